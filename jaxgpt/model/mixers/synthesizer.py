"""Synthesizer: attention whose weights are not computed from products of queries and keys.

A query's scores for the C positions of a context are a function of the query alone (dense),
W2 relu(W1 x), or are learned parameters (random): they do not depend on the tokens attended to.

    y_t = Σ_s softmax_s(score_t[position of s]) v_s
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.kernels import MASKED_LOGIT
from jaxgpt.model.layers import DTYPES, Linear, make_residual_init, normal
from jaxgpt.model.masks import Coords, make_layer_mask
from jaxgpt.model.mixers.mixer import LayerContext, Mixer, update_slots
from jaxgpt.model.taps import tap


class Synthesizer(Mixer):
    """The base of both variants: attention weights are a masked softmax of `compute_scores`.

    Positions from C on have no score and are masked.
    """

    HAS_TOKEN_STATE = True
    USES = ("pattern",)

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> jax.Array:
        shape = (batch, slots, cfg.sizes["G"], cfg.sizes["K"])
        return jnp.zeros(shape, DTYPES[cfg.dtype])  # the values

    def compute_scores(self, x: jax.Array, q: Coords, k: Coords) -> jax.Array:
        """Compute scores, float32 [B H T S], from x [B T D], coordinates [B T] and [B S]."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: jax.Array | None):
        c, (B, T, _) = self.cfg, x.shape
        v = tap(self, "v", Linear(c, "D>GK", name="v")(x))
        if state is not None:
            v = state = update_slots(state, v, layer_context.cursor)
        mask = make_layer_mask(c, self.pattern, self.direction)(
            layer_context.q_coords, layer_context.k_coords
        )
        mask &= (layer_context.k_coords.positions < c.context)[:, None]
        scores = jnp.where(
            mask[:, None],
            self.compute_scores(x, layer_context.q_coords, layer_context.k_coords),
            MASKED_LOGIT,
        )
        G, S = v.shape[2], v.shape[1]
        weights = tap(self, "weights", jax.nn.softmax(tap(self, "logits", scores), axis=-1))
        weights = weights.astype(v.dtype).reshape(B, G, -1, T, S)
        y = jnp.einsum("bgmts,bsgk->btgmk", weights, v).reshape(B, T, c.heads, -1)
        y = tap(self, "z", y)
        return Linear(c, "HK>D", make_residual_init(c), name="o")(y), state


class DenseSynthesizer(Synthesizer):
    """Scores computed by each token for all positions.

    Source: Tay et al. 2021, arXiv:2005.00743, section 3.1.
    """

    def compute_scores(self, x, q, k):
        hidden = jax.nn.relu(Linear(self.cfg, "D>HK", name="q")(x))
        table = declare_param(self, "scores", "HK>C", self.cfg.sizes, normal).astype(x.dtype)
        B, T, H, K = hidden.shape
        hidden = hidden.reshape(B * T, H, K).swapaxes(0, 1)
        scores = jnp.matmul(hidden, table, preferred_element_type=jnp.float32)  # [H B·T C]
        scores = scores.reshape(H, B, T, -1).swapaxes(0, 1)
        return jnp.take_along_axis(scores, k.positions[:, None, None], axis=-1, mode="clip")


class RandomSynthesizer(Synthesizer):
    """A learned score for each pair of positions, independent of the tokens.

    Source: Tay et al. 2021, arXiv:2005.00743, section 3.2.
    """

    HAS_LOGIT_TABLE = True

    def compute_scores(self, x, q, k):
        table = declare_param(self, "scores", "HC>C", self.cfg.sizes, normal)
        last = self.cfg.context - 1
        q_index, k_index = (jnp.clip(coords.positions, 0, last) for coords in (q, k))
        return jnp.moveaxis(table[:, q_index[:, :, None], k_index[:, None]], 0, 1)
