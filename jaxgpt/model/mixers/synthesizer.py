"""Synthesizer: attention whose weights are not products of queries and keys.

A query's scores of the C positions of a context come from itself alone (dense), W2 relu(W1 x), or
are learned as they are (random): what stands at those positions has no say in them.

    y_t = Σ_s softmax_s(score_t[position of s]) v_s
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import DTYPES, Linear, into_residual, normal
from jaxgpt.model.masks import Coords, layer_mask
from jaxgpt.model.mixers.mixer import Mixer, Sight, write


class Synthesizer(Mixer):
    """What both have: a softmax of `scores` over what the mask allows.

    Positions from C on have no score: nobody sees them.
    """

    USES = ("pattern",)

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> jax.Array:
        shape = (batch, slots, cfg.sizes["G"], cfg.sizes["K"])
        return jnp.zeros(shape, DTYPES[cfg.dtype])  # the values

    def scores(self, x: jax.Array, q: Coords, k: Coords) -> jax.Array:
        """x [B T D], coordinates [B T] and [B S] -> float32 [B H T S]."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: jax.Array | None):
        c, (B, T, _) = self.cfg, x.shape
        v = Linear(c, "D>GK", name="v")(x)
        if state is not None:
            v = state = write(state, v, sight.cursor)
        mask = layer_mask(c, self.pattern, self.direction)(sight.q_at, sight.k_at)
        mask &= (sight.k_at.position < c.context)[:, None]
        scores = jnp.where(mask[:, None], self.scores(x, sight.q_at, sight.k_at), NEVER)
        G, S = v.shape[2], v.shape[1]
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, G, -1, T, S)
        y = jnp.einsum("bgmts,bsgk->btgmk", weights, v).reshape(B, T, c.heads, -1)
        return Linear(c, "HK>D", into_residual(c), name="o")(y), state


class DenseSynthesizer(Synthesizer):
    """Every token computes the scores of all positions.

    Source: Tay et al. 2021, arXiv:2005.00743, section 3.1.
    """

    def scores(self, x, q, k):
        hidden = jax.nn.relu(Linear(self.cfg, "D>HK", name="q")(x))
        table = weight(self, "scores", "HK>C", self.cfg.sizes, normal).astype(x.dtype)
        B, T, H, K = hidden.shape
        hidden = hidden.reshape(B * T, H, K).swapaxes(0, 1)
        scores = jnp.matmul(hidden, table, preferred_element_type=jnp.float32)  # [H B·T C]
        scores = scores.reshape(H, B, T, -1).swapaxes(0, 1)
        return jnp.take_along_axis(scores, k.position[:, None, None], axis=-1, mode="clip")


class RandomSynthesizer(Synthesizer):
    """Every pair of positions has a score of its own, whatever stands there.

    Source: Tay et al. 2021, arXiv:2005.00743, section 3.2.
    """

    def scores(self, x, q, k):
        table = weight(self, "scores", "HC>C", self.cfg.sizes, normal)
        last = self.cfg.context - 1
        here, there = (jnp.clip(at.position, 0, last) for at in (q, k))
        return jnp.moveaxis(table[:, here[:, :, None], there[:, None]], 0, 1)
