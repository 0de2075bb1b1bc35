"""Attention logits, the same for every kernel: scale, soft cap, bias, mask and sinks."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial

from jaxgpt.model.masks import DOCUMENT_MASKS, And, Coords, Mask, Window

# Finite, so that a query without visible keys (padding) gives a harmless value instead of NaN.
MASKED_LOGIT = -1e30


@struct.dataclass
class ScoreMod:
    """What is applied to the raw logits q·k before the softmax: scale, soft cap, bias, mask.

    A sink is the logit of one more key, whose value is 0, for all queries of a head: it takes a
    part of the weights. Source: OpenAI 2025 (gpt-oss), arXiv:2508.10925, section 2.2; Xiao et al.
    2023, arXiv:2309.17453. Dropout acts on the weights, in `dense` only.

    `is_self` is True if queries and keys are the same tokens in the same order, not a cache.
    """

    mask: Mask = struct.field(pytree_node=False)
    # (q coords, k coords) -> [B or 1 H T S], a pytree of float arrays so that it may hold weights
    bias: Partial | None = None
    scale: float | None = struct.field(pytree_node=False, default=None)  # None = 1 / √K
    softcap: float | None = struct.field(pytree_node=False, default=None)
    sinks: jax.Array | None = None  # float32 [H]
    dropout: float = struct.field(pytree_node=False, default=0.0)  # rate, on the weights
    dropout_key: jax.Array | None = None
    is_self: bool = struct.field(pytree_node=False, default=False)

    @property
    def index_masks(self) -> frozenset[Mask]:
        """The intersected masks, if they can be evaluated on row indices instead of positions.

        The two differ by a constant within a document, where positions count up by one.
        """
        masks = split_conjunction(self.mask)
        return masks if self.is_self and masks & {*DOCUMENT_MASKS.values()} else frozenset()

    def scale_queries(self, q: jax.Array) -> jax.Array:
        """Scale q [... K] so that q·k are the logits."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def __call__(self, logits: jax.Array, q_coords: Coords, k_coords: Coords) -> jax.Array:
        """Apply soft cap, bias and mask to logits: float32 [B G M T S], or [B H T S]."""
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if self.bias is not None:
            bias = self.bias(q_coords, k_coords)  # [B or 1 H T S]
            logits = logits + bias.reshape(-1, *logits.shape[1:])
        # Added, since selecting by `where` takes three times as long on a CPU: a float32 logit
        # vanishes next to 1e30.
        masked = jnp.where(self.mask(q_coords, k_coords), 0, MASKED_LOGIT)
        return logits + jnp.expand_dims(masked, range(1, logits.ndim - 2))

    def shape_sinks(self, logits: jax.Array) -> jax.Array:
        """Return the sinks as [G M 1 1], or [H 1 1], to go with logits [B G M T S] or [B H T S]."""
        assert self.sinks is not None
        return self.sinks.reshape(*logits.shape[1:-2], 1, 1)

    def add_to_sinks(self, gradient: jax.Array) -> "ScoreMod":
        """Add [B G M T 1], or [B H T 1], to the sinks, summed over rows and queries."""
        assert self.sinks is not None
        total = gradient.sum((0, -2, -1)).reshape(-1)
        return replace(self, sinks=self.sinks + total)

    def compute_weights(self, logits: jax.Array) -> jax.Array:
        """Return the softmax of the final logits with the sinks, after dropout."""
        if self.sinks is not None:
            sinks = jnp.broadcast_to(self.shape_sinks(logits), (*logits.shape[:-1], 1))
            logits = jnp.concatenate([logits, sinks], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)
        if self.sinks is not None:
            weights = weights[..., :-1]
        if self.dropout:
            assert self.dropout_key is not None
            is_kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, weights.shape)
            weights = jnp.where(is_kept, weights / (1 - self.dropout), 0)
        return weights


Kernel = Callable[[jax.Array, jax.Array, jax.Array, Coords, Coords, ScoreMod], jax.Array]


def split_conjunction(mask: Mask) -> frozenset[Mask]:
    """Return the masks that `mask` is an intersection of, for kernels that match known masks."""
    if isinstance(mask, And):
        return split_conjunction(mask.a) | split_conjunction(mask.b)
    return frozenset([mask])


def select_windows(masks: frozenset[Mask]) -> frozenset[Window]:
    """Return the windows among intersected masks."""
    return frozenset(mask for mask in masks if isinstance(mask, Window))


def find_lookback(masks: frozenset[Mask]) -> int | None:
    """Return how many tokens back the narrowest window reaches; None without a window."""
    return min((window.size - 1 for window in select_windows(masks)), default=None)
