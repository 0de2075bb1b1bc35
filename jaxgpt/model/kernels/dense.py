"""Attention with all weights in memory at once: the truth, and the fastest for short rows."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import Score
from jaxgpt.model.layers import ATTENDED, LOGITS, wide_product
from jaxgpt.model.masks import Coords


def dense(q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """softmax(q kᵀ / √K) v with the whole [T S] matrix in memory. Returns [B T H K].

    A query that sees nothing gets the average of all values.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    q = score.queries(q).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # [B G M T K]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B G S K]
    # Heads before tokens, so that each product is one plain matrix per head: with the einsum on
    # [B T H K] the forward pass takes twice as long on CPU.
    logits = checkpoint_name(wide_product("BGMTK,BGSK->BGMTS", q, k), LOGITS)
    weights = jax.nn.softmax(score(logits, q_at, k_at), axis=-1).astype(v.dtype)
    out = checkpoint_name(jnp.einsum("BGMTS,BGSK->BGMTK", weights, v), ATTENDED)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
