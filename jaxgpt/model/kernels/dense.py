"""Attention with all weights in memory: the reference, and the fastest for short rows."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import ScoreMod
from jaxgpt.model.layers import ATTENTION_LOGITS, ATTENTION_OUTPUT
from jaxgpt.model.masks import Coords
from jaxgpt.model.products import einsum_float32


def dense(q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod) -> jax.Array:
    """Compute softmax(q kᵀ / √K) v with the whole [T S] matrix in memory. Returns [B T H K].

    A query without visible keys gets the average of all values.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    logits = compute_logits(q, k, q_coords, k_coords, score_mod)
    return apply_weights(score_mod.compute_weights(logits), v)


# Heads before tokens, so that each product is one plain matrix per head: an einsum on [B T H K]
# takes twice as long in the forward pass on CPU.


def compute_logits(q, k, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod) -> jax.Array:
    """Compute the masked attention logits of q [B T H K], k [B S G K]: float32 [B G M T S]."""
    (B, T, H, K), G = q.shape, k.shape[2]
    q = (
        score_mod.scale_queries(q).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    )  # [B G M T K]
    k = k.transpose(0, 2, 1, 3)  # [B G S K]
    logits = checkpoint_name(einsum_float32("BGMTK,BGSK->BGMTS", q, k), ATTENTION_LOGITS)
    return score_mod(logits, q_coords, k_coords)


def apply_weights(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Average values v [B S G K] by weights [B G M T S]: [B T H K]."""
    B, G, M, T, _ = weights.shape
    v = v.transpose(0, 2, 1, 3)  # [B G S K]
    weights = weights.astype(v.dtype)
    out = checkpoint_name(jnp.einsum("BGMTS,BGSK->BGMTK", weights, v), ATTENTION_OUTPUT)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, G * M, -1)
