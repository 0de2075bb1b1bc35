"""Exact attention in strips: some queries at a time meet all the keys that they may see.

The weights of a strip [t S] are used while they are near the processor, and since all keys of a
query are there, its softmax is the plain one. A strip ends where a causal mask does, and begins
where a window does, so that half of a long causal row is never computed. The backward pass computes
each strip again. Strips stand in the program one after the other, so rows should not be too long.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.kernels.score import Score, behind
from jaxgpt.model.layers import ATTENDED, columns
from jaxgpt.model.masks import Causal, Coords


def height(T: int) -> int:
    """How many of T queries make a strip.

    Fewer waste less on a causal mask, more are quicker. On a CPU 32 was the fastest for T = 64, 64
    for 128 and 256, and 128 for 1024, and a root goes through these.
    """
    return 4 << (T.bit_length() // 2)


def strips(q, k, v, q_at: Coords, k_at: Coords, score: Score, size: int | None = None) -> jax.Array:
    """As `dense`, in strips of `size` queries, else of `height`. Returns [B T H K].

    A query that sees nothing gets the average of the values of its strip.

    Source: Rabe & Staats 2021, arXiv:2112.05682, with all keys in one chunk.
    """
    (B, T, H, K), G = q.shape, k.shape[2]
    shared = () if G == H else (H // G,)
    # Heads before tokens, as in `dense`. Where no heads share a key there is no dimension for it:
    # of four dimensions XLA makes one fused loop on CPU, from the logits to the average of values.
    q = jnp.moveaxis(score.queries(q).reshape(B, T, G, *shared, K), 1, -2)  # [B G M T K]
    k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B G S K]
    out = _attention(size or height(T), score, q, k, v, q_at, k_at)
    return jnp.moveaxis(out, -2, 1).reshape(B, T, H, K)


def spans(score: Score, T: int, S: int, size: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each strip, and the keys that they may see."""
    known = score.by_place
    back = behind(known)
    back = S if back is None else back
    ahead = 0 if Causal() in known else back
    for start in range(0, T, size):
        end = min(start + size, T)
        yield slice(start, end), slice(max(0, start - back), min(S, end + ahead))


def _at(at: Coords, span: slice) -> Coords:
    return jax.tree.map(lambda x: x[:, span], at)


def _scored(at: tuple[Coords, Coords], score: Score, logits: jax.Array) -> jax.Array:
    return score(logits, *at)


def _added(x: jax.Array, keys: slice, more: jax.Array) -> jax.Array:
    """x [B G K S] with `more` added at some keys.

    `x.at[...].add` is a scatter, on which jaxlib 0.11 dies inside `shard_map` on CPUs.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, x[..., keys] + more, keys.start, axis=3)


def _rows(x: jax.Array) -> jax.Array:
    """x [B G M T K] -> [B G M*T K]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _dot(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    if max(a.ndim, b.ndim) == 4:
        letters = letters.replace("M", "")
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _weights(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [... T S] of the softmax, times their sums, and the sums [... T 1]."""
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(size: int, score: Score, q, k, v, q_at: Coords, k_at: Coords) -> jax.Array:
    """q [B G M T K], k and v [B G S K] -> [B G M T K]."""
    k_columns, out = columns(k), []
    for queries, keys in spans(score, q.shape[-2], k.shape[-2], size):
        logits = _dot("BGMTK,BGKS->BGMTS", q[..., queries, :], k_columns[..., keys])
        weights, total = _weights(score(logits, _at(q_at, queries), _at(k_at, keys)))
        values = _dot("BGMTS,BGSK->BGMTK", weights.astype(v.dtype), v[:, :, keys])
        out.append((values / total).astype(v.dtype))
    return jnp.concatenate(out, -2)


def _forward(size, *given):
    return checkpoint_name(_attention(size, *given), ATTENDED), given


def _backward(size, saved, d_out):
    """Gradients of the score's own arrays, and of q, k and v.

    Products are fused with sums over their rows, so the softmax has its total and its gradient's
    inner product taken where they are needed, rather than once for all strips.
    """
    score, q, k, v, q_at, k_at = saved
    k_columns, v_columns = columns(k), columns(v)
    d_score = jax.tree.map(jnp.zeros_like, score)
    d_q, (d_k, d_v) = [], (jnp.zeros(x.shape, jnp.float32) for x in (k_columns, v_columns))
    for queries, keys in spans(score, q.shape[-2], k.shape[-2], size):
        q_i, d_out_i = q[..., queries, :], d_out[..., queries, :]
        at = _at(q_at, queries), _at(k_at, keys)
        logits = _dot("BGMTK,BGKS->BGMTS", q_i, k_columns[..., keys])
        logits, back = jax.vjp(partial(_scored, at), score, logits)
        weights, total = _weights(logits)
        weights = weights / total
        d_weights = _dot("BGMTK,BGKS->BGMTS", d_out_i, v_columns[..., keys])
        inner = jnp.sum(weights * d_weights, -1, keepdims=True)
        d_score_i, d_logits = back(weights * (d_weights - inner))
        d_logits = d_logits.astype(q.dtype)
        d_score = jax.tree.map(jnp.add, d_score, d_score_i)
        d_q.append(_dot("BGMTS,BGSK->BGMTK", d_logits, k[:, :, keys]).astype(q.dtype))
        weights, d_logits = _rows(weights.astype(v.dtype)), _rows(d_logits)
        d_k = _added(d_k, keys, _dot("BGKT,BGTS->BGKS", columns(_rows(q_i)), d_logits))
        d_v = _added(d_v, keys, _dot("BGKT,BGTS->BGKS", columns(_rows(d_out_i)), weights))
    d_k, d_v = (columns(x.astype(k.dtype)) for x in (d_k, d_v))
    return d_score, jnp.concatenate(d_q, -2), d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
