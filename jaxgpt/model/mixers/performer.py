"""Performer: softmax attention in linear time, by random features.

For w drawn from a standard normal distribution, exp(q·k) = E[exp(w·q - |q|²/2) exp(w·k - |k|²/2)].
With m such w, φ(x)_i = exp(w_i·x - |x|²/2) / √m, attention is a quotient of sums over keys,

    y_t = φ(q_t)·Σ_s φ(k_s) v_s / φ(q_t)·Σ_s φ(k_s),

and the sums over the keys before a chunk are m x K numbers, instead of all keys and values. Inside
a chunk all products φ(q_t)·φ(k_s) are computed and masked.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import MASKED_LOGIT
from jaxgpt.model.layers import Linear, make_residual_init
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.model.mixers.chunks import (
    carry_across_chunks,
    index_documents,
    join_chunks,
    mask_chunks,
    select_edge,
    split_chunks,
)
from jaxgpt.model.mixers.mixer import LayerContext, Mixer
from jaxgpt.model.taps import tap


@functools.cache
def draw_feature_projections(features: int, size: int) -> np.ndarray:
    """Draw w, float32 [m K], with a fixed seed: orthogonal in blocks of K, with norms of normals.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4.
    """
    rng = np.random.default_rng(0)
    q, r = np.linalg.qr(rng.normal(size=(-(-features // size), size, size)))
    # LAPACK chooses the signs of r; making them all positive gives uniform directions.
    blocks = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = np.linalg.norm(rng.normal(size=(features, size)), axis=1, keepdims=True)
    return (blocks.reshape(-1, size)[:features] * lengths).astype(np.float32)


def compute_log_features(x: jax.Array, w: np.ndarray) -> jax.Array:
    """Compute log φ(x) + log √m (which cancels): [... K] -> [... m].

    Source: Choromanski et al. 2021, arXiv:2009.14794, lemma 1.
    """
    return x @ w.T - jnp.sum(x * x, axis=-1, keepdims=True) / 2


class KeySums(NamedTuple):
    """Sums over the keys so far, scaled to prevent overflow."""

    sums: jax.Array  # float32 [B G m K+1], Σ φ(k) (v, 1) / exp(max_log)
    max_log: jax.Array  # float32 [B G], the largest log feature of these keys


def merge(a: KeySums, b: KeySums) -> KeySums:
    """Add the sums of two sets of keys."""
    max_log = jnp.maximum(a.max_log, b.max_log)
    a_sums, b_sums = (jnp.exp(x.max_log - max_log)[..., None, None] * x.sums for x in (a, b))
    return KeySums(a_sums + b_sums, max_log)


def _masked_exp(condition, x):
    return jnp.exp(jnp.where(condition, x, MASKED_LOGIT))


class Performer(Mixer):
    """FAVOR+: attention with positive orthogonal random features, in time linear in T.

    Both sums are scaled by exp(-max_log), the maximum over only the keys that a query attends to:
    it cancels in the quotient, and later tokens do not affect the result, not even by rounding.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.3 and appendix B.1 (the prefix
    sums of the causal case).
    """

    USES = ("rotation",)

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> KeySums:
        m, G, K = cfg.mixer.features, cfg.sizes["G"], cfg.sizes["K"]
        return KeySums(jnp.zeros((batch, G, m, K + 1)), jnp.full((batch, G), MASKED_LOGIT))

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KeySums | None):
        c, T = self.cfg, x.shape[1]
        H, G, K = (c.sizes[letter] for letter in "HGK")
        q = Linear(c, "D>HK", name="q")(x)
        k = Linear(c, "D>GK", name="k")(x)
        v = Linear(c, "D>GK", name="v")(x).astype(jnp.float32)
        q, k = layer_context.apply_rotation(q), layer_context.apply_rotation(k)
        q, k, v = tap(self, "q", q), tap(self, "k", k), tap(self, "v", v)
        # Each takes half of the scale, so that q·k is the logit.
        half = c.attention_scale**0.5
        w = draw_feature_projections(c.mixer.features, K)
        q, k = (compute_log_features(half * y.astype(jnp.float32), w) for y in (q, k))
        q, k = tap(self, "log_features_q", q), tap(self, "log_features_k", k)
        q = jnp.exp(q - jax.lax.stop_gradient(q.max(-1, keepdims=True)))  # cancels in the quotient
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # numerator and denominator
        q, k, v, coords = split_chunks((q, k, v, layer_context.q_coords), min(c.mixer.chunk, T))
        q = q.reshape(*q.shape[:3], G, H // G, -1)  # [B n Q G M m]
        sums, state = self._attend(q, k, v, coords, state)
        numerator, denominator = sums[..., :K], sums[..., K:]
        y = numerator / jnp.where(denominator > 0, denominator, 1)  # 0 where there is no token
        y = tap(self, "z", join_chunks(y.reshape(*y.shape[:3], H, K), T).astype(x.dtype))
        return Linear(c, "HK>D", make_residual_init(c), name="o")(y), state

    def _attend(self, q, log_k, v, coords, state):
        """Compute both sums of every query, [B n Q G M K+1], and the state after the last chunk."""
        max_log = jax.lax.stop_gradient(log_k.max(-1))  # [B n Q G], of each key
        k = jnp.exp(log_k - max_log[..., None])
        document_index = index_documents(coords)
        reverses = (False,) if self.direction == "causal" else (False, True)
        outside = [
            self._sum_other_chunks(k, v, max_log, coords, document_index, state, reverse)
            for reverse in reverses
        ]
        mask = make_layer_mask(self.cfg, self.pattern, self.direction)
        mask = mask_chunks(mask, coords, coords)[..., None]
        same_document = [
            (documents[..., None] == document_index)[..., None] for _, documents, _ in outside
        ]  # [B n Q 1]
        maxima = [jnp.where(mask, max_log[:, :, None], MASKED_LOGIT).max(3)]  # [B n Q G]
        for is_same, (carry, _, _) in zip(same_document, outside, strict=True):
            maxima.append(jnp.where(is_same, carry.max_log[:, :, None], MASKED_LOGIT))
        overall_max = functools.reduce(jnp.maximum, maxima)
        weights = _masked_exp(mask, max_log[:, :, None] - overall_max[:, :, :, None])  # [B n Q S G]
        weights = weights[..., None] * jnp.einsum("bntgmf,bnsgf->bntsgm", q, k)
        sums = jnp.einsum("bntsgm,bnsgk->bntgmk", weights, v)
        for is_same, (carry, _, _) in zip(same_document, outside, strict=True):
            scale = _masked_exp(is_same, carry.max_log[:, :, None] - overall_max)[..., None, None]
            sums += scale * jnp.einsum("bntgmf,bngfk->bntgmk", q, carry.sums)
        return sums, None if state is None else outside[0][2]

    def _sum_other_chunks(self, k, v, max_log, coords, document_index, state, reverse):
        """Sum over the keys before (reverse: after) each chunk; see `carry_across_chunks`."""
        is_edge = document_index == select_edge(document_index, reverse)[:, :, None]
        is_edge = (is_edge & (coords.segment_ids > 0))[..., None]  # [B n Q 1]
        chunk_max = jnp.where(is_edge, max_log, MASKED_LOGIT).max(2)  # [B n G]
        scale = _masked_exp(is_edge, max_log - chunk_max[:, :, None])
        chunk_sums = KeySums(jnp.einsum("bnsg,bnsgf,bnsgk->bngfk", scale, k, v), chunk_max)
        empty = self.init_state(self.cfg, len(k), 0)
        return carry_across_chunks(chunk_sums, document_index, merge, empty, state, reverse)
