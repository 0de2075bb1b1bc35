"""What a model is trained to predict, and the loss over the vocabulary.

The scores of all tokens for all words, float32 [N V], are the largest array of a training step
(GPT-2 at 64 x 1024: 13 GB), so no function here makes it whole. `vocabulary_loss` goes through the
tokens in chunks, and takes the gradient of a chunk while its scores are at hand: one pass of three
products, where recomputing the scores in the backward pass would need four.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgpt.config import TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.model import Coords, unembedding
from jaxgpt.sharding import constrain

# Scores per chunk, in numbers. On CPU a chunk should stay near the cache: for [4096 384] x [8192],
# loss and gradient take 462 ms at 2**22 and 553 ms at 2**25. Accelerators want larger products.
CHUNK_SCORES = {"cpu": 2**22}
CHUNK_SCORES_ELSEWHERE = 2**28


class Sums(NamedTuple):
    """Sums over tokens, float32 [] each, so that parts of a batch can simply be added."""

    loss: jax.Array  # what is minimised: nats, with smoothing and z-loss
    nats: jax.Array  # plain negative log-likelihood, nats
    weight: jax.Array  # tokens that count
    correct: jax.Array  # of these, tokens whose likeliest guess was right


def score_chunk(hidden, table, targets, weights, smoothing: float, z_loss: float):
    """The loss of a few tokens, written out plainly.

    Args:
        hidden: [N D] in the compute dtype.
        table: [V D] float32, cast here so that its gradient is summed over chunks in float32.
        targets: int32 [N]. weights: float32 [N].
        smoothing: share of the target spread evenly over the vocabulary.
        z_loss: weight of log(Z)², which keeps the scores from drifting.

    Returns:
        (loss [], Sums).

    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7; z-loss, Chowdhery
    et al. 2022, arXiv:2204.02311, section 5.
    """
    chex.assert_rank([hidden, table], 2)
    chex.assert_shape([targets, weights], hidden.shape[:1])
    table = table.astype(hidden.dtype)
    scores = jnp.einsum("ND,VD->NV", hidden, table, preferred_element_type=jnp.float32)
    scores = constrain(scores, "NV")
    log_z = jax.nn.logsumexp(scores, axis=-1)
    hit = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    nats = log_z - hit
    loss = nats
    if smoothing:
        loss = (1 - smoothing) * nats + smoothing * (log_z - jnp.mean(scores, axis=-1))
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    # A target that nothing beats is the guess: one comparison in place of an argmax over V.
    correct = hit >= jnp.max(scores, axis=-1)
    total = jnp.sum(weights * loss)
    return total, Sums(total, jnp.sum(weights * nats), jnp.sum(weights), jnp.sum(weights * correct))


def vocabulary_loss(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy over the vocabulary, in chunks of tokens.

    Args:
        hidden: [B T D] in the compute dtype.
        table: [V D].
        targets: int32 [B T]. weights: float32 [B T], 0 where a token does not count.
        smoothing, z_loss: see `score_chunk`.
        chunk: tokens per chunk; 0 chooses by size. The outcome does not depend on it.

    Returns:
        (loss [], differentiable in hidden and table; Sums, not differentiable).
    """
    B, T, D = hidden.shape
    chex.assert_rank(table, 2)
    chex.assert_axis_dimension(table, 1, D)
    chex.assert_shape([targets, weights], (B, T))
    scores = CHUNK_SCORES.get(jax.default_backend(), CHUNK_SCORES_ELSEWHERE)
    pieces = _pieces(T, B, chunk or max(1, scores // table.shape[0]))

    def cut(x):  # [B T ...] -> [pieces N/pieces ...]; cut along T, since B is spread over devices
        x = x.reshape(B, pieces, T // pieces, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(pieces, -1, *x.shape[3:])

    table = constrain(table, "V.")
    loss = functools.partial(score_chunk, smoothing=smoothing, z_loss=z_loss)
    return _chunked(loss, cut(hidden), table, cut(targets), cut(weights))


def _pieces(T: int, B: int, chunk: int) -> int:
    """The fewest equal pieces of T with at most `chunk` tokens each (one column at least)."""
    fits = (p for p in range(1, T + 1) if T % p == 0 and B * (T // p) <= chunk)
    return next(fits, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(loss: Callable, hidden, table, targets, weights):
    """Sums `loss` over the leading axis of hidden [P N D], targets [P N] and weights [P N]."""

    def add(sums, part):
        h, t, w = part
        _, more = loss(h, table, t, w)
        return jax.tree.map(jnp.add, sums, more), None

    sums, _ = jax.lax.scan(add, _zeros(), (hidden, targets, weights))
    return sums.loss, sums


def _chunked_forward(loss, hidden, table, targets, weights):
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def add(carry, part):
        sums, d_table = carry
        h, t, w = part
        (_, more), (d_h, d_t) = gradient(h, table, t, w)
        return (jax.tree.map(jnp.add, sums, more), d_table + d_t), d_h

    carry = (_zeros(), jnp.zeros_like(table))
    (sums, d_table), d_hidden = jax.lax.scan(add, carry, (hidden, targets, weights))
    return (sums.loss, sums), (d_hidden, d_table)


def _chunked_backward(loss, saved, cotangents):
    scale = cotangents[0]
    d_hidden, d_table = (g * scale.astype(g.dtype) for g in saved)
    return d_hidden, d_table, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _zeros() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))


# --- objectives: (model, params, batch, rngs, cfg) -> (loss, Sums) ---------------------------


def causal(model, params, batch: Batch, rngs, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Every token predicts the next one of its document.

    Args:
        batch: arrays [B T]; `weights` says which targets count.
        rngs: {"dropout": key} to train with dropout, {} without.

    Returns:
        (summed loss [], Sums). Divide by `Sums.weight` for the mean.
    """
    chex.assert_rank(batch.tokens, 2)
    chex.assert_equal_shape(batch)
    tokens, targets, positions, segments, weights = map(jnp.asarray, batch)
    hidden, _ = model.apply({"params": params}, tokens, Coords(positions, segments), rngs=rngs)
    return vocabulary_loss(
        hidden,
        unembedding(params),
        targets,
        weights,
        smoothing=cfg.label_smoothing,
        z_loss=cfg.z_loss,
        chunk=cfg.loss_chunk,
    )


OBJECTIVES = {"causal": causal}
