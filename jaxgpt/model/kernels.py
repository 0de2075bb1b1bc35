"""Attention kernels: the same mathematics, computed in different ways.

    q: [B T H K]   queries; M = H / G of them share a key
    k: [B S G K]   keys: G = H is MHA, G = 1 is MQA, between is GQA
    v: [B S G K]   values

`dense` is the truth: the others must equal it.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from jaxgpt.model.masks import Coords, Mask

# Finite, so that a row that sees nothing (padding) gives a harmless average instead of NaN.
NEVER = -1e30


@struct.dataclass
class Score:
    """What happens to the raw logits q·k before the softmax: bias, then mask."""

    mask: Mask = struct.field(pytree_node=False)
    bias: Partial | None = None  # (q at, k at) -> [B H T S], a pytree so that it may hold weights

    def __call__(self, logits: jax.Array, q_at: Coords, k_at: Coords) -> jax.Array:
        """logits: float32 [B G M T S]."""
        if self.bias is not None:
            logits = logits + self.bias(q_at, k_at).reshape(-1, *logits.shape[1:])
        return jnp.where(self.mask(q_at, k_at)[:, None, None], logits, NEVER)


Kernel = Callable[[jax.Array, jax.Array, jax.Array, Coords, Coords, Score], jax.Array]


def dense(q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """softmax(q kᵀ / √K) v with the whole [T S] matrix in memory. Returns [B T H K].

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    q = (q * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # [B G M T K]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B G S K]
    # Heads before tokens, so that each product is one plain matrix per head: with the einsum on
    # [B T H K] the forward pass takes twice as long on CPU.
    logits = jnp.einsum("BGMTK,BGSK->BGMTS", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(score(logits, q_at, k_at), axis=-1).astype(v.dtype)
    out = jnp.einsum("BGMTS,BGSK->BGMTK", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def attend(name: str, q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """Runs the kernel called `name`. Arrays as above; returns [B T H K]."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    chex.assert_shape([k, v], (B, S, G, K))
    chex.assert_is_divisible(H, G)
    chex.assert_shape([q_at.position, q_at.document], (B, T))
    chex.assert_shape([k_at.position, k_at.document], (B, S))
    return KERNELS[name](q, k, v, q_at, k_at, score)


KERNELS: dict[str, Kernel] = {"dense": dense}
