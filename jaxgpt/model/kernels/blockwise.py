"""Exact attention in memory that grows with T, not with T·S, on any device.

The weights are never held whole. A block of queries meets one block of keys after the other and
keeps, per query, the largest logit m so far, the sum l of e^(logit - m), and the sum o of
e^(logit - m) v; when a larger m' comes, l and o are multiplied by e^(m - m'). At the end o / l is
the softmax's average, whatever the blocks. The backward pass is given o / l and
log Σ e^logit = m + log l of every query, and computes each block of weights again.

A block in which nobody sees anybody is never visited, so a causal mask costs half and a window or
packed documents cost what they see.

Source: Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022 (FlashAttention), arXiv:2205.14135,
algorithms 1 and 4; Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithms 1 and 2.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import NEVER, Score
from jaxgpt.model.layers import ATTENDED
from jaxgpt.model.masks import Coords, Mask

# Queries, keys. Causal gradients of two rows of 1024, 6 heads of width 64, on a CPU with two cores:
# 116 ms, against 132 for 64 x 64, 132 for 256 x 256, 189 for 128 x 256 and 224 for 512 x 512.
BLOCKS = (128, 128)

dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class NotAppended(Mask):
    """Nobody sees the keys that only fill the last block, which are in document -1."""

    def __call__(self, q, k):
        return (k.document >= 0)[:, None, :]


def blockwise(
    q, k, v, q_at: Coords, k_at: Coords, score: Score, blocks: tuple[int, int] = BLOCKS
) -> jax.Array:
    """As `dense`, in blocks of so many queries and keys. Returns [B T H K].

    A query that sees nothing gets 0.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    t, s = min(T, blocks[0]), min(S, blocks[1])
    score = replace(score, mask=score.mask & NotAppended())
    q = score.queries(q).reshape(B, T, G, H // G, K)
    # Blocks first, to loop over; then heads before tokens, as in `dense`.
    q = _cut(q, t, 0).transpose(0, 1, 3, 4, 2, 5)  # [n B G M t K]
    k, v = (_cut(x, s, 0).transpose(0, 1, 3, 2, 4) for x in (k, v))  # [n B G s K]
    q_at = jax.tree.map(lambda x: _cut(x, t, -1), q_at)  # [n B t]
    k_at = jax.tree.map(lambda x: _cut(x, s, -1), k_at)
    out = _attention(score, q, k, v, q_at, k_at)  # [n B G M t K]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, K)[:, :T]


def _cut(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[B T ...] -> [n B size ...], filled up to a whole number of blocks."""
    short = -x.shape[1] % size
    if short:
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _visits(mask: Mask, q_at: Coords, k_at: Coords) -> jax.Array:
    """Whether any query of a block sees any key of a block: bool [n of T, n of S]."""
    seen = jax.lax.map(lambda q: jax.lax.map(lambda k: mask(q, k).any((1, 2)), k_at), q_at)
    return seen.any(-1)  # over B only now: one message where rows lie on several devices


def _itinerary(visits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n m] -> (for each of n the blocks to visit, those not to be visited last; how many)."""
    return jnp.argsort(~visits, axis=1), visits.sum(1)


def _take(blocks, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), blocks)


@jax.custom_vjp
def _attention(score: Score, q, k, v, q_at: Coords, k_at: Coords) -> jax.Array:
    return _forward(score, q, k, v, q_at, k_at)[0]


def _forward(score: Score, q, k, v, q_at: Coords, k_at: Coords):
    """(out [n B G M t K], what the backward pass needs)."""

    def of_queries(block):
        q, q_at, order, count = block

        def add_keys(i, carry):
            top, total, out = carry
            k_i, v_i, at_i = _take((k, v, k_at), order[i])
            logits = score(dot("BGMTK,BGSK->BGMTS", q, k_i), q_at, at_i)
            higher = jnp.maximum(top, logits.max(-1))
            shrink = jnp.exp(top - higher)
            weights = jnp.exp(logits - higher[..., None])
            added = dot("BGMTS,BGSK->BGMTK", weights.astype(v.dtype), v_i)
            return higher, total * shrink + weights.sum(-1), out * shrink[..., None] + added

        nothing = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (nothing + NEVER, nothing, jnp.zeros(q.shape, jnp.float32))
        top, total, out = jax.lax.fori_loop(0, count, add_keys, start)
        # Among hidden keys e^(NEVER - NEVER) was counted as 1; that is gone, times e^(NEVER - m),
        # as soon as a key is seen. Who has seen none gets 0, and with so large a sum, no gradient.
        is_seen = top > NEVER / 2
        out = jnp.where(is_seen[..., None], out / jnp.where(is_seen, total, 1)[..., None], 0)
        return out.astype(v.dtype), jnp.where(is_seen, top + jnp.log(total), -NEVER)

    visits = _visits(score.mask, q_at, k_at)
    made = jax.lax.map(of_queries, (q, q_at, *_itinerary(visits)))
    out, log_sum = checkpoint_name(made, ATTENDED)
    return out, (score, q, k, v, q_at, k_at, visits, out, log_sum)


def _backward(saved, d_out):
    """Gradients of the score's own arrays, and of q, k and v."""
    score, q, k, v, q_at, k_at, visits, out, log_sum = saved
    # Σ_s weight · d_weight of a query is d_out · out.
    inner = jnp.sum(d_out.astype(jnp.float32) * out, -1)  # [n B G M t]
    rows = (q, q_at, d_out, log_sum, inner)

    def of_keys(carry, block):
        k, v, k_at, order, count = block

        def add_queries(i, carry):
            d_q, d_score, d_k, d_v = carry
            q_i, at_i, d_out_i, log_sum_i, inner_i = _take(rows, order[i])

            def scored(score, logits):
                return score(logits, at_i, k_at)

            logits, back = jax.vjp(scored, score, dot("BGMTK,BGSK->BGMTS", q_i, k))
            weights = jnp.exp(logits - log_sum_i[..., None])
            d_weights = dot("BGMTK,BGSK->BGMTS", d_out_i, v)
            d_score_i, d_logits = back(weights * (d_weights - inner_i[..., None]))
            d_logits = d_logits.astype(q.dtype)
            d_q = d_q.at[order[i]].add(dot("BGMTS,BGSK->BGMTK", d_logits, k))
            d_k += dot("BGMTS,BGMTK->BGSK", d_logits, q_i)
            d_v += dot("BGMTS,BGMTK->BGSK", weights.astype(v.dtype), d_out_i)
            return d_q, jax.tree.map(jnp.add, d_score, d_score_i), d_k, d_v

        nothing = jnp.zeros(k.shape, jnp.float32)
        *carry, d_k, d_v = jax.lax.fori_loop(0, count, add_queries, (*carry, nothing, nothing))
        return tuple(carry), (d_k.astype(k.dtype), d_v.astype(v.dtype))

    start = (jnp.zeros(q.shape, jnp.float32), jax.tree.map(jnp.zeros_like, score))
    columns = (k, v, k_at, *_itinerary(visits.T))
    (d_q, d_score), (d_k, d_v) = jax.lax.scan(of_keys, start, columns)
    return d_score, d_q.astype(q.dtype), d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
