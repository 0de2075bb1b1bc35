"""Transformer-XL: segment-level recurrence and relative position encodings.

    A_ij = ((q_i + u)·k_j + (q_i + v)·W_r r_{i-j}) / √K

with u and v learned and r the sinusoidal encoding of the distance. A query attends to its own
segment of M tokens up to itself, and to all of the previous segment. Gradients do not flow into the
hidden states of the previous segment, as if they were cached from an earlier step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.kernels import MASKED_LOGIT
from jaxgpt.model.layers import Linear, make_residual_init, normal
from jaxgpt.model.masks import make_layer_mask, relative_position
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.chunks import (
    BlockBand,
    gather_neighbors,
    join_chunks,
    mask_chunks,
    split_chunks,
)
from jaxgpt.model.mixers.mixer import KV, LayerContext, Mixer, update_kv_cache
from jaxgpt.model.positions import encode_sinusoidal
from jaxgpt.model.taps import tap


class TransformerXL(Mixer):
    """Attention with relative positions, within a segment and to the previous one.

    Segments are counted from the start of a document. All segments of a row are computed in
    parallel: the memory of a segment is the hidden states of the previous one in the same pass,
    which equals the paper's recurrence where rows are as long as documents.

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.2 (recurrence), 3.3 (positions).
    """

    HAS_TOKEN_STATE = True
    DIRECTIONS = ("causal",)

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        return Attention.init_state(cfg, batch, slots)

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KV | None):
        c, (_, T, _), size = self.cfg, x.shape, self.cfg.mixer.memory
        q = tap(self, "q", Linear(c, "D>HK", name="q")(x)) * c.attention_scale
        key, value = Linear(c, "D>GK", name="k"), Linear(c, "D>GK", name="v")
        current = KV(tap(self, "k", key(x)), tap(self, "v", value(x)))
        # The same values without gradient to x: the compiler computes them once.
        memory = KV(*(project(jax.lax.stop_gradient(x)) for project in (key, value)))
        q_coords, k_coords = layer_context.q_coords, layer_context.k_coords
        if state is None:
            # A query attends up to 2M - 1 tokens back: two chunks before its own.
            q, q_coords = split_chunks((q, q_coords), min(size, T))
            current, memory, k_coords = gather_neighbors(
                split_chunks((current, memory, k_coords), min(size, T)), before=2
            )
        else:
            current, state = update_kv_cache(state, current, layer_context.cursor)
            q, q_coords, current, k_coords = jax.tree.map(
                lambda x: x[:, None], (q, q_coords, current, k_coords)
            )
            memory = current
        y = join_chunks(self._attend(q, current, memory, q_coords, k_coords), T)
        y = tap(self, "z", y)
        return Linear(c, "HK>D", make_residual_init(c), name="o")(y), state

    def _attend(self, q, current: KV, memory: KV, q_coords, k_coords) -> jax.Array:
        """Attend, by chunks: queries [B n T H K], keys [B n S G K] -> [B n T H K]."""
        c, size, (B, n, T, H, K), G = self.cfg, self.cfg.mixer.memory, q.shape, current.k.shape[3]
        u, v = (declare_param(self, name, "HK", c.sizes, normal) for name in ("u_bias", "v_bias"))
        u, v = ((bias * c.attention_scale).astype(q.dtype) for bias in (u, v))
        encoding = encode_sinusoidal(jnp.arange(2 * size)[None], c.width).astype(q.dtype)
        encoding = Linear(c, "D>HK", name="r")(encoding)[0]  # [2M H K], by distance
        position_logits = jnp.einsum(
            "bnthk,dhk->bnhtd", q + v, encoding, preferred_element_type=jnp.float32
        )
        distance = jax.vmap(relative_position, 1, 1)(q_coords, k_coords)[:, :, None]  # [B n 1 T S]
        position_logits = jnp.take_along_axis(
            position_logits, jnp.clip(distance, 0, 2 * size - 1), axis=-1
        )
        is_current = mask_chunks(BlockBand(size, 0, 0), q_coords, k_coords)[:, :, None, None]

        def compute_content_logits(k):
            grouped = (q + u).reshape(B, n, T, G, H // G, K)
            return jnp.einsum(
                "bntgmk,bnsgk->bngmts", grouped, k, preferred_element_type=jnp.float32
            )

        logits = jnp.where(
            is_current, compute_content_logits(current.k), compute_content_logits(memory.k)
        )
        logits += position_logits.reshape(logits.shape)
        mask = make_layer_mask(c, self.pattern, self.direction) & BlockBand(size, 0, 1)
        logits = jnp.where(
            mask_chunks(mask, q_coords, k_coords)[:, :, None, None], logits, MASKED_LOGIT
        )
        weights = tap(self, "weights", jax.nn.softmax(logits, axis=-1)).astype(current.v.dtype)
        y = jnp.einsum("bngmts,bnsgk->bntgmk", jnp.where(is_current, weights, 0), current.v)
        y += jnp.einsum("bngmts,bnsgk->bntgmk", jnp.where(is_current, 0, weights), memory.v)
        return y.reshape(B, n, T, H, K)
