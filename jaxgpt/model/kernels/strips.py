"""Exact attention in strips: a chunk of queries at a time attends to all its visible keys.

The weights of a strip [t S] are used while they are in the processor's cache, and since all keys
of a query are present, its softmax is the plain one. The keys of a strip end where a causal mask
does and begin where a window does, so that half of a long causal row is never computed. The
backward pass recomputes each strip. The loop over strips is unrolled in the program, so rows should
not be too long.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import ScoreMod, find_lookback
from jaxgpt.model.layers import ATTENTION_OUTPUT
from jaxgpt.model.masks import Causal, Coords
from jaxgpt.model.products import transpose_copy


def choose_strip_size(T: int) -> int:
    """Return the number of queries per strip, for T queries.

    Fewer waste less on a causal mask, more are faster each. On a CPU 32 was the fastest for T = 64,
    64 for 128 and 256, and 128 for 1024: about a square root.
    """
    return 4 << (T.bit_length() // 2)


def strips(
    q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod, size: int | None = None
) -> jax.Array:
    """As `dense`, in strips of `size` or `choose_strip_size(T)` queries. Returns [B T H K].

    A query without visible keys gets the average of the values of its strip.

    Source: Rabe & Staats 2021, arXiv:2112.05682, with all keys in one chunk.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    group = () if G == H else (H // G,)
    # Heads before tokens, as in `dense`. Without grouped heads their dimension is dropped: on four
    # dimensions XLA emits one fused CPU loop, from the logits to the average of values.
    q = jnp.moveaxis(score_mod.scale_queries(q).reshape(B, T, G, *group, K), 1, -2)  # [B G M T K]
    k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B G S K]
    out = _attention(size or choose_strip_size(T), score_mod, q, k, v, q_coords, k_coords)
    return jnp.moveaxis(out, -2, 1).reshape(B, T, H, K)


def iterate_strips(score_mod: ScoreMod, T: int, S: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each strip and the range of keys that they may attend to."""
    masks = score_mod.index_masks
    lookback = find_lookback(masks)
    lookback = max(S, T) if lookback is None else lookback  # cross-attention may have T > S
    lookahead = 0 if Causal() in masks else lookback
    for start in range(0, T, size):
        end = min(start + size, T)
        yield slice(start, end), slice(max(0, start - lookback), min(S, end + lookahead))


def _slice_coords(coords: Coords, span: slice) -> Coords:
    return jax.tree.map(lambda x: x[:, span], coords)


def _apply_score_mod(
    coords: tuple[Coords, Coords], score_mod: ScoreMod, logits: jax.Array
) -> jax.Array:
    return score_mod(logits, *coords)


def _add_at_keys(x: jax.Array, keys: slice, more: jax.Array) -> jax.Array:
    """Add `more` to x [B G K S] at some keys.

    `x.at[...].add` is a scatter, on which jaxlib 0.11 crashes inside `shard_map` on CPUs.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, x[..., keys] + more, keys.start, axis=3)


def _merge_query_heads(x: jax.Array) -> jax.Array:
    """Reshape x [B G M T K] -> [B G M*T K]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    if max(a.ndim, b.ndim) == 4:
        letters = letters.replace("M", "")
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _softmax_terms(
    score_mod: ScoreMod, logits: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return unnormalized weights [... T S], the sums of all and the weights of sinks [... T 1]."""
    peak = logits.max(-1, keepdims=True)
    if score_mod.sinks is None:
        weights = jnp.exp(logits - peak)
        return weights, weights.sum(-1, keepdims=True), None
    sinks = score_mod.shape_sinks(logits)
    peak = jnp.maximum(peak, sinks)
    weights, sinks = jnp.exp(logits - peak), jnp.exp(sinks - peak)
    return weights, weights.sum(-1, keepdims=True) + sinks, sinks


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    size: int, score_mod: ScoreMod, q, k, v, q_coords: Coords, k_coords: Coords
) -> jax.Array:
    """q [B G M T K], k and v [B G S K] -> [B G M T K]."""
    k_columns, out = transpose_copy(k), []
    for queries, keys in iterate_strips(score_mod, q.shape[-2], k.shape[-2], size):
        logits = _dot("BGMTK,BGKS->BGMTS", q[..., queries, :], k_columns[..., keys])
        coords = _slice_coords(q_coords, queries), _slice_coords(k_coords, keys)
        weights, total, _ = _softmax_terms(score_mod, score_mod(logits, *coords))
        values = _dot("BGMTS,BGSK->BGMTK", weights.astype(v.dtype), v[:, :, keys])
        out.append((values / total).astype(v.dtype))
    return jnp.concatenate(out, -2)


def _forward(size, *inputs):
    return checkpoint_name(_attention(size, *inputs), ATTENTION_OUTPUT), inputs


def _backward(size, saved, d_out):
    """Return gradients of the arrays of `score_mod`, and of q, k and v.

    Products are fused with sums over their rows, so the softmax's sum and its gradient's inner
    product are computed where they are needed, rather than once for all strips.
    """
    score_mod, q, k, v, q_coords, k_coords = saved
    k_columns, v_columns = transpose_copy(k), transpose_copy(v)
    d_score = jax.tree.map(jnp.zeros_like, score_mod)
    d_q, (d_k, d_v) = [], (jnp.zeros(x.shape, jnp.float32) for x in (k_columns, v_columns))
    for queries, keys in iterate_strips(score_mod, q.shape[-2], k.shape[-2], size):
        q_i, d_out_i = q[..., queries, :], d_out[..., queries, :]
        coords = _slice_coords(q_coords, queries), _slice_coords(k_coords, keys)
        logits = _dot("BGMTK,BGKS->BGMTS", q_i, k_columns[..., keys])
        logits, pull = jax.vjp(partial(_apply_score_mod, coords), score_mod, logits)
        weights, total, sinks = _softmax_terms(score_mod, logits)
        weights = weights / total
        d_weights = _dot("BGMTK,BGKS->BGMTS", d_out_i, v_columns[..., keys])
        inner = jnp.sum(weights * d_weights, -1, keepdims=True)
        d_score_i, d_logits = pull(weights * (d_weights - inner))
        d_logits = d_logits.astype(q.dtype)
        d_score = jax.tree.map(jnp.add, d_score, d_score_i)
        if sinks is not None:
            d_score = d_score.add_to_sinks(-inner * sinks / total)
        d_q.append(_dot("BGMTS,BGSK->BGMTK", d_logits, k[:, :, keys]).astype(q.dtype))
        weights, d_logits = (
            _merge_query_heads(weights.astype(v.dtype)),
            _merge_query_heads(d_logits),
        )
        q_i, d_out_i = (transpose_copy(_merge_query_heads(x)) for x in (q_i, d_out_i))
        d_k = _add_at_keys(d_k, keys, _dot("BGKT,BGTS->BGKS", q_i, d_logits))
        d_v = _add_at_keys(d_v, keys, _dot("BGKT,BGTS->BGKS", d_out_i, weights))
    d_k, d_v = (transpose_copy(x.astype(k.dtype)) for x in (d_k, d_v))
    return d_score, jnp.concatenate(d_q, -2), d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
