"""Who may look at whom.

A mask is a pure predicate on the coordinates of a query token and a key token. Causality,
windows, packing, padding and unfilled cache slots are all the same kind of thing, and `all_of` and
`any_of` combine them. A dense kernel evaluates a mask once on [T, S]; a blockwise kernel
evaluates the very same mask on one block of keys at a time.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax


class Coords(NamedTuple):
    """Where tokens stand."""

    position: jax.Array  # int32 [B T], counted from the start of the token's document
    document: jax.Array  # int32 [B T], which document; 0 = no token here

    def check(self, tokens: jax.Array) -> "Coords":
        """Asserts that there is one coordinate per token of [B T]."""
        chex.assert_rank(tokens, 2)
        chex.assert_shape([self.position, self.document], tokens.shape)
        return self


Mask = Callable[[Coords, Coords], jax.Array]  # (q at [B T], k at [B S]) -> bool [B T S]


def same_document(q: Coords, k: Coords) -> jax.Array:
    """Tokens see their own document, and nobody sees an empty slot."""
    same = q.document[:, :, None] == k.document[:, None, :]
    return same & (k.document[:, None, :] > 0)


def causal(q: Coords, k: Coords) -> jax.Array:
    """Tokens see themselves and what came before."""
    return q.position[:, :, None] >= k.position[:, None, :]


def all_of(*masks: Mask) -> Mask:
    return lambda q, k: functools.reduce(operator.and_, (mask(q, k) for mask in masks))


def any_of(*masks: Mask) -> Mask:
    return lambda q, k: functools.reduce(operator.or_, (mask(q, k) for mask in masks))
