"""What optimizers remember, in 8 or 16 bits where 32 are not needed.

A moment in 8 bits is a code, and a float32 scale for each row, its largest entry. Steps between
codes are unequal: m = scale (c / 127)^2 with the sign of c, and v = scale (c / 255)^4, so that m
and sqrt(v), whose quotient moves a parameter, are resolved alike: finely where they are large,
and down to 1/16129 and 1/65025 of the largest. A v that is not 0 never becomes 0.

Rounding is stochastic: up or down, with chances that keep the mean. An average that moves by less
than half a step at a time would stand still if it went to the nearest one.

A row is the last axis, or axes, until there are 64 entries. Codes have the parameter's shape, and
scales the same with 1 for the row, so both lie on devices as the parameter does. Vectors (norms,
biases) stay float32.

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

MIN_ROW = 64  # entries that share a scale, whose bytes are then at most a 16th of the codes'
FIELDS = {"mu": False, "trace": False, "nu": True}  # where optax keeps moments: are they squares?
NONE = optax.MaskedNode()  # no scale


class Kept(NamedTuple):
    """The state of a rule whose moments are kept in fewer bits."""

    step: jax.Array  # int32 [], so that every step rounds differently
    state: Any  # the rule's own, with codes for moments
    scales: dict[str, Any]  # by field: trees like the parameters


class Format(NamedTuple):
    """How a float32 array is kept. `is_square` tells v from m."""

    pack: Callable  # (x, random uint32 like x, axes of a row, is_square) -> (code, scale)
    unpack: Callable  # (code, scale, is_square) -> x


def keep(rule: optax.GradientTransformation, moments: str, letters) -> optax.GradientTransformation:
    """The same rule, with the moments of matrices kept as `moments` says.

    A step computes in float32 what it always did; only what it leaves for the next is rounded.

    Args:
        rule: its state is a NamedTuple, with moments in the fields of FIELDS.
        moments: a name of MOMENTS.
        letters: the letters of every parameter.
    """
    form = MOMENTS[moments]
    if form is None:
        return rule

    def pack(step, state):
        numbers = itertools.count()

        def write(field: str, x, letters: str):
            if ">" not in letters:
                return x, NONE
            random = _random(x.shape, step, next(numbers))
            return form.pack(x, random, _row(x.shape, letters), FIELDS[field])

        codes, scales = {}, {}
        for field in (field for field in FIELDS if field in state._fields):
            tree = getattr(state, field)
            pairs = _map(partial(write, field), tree, letters)
            codes[field] = _map(lambda _, pair: pair[0], tree, pairs)
            scales[field] = _map(lambda _, pair: pair[1], tree, pairs)
        return Kept(step, state._replace(**codes), scales)

    def unpack(kept: Kept):
        def read(field: str, code, scale, letters: str):
            return form.unpack(code, scale, FIELDS[field]) if ">" in letters else code

        return kept.state._replace(**{
            field: _map(partial(read, field), getattr(kept.state, field), scales, letters)
            for field, scales in kept.scales.items()
        })  # fmt: skip

    def init(params):
        state = rule.init(params)
        kept = jax.eval_shape(pack, jnp.int32(0), state)
        # Moments begin as zeros, and so do their codes: XLA would take seconds to find that out.
        kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
        others = {name: x for name, x in state._asdict().items() if name not in FIELDS}
        return kept._replace(state=kept.state._replace(**others))

    def update(grads, kept: Kept, params=None):
        updates, state = rule.update(grads, unpack(kept), params)
        return updates, pack(kept.step + 1, state)

    return optax.GradientTransformation(init, update)


def _map(f: Callable, tree, *rest):
    """jax.tree.map, but a tree without leaves stays as it is.

    optax.tree.map_params puts one in place of the parameters, to learn which parts of the state
    are like them.
    """
    return jax.tree.map(f, tree, *rest) if jax.tree.leaves(tree) else tree


def _row(shape, letters: str) -> tuple[int, ...]:
    """The last axes, until they have MIN_ROW entries. What is stacked (L, E) is in no row.

    >>> _row((12, 768, 12, 64), "LD>HK"), _row((12, 384, 12, 32), "LD>HK"), _row((9, 8), "E>A")
    ((3,), (3, 2), (1,))
    """
    stacked = len(letters) - len(letters.lstrip("LE"))
    axes: tuple[int, ...] = ()
    while math.prod(shape[a] for a in axes) < MIN_ROW and len(axes) < len(shape) - stacked:
        axes += (len(shape) - 1 - len(axes),)
    return axes


# --- randomness ---


def _random(shape, step: jax.Array, number: int) -> jax.Array:
    """uint32 of this shape, others for each step and number; the same on any number of devices.

    A function of the place, so that it is part of the loop that rounds. `jax.random` would make
    an array: as large as the moments in float32.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    salt = _scramble(_scramble(step.astype(jnp.uint32)) + jnp.uint32(number))
    return _scramble(place ^ salt)


def _scramble(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which each bit of x tips every bit with chance 1/2.

    Source: Wellons 2018, "Prospecting for hash functions", lowbias32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


# --- formats ---

CODES = {False: (127, 2, jnp.int8), True: (255, 4, jnp.uint8)}  # is a square? -> steps, power


def pack_int8(x, random, axes: tuple[int, ...], is_square: bool):
    """x float32 -> (codes like x, scale with 1 for `axes`), with E[unpack(codes)] = x.

    A row with NaN or inf comes back without a finite number in it, or with few.
    """
    steps, power, dtype = CODES[is_square]
    scale = jnp.max(jnp.abs(x), axes, keepdims=True)
    share = jnp.where(scale > 0, jnp.abs(x) / scale, 0) * float(steps**power)
    root = jnp.sqrt(jnp.sqrt(share)) if is_square else jnp.sqrt(share)
    low = jnp.floor(root)
    chance = (share - low**power) / ((low + 1) ** power - low**power)
    code = low + (random.astype(jnp.float32) * 2.0**-32 < chance)
    least = is_square & (x != 0)  # a v of 0 in place of a small one would make the step leap
    code = jnp.clip(code, least, steps)
    return (code * jnp.sign(x)).astype(dtype), scale


def unpack_int8(code, scale, is_square: bool):
    """The inverse of `pack_int8`, but for the rounding."""
    steps, power, _ = CODES[is_square]
    c = code.astype(jnp.float32)
    return scale * (jnp.sign(c) * c**power / float(steps**power))


def pack_bfloat16(x, random, axes, is_square):
    """x float32 -> bfloat16 with the mean of x: of the 16 bits cut off, what carries is random."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (random >> 16)
    carried = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), carried, x).astype(jnp.bfloat16), NONE


def unpack_bfloat16(code, scale, is_square):
    return code.astype(jnp.float32)


MOMENTS: dict[str, Format | None] = {
    "float32": None,
    "bfloat16": Format(pack_bfloat16, unpack_bfloat16),
    "int8": Format(pack_int8, unpack_int8),
}
