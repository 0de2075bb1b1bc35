"""What every kernel is told: how raw logits are scaled, capped, biased and masked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from jaxgpt.model.masks import DOCUMENTS, And, Coords, Mask, Window

# Finite, so that a row that sees nothing (padding) gives something harmless instead of NaN.
NEVER = -1e30


@struct.dataclass
class Score:
    """What happens to the raw logits q·k before the softmax: scale, soft cap, bias, mask.

    `is_self` says that queries and keys are the same tokens in the same order, not a cache.
    """

    mask: Mask = struct.field(pytree_node=False)
    # (q at, k at) -> [B or 1 H T S], a pytree of float arrays so that it may hold weights
    bias: Partial | None = None
    scale: float | None = struct.field(pytree_node=False, default=None)  # None = 1 / √K
    softcap: float | None = struct.field(pytree_node=False, default=None)
    is_self: bool = struct.field(pytree_node=False, default=False)

    @property
    def by_place(self) -> frozenset[Mask]:
        """The masks that all have to agree, if places in the row are as far apart as positions.

        They are among the tokens of one document of one row, where they count up by one.
        """
        masks = parts(self.mask)
        return masks if self.is_self and masks & {*DOCUMENTS.values()} else frozenset()

    def queries(self, q: jax.Array) -> jax.Array:
        """q [... K], scaled so that q·k are the logits."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def __call__(self, logits: jax.Array, q_at: Coords, k_at: Coords) -> jax.Array:
        """logits: float32 [B G M T S], or [B H T S]."""
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.bias is not None:
            bias = self.bias(q_at, k_at)  # [B or 1 H T S]
            logits = logits + bias.reshape(-1, *logits.shape[1:])
        # Added, not chosen by `where`, which takes three times as long on a CPU: next to 1e30 a
        # float32 logit is nothing.
        hidden = jnp.where(self.mask(q_at, k_at), 0, NEVER)
        return logits + jnp.expand_dims(hidden, range(1, logits.ndim - 2))


Kernel = Callable[[jax.Array, jax.Array, jax.Array, Coords, Coords, Score], jax.Array]


def parts(mask: Mask) -> frozenset[Mask]:
    """The masks that all have to agree, so that a fast kernel can look for those it knows."""
    return parts(mask.a) | parts(mask.b) if isinstance(mask, And) else frozenset([mask])


def windows(masks: frozenset[Mask]) -> frozenset[Window]:
    """Those among masks that all have to agree that are windows."""
    return frozenset(mask for mask in masks if isinstance(mask, Window))


def behind(masks: frozenset[Mask]) -> int | None:
    """How many tokens back their narrowest window lets a query see; None without a window."""
    return min((window.size - 1 for window in windows(masks)), default=None)
