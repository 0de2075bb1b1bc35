"""What an encoder says of a text: the words behind its masks, or its class.

`ask` is the one way to use a model of any objective: it gives the question to the function that
belongs to it, here or in `generate`, and streams the answer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.generate import MASK, bucket, drawable, framed, generate, questions, with_masks
from jaxgpt.hosts import fetch
from jaxgpt.model import Coords, build, logits
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

FEW = 5  # answers shown for a mask, unless sample.top_k says how many


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def _read(cfg: ModelConfig, params, tokens, lengths, method: str):
    """tokens int32 [B T] from the left, lengths [B] -> what the method gives."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    at = Coords(position, (position < lengths[:, None]).astype(jnp.int32))
    return build(cfg).apply({"params": params}, tokens, at, method=method)


def _rows(cfg: ModelConfig, tokenizer: Tokenizer, texts: Sequence[np.ndarray]):
    """Texts of tokens -> (int32 [B T], lengths [B]); see `framed`."""
    read = [framed(cfg, tokenizer, text) for text in texts]
    lengths = np.array([len(ids) for ids in read], np.int32)
    rows = np.full((len(read), min(bucket(lengths.max()), cfg.context)), tokenizer.pad, np.int32)
    for row, ids in zip(rows, read, strict=True):
        row[: len(ids)] = ids
    return rows, lengths


def fill(config: Config, params, tokenizer: Tokenizer, prompts, labels) -> list[str]:
    """Of each prompt, the likeliest words for every `<mask>` in it, and their probabilities."""
    cfg, mask = config.model, config.model.vocab - 1
    tokens, lengths = _masked(config, tokenizer, prompts)
    hidden, _ = _read(cfg, params, tokens, lengths, "__call__")
    few = config.sample.top_k or FEW
    allowed = drawable(tokenizer, cfg.vocab) & (np.arange(cfg.vocab) != tokenizer.eos)
    answers = []
    for row, states in zip(tokens, fetch(hidden), strict=True):
        scores = fetch(logits(cfg, params, states[np.flatnonzero(row == mask)]))
        odds = np.asarray(jax.nn.softmax(np.where(allowed, scores, -np.inf)))
        answers.append("\n".join(_best(tokenizer, row_odds, few) for row_odds in odds))
    return answers


def _masked(config: Config, tokenizer: Tokenizer, prompts):
    mask = config.model.vocab - 1
    for prompt in prompts:
        if MASK not in prompt:
            raise ConfigError(f"the prompt {prompt!r} has no {MASK} to fill.")
    texts = [with_masks(tokenizer, prompt, lambda i: mask) for prompt in prompts]
    return _rows(config.model, tokenizer, texts)


def _best(tokenizer: Tokenizer, odds: np.ndarray, few: int) -> str:
    best = np.argsort(-odds)[:few].tolist()
    return f"{MASK}  " + "  ".join(f"{tokenizer.decode([i])!r} {odds[i]:.1%}" for i in best)


def classify(config: Config, params, tokenizer: Tokenizer, prompts, labels) -> list[str]:
    """Of each prompt, its likeliest classes and their probabilities."""
    tokens, lengths = _whole(config, tokenizer, prompts)
    odds = fetch(jax.nn.softmax(_read(config.model, params, tokens, lengths, "classify")))
    few = config.sample.top_k or FEW
    return [
        "  ".join(f"{labels[i]} {row[i]:.1%}" for i in np.argsort(-row)[:few].tolist())
        for row in odds
    ]


def _whole(config: Config, tokenizer: Tokenizer, prompts):
    return _rows(config.model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts])


ANSWERS: dict[str, Callable] = {"masked": fill, "classify": classify}  # others are written
QUESTIONS: dict[str, Callable] = {"masked": _masked, "classify": _whole}


def check(config: Config, tokenizer: Tokenizer, prompts: Sequence[str]):
    """Refuses what `ask` would refuse, without a model.

    Raises:
        ConfigError: a prompt does not suit the objective, or is too long.
    """
    masks = config.objective.task.reserved(config)
    written = functools.partial(questions, masks=masks)
    QUESTIONS.get(config.train.objective, written)(config, tokenizer, prompts)


def ask(
    config: Config, params, tokenizer: Tokenizer, prompts: Sequence[str], labels: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Puts prompts to a model, as its objective wants them.

    Args:
        config: of the run; `config.sample` says how to draw.
        labels: names of the classes, of a model that classifies.

    Yields:
        The new piece of each answer.

    Raises:
        ConfigError: a prompt does not suit the objective.
    """
    if config.train.objective in ANSWERS:
        yield ANSWERS[config.train.objective](config, params, tokenizer, prompts, labels)
    else:
        masks = config.objective.task.reserved(config)
        yield from generate(config.model, params, tokenizer, prompts, config.sample, masks)
