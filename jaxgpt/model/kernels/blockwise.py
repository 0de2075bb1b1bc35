"""Exact attention in memory that grows with T, not with T·S, on any device.

The weights are never materialized whole. A block of queries loops over blocks of keys and carries,
per query, the largest logit m so far, the sum l of e^(logit - m), and the sum o of e^(logit - m) v;
when m grows to m', l and o are multiplied by e^(m - m'). At the end o / l is the softmax's average,
whatever the blocks. The backward pass uses o / l and log Σ e^logit = m + log l of every query, and
recomputes each block of weights.

Fully masked blocks are skipped, so a causal mask costs half, and a window or packed documents cost
only their visible blocks.

Source: Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022 (FlashAttention), arXiv:2205.14135,
algorithms 1 and 4; Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithms 1 and 2.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import MASKED_LOGIT, ScoreMod
from jaxgpt.model.layers import ATTENTION_OUTPUT
from jaxgpt.model.masks import Coords, Mask

# (queries, keys). Causal gradients of two rows of 1024, 6 heads of width 64, on a CPU with 2 cores:
# 116 ms, against 132 for 64 x 64, 132 for 256 x 256, 189 for 128 x 256 and 224 for 512 x 512.
BLOCK_SIZES = (128, 128)

dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class NotBlockPadding(Mask):
    """Masks the keys that only fill the last block, which have segment id -1."""

    def __call__(self, q, k):
        return (k.segment_ids >= 0)[:, None, :]


def blockwise(
    q,
    k,
    v,
    q_coords: Coords,
    k_coords: Coords,
    score_mod: ScoreMod,
    blocks: tuple[int, int] = BLOCK_SIZES,
) -> jax.Array:
    """As `dense`, in blocks of (queries, keys). Returns [B T H K].

    A query without visible keys gets 0.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    t, s = min(T, blocks[0]), min(S, blocks[1])
    score_mod = replace(score_mod, mask=score_mod.mask & NotBlockPadding())
    q = score_mod.scale_queries(q).reshape(B, T, G, H // G, K)
    # Blocks first, to loop over; then heads before tokens, as in `dense`.
    q = _split_blocks(q, t, 0).transpose(0, 1, 3, 4, 2, 5)  # [n B G M t K]
    k, v = (_split_blocks(x, s, 0).transpose(0, 1, 3, 2, 4) for x in (k, v))  # [n B G s K]
    q_coords = jax.tree.map(lambda x: _split_blocks(x, t, -1), q_coords)  # [n B t]
    k_coords = jax.tree.map(lambda x: _split_blocks(x, s, -1), k_coords)
    out = _attention(score_mod, q, k, v, q_coords, k_coords)  # [n B G M t K]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, K)[:, :T]


def _split_blocks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """Split [B T ...] -> [n B size ...], padded to a whole number of blocks."""
    padding = -x.shape[1] % size
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _find_visible_blocks(mask: Mask, q_coords: Coords, k_coords: Coords) -> jax.Array:
    """Return which pairs of blocks have a visible pair of tokens: bool [n of T, n of S]."""
    is_visible = jax.lax.map(
        lambda q: jax.lax.map(lambda k: mask(q, k).any((1, 2)), k_coords), q_coords
    )
    return is_visible.any(-1)  # over B last: one all-reduce if rows are sharded


def _order_blocks(is_visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For [n m], return (for each of n the block indices, visible ones first; their number)."""
    return jnp.argsort(~is_visible, axis=1), is_visible.sum(1)


def _take(blocks, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)


@jax.custom_vjp
def _attention(score_mod: ScoreMod, q, k, v, q_coords: Coords, k_coords: Coords) -> jax.Array:
    return _forward(score_mod, q, k, v, q_coords, k_coords)[0]


def _forward(score_mod: ScoreMod, q, k, v, q_coords: Coords, k_coords: Coords):
    """Return (out [n B G M t K], residuals of the backward pass)."""

    def attend_query_block(block):
        q, q_coords, order, count = block

        def add_keys(i, carry):
            max_logit, total, out = carry
            k_i, v_i, coords_i = _take((k, v, k_coords), order[i])
            logits = score_mod(dot("BGMTK,BGSK->BGMTS", q, k_i), q_coords, coords_i)
            new_max = jnp.maximum(max_logit, logits.max(-1))
            rescale = jnp.exp(max_logit - new_max)
            weights = jnp.exp(logits - new_max[..., None])
            block_out = dot("BGMTS,BGSK->BGMTK", weights.astype(v.dtype), v_i)
            return new_max, total * rescale + weights.sum(-1), out * rescale[..., None] + block_out

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (zeros + MASKED_LOGIT, zeros, jnp.zeros(q.shape, jnp.float32))
        if score_mod.sinks is not None:  # the first key, of value 0: e^(sink - sink) = 1
            start = (zeros + score_mod.shape_sinks(q)[..., 0], zeros + 1, start[2])
        max_logit, total, out = jax.lax.fori_loop(0, count, add_keys, start)
        # Until a key is visible, masked keys count as e^(MASKED_LOGIT - MASKED_LOGIT) = 1 each; the
        # first visible key rescales that to 0. A query without visible keys gets 0, and by its
        # large log_sum no gradient.
        has_keys = max_logit > MASKED_LOGIT / 2
        out = jnp.where(has_keys[..., None], out / jnp.where(has_keys, total, 1)[..., None], 0)
        return out.astype(v.dtype), jnp.where(has_keys, max_logit + jnp.log(total), -MASKED_LOGIT)

    is_visible = _find_visible_blocks(score_mod.mask, q_coords, k_coords)
    outputs = jax.lax.map(attend_query_block, (q, q_coords, *_order_blocks(is_visible)))
    out, log_sum = checkpoint_name(outputs, ATTENTION_OUTPUT)
    return out, (score_mod, q, k, v, q_coords, k_coords, is_visible, out, log_sum)


def _backward(saved, d_out):
    """Return gradients of the arrays of `score_mod`, and of q, k and v."""
    score_mod, q, k, v, q_coords, k_coords, is_visible, out, log_sum = saved
    # Σ_s weight · d_weight of a query is d_out · out.
    inner = jnp.sum(d_out.astype(jnp.float32) * out, -1)  # [n B G M t]
    query_blocks = (q, q_coords, d_out, log_sum, inner)

    def backprop_key_block(carry, block):
        k, v, k_coords, order, count = block

        def add_queries(i, carry):
            d_q, d_score, d_k, d_v = carry
            q_i, coords_i, d_out_i, log_sum_i, inner_i = _take(query_blocks, order[i])

            def apply_score_mod(score_mod, logits):
                return score_mod(logits, coords_i, k_coords)

            logits, pull = jax.vjp(apply_score_mod, score_mod, dot("BGMTK,BGSK->BGMTS", q_i, k))
            weights = jnp.exp(logits - log_sum_i[..., None])
            d_weights = dot("BGMTK,BGSK->BGMTS", d_out_i, v)
            d_score_i, d_logits = pull(weights * (d_weights - inner_i[..., None]))
            d_logits = d_logits.astype(q.dtype)
            d_q = d_q.at[order[i]].add(dot("BGMTS,BGSK->BGMTK", d_logits, k))
            d_k += dot("BGMTS,BGMTK->BGSK", d_logits, q_i)
            d_v += dot("BGMTS,BGMTK->BGSK", weights.astype(v.dtype), d_out_i)
            return d_q, jax.tree.map(jnp.add, d_score, d_score_i), d_k, d_v

        zeros = jnp.zeros(k.shape, jnp.float32)
        *carry, d_k, d_v = jax.lax.fori_loop(0, count, add_queries, (*carry, zeros, zeros))
        return tuple(carry), (d_k.astype(k.dtype), d_v.astype(v.dtype))

    d_score = jax.tree.map(jnp.zeros_like, score_mod)
    if score_mod.sinks is not None:
        sink_weights = jnp.exp(score_mod.shape_sinks(q[0])[..., 0] - log_sum)
        d_score = d_score.add_to_sinks((-inner * sink_weights).sum(0)[..., None])
    start = (jnp.zeros(q.shape, jnp.float32), d_score)
    key_blocks = (k, v, k_coords, *_order_blocks(is_visible.T))
    (d_q, d_score), (d_k, d_v) = jax.lax.scan(backprop_key_block, start, key_blocks)
    return d_score, d_q.astype(q.dtype), d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
