"""Linformer: keys and values projected along the sequence to a fixed length.

    y_t = softmax(q_t·(Eᵀ k) / √K) (Fᵀ v)

where E and F, learned, project the C positions of a document to P summaries: a query has P scores
instead of C. A summary of the whole document cannot be causal, so `linformer_causal` splits a
document into blocks, and a query attends to the summaries of the complete blocks before its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.kernels import MASKED_LOGIT
from jaxgpt.model.layers import Linear, make_residual_init
from jaxgpt.model.masks import Coords, SameSegment, make_layer_mask
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.chunks import (
    BlockBand,
    carry_across_chunks,
    gather_neighbors,
    index_documents,
    join_chunks,
    mask_chunks,
    select_edge,
    split_chunks,
)
from jaxgpt.model.mixers.mixer import KV, LayerContext, Mixer, update_kv_cache
from jaxgpt.model.taps import tap


def _project_qkv(module: Mixer, x: jax.Array, layer_context: LayerContext) -> tuple[jax.Array, KV]:
    """Compute scaled queries [B T H K], and keys and values [B T G K]."""
    c = module.cfg
    q = Linear(c, "D>HK", name="q")(x)
    k = Linear(c, "D>GK", name="k")(x)
    v = Linear(c, "D>GK", name="v")(x)
    q, k = layer_context.apply_rotation(q), layer_context.apply_rotation(k)
    q, k, v = tap(module, "q", q), tap(module, "k", k), tap(module, "v", v)
    return q * c.attention_scale, KV(k, v)


def _make_projections(module: Mixer, letters: str) -> KV:
    """Create the parameters E and F, initialized so that a projection preserves norms.

    Source: Wang et al. 2020, arXiv:2006.04768, theorem 2: entries of variance 1 / P.
    """
    c = module.cfg
    init = nn.initializers.normal(c.mixer.summary**-0.5)
    return KV(*(declare_param(module, name, letters, c.sizes, init) for name in ("E", "F")))


class Linformer(Mixer):
    """Attention to P summaries of the document, one E and one F per layer for all heads.

    A row may hold several documents, each with its own summaries, so these are summed chunk by
    chunk: a chunk receives the partial summaries of the documents that extend beyond it on either
    side, and computes the rest itself. This costs T·(P·K + Q·K + Q·P), linear in T, in float32.

    Source: Wang et al. 2020, arXiv:2006.04768, section 4, equation 7.
    """

    USES = ("rotation",)
    DIRECTIONS = ("both",)

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: None):
        c, (_, T, _) = self.cfg, x.shape
        H, G, K = (c.sizes[letter] for letter in "HGK")
        q, kv = _project_qkv(self, x, layer_context)
        q, kv, coords = split_chunks((q, kv, layer_context.q_coords), min(c.mixer.chunk, T))
        q, kv = jax.tree.map(lambda y: y.astype(jnp.float32), (q, kv))
        is_token = (coords.segment_ids > 0) & (coords.positions < c.context)
        projections = KV(*(
            jnp.where(is_token[..., None], table.at[coords.positions].get(mode="clip"), 0)
            for table in _make_projections(self, "C>P")
        ))  # [B n Q P]: the weight of each token in each summary  # fmt: skip
        q = q.reshape(*q.shape[:3], G, H // G, K)
        y = self._attend(q, kv, projections, index_documents(coords))
        y = tap(self, "z", join_chunks(y.reshape(*y.shape[:3], H, K), T).astype(x.dtype))
        return Linear(c, "HK>D", make_residual_init(c), name="o")(y), state

    def _attend(self, q, kv: KV, projections: KV, document_index) -> jax.Array:
        """Attend: q [B n Q G M K], kv [B n Q G K], projections [B n Q P] -> as q."""
        outside = []  # (summaries [B n P G K], which queries attend to them [B n Q 1 1 1])
        for reverse in (False, True):
            is_edge = document_index == select_edge(document_index, reverse)[:, :, None]

            def project(y, projection, is_edge=is_edge):
                return jnp.einsum("bnt,bntp,bntgk->bnpgk", is_edge.astype(y.dtype), projection, y)

            summaries = jax.tree.map(project, kv, projections)
            empty = jax.tree.map(lambda y: jnp.zeros_like(y[:, 0]), summaries)
            carries, documents, _ = carry_across_chunks(
                summaries, document_index, _add, empty, reverse=reverse
            )
            is_same = documents[..., None] == document_index  # [B n Q]
            outside.append((carries, is_same[..., None, None, None]))
        same_document = document_index[:, :, :, None] == document_index[:, :, None]  # [B n T S]
        same_document = same_document[:, :, :, None, None].astype(q.dtype)  # [B n T 1 1 S]
        logits = jnp.einsum("bntgmk,bnsgk->bntgms", q, kv.k) * same_document
        logits = jnp.einsum("bntgms,bnsp->bntgmp", logits, projections.k)
        for carries, is_same in outside:
            logits += jnp.where(is_same, jnp.einsum("bntgmk,bnpgk->bntgmp", q, carries.k), 0)
        weights = tap(self, "weights", jax.nn.softmax(logits, axis=-1))
        inside = jnp.einsum("bntgmp,bnsp->bntgms", weights, projections.v) * same_document
        y = jnp.einsum("bntgms,bnsgk->bntgmk", inside, kv.v)
        for carries, is_same in outside:
            y += jnp.where(is_same, jnp.einsum("bntgmp,bnpgk->bntgmk", weights, carries.v), 0)
        return y


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


class CausalLinformer(Mixer):
    """Attention to the query's own block up to itself, and to P summaries of each block before it.

    It costs T·(2Q + P·T/Q): less than T² by the factor Q / P in a long row. The cache holds all
    keys and values; the summaries of the blocks are recomputed from them at every step.

    Source: ours: the blocks and summaries of Zhu et al. 2021 (Long-Short Transformer),
    arXiv:2107.02192, with the learned projections of Wang et al. 2020.
    """

    HAS_TOKEN_STATE = True
    USES = ("rotation",)
    DIRECTIONS = ("causal",)

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        return Attention.init_state(cfg, batch, slots)

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KV | None):
        c, (_, T, _), size = self.cfg, x.shape, self.cfg.mixer.chunk
        q, kv = _project_qkv(self, x, layer_context)
        if state is not None:
            kv, state = update_kv_cache(state, kv, layer_context.cursor)
        q_coords, k_coords = layer_context.q_coords, layer_context.k_coords
        far, far_coords = self._summarize_blocks(kv, k_coords)
        if state is None:
            q, q_coords = split_chunks((q, q_coords), min(size, T))
            kv, k_coords = gather_neighbors(split_chunks((kv, k_coords), min(size, T)), before=1)
        else:
            q, q_coords, kv, k_coords = jax.tree.map(
                lambda y: y[:, None], (q, q_coords, kv, k_coords)
            )
        y = join_chunks(self._attend(q, kv, far, q_coords, k_coords, far_coords), T)
        y = tap(self, "z", y)
        return Linear(c, "HK>D", make_residual_init(c), name="o")(y), state

    def _summarize_blocks(self, kv: KV, coords: Coords) -> tuple[KV, Coords]:
        """Project the complete blocks of [B S G K] to [B N P G K]; their coordinates are [B N]."""
        size = self.cfg.mixer.chunk
        is_end = (coords.positions % size == size - 1) & (coords.segment_ids > 0)
        # A row of S tokens holds at most S // Q blocks; the sort puts their ends first, in order.
        ends = jnp.argsort(~is_end, axis=1, stable=True)[:, : is_end.shape[1] // size]
        tokens = jnp.maximum(ends[:, :, None] - jnp.arange(size)[::-1], 0)  # [B N Q]
        pick = jax.vmap(lambda y, i: y[i])

        def project(y, projection):
            return jnp.einsum("bnqgk,qp->bnpgk", pick(y, tokens), projection.astype(y.dtype))

        far = jax.tree.map(project, kv, _make_projections(self, "Q>P"))
        segment_ids = jnp.where(pick(is_end, ends), pick(coords.segment_ids, ends), 0)
        return far, Coords(pick(coords.positions, ends), segment_ids)

    def _attend(self, q, near: KV, far: KV, q_coords, near_coords, far_coords) -> jax.Array:
        """Attend: q [B n T H K], near [B n S G K], far [B N P G K] -> [B n T H K]."""
        c, size, (B, n, T, H, K), G = self.cfg, self.cfg.mixer.chunk, q.shape, near.k.shape[3]
        q = q.reshape(B, n, T, G, H // G, K)
        float32 = dict(preferred_element_type=jnp.float32)
        logits = jnp.einsum("bntgmk,bnsgk->bngmts", q, near.k, **float32)
        mask = mask_chunks(
            make_layer_mask(c, self.pattern, self.direction) & BlockBand(size, 0, 0),
            q_coords,
            near_coords,
        )
        logits = jnp.where(mask[:, :, None, None], logits, MASKED_LOGIT)
        far_logits = jnp.einsum("bntgmk,bNpgk->bngmtNp", q, far.k, **float32)
        mask = jax.vmap(SameSegment() & BlockBand(size, 1, None), (1, None), 1)(
            q_coords, far_coords
        )
        far_logits = jnp.where(mask[:, :, None, None, :, :, None], far_logits, MASKED_LOGIT)
        all_logits = jnp.concatenate([logits, far_logits.reshape(*logits.shape[:-1], -1)], axis=-1)
        weights = tap(self, "weights", jax.nn.softmax(all_logits, axis=-1)).astype(near.v.dtype)
        S = logits.shape[-1]
        y = jnp.einsum("bngmts,bnsgk->bntgmk", weights[..., :S], near.v)
        weights = weights[..., S:].reshape(far_logits.shape)
        y += jnp.einsum("bngmtNp,bNpgk->bntgmk", weights, far.v)
        return y.reshape(B, n, T, H, K)
