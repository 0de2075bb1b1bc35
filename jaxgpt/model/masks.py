"""Attention masks.

A mask is a pure predicate on the coordinates of a query token and a key token. Causality,
windows, strides, packing, padding and unfilled cache slots are all masks, and `&` and `|`
combine them. A dense kernel evaluates a mask once on [T, S]; a blockwise kernel evaluates
the same mask on one block of keys at a time; an accelerated kernel matches the masks that it
supports, since masks are values that can be compared.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig


class Coords(NamedTuple):
    """Positions and segments of tokens."""

    positions: jax.Array  # int32 [B T], counted from the start of the token's document
    segment_ids: jax.Array  # int32 [B T], the document in its row; 0 = padding
    prefix: jax.Array | None = None  # int32 [B T], length of the document's bidirectional prefix

    def check(self, tokens: jax.Array) -> "Coords":
        """Assert that there is one coordinate per token of [B T], and return self."""
        chex.assert_rank(tokens, 2)
        chex.assert_shape([x for x in self if x is not None], tokens.shape)
        return self


def relative_position(q: Coords, k: Coords) -> jax.Array:
    """Return by how much a key precedes a query: int32 [B T S]."""
    return q.positions[:, :, None] - k.positions[:, None, :]


class Mask:
    """(q coords [B T], k coords [B S]) -> bool [B T S], True where q may attend to k."""

    def __call__(self, q: Coords, k: Coords) -> jax.Array:
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@dataclass(frozen=True)
class And(Mask):
    """The intersection of two masks."""

    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)


@dataclass(frozen=True)
class Or(Mask):
    """The union of two masks."""

    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)


@dataclass(frozen=True)
class SameSegment(Mask):
    """Attention within a document, and none to padding."""

    def __call__(self, q, k):
        is_same = q.segment_ids[:, :, None] == k.segment_ids[:, None, :]
        return is_same & (k.segment_ids[:, None, :] > 0)


@dataclass(frozen=True)
class OneSegment(Mask):
    """Attention to the whole row, which is treated as one document, and none to padding.

    Outside a cache, only the end of a row is padding. So positions are row indices, and under a
    causal mask nothing is left to mask.
    """

    def __call__(self, q, k):
        return (k.segment_ids > 0)[:, None, :]


@dataclass(frozen=True)
class Causal(Mask):
    """Attention to the token itself and those before it."""

    def __call__(self, q, k):
        return relative_position(q, k) >= 0


@dataclass(frozen=True)
class Window(Mask):
    """Attention to tokens less than `size` away: with `Causal`, to itself and size - 1 before.

    Source: Beltagy et al. 2020 (Longformer), arXiv:2004.05150, section 3.1; Jiang et al. 2023
    (Mistral), arXiv:2310.06825, section 2.
    """

    size: int

    def __call__(self, q, k):
        return jnp.abs(relative_position(q, k)) < self.size


@dataclass(frozen=True)
class SameChunk(Mask):
    """Attention within chunks of `size` tokens, counted from the start of the document.

    Source: Llama 4 (Meta 2025), its local layers, in its code.
    """

    size: int

    def __call__(self, q, k):
        return (q.positions // self.size)[:, :, None] == (k.positions // self.size)[:, None, :]


@dataclass(frozen=True)
class Strided(Mask):
    """Attention to every stride-th token, counted from the query.

    Source: Child et al. 2019 (Sparse Transformer), arXiv:1904.10509, section 4.3, A(2).
    """

    stride: int

    def __call__(self, q, k):
        return relative_position(q, k) % self.stride == 0


@dataclass(frozen=True)
class BlockSparse(Mask):
    """Block-sparse attention to neighboring blocks, the first ones, and a few random ones.

    The random blocks are a fixed function of the block index; under a causal mask they are drawn
    from earlier blocks, so that none is wasted on blocks that are masked.

    Args:
        size: tokens per block.
        near: blocks in the neighborhood, including the query's own.
        anchors: global blocks at the start, which attend to all and which all attend to.
        random: blocks drawn per query block.
        total: blocks to draw from; 0 draws from earlier blocks.

    Source: Zaheer et al. 2020 (BigBird), arXiv:2007.14062, section 2 and appendix D.
    """

    size: int
    near: int
    anchors: int
    random: int
    total: int

    def __call__(self, q, k):
        q_block = q.positions[:, :, None] // self.size
        k_block = k.positions[:, None, :] // self.size
        is_visible = jnp.abs(q_block - k_block) <= self.near // 2
        is_visible |= (k_block < self.anchors) | (q_block < self.anchors)
        for draw in range(self.random):
            drawn = _hash(q_block, draw) % (self.total or jnp.maximum(q_block, 1))
            is_visible |= k_block == drawn
        return is_visible


def _hash(x: jax.Array, salt: int) -> jax.Array:
    """Hash integers to pseudo-random int32 >= 0, the same on every platform.

    Source: the finalizer of MurmurHash3, by Austin Appleby.
    """
    x = x.astype(jnp.uint32) + jnp.uint32((salt + 1) * 0x9E3779B9 & 0xFFFFFFFF)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((x ^ (x >> 16)) >> 1).astype(jnp.int32)


@dataclass(frozen=True)
class InPrefix(Mask):
    """Attention to the prefix of the document.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1, "prefix LM".
    """

    def __call__(self, q, k):
        if k.prefix is None:
            raise ValueError(
                "model.pattern=prefix needs the prefix lengths in Coords.prefix, found None."
            )
        return (k.positions < k.prefix)[:, None, :]


# --- patterns: (config, the mask of the stack's direction, None for both) -> mask ---------------


def make_full_mask(cfg: ModelConfig, direction: Mask | None) -> Mask | None:
    """Return the mask of full attention in the stack's direction."""
    return direction


def make_window_mask(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """Return the mask of sliding-window attention."""
    return _intersect(direction, Window(cfg.sparse.window))


def make_chunked_mask(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """Return the mask of chunked attention."""
    return _intersect(direction, SameChunk(cfg.sparse.chunk))


def make_strided_mask(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """Return the last `stride` tokens and every stride-th one: both heads of the paper in one."""
    stride = cfg.sparse.stride
    return _intersect(direction, Window(stride) | Strided(stride))


def make_block_sparse_mask(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """Return the mask of BigBird."""
    s = cfg.sparse
    total = 0 if direction else -(-cfg.context // s.block)
    return _intersect(direction, BlockSparse(s.block, s.near, s.anchors, s.random, total))


def make_prefix_mask(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """Return the mask of a prefix LM: the prefix, and causal attention after it."""
    return Causal() | InPrefix()


def _intersect(direction: Mask | None, mask: Mask) -> Mask:
    return direction & mask if direction else mask


PATTERNS = {
    "full": make_full_mask,
    "window": make_window_mask,
    "chunked": make_chunked_mask,
    "strided": make_strided_mask,
    "blocks": make_block_sparse_mask,
    "prefix": make_prefix_mask,
}


DOCUMENT_MASKS: dict[str, Mask] = {"separate": SameSegment(), "joined": OneSegment()}


def make_layer_mask(cfg: ModelConfig, pattern: str, direction: str) -> Mask:
    """Return a layer's attention mask: its pattern, within documents."""
    allowed = PATTERNS[pattern](cfg, Causal() if direction == "causal" else None)
    return _intersect(allowed, DOCUMENT_MASKS[cfg.documents])
