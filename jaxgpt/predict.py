"""Predictions of an encoder: the tokens at the masks of a text, or its class.

`predict` is the one entry point for a model of any objective: it dispatches the prompts to the
function for the objective, here or in `generate`, and streams the output.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.generate import (
    MASK,
    add_bos_eos,
    encode_prompts,
    encode_with_masks,
    generate,
    round_up_to_bucket,
    sampleable_tokens,
)
from jaxgpt.hosts import fetch
from jaxgpt.model import Coords, build, compute_logits
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

DEFAULT_ANSWERS = 5  # answers shown for a mask or a text, unless sample.top_k is set


@functools.partial(jax.jit, static_argnames=("cfg", "method"))
def _apply_encoder(cfg: ModelConfig, params, tokens, lengths, method: str):
    """Apply a method of the model to right-padded tokens, int32 [B T], of lengths [B]."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    coords = Coords(position, (position < lengths[:, None]).astype(jnp.int32))
    return build(cfg).apply({"params": params}, tokens, coords, method=method)


def _encode_rows(cfg: ModelConfig, tokenizer: Tokenizer, texts: Sequence[np.ndarray]):
    """Return right-padded rows, int32 [B T], and their lengths [B]; see `add_bos_eos`."""
    encoded = [add_bos_eos(cfg, tokenizer, text) for text in texts]
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    rows = np.full(
        (len(encoded), min(round_up_to_bucket(lengths.max()), cfg.context)), tokenizer.pad, np.int32
    )
    for row, ids in zip(rows, encoded, strict=True):
        row[: len(ids)] = ids
    return rows, lengths


def fill_masks(config: Config, params, tokenizer: Tokenizer, prompts, labels) -> list[str]:
    """Return, for each prompt, the likeliest tokens of every `<mask>` and their probabilities."""
    cfg, mask = config.model, config.model.vocab - 1
    tokens, lengths = _encode_masked(config, tokenizer, prompts)
    hidden, _ = _apply_encoder(cfg, params, tokens, lengths, "__call__")
    n_answers = config.sample.top_k or DEFAULT_ANSWERS
    allowed = sampleable_tokens(tokenizer, cfg.vocab) & (np.arange(cfg.vocab) != tokenizer.eos)
    answers = []
    for row, states in zip(tokens, fetch(hidden), strict=True):
        scores = fetch(compute_logits(cfg, params, states[np.flatnonzero(row == mask)]))
        probs = np.asarray(jax.nn.softmax(np.where(allowed, scores, -np.inf)))
        answers.append(
            "\n".join(_format_best(tokenizer, row_probs, n_answers) for row_probs in probs)
        )
    return answers


def _encode_masked(config: Config, tokenizer: Tokenizer, prompts):
    mask = config.model.vocab - 1
    for prompt in prompts:
        if MASK not in prompt:
            raise ConfigError(f"the prompt {prompt!r} has no {MASK} to fill.")
    texts = [encode_with_masks(tokenizer, prompt, lambda i: mask) for prompt in prompts]
    return _encode_rows(config.model, tokenizer, texts)


def _format_best(tokenizer: Tokenizer, probs: np.ndarray, n_answers: int) -> str:
    best = np.argsort(-probs)[:n_answers].tolist()
    return f"{MASK}  " + "  ".join(f"{tokenizer.decode([i])!r} {probs[i]:.1%}" for i in best)


def classify(config: Config, params, tokenizer: Tokenizer, prompts, labels) -> list[str]:
    """Return, for each prompt, its likeliest classes and their probabilities."""
    tokens, lengths = _encode_texts(config, tokenizer, prompts)
    probs = fetch(jax.nn.softmax(_apply_encoder(config.model, params, tokens, lengths, "classify")))
    n_answers = config.sample.top_k or DEFAULT_ANSWERS
    return [
        "  ".join(f"{labels[i]} {row[i]:.1%}" for i in np.argsort(-row)[:n_answers].tolist())
        for row in probs
    ]


def _encode_texts(config: Config, tokenizer: Tokenizer, prompts):
    return _encode_rows(config.model, tokenizer, [tokenizer.encode(prompt) for prompt in prompts])


PREDICTORS: dict[str, Callable] = {"masked": fill_masks, "classify": classify}  # others generate
PROMPT_ENCODERS: dict[str, Callable] = {"masked": _encode_masked, "classify": _encode_texts}


def check_prompts(config: Config, tokenizer: Tokenizer, prompts: Sequence[str]):
    """Check prompts as `predict` does, without a model.

    Raises:
        ConfigError: a prompt does not fit the objective, or is too long.
    """
    masks = config.objective.task.count_mask_tokens(config)
    encode_generic = functools.partial(encode_prompts, masks=masks)
    PROMPT_ENCODERS.get(config.train.objective, encode_generic)(config, tokenizer, prompts)


def predict(
    config: Config, params, tokenizer: Tokenizer, prompts: Sequence[str], labels: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Predict from prompts, in the way of the model's objective.

    Args:
        config: of the run; `config.sample` has the sampling settings.
        labels: names of the classes, for a classifier.

    Yields:
        The new piece of each output.

    Raises:
        ConfigError: a prompt does not fit the objective.
    """
    if config.train.objective in PREDICTORS:
        yield PREDICTORS[config.train.objective](config, params, tokenizer, prompts, labels)
    else:
        masks = config.objective.task.count_mask_tokens(config)
        yield from generate(config.model, params, tokenizer, prompts, config.sample, masks)
