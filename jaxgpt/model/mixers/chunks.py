"""Rows of tokens split into chunks, so that the cost is linear in the length, not quadratic.

A chunk attends to itself and its neighbors (`gather_neighbors`), or receives a summary of fixed
size of the tokens outside it (`carry_across_chunks`). Chunks are independent of documents: one may
begin in the middle of a chunk and end in the middle of another. n is the number of chunks, Q the
tokens of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model.masks import Coords, Mask


@dataclass(frozen=True)
class BlockBand(Mask):
    """A block-banded mask: documents are split into blocks of `size` tokens, from their start, and
    a token attends to the blocks `nearest` to `farthest` before its own (None = no limit)."""

    size: int
    nearest: int
    farthest: int | None

    def __call__(self, q, k):
        q_block, k_block = (
            q.positions[:, :, None] // self.size,
            k.positions[:, None, :] // self.size,
        )
        distance = q_block - k_block
        mask = distance >= self.nearest
        return mask if self.farthest is None else mask & (distance <= self.farthest)


def split_chunks(tree, size: int):
    """Split leaves [B T ...] into chunks [B n Q ...]; the last is padded with 0 (no token)."""

    def split(x):
        n = -(-x.shape[1] // size)
        padding = [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(x.shape[0], n, size, *x.shape[2:])

    return jax.tree.map(split, tree)


def join_chunks(x: jax.Array, tokens: int) -> jax.Array:
    """Join chunks [B n Q ...] to rows [B T ...], the inverse of `split_chunks`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def gather_neighbors(tree, before: int, after: int = 0):
    """Extend chunks [B n Q ...] by their neighbors: [B n (before + 1 + after)·Q ...]."""

    def gather(x):
        n = x.shape[1]
        padded = jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([padded[:, i : i + n] for i in range(before + 1 + after)], axis=2)

    return jax.tree.map(gather, tree)


def mask_chunks(mask: Mask, q: Coords, k: Coords) -> jax.Array:
    """Evaluate a mask per chunk: coordinates [B n T] and [B n S] -> bool [B n T S]."""
    return jax.vmap(mask, in_axes=1, out_axes=1)(q, k)


def index_documents(coords: Coords) -> jax.Array:
    """Number the documents of a row from 1: int32 [B n Q]; 0 = one that began before the row."""
    is_first = (coords.positions == 0) & (coords.segment_ids > 0)
    return jnp.cumsum(is_first.reshape(len(is_first), -1), axis=1).reshape(is_first.shape)


def select_edge(document_index: jax.Array, reverse: bool = False) -> jax.Array:
    """Select the document at the last (reverse: first) token of each chunk: [B n Q] -> [B n]."""
    return document_index[:, :, 0 if reverse else -1]


def carry_across_chunks(
    summaries: Any,
    document_index: jax.Array,
    merge: Callable[[Any, Any], Any],
    empty: Any,
    start: Any = None,
    reverse: bool = False,
):
    """Summarize, for each chunk, the tokens of one document before it (reverse: after it).

    Args:
        summaries: leaves [B n ...], of each chunk's tokens of the document at its edge, see
            `select_edge`.
        document_index: [B n Q], see `index_documents`.
        merge: combines the summaries of two chunks of the same document.
        empty: leaves [B ...], the summary of no tokens.
        start: leaves [B ...], the summary of document 0 before the row; None = `empty`.

    Returns:
        (carries, documents, end): the summaries, leaves [B n ...], the index [B n] of the document
        that each summarizes, and the summary after the last chunk, leaves [B ...].
    """

    def step(carry, chunk):
        (carried, document), (summary, next_document) = carry, chunk

        def keep(x, none):
            is_same = (document == next_document).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(is_same, x, none)

        merged = merge(jax.tree.map(keep, carried, empty), summary)
        return (merged, next_document), carry

    first = (empty if start is None else start, jnp.zeros_like(document_index[:, 0, 0]))
    chunks = (summaries, select_edge(document_index, reverse))
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks)
    (end, _), carries = jax.lax.scan(step, first, chunks, reverse=reverse)
    carries, documents = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), carries)
    return carries, documents, end
