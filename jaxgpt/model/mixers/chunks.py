"""Rows of tokens cut into chunks, so that the cost grows with the length and not with its square.

A chunk looks at itself and at its neighbours (`around`), or is told in a few numbers what stands
outside of it (`carried`). Chunks know nothing of documents: one may begin in the middle of a chunk
and end in the middle of another. n is the number of chunks, Q the tokens of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model.masks import Coords, Mask


@dataclass(frozen=True)
class Spans(Mask):
    """Documents are cut into spans of `size` tokens, from their start; tokens see the spans which
    begin `nearest` to `farthest` spans before their own. None: as far as there are any."""

    size: int
    nearest: int
    farthest: int | None

    def __call__(self, q, k):
        here, there = q.position[:, :, None] // self.size, k.position[:, None, :] // self.size
        sees = here - there >= self.nearest
        return sees if self.farthest is None else sees & (here - there <= self.farthest)


def cut(tree, size: int):
    """Leaves [B T ...] -> [B n Q ...]. The last chunk is filled with 0, which is no token."""

    def one(x):
        n = -(-x.shape[1] // size)
        wide = [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, wide).reshape(x.shape[0], n, size, *x.shape[2:])

    return jax.tree.map(one, tree)


def join(x: jax.Array, tokens: int) -> jax.Array:
    """[B n Q ...] -> [B T ...]: undoes `cut`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def around(tree, before: int, after: int = 0):
    """Leaves [B n Q ...] -> [B n (before + 1 + after)·Q ...]: chunks with their neighbours."""

    def one(x):
        n = x.shape[1]
        wide = jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([wide[:, i : i + n] for i in range(before + 1 + after)], axis=2)

    return jax.tree.map(one, tree)


def seen(mask: Mask, q: Coords, k: Coords) -> jax.Array:
    """A mask chunk by chunk: coordinates [B n T] and [B n S] -> bool [B n T S]."""
    rows = jax.vmap(mask, in_axes=1, out_axes=1)
    return rows(q, k)


def segments(at: Coords) -> jax.Array:
    """int32 [B n Q]: how many documents began in the row up to here; 0 is one begun before it."""
    begins = (at.position == 0) & (at.document > 0)
    return jnp.cumsum(begins.reshape(len(begins), -1), axis=1).reshape(begins.shape)


def edge(segment: jax.Array, reverse: bool = False) -> jax.Array:
    """[B n Q] -> [B n]: the document on that side of a chunk from which the next one goes on."""
    return segment[:, :, 0 if reverse else -1]


def carried(
    parts: Any,
    segment: jax.Array,
    merge: Callable[[Any, Any], Any],
    empty: Any,
    start: Any = None,
    reverse: bool = False,
):
    """What each chunk is told of the tokens before it (reverse: after it) of one document.

    Args:
        parts: leaves [B n ...], what each chunk tells of its tokens of the document at its `edge`.
        segment: [B n Q], see `segments`.
        merge: what two chunks of the same document tell together.
        empty: leaves [B ...], what is told of no token.
        start: leaves [B ...], what is told of document 0 before the row; None = `empty`.

    Returns:
        (told, of, end): leaves [B n ...], the documents [B n] they tell of, and what is told
        after the last chunk, leaves [B ...].
    """

    def step(before, now):
        (memory, of), (part, here) = before, now

        def keep(x, none):
            return jnp.where((of == here).reshape(-1, *[1] * (x.ndim - 1)), x, none)

        return (merge(jax.tree.map(keep, memory, empty), part), here), before

    first = (empty if start is None else start, jnp.zeros_like(segment[:, 0, 0]))
    each = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (parts, edge(segment, reverse)))
    (end, _), told = jax.lax.scan(step, first, each, reverse=reverse)
    told, of = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), told)
    return told, of, end
