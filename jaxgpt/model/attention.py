"""Attention: projections around a kernel, and the cache of keys and values."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.tree_util import Partial

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import Score, attend
from jaxgpt.model.layers import Linear, into_residual
from jaxgpt.model.masks import Coords
from jaxgpt.sharding import constrain


class KV(NamedTuple):
    """Keys and values of one layer, or of all layers with a leading L."""

    k: jax.Array  # [B S G K]
    v: jax.Array  # [B S G K]


class Sight(NamedTuple):
    """What every layer of a stack is told, and no layer changes."""

    q_at: Coords
    k_at: Coords
    rotate: Partial | None
    bias: Partial | None
    cursor: jax.Array | None  # the next free slot of the cache, the same for every row


def write(old, new, cursor: jax.Array):
    """Writes new entries [B T ...] into old ones [B S ...] from slot `cursor` on, leaf by leaf."""

    def put(o, n):
        return jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), cursor, axis=1)

    return jax.tree.map(put, old, new)


class Attention(nn.Module):
    """Multi-head attention of x [B T D] to itself and to the cache, if there is one."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, score: Score, sight: Sight, kv: KV | None):
        """Returns (out [B T D], the cache with the new keys and values written)."""
        c = self.cfg
        q = Linear(c, "D>HK", name="q")(x)
        k = Linear(c, "D>GK", name="k")(x)
        v = Linear(c, "D>GK", name="v")(x)
        if sight.rotate is not None:
            q, k = (sight.rotate(y, sight.q_at.position) for y in (q, k))
        if kv is not None and sight.cursor is not None:
            k, v = kv = write(kv, KV(k, v), sight.cursor)
        q, k, v = constrain(q, "BTHK"), constrain(k, "BSGK"), constrain(v, "BSGK")
        out = attend(c.kernel, q, k, v, sight.q_at, sight.k_at, score)
        return Linear(c, "HK>D", into_residual(c), name="o")(out), kv
