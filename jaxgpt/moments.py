"""Optimizer moments quantized to 8 or 16 bits.

An 8-bit moment is a code per entry and a float32 scale per row, the row's largest magnitude.
Quantization is nonuniform: m = scale (c / 127)^2 with the sign of c, and v = scale (c / 255)^4, so
that m and sqrt(v), whose quotient updates a parameter, are resolved alike: finely where they are
large, and down to 1/16129 and 1/65025 of the largest entry. A nonzero v never becomes 0.

Rounding is stochastic and unbiased. With rounding to nearest, a moving average that changes by
less than half a quantization step at a time would never change.

A row is the last axis, or the last axes until they hold 64 entries. Codes have the parameter's
shape, and scales the same with size 1 along the row, so both are sharded like the parameter.
Vectors (norms, biases) stay float32.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MIN_ROW_ENTRIES = 64  # that share a scale: scales take at most a 16th of the codes' bytes
MOMENT_FIELDS = {"mu": False, "trace": False, "nu": True}  # of optax's states -> is it a square?
NO_SCALE = optax.MaskedNode()


class QuantizedState(NamedTuple):
    """The state of an update rule with quantized moments."""

    step: jax.Array  # int32 [], so that every step rounds differently
    state: Any  # the rule's own, with codes in place of moments
    scales: dict[str, Any]  # by field: trees like the parameters


class Format(NamedTuple):
    """How a float32 array is stored. `is_square` is true for v, false for m."""

    pack: Callable  # (x, random uint32 like x, axes of a row, is_square) -> (code, scale)
    unpack: Callable  # (code, scale, is_square) -> x


def quantize_moments(
    rule: optax.GradientTransformation, moments: str, letters
) -> optax.GradientTransformation:
    """Wrap an update rule so that its moments of matrices are stored in a given format.

    A step still computes in float32; only the moments that it stores for the next are rounded.

    Args:
        rule: its state is a NamedTuple, with moments in the fields of MOMENT_FIELDS.
        moments: a key of MOMENT_FORMATS.
        letters: the letters of every parameter.
    """
    moment_format = MOMENT_FORMATS[moments]
    if moment_format is None:
        return rule

    def pack(step, state):
        numbers = itertools.count()

        def quantize(field: str, x, letters: str):
            if ">" not in letters:
                return x, NO_SCALE
            random = _draw_bits(x.shape, step, next(numbers))
            return moment_format.pack(
                x, random, _find_row_axes(x.shape, letters), MOMENT_FIELDS[field]
            )

        codes, scales = {}, {}
        for field in (field for field in MOMENT_FIELDS if field in state._fields):
            tree = getattr(state, field)
            pairs = _map_nonempty(partial(quantize, field), tree, letters)
            codes[field] = _map_nonempty(lambda _, pair: pair[0], tree, pairs)
            scales[field] = _map_nonempty(lambda _, pair: pair[1], tree, pairs)
        return QuantizedState(step, state._replace(**codes), scales)

    def unpack(quantized: QuantizedState):
        def dequantize(field: str, code, scale, letters: str):
            return (
                moment_format.unpack(code, scale, MOMENT_FIELDS[field]) if ">" in letters else code
            )

        return quantized.state._replace(**{
            field: _map_nonempty(
                partial(dequantize, field), getattr(quantized.state, field), scales, letters
            )
            for field, scales in quantized.scales.items()
        })  # fmt: skip

    def init(params):
        state = rule.init(params)
        quantized = jax.eval_shape(pack, jnp.int32(0), state)
        # Moments start as zeros, and so do their codes: XLA would take seconds to compute that.
        quantized = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), quantized)
        others = {name: x for name, x in state._asdict().items() if name not in MOMENT_FIELDS}
        return quantized._replace(state=quantized.state._replace(**others))

    def update(grads, quantized: QuantizedState, params=None):
        updates, state = rule.update(grads, unpack(quantized), params)
        return updates, pack(quantized.step + 1, state)

    return optax.GradientTransformation(init, update)


def _map_nonempty(f: Callable, tree, *rest):
    """Apply jax.tree.map, but return a tree without leaves unchanged.

    optax.tree.map_params passes one in place of the parameters, to find which parts of the state
    have their structure.
    """
    return jax.tree.map(f, tree, *rest) if jax.tree.leaves(tree) else tree


def _find_row_axes(shape, letters: str) -> tuple[int, ...]:
    """Return the last axes that hold MIN_ROW_ENTRIES entries, without stacked axes (L, E).

    >>> _find_row_axes((12, 768, 12, 64), "LD>HK"), _find_row_axes((12, 384, 12, 32), "LD>HK")
    ((3,), (3, 2))
    >>> _find_row_axes((9, 8), "E>A")
    (1,)
    """
    stacked = len(letters) - len(letters.lstrip("LE"))
    axes: tuple[int, ...] = ()
    while math.prod(shape[a] for a in axes) < MIN_ROW_ENTRIES and len(axes) < len(shape) - stacked:
        axes += (len(shape) - 1 - len(axes),)
    return axes


# --- randomness ---


def _draw_bits(shape, step: jax.Array, number: int) -> jax.Array:
    """Draw uint32 of this shape for a step and array number, on any number of devices alike.

    A hash of each entry's index, so that XLA fuses it with the rounding. `jax.random` would
    materialize an array as large as the moments in float32.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    salt = _hash_bits(_hash_bits(step.astype(jnp.uint32)) + jnp.uint32(number))
    return _hash_bits(index ^ salt)


def _hash_bits(x: jax.Array) -> jax.Array:
    """Permute uint32 so that each bit of x flips every bit of the result with probability 1/2.

    Source: Wellons 2018, "Prospecting for hash functions", lowbias32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


# --- formats ---

CODES = {False: (127, 2, jnp.int8), True: (255, 4, jnp.uint8)}  # is_square -> steps, power, dtype


def pack_int8(x, random, axes: tuple[int, ...], is_square: bool):
    """Quantize x float32 to (codes like x, scale of size 1 along `axes`); E[unpack(codes)] = x.

    A row with NaN or inf unpacks to few finite numbers, or none.
    """
    steps, power, dtype = CODES[is_square]
    scale = jnp.max(jnp.abs(x), axes, keepdims=True)
    ratio = jnp.where(scale > 0, jnp.abs(x) / scale, 0) * float(steps**power)
    root = jnp.sqrt(jnp.sqrt(ratio)) if is_square else jnp.sqrt(ratio)
    low = jnp.floor(root)
    probability = (ratio - low**power) / ((low + 1) ** power - low**power)
    code = low + (random.astype(jnp.float32) * 2.0**-32 < probability)
    min_code = is_square & (x != 0)  # a small v rounded to 0 would make the update explode
    code = jnp.clip(code, min_code, steps)
    return (code * jnp.sign(x)).astype(dtype), scale


def unpack_int8(code, scale, is_square: bool):
    """Invert `pack_int8`, up to its rounding."""
    steps, power, _ = CODES[is_square]
    c = code.astype(jnp.float32)
    return scale * (jnp.sign(c) * c**power / float(steps**power))


def pack_bfloat16(x, random, axes, is_square):
    """Round x float32 stochastically to bfloat16: add random low bits, then truncate."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
    carried = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), carried, x).astype(jnp.bfloat16), NO_SCALE


def unpack_bfloat16(code, scale, is_square):
    """Return a bfloat16 array as float32."""
    return code.astype(jnp.float32)


MOMENT_FORMATS: dict[str, Format | None] = {
    "float32": None,
    "bfloat16": Format(pack_bfloat16, unpack_bfloat16),
    "int8": Format(pack_int8, unpack_int8),
}
