"""Predictions of an encoder: the tokens at the masks of a text, or its class."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.engine import check_scores
from jaxgpt.generate import (
    MASK,
    add_bos_eos,
    encode_prompts,
    encode_with_masks,
    name_text,
)
from jaxgpt.hosts import fetch
from jaxgpt.model import build, compute_logits
from jaxgpt.model.layers import check_token_ids
from jaxgpt.prompts import shorten
from jaxgpt.sampling import sampleable_tokens
from jaxgpt.score import BATCH_TOKENS, make_batches, make_coords, pad_right
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import Tokenizer

DEFAULT_CANDIDATES = 5


@dataclass(frozen=True)
class Candidate:
    """A token that may stand at a mask."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class FilledMask:
    """The likeliest tokens at one mask of a text, the likeliest first."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Classification:
    """The class of a text."""

    label: str  # the likeliest
    probabilities: dict[str, float]  # of every label, the likeliest first


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg",))
def compute_mask_probabilities(cfg: ModelConfig, params, tokens, lengths, masks, allowed):
    """Return the distribution of the tokens at the masks.

    Args:
        tokens: int32 [B T], right-padded. lengths: int32 [B].
        masks: int32 [B M], where the masks are in a row, padded by any number.
        allowed: bool [V], tokens of the distribution.

    Returns:
        float32 [B M V].
    """
    coords = make_coords(tokens, lengths)
    hidden, _ = build(cfg).apply({"params": params}, tokens, coords)
    scores = compute_logits(cfg, params, jnp.take_along_axis(hidden, masks[..., None], axis=1))
    return jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg",))
def compute_class_probabilities(cfg: ModelConfig, params, tokens, lengths):
    """Return the distribution over classes, float32 [B A], of right-padded texts, int32 [B T]."""
    coords = make_coords(tokens, lengths)
    scores = build(cfg).apply({"params": params}, tokens, coords, method="classify")
    return jax.nn.softmax(scores, axis=-1)


def fill(
    config: Config,
    params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    count: int = DEFAULT_CANDIDATES,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[FilledMask]]:
    """Return the likeliest tokens at every `<mask>` of texts, with a masked-word encoder.

    Args:
        count: candidates for each mask.
        batch_tokens: tokens of a batch.

    Returns:
        For each text, its masks in order.

    Raises:
        ConfigError: a text has no mask, or does not fit the context.
    """
    cfg, rows = config.model, _encode_masked(config, tokenizer, texts)
    places = [np.flatnonzero(np.array(row) == cfg.first_mask).tolist() for row in rows]
    allowed = sampleable_tokens(tokenizer, cfg.vocab)
    allowed[list(tokenizer.ends)] = False
    found: dict[int, list[FilledMask]] = {}
    for numbers, shape in make_batches([len(row) for row in rows], cfg.context, batch_tokens):
        M = 2 ** (max(len(places[n]) for n in numbers) - 1).bit_length()  # few sizes
        masks, _ = pad_right([places[n] for n in numbers], (shape[0], M))
        tokens, lengths = pad_right([rows[n] for n in numbers], shape)
        with use_mesh_of(params):
            probs = fetch(compute_mask_probabilities(cfg, params, tokens, lengths, masks, allowed))
        check_scores(probs[: len(numbers)])
        for n, row in zip(numbers, probs, strict=False):  # the batch may end in empty rows
            found[n] = [_find_best(tokenizer, p, count) for p in row[: len(places[n])]]
    return [found[n] for n in range(len(rows))]


def _find_best(tokenizer: Tokenizer, probs: np.ndarray, count: int) -> FilledMask:
    best = np.argsort(-probs)[:count].tolist()
    return FilledMask(tuple(Candidate(i, tokenizer.decode([i]), float(probs[i])) for i in best))


def classify(
    config: Config,
    params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> list[Classification]:
    """Return the classes of texts; of one longer than the context its beginning, as in training.

    Args:
        labels: names of the classes; without them, they are named by number.
        batch_tokens: tokens of a batch.
    """
    cfg, rows = config.model, _encode_texts(config, tokenizer, texts)
    names = labels or [str(n) for n in range(cfg.classes)]
    found: dict[int, Classification] = {}
    for numbers, shape in make_batches([len(row) for row in rows], cfg.context, batch_tokens):
        tokens, lengths = pad_right([rows[n] for n in numbers], shape)
        with use_mesh_of(params):
            probs = fetch(compute_class_probabilities(cfg, params, tokens, lengths))
        check_scores(probs[: len(numbers)])
        for n, row in zip(numbers, probs, strict=False):  # the batch may end in empty rows
            order = np.argsort(-row).tolist()
            found[n] = Classification(names[order[0]], {names[i]: float(row[i]) for i in order})
    return [found[n] for n in range(len(rows))]


def _encode_masked(config: Config, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    mask, rows = config.model.first_mask, []
    for number, text in enumerate(texts):
        with name_text(texts, number):
            if MASK not in text:
                raise ConfigError(f"the prompt {shorten(text)} has no {MASK} to fill.")
            ids = encode_with_masks(tokenizer, text, lambda i: mask)
            rows.append(add_bos_eos(config.model, tokenizer, ids))
    return rows


def _encode_texts(config: Config, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of texts, cut as `data.tasks.TextRows` cuts them."""
    encoded = tokenizer.encode_batch(texts)
    return [add_bos_eos(config.model, tokenizer, ids, is_cut=True) for ids in encoded]


ENCODERS: dict[str, Callable] = {"masked": _encode_masked, "classify": _encode_texts}


def check_prompts(config: Config, tokenizer: Tokenizer, prompts: Sequence[str]):
    """Check the prompts of `config.sample` without a model.

    Raises:
        ConfigError: a prompt does not fit the objective, or is too long.
    """
    if config.train.objective in ENCODERS:
        ENCODERS[config.train.objective](config, tokenizer, prompts)
    else:
        encode_prompts(config, tokenizer, prompts, [config.sample] * len(prompts))
