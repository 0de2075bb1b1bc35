"""Quantized weights: integers of 8 or 4 bits, and a scale for each group of them.

    w[i, o] ≈ values[i, o] * scales[group of i, o]

A `QuantizedArray` stands in the tree of parameters in place of an array. It is a pytree of two
arrays, so that scanning, sharding and donating treat it as any parameter; `astype` gives the
weights that it stands for, in a dtype. Only products read it (see `model.products`).

Rounding is symmetric: the largest magnitude of a group is 127 or 7 steps, and zero stays zero. A
group is the inputs that one output adds up, all of them ("per output channel") or so many in a row.

Source: Dettmers et al. 2022 (LLM.int8()), arXiv:2208.07339, section 2; Frantar et al. 2022 (GPTQ),
arXiv:2210.17323, section 4, for groups.
"""

import dataclasses
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

LEVELS = {8: 127, 4: 7}  # the largest integer, by the bits of one
# bfloat16 has the range of float32, and a group of 32 costs half a bit a weight. Integers are
# rounded for the scale as it is stored, so its own rounding moves no weight by more than a step.
SCALE_DTYPE = jnp.bfloat16


class QuantizedArray(struct.PyTreeNode):
    """Weights [... inputs outputs], quantized in groups along the inputs.

    Attributes:
        values: int8 [... groups size outputs]; of 4 bits [... groups size/2 outputs], where a byte
            holds an input of the group's first half in its low bits, one of its second half above.
        scales: bfloat16 [... groups outputs].
        bits: of one integer, 8 or 4.
        inputs: sizes of the input dimensions, which `values` has as groups and size.
        output_dims: how many dimensions the outputs have.
    """

    values: jax.Array
    scales: jax.Array
    bits: int = struct.field(pytree_node=False)
    inputs: tuple[int, ...] = struct.field(pytree_node=False)
    output_dims: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights that it stands for."""
        shape, first = self.values.shape, self.group_axis
        return (*shape[:first], *self.inputs, *shape[first + 2 :])

    @property
    def ndim(self) -> int:
        """The number of dimensions of the weights."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes in memory, scales included."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def group_axis(self) -> int:
        """The dimension of `values` that counts groups."""
        return self.values.ndim - self.output_dims - 2

    @property
    def groups(self) -> int:
        """How many groups the inputs are divided into; 1 is per output channel."""
        return self.values.shape[self.group_axis]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Return the weights as an array of NumPy, for those who analyze them."""
        return np.asarray(self.astype(jnp.float32), dtype)

    def astype(self, dtype) -> jax.Array:
        """Return the weights [... inputs outputs] in a dtype, computed in that dtype."""
        axis = self.group_axis
        values = self.values if self.bits == 8 else unpack_nibbles(self.values, axis + 1)
        weights = values.astype(dtype) * jnp.expand_dims(self.scales.astype(dtype), axis + 1)
        return weights.reshape(self.shape)

    def take_rows(self, rows: jax.Array, dtype) -> jax.Array:
        """Return rows [...] of a table [V D] in a dtype, without the others: [... D]."""
        taken = self.replace(values=self.values[rows], scales=self.scales[rows])
        return taken.astype(dtype)


def is_quantized(x: Any) -> TypeGuard[QuantizedArray]:
    """Return whether x is a `QuantizedArray`, as `is_leaf` of `jax.tree.map`."""
    return isinstance(x, QuantizedArray)


def pack_nibbles(values: jax.Array, axis: int) -> jax.Array:
    """Pack int8 values of -8 to 7, two a byte: the first half of `axis` in the low bits."""
    low, high = jnp.split(values, 2, axis)
    return (low & 0x0F) | (high << 4)


def unpack_nibbles(packed: jax.Array, axis: int) -> jax.Array:
    """Invert `pack_nibbles`: shifts of int8 keep the sign."""
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis)


def choose_group(size: int, group: int, bits: int) -> int:
    """Return the inputs of a group for so many inputs: `group`, or what divides them.

    >>> choose_group(768, 128, 4), choose_group(576, 128, 4), choose_group(30, 32, 4)
    (128, 64, 30)
    """
    common = math.gcd(size, group) if group else size
    return common if common >= min(16, size) else size


def quantize_array(w: jax.Array, bits: int, group: int, first: int, count: int) -> QuantizedArray:
    """Quantize weights, each to the nearest of its group's steps.

    Args:
        w: [... inputs outputs], float32 or bfloat16.
        bits: 8 or 4. Four bits for an odd number of inputs have no pairs: they get 8.
        group: inputs that share a scale, 0 for all of them; see `choose_group`.
        first, count: the dimensions of w that are inputs: `count` of them from `first` on.

    Returns:
        The quantized weights; each is within half a step of its own.
    """
    lead, inputs = w.shape[:first], w.shape[first : first + count]
    outputs, total = w.shape[first + count :], math.prod(inputs)
    bits = bits if total % 2 == 0 else 8
    size = choose_group(total, group, bits)
    size = size if bits == 8 or size % 2 == 0 else total
    grouped = w.astype(jnp.float32).reshape(*lead, total // size, size, *outputs)
    largest = jnp.max(jnp.abs(grouped), axis=first + 1)
    scales = (largest / LEVELS[bits]).astype(SCALE_DTYPE)
    step = jnp.expand_dims(scales.astype(jnp.float32), first + 1)
    steps = jnp.round(grouped / jnp.where(step > 0, step, 1.0))
    values = jnp.clip(steps, -LEVELS[bits], LEVELS[bits]).astype(jnp.int8)
    values = values if bits == 8 else pack_nibbles(values, first + 1)
    return QuantizedArray(values, scales, bits, inputs, len(outputs))


def quantize_last(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantize x [... K] to (int8 [... K], a scale for each row [...])."""
    q = quantize_array(x, 8, 0, first=x.ndim - 1, count=1)
    return q.values[..., 0, :], q.scales[..., 0]


def label_dims(w: QuantizedArray, letters: str) -> QuantizedArray:
    """Return the letters of `values` and `scales` from those of the weights, "LD>HK".

    One dimension is called after the first input, so that it is sharded as that is: the groups, or
    the inputs if there is one group.
    """
    letters = letters.replace(">", "")
    first, dims = w.group_axis, len(w.inputs)
    lead, name, outputs = letters[:first], letters[first], letters[first + dims :]
    groups = f"{name}." if w.groups > 1 else f".{name}"
    changes: Any = {"values": lead + groups + outputs, "scales": lead + name + outputs}
    return dataclasses.replace(w, **changes)
