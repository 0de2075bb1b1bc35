"""Attention: projections around a kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import Score, attend
from jaxgpt.model.layers import DTYPES, Linear, into_residual
from jaxgpt.model.masks import SameDocument, layer_mask
from jaxgpt.model.mixers.mixer import KV, Mixer, Sight, recall
from jaxgpt.model.norms import NORMS
from jaxgpt.sharding import constrain


class Attention(Mixer):
    """Multi-head attention of x to itself and to the tokens in the cache."""

    USES = ("rotation", "bias", "pattern", "softcap", "qk_norm")
    DIVIDES_ROWS = True

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        shape = (batch, cfg.sizes["G"], slots, cfg.sizes["K"])
        return KV(*(jnp.zeros(shape, DTYPES[cfg.dtype]) for _ in KV._fields))

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: KV | None):
        c = self.cfg
        q = Linear(c, "D>HK", name="q")(x)
        k = Linear(c, "D>GK", name="k")(x)
        v = Linear(c, "D>GK", name="v")(x)
        if c.qk_norm:
            q = NORMS[c.norm](c, "K", name="q_norm")(q)
            k = NORMS[c.norm](c, "K", name="k_norm")(k)
        q, k = sight.rotated(q), sight.rotated(k)
        if state is not None:
            (k, v), state = recall(state, KV(k, v), sight.cursor)
        mask = layer_mask(c, self.pattern, self.direction)
        score = Score(mask, sight.bias, c.attention_scale, c.softcap, is_self=state is None)
        q, k, v = constrain(q, "BTHK"), constrain(k, "BTGK"), constrain(v, "BTGK")

        def attended(q, k, v):
            return attend(c.kernel, q, k, v, sight.q_at, sight.k_at, score)

        return Linear(c, "HK>D", into_residual(c), name="o")(q, k, v, of=attended), state


class CrossAttention(nn.Module):
    """Attention of x [B T D] to what the encoder made of the source, `sight.memory` [B S D].

    The keys and values of the source are made once: where there is no memory, `state` has them.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: KV | None):
        c = self.cfg
        q = Linear(c, "D>HK", name="q")(x)
        if sight.memory is not None:
            k = Linear(c, "D>GK", name="k")(sight.memory)
            v = Linear(c, "D>GK", name="v")(sight.memory)
            kept = KV(k, v).turned()
            state = state and KV(*(x.astype(old.dtype) for x, old in zip(kept, state, strict=True)))
        else:
            assert state is not None, "without a memory there is a state that has read it"
            k, v = state.turned()
        assert sight.memory_at is not None
        score = Score(SameDocument(), scale=c.attention_scale)
        q, k, v = constrain(q, "BTHK"), constrain(k, "BTGK"), constrain(v, "BTGK")

        def attended(q, k, v):
            return attend(c.kernel, q, k, v, sight.q_at, sight.memory_at, score)

        return Linear(c, "HK>D", into_residual(c), name="o")(q, k, v, of=attended), state
