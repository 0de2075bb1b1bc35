"""Linformer: keys and values summarised along the sequence.

    y_t = softmax(q_t·(Eᵀ k) / √K) (Fᵀ v)

where E and F, learned, project the C positions of a document to P summaries: a query has P scores
instead of C. A summary of everything can not be causal, so `linformer_causal` cuts a document into
blocks, and a query sees the summaries of the blocks that are complete before its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import Linear, into_residual
from jaxgpt.model.masks import Coords, SameDocument, layer_mask
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.chunks import (
    Spans,
    around,
    carried,
    cut,
    edge,
    join,
    seen,
    segments,
)
from jaxgpt.model.mixers.mixer import KV, Mixer, Sight, recall


def _project(module: Mixer, x: jax.Array, sight: Sight) -> tuple[jax.Array, KV]:
    """Scaled queries [B T H K], keys and values [B T G K]."""
    c = module.cfg
    q = Linear(c, "D>HK", name="q")(x)
    k = Linear(c, "D>GK", name="k")(x)
    v = Linear(c, "D>GK", name="v")(x)
    q, k = sight.rotated(q), sight.rotated(k)
    return q * c.attention_scale, KV(k, v)


def _summaries(module: Mixer, letters: str) -> KV:
    """E and F, drawn so that a projection keeps lengths.

    Source: Wang et al. 2020, arXiv:2006.04768, theorem 2: entries of variance 1 / P.
    """
    c = module.cfg
    keep = nn.initializers.normal(c.mixer.summary**-0.5)
    return KV(*(weight(module, name, letters, c.sizes, keep) for name in ("E", "F")))


class Linformer(Mixer):
    """Attention to P summaries of the document, one E and one F per layer for all heads.

    A row may hold several documents, and each has its own summaries, so they are summed chunk by
    chunk: a chunk is told those of the documents which go on beyond it on either side, and makes
    the rest itself. This costs T·(P·K + Q·K + Q·P), linear in T, in float32.

    Source: Wang et al. 2020, arXiv:2006.04768, section 4, equation 7.
    """

    USES = ("rotation",)
    DIRECTIONS = ("both",)

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: None):
        c, (_, T, _) = self.cfg, x.shape
        H, G, K = (c.sizes[letter] for letter in "HGK")
        q, kv = _project(self, x, sight)
        q, kv, at = cut((q, kv, sight.q_at), min(c.mixer.chunk, T))
        q, kv = jax.tree.map(lambda y: y.astype(jnp.float32), (q, kv))
        is_real = (at.document > 0) & (at.position < c.context)
        share = KV(*(
            jnp.where(is_real[..., None], table.at[at.position].get(mode="clip"), 0)
            for table in _summaries(self, "C>P")
        ))  # [B n Q P]: how much of each token goes into each summary  # fmt: skip
        q = q.reshape(*q.shape[:3], G, H // G, K)
        y = self._attend(q, kv, share, segments(at))
        y = join(y.reshape(*y.shape[:3], H, K), T).astype(x.dtype)
        return Linear(c, "HK>D", into_residual(c), name="o")(y), state

    def _attend(self, q, kv: KV, share: KV, segment) -> jax.Array:
        """q [B n Q G M K], kv [B n Q G K], share [B n Q P], segment [B n Q] -> as q."""
        told = []
        for reverse in (False, True):
            last = segment == edge(segment, reverse)[:, :, None]

            def summed(y, by, last=last):
                return jnp.einsum("bnt,bntp,bntgk->bnpgk", last.astype(y.dtype), by, y)

            parts = jax.tree.map(summed, kv, share)
            empty = jax.tree.map(lambda y: jnp.zeros_like(y[:, 0]), parts)
            memory, of, _ = carried(parts, segment, _add, empty, reverse=reverse)
            told.append((memory, (of[..., None] == segment)[..., None, None, None]))
        same = segment[:, :, :, None] == segment[:, :, None]  # [B n T S]
        same = same[:, :, :, None, None].astype(q.dtype)  # [B n T 1 1 S]
        logits = jnp.einsum("bntgmk,bnsgk->bntgms", q, kv.k) * same
        logits = jnp.einsum("bntgms,bnsp->bntgmp", logits, share.k)
        for memory, hears in told:
            logits += jnp.where(hears, jnp.einsum("bntgmk,bnpgk->bntgmp", q, memory.k), 0)
        weights = jax.nn.softmax(logits, axis=-1)
        near = jnp.einsum("bntgmp,bnsp->bntgms", weights, share.v) * same
        y = jnp.einsum("bntgms,bnsgk->bntgmk", near, kv.v)
        for memory, hears in told:
            y += jnp.where(hears, jnp.einsum("bntgmp,bnpgk->bntgmk", weights, memory.v), 0)
        return y


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


class CausalLinformer(Mixer):
    """Attention to the query's own block up to itself, and to P summaries of each block before it.

    It costs T·(2Q + P·T/Q): less than T² by the factor Q / P in a long row. The cache keeps all
    keys and values, of which blocks are summarised anew.

    Source: ours: the blocks and summaries of Zhu et al. 2021 (Long-Short Transformer),
    arXiv:2107.02192, with the learned projections of Wang et al. 2020.
    """

    USES = ("rotation",)
    DIRECTIONS = ("causal",)

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        return Attention.state(cfg, batch, slots)

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: KV | None):
        c, (_, T, _), size = self.cfg, x.shape, self.cfg.mixer.chunk
        q, kv = _project(self, x, sight)
        if state is not None:
            kv, state = recall(state, kv, sight.cursor)
        q_at, k_at = sight.q_at, sight.k_at
        far, far_at = self._summarise(kv, k_at)
        if state is None:
            q, q_at = cut((q, q_at), min(size, T))
            kv, k_at = around(cut((kv, k_at), min(size, T)), before=1)
        else:
            q, q_at, kv, k_at = jax.tree.map(lambda y: y[:, None], (q, q_at, kv, k_at))
        y = join(self._attend(q, kv, far, q_at, k_at, far_at), T)
        return Linear(c, "HK>D", into_residual(c), name="o")(y), state

    def _summarise(self, kv: KV, at: Coords) -> tuple[KV, Coords]:
        """Keys, values [B S G K] -> summaries [B N P G K] of complete blocks, and where [B N]."""
        size = self.cfg.mixer.chunk
        is_end = (at.position % size == size - 1) & (at.document > 0)
        # A row of S tokens has room for S // Q blocks; the ends come first, in their order.
        ends = jnp.argsort(~is_end, axis=1, stable=True)[:, : is_end.shape[1] // size]
        tokens = jnp.maximum(ends[:, :, None] - jnp.arange(size)[::-1], 0)  # [B N Q]
        pick = jax.vmap(lambda y, i: y[i])
        tables = _summaries(self, "Q>P")
        far = jax.tree.map(
            lambda y, by: jnp.einsum("bnqgk,qp->bnpgk", pick(y, tokens), by.astype(y.dtype)),
            kv, tables,
        )  # fmt: skip
        document = jnp.where(pick(is_end, ends), pick(at.document, ends), 0)
        return far, Coords(pick(at.position, ends), document)

    def _attend(self, q, near: KV, far: KV, q_at, near_at, far_at) -> jax.Array:
        """q [B n T H K], near [B n S G K], far [B N P G K] -> [B n T H K]."""
        c, size, (B, n, T, H, K), G = self.cfg, self.cfg.mixer.chunk, q.shape, near.k.shape[3]
        q = q.reshape(B, n, T, G, H // G, K)
        wide = dict(preferred_element_type=jnp.float32)
        logits = jnp.einsum("bntgmk,bnsgk->bngmts", q, near.k, **wide)
        mask = seen(layer_mask(c, self.pattern, self.direction) & Spans(size, 0, 0), q_at, near_at)
        logits = jnp.where(mask[:, :, None, None], logits, NEVER)
        before = jnp.einsum("bntgmk,bNpgk->bngmtNp", q, far.k, **wide)
        mask = jax.vmap(SameDocument() & Spans(size, 1, None), (1, None), 1)(q_at, far_at)
        before = jnp.where(mask[:, :, None, None, :, :, None], before, NEVER)
        both = jnp.concatenate([logits, before.reshape(*logits.shape[:-1], -1)], axis=-1)
        weights = jax.nn.softmax(both, axis=-1).astype(near.v.dtype)
        S = logits.shape[-1]
        y = jnp.einsum("bngmts,bnsgk->bntgmk", weights[..., :S], near.v)
        weights = weights[..., S:].reshape(before.shape)
        y += jnp.einsum("bngmtNp,bNpgk->bntgmk", weights, far.v)
        return y.reshape(B, n, T, H, K)
