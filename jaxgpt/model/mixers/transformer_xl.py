"""Transformer-XL: segments that remember the segment before, and positions relative to the query.

    A_ij = ((q_i + u)·k_j + (q_i + v)·W_r r_{i-j}) / √K

with u and v learned and r the sinusoids of the distance. A query sees its own segment of M tokens
up to itself, and all of the segment before. What it takes from there comes out of hidden states
that get no gradient from it, as if they had been kept from an earlier step.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import Linear, into_residual, normal
from jaxgpt.model.masks import apart, layer_mask
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.chunks import Spans, around, cut, join, seen
from jaxgpt.model.mixers.mixer import KV, Mixer, Sight, recall
from jaxgpt.model.positions import sinusoidal


class TransformerXL(Mixer):
    """Attention with relative positions, within a segment and to the one before.

    Segments are counted from the start of a document. The segments of a row are computed at once:
    the memory of a segment is the hidden states of the one before in the same pass, which is what
    the paper's recurrence gives where rows are as long as documents.

    Source: Dai et al. 2019, arXiv:1901.02860, section 3.2 (recurrence), 3.3 (positions).
    """

    DIRECTIONS = ("causal",)

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        return Attention.state(cfg, batch, slots)

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: KV | None):
        c, (_, T, _), size = self.cfg, x.shape, self.cfg.mixer.memory
        q = Linear(c, "D>HK", name="q")(x) * c.attention_scale
        key, value = Linear(c, "D>GK", name="k"), Linear(c, "D>GK", name="v")
        now = KV(key(x), value(x))
        # The same numbers: the compiler makes them once.
        past = KV(*(project(jax.lax.stop_gradient(x)) for project in (key, value)))
        q_at, k_at = sight.q_at, sight.k_at
        if state is None:
            # A query is up to 2M - 1 tokens behind what it sees: two chunks before its own.
            q, q_at = cut((q, q_at), min(size, T))
            now, past, k_at = around(cut((now, past, k_at), min(size, T)), before=2)
        else:
            now, state = recall(state, now, sight.cursor)
            q, q_at, now, k_at = jax.tree.map(lambda x: x[:, None], (q, q_at, now, k_at))
            past = now
        y = join(self._attend(q, now, past, q_at, k_at), T)
        return Linear(c, "HK>D", into_residual(c), name="o")(y), state

    def _attend(self, q, now: KV, past: KV, q_at, k_at) -> jax.Array:
        """Chunks of queries [B n T H K] and of keys [B n S G K] -> [B n T H K]."""
        c, size, (B, n, T, H, K), G = self.cfg, self.cfg.mixer.memory, q.shape, now.k.shape[3]
        u, v = (weight(self, name, "HK", c.sizes, normal) for name in ("u_bias", "v_bias"))
        u, v = ((bias * c.attention_scale).astype(q.dtype) for bias in (u, v))
        place = sinusoidal(jnp.arange(2 * size)[None], c.width).astype(q.dtype)
        place = Linear(c, "D>HK", name="r")(place)[0]  # [2M H K], by distance
        far = jnp.einsum("bnthk,dhk->bnhtd", q + v, place, preferred_element_type=jnp.float32)
        distance = jax.vmap(apart, 1, 1)(q_at, k_at)[:, :, None]  # [B n 1 T S]
        far = jnp.take_along_axis(far, jnp.clip(distance, 0, 2 * size - 1), axis=-1)
        is_now = seen(Spans(size, 0, 0), q_at, k_at)[:, :, None, None]

        def content(k):
            grouped = (q + u).reshape(B, n, T, G, H // G, K)
            return jnp.einsum(
                "bntgmk,bnsgk->bngmts", grouped, k, preferred_element_type=jnp.float32
            )

        logits = jnp.where(is_now, content(now.k), content(past.k))
        logits += far.reshape(logits.shape)
        mask = layer_mask(c, self.pattern, self.direction) & Spans(size, 0, 1)
        logits = jnp.where(seen(mask, q_at, k_at)[:, :, None, None], logits, NEVER)
        weights = jax.nn.softmax(logits, axis=-1).astype(now.v.dtype)
        y = jnp.einsum("bngmts,bnsgk->bntgmk", jnp.where(is_now, weights, 0), now.v)
        y += jnp.einsum("bngmts,bnsgk->bntgmk", jnp.where(is_now, 0, weights), past.v)
        return y.reshape(B, n, T, H, K)
