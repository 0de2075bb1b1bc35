"""Who may look at whom.

A mask is a pure predicate on the coordinates of a query token and a key token. Causality,
windows, strides, packing, padding and unfilled cache slots are all the same kind of thing, and `&`
and `|` combine them. A dense kernel evaluates a mask once on [T, S]; a blockwise kernel evaluates
the very same mask on one block of keys at a time; a fast kernel recognises the masks it knows,
since they are values that can be compared.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig


class Coords(NamedTuple):
    """Where tokens stand."""

    position: jax.Array  # int32 [B T], counted from the start of the token's document
    document: jax.Array  # int32 [B T], which document; 0 = no token here
    prefix: jax.Array | None = None  # int32 [B T], how many tokens of the document all may see

    def check(self, tokens: jax.Array) -> "Coords":
        """Asserts that there is one coordinate per token of [B T]."""
        chex.assert_rank(tokens, 2)
        chex.assert_shape([x for x in self if x is not None], tokens.shape)
        return self


def apart(q: Coords, k: Coords) -> jax.Array:
    """How far a key lies behind a query: int32 [B T S]."""
    return q.position[:, :, None] - k.position[:, None, :]


class Mask:
    """(q at [B T], k at [B S]) -> bool [B T S]."""

    def __call__(self, q: Coords, k: Coords) -> jax.Array:
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@dataclass(frozen=True)
class And(Mask):
    """What both allow."""

    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)


@dataclass(frozen=True)
class Or(Mask):
    """What either allows."""

    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)


@dataclass(frozen=True)
class SameDocument(Mask):
    """Tokens see their own document, and nobody sees an empty slot."""

    def __call__(self, q, k):
        same = q.document[:, :, None] == k.document[:, None, :]
        return same & (k.document[:, None, :] > 0)


@dataclass(frozen=True)
class OneDocument(Mask):
    """A row is one document, to which all of its tokens belong, and nobody sees an empty slot.

    Slots are empty at the end of a row only, but in a cache. So positions are places in the row,
    and where nobody looks ahead there is nothing to hide.
    """

    def __call__(self, q, k):
        return (k.document > 0)[:, None, :]


@dataclass(frozen=True)
class Causal(Mask):
    """Tokens see themselves and what came before."""

    def __call__(self, q, k):
        return apart(q, k) >= 0


@dataclass(frozen=True)
class Window(Mask):
    """Tokens see less than `size` tokens away: with `Causal`, themselves and size - 1 before.

    Source: Beltagy et al. 2020 (Longformer), arXiv:2004.05150, section 3.1; Jiang et al. 2023
    (Mistral), arXiv:2310.06825, section 2.
    """

    size: int

    def __call__(self, q, k):
        return jnp.abs(apart(q, k)) < self.size


@dataclass(frozen=True)
class Strided(Mask):
    """Tokens see every stride-th token, counted from themselves.

    Source: Child et al. 2019 (Sparse Transformer), arXiv:1904.10509, section 4.3, A(2).
    """

    stride: int

    def __call__(self, q, k):
        return apart(q, k) % self.stride == 0


@dataclass(frozen=True)
class Blocks(Mask):
    """Blocks of tokens see neighbouring blocks, the first ones, and a few at random.

    The random blocks are a fixed function of the number of the block; behind a causal mask they are
    drawn from the blocks before, so that they are not wasted on what can not be seen.

    Args:
        size: tokens of a block.
        near: blocks in the neighbourhood, with its own.
        anchors: first blocks, which see all and which all see.
        random: blocks drawn for each block.
        total: blocks to draw from; 0 draws from those before.

    Source: Zaheer et al. 2020 (BigBird), arXiv:2007.14062, section 2 and appendix D.
    """

    size: int
    near: int
    anchors: int
    random: int
    total: int

    def __call__(self, q, k):
        here, there = q.position[:, :, None] // self.size, k.position[:, None, :] // self.size
        sees = jnp.abs(here - there) <= self.near // 2
        sees |= (there < self.anchors) | (here < self.anchors)
        for draw in range(self.random):
            chosen = _scramble(here, draw) % (self.total or jnp.maximum(here, 1))
            sees |= there == chosen
        return sees


def _scramble(x: jax.Array, salt: int) -> jax.Array:
    """Whole numbers into other ones that look random, int32 >= 0; the same everywhere.

    Source: the finaliser of MurmurHash3, by Austin Appleby.
    """
    x = x.astype(jnp.uint32) + jnp.uint32((salt + 1) * 0x9E3779B9 & 0xFFFFFFFF)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((x ^ (x >> 16)) >> 1).astype(jnp.int32)


@dataclass(frozen=True)
class InPrefix(Mask):
    """All tokens see the prefix of their document.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1, "prefix LM".
    """

    def __call__(self, q, k):
        if k.prefix is None:
            raise ValueError("model.pattern=prefix: Coords.prefix says how long the prefixes are.")
        return (k.position < k.prefix)[:, None, :]


# --- patterns: (config, the mask of the stack's direction, None for both) -> what it allows -----


def full(cfg: ModelConfig, direction: Mask | None) -> Mask | None:
    """All there is in the stack's direction."""
    return direction


def window(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """The nearest tokens."""
    return _both(direction, Window(cfg.sparse.window))


def strided(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """The last `stride` tokens and every stride-th one: both heads of the paper in one."""
    stride = cfg.sparse.stride
    return _both(direction, Window(stride) | Strided(stride))


def blocks(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """BigBird."""
    s = cfg.sparse
    total = 0 if direction else -(-cfg.context // s.block)
    return _both(direction, Blocks(s.block, s.near, s.anchors, s.random, total))


def prefix(cfg: ModelConfig, direction: Mask | None) -> Mask:
    """The prefix, and what came before."""
    return Causal() | InPrefix()


def _both(direction: Mask | None, mask: Mask) -> Mask:
    return direction & mask if direction else mask


PATTERNS = {
    "full": full,
    "window": window,
    "strided": strided,
    "blocks": blocks,
    "prefix": prefix,
}


DOCUMENTS: dict[str, Mask] = {"apart": SameDocument(), "joined": OneDocument()}


def layer_mask(cfg: ModelConfig, pattern: str, direction: str) -> Mask:
    """What a layer sees: its pattern, inside its own document."""
    allowed = PATTERNS[pattern](cfg, Causal() if direction == "causal" else None)
    return _both(allowed, DOCUMENTS[cfg.documents])
