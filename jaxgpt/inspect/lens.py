"""What the model would answer after each layer, and what it answers: logit lens, token losses."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.inspect.activations import (
    Activations,
    EncodedText,
    capture,
    has_vocab_scores,
    in_float32,
    spell_tokens,
)
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import build, compute_logits
from jaxgpt.model.block import WIRINGS_WITHOUT_FINAL_NORM
from jaxgpt.model.norms import NORMS
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of

LENS_SITES = ("embedding", "layers.*.residual_post")


@dataclass(frozen=True)
class Lens:
    """The distribution over the vocabulary after the embedding and after each layer.

    Attributes:
        text: the tokens.
        names: "embedding", "layers.0", ...: L + 1 rows.
        top: int32 [L+1 T C], the likeliest tokens. top_pieces: what they spell.
        probs: float32 [L+1 T C], their probabilities.
        entropy: float32 [L+1 T], nats.
        kl: float32 [L+1 T], nats: KL(last layer || this one); 0 in the last row.
        target_logprobs: float32 [L+1 T-1], of the token that follows.
    """

    text: EncodedText
    names: tuple[str, ...]
    top: np.ndarray
    top_pieces: tuple[tuple[tuple[str, ...], ...], ...]
    probs: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    target_logprobs: np.ndarray


def finish(cfg: ModelConfig, params, residual: jax.Array) -> jax.Array:
    """Return the logits, float32 [B T V], of a residual stream [B T D] taken for the last one."""
    if cfg.wiring not in WIRINGS_WITHOUT_FINAL_NORM:
        norm: Any = NORMS[cfg.norm](cfg)
        residual = norm.apply({"params": params["stack"]["norm"]}, residual)
    tokens = jnp.zeros(residual.shape[:2], jnp.int32)
    hidden = build(cfg).apply({"params": params}, tokens, residual, method="transform_hidden")
    return compute_logits(cfg, params, hidden)


@partial(jax.jit, static_argnums=(0, 1))
def _look_through(cfg: ModelConfig, count: int, params, residual, last, targets):
    """Return (top, probs, entropy, kl, target_logprobs) of one layer, and its log-probabilities."""
    logp = jax.nn.log_softmax(finish(cfg, params, residual), axis=-1)[0]  # [T V]
    last = logp if last is None else last
    p = jnp.exp(logp)
    probs, top = jax.lax.top_k(p, count)
    kl = jnp.sum(jnp.exp(last) * (last - logp), axis=-1)
    hit = jnp.take_along_axis(logp[:-1], targets[1:, None], axis=-1)[:, 0]
    return (top, probs, -jnp.sum(p * logp, axis=-1), kl, hit), logp


def logit_lens(
    model: LanguageModel, text: str | EncodedText, *, source: str | None = None, count: int = 5
) -> Lens:
    """Return the logit lens: the output head applied to the residual stream after every layer.

    Args:
        count: how many of the likeliest tokens to return.

    Raises:
        ConfigError: the model does not score the vocabulary; see `encode`.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    require_vocab_scores(model)
    return apply_lens(model, capture(model, text, LENS_SITES, source=source), count)


def apply_lens(model: LanguageModel, found: Activations, count: int = 5) -> Lens:
    """Return the logit lens of a capture that has LENS_SITES; see `logit_lens`."""
    model, text = in_float32(model), found.text
    cfg = model.config.model
    streams = [found["embedding"], *found.stack("residual_post")]
    count, targets = min(count, cfg.vocab), jnp.asarray(text.tokens)
    rows, last = [], None
    with use_mesh_of(model.params):
        for stream in reversed(streams):
            row, logp = _look_through(
                cfg, count, model.params, jnp.asarray(stream)[None], last, targets
            )
            last = logp if last is None else last
            rows.append(fetch(row))
    top, probs, entropy, kl, hits = (np.stack(x) for x in zip(*reversed(rows), strict=True))
    names = ("embedding", *(f"layers.{n}" for n in range(len(streams) - 1)))
    pieces = tuple(tuple(spell_tokens(model, row) for row in layer) for layer in top)
    return Lens(text, names, top, pieces, probs, entropy, kl, hits)


def require_vocab_scores(model: LanguageModel):
    """Raise ConfigError if the model is a classifier, which scores no tokens."""
    if not has_vocab_scores(model):
        raise ConfigError(
            "a classifier (train.objective='classify') scores classes and not tokens: "
            "this needs a model that scores the vocabulary."
        )


def require_next_tokens(model: LanguageModel):
    """Raise ConfigError if the tokens of a text have no loss given those before them."""
    require_vocab_scores(model)
    if model.config.model.family == "encoder":
        raise ConfigError("an encoder reads a text from both sides: its tokens have no loss.")


@dataclass(frozen=True)
class NextToken:
    """A token that may come next."""

    token: int
    piece: str
    probability: float


def next_tokens(
    model: LanguageModel, text: str | EncodedText, count: int = 10, *, source: str | None = None
) -> list[NextToken]:
    """Return the likeliest tokens after a text, in the model's own distribution.

    Raises:
        ConfigError: the model does not predict a next token; see `encode`.
    """
    require_vocab_scores(model)
    if model.config.model.family == "encoder":
        raise ConfigError("an encoder fills masks, it predicts no next token: use `fill`.")
    logits = capture(model, text, [], source=source).logits[-1].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    best = np.argsort(-p, kind="stable")[:count]
    return [NextToken(int(t), piece, float(p[t]))
            for t, piece in zip(best, spell_tokens(model, best), strict=True)]  # fmt: skip


def token_losses(
    model: LanguageModel, text: str | EncodedText, *, source: str | None = None
) -> np.ndarray:
    """Return -log p of each token given those before it, float32 [T]; NaN for the first, bos.

    Raises:
        ConfigError: the model does not predict a next token; see `encode`.
    """
    require_next_tokens(model)
    found = capture(model, text, [], source=source)
    logp = np.asarray(jax.nn.log_softmax(found.logits[:-1], axis=-1))
    losses = np.full(len(found.tokens), np.nan, np.float32)
    losses[1:] = -np.take_along_axis(logp, found.tokens[1:, None], axis=-1)[:, 0]
    return losses
