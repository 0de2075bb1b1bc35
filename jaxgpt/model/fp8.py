"""Matrix products in floating-point numbers of one byte, which GPUs multiply at twice the speed.

What goes in and the weights are rounded to float8_e4m3fn (4 bits of exponent, 3 of mantissa), the
gradients that come back to float8_e5m2, which reaches further; products are summed in float32. A
tensor is divided before by a scale that brings its largest number just below the largest of the
format. The scale is a power of two and found in the tensor itself. So there is no state, nothing
overflows, and scaling is exact: a number is rounded to the same one whatever else is in its tensor
(the whole prompt or one new token, the batch or the part of one device), but for numbers 2^13 times
smaller than the largest (2^28 among gradients), which lose digits on their way to 0.

A GPU has units for it from Ada and Hopper on. Elsewhere it is the same arithmetic and no faster;
a compiler that widens products may leave out the rounding.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (the formats, and which is for what).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

EXPONENT = 0x7F800000  # the bits of a float32 that hold it
SMALLEST = 2.0**-60  # scale: the product of two is still a normal number, and zeros have one too

# On Hopper, DEFAULT sums in the matrix unit, with fewer bits than float32 has; HIGHEST takes out
# what was summed every now and then. Gradients need that: they are sums over all tokens.
FORWARD, BACKWARD = lax.Precision.DEFAULT, lax.Precision.HIGHEST

# What the backward pass is to keep: to find a scale anew is to read the tensor once more.
SCALE = "scale"


class Rounded(NamedTuple):
    """`values` times `scale`."""

    values: jax.Array  # float8
    scale: jax.Array  # float32 [], a power of two


def rounded(x: jax.Array, dtype) -> Rounded:
    """x in float8, the largest between a half and the whole of what `dtype` can hold.

    Where x has an infinity or NaN, every product of it is NaN.
    """
    largest = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
    bits = lax.bitcast_convert_type(largest / float(jnp.finfo(dtype).max), jnp.int32)
    below = lax.bitcast_convert_type(bits & EXPONENT, jnp.float32)  # the next power of two
    scale = checkpoint_name(jnp.maximum(2 * below, SMALLEST), SCALE)
    return Rounded((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


def multiplied(a: Rounded, b: Rounded, contracted, precision, out) -> jax.Array:
    """The product over pairs of dimensions, in dtype `out`.

    XLA makes a float8 product of cuBLASLt or Triton of a dot whose operands are float8 themselves;
    what is widened and scaled first it may as well multiply in bfloat16. cuBLASLt takes a scale
    for a tensor, and XLA gives it one that multiplies what comes out.
    """
    dims = (contracted, ((), ()))
    y = lax.dot_general(a.values, b.values, dims, precision, preferred_element_type=out)
    return y * (a.scale * b.scale).astype(out)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    """x [... inputs] · w [inputs outputs] -> [... outputs] in their dtype; inputs are `axes`."""
    return _forward(x, w, axes)[0]


def _forward(x, w, axes):
    x8, w8 = rounded(x, jnp.float8_e4m3fn), rounded(w, jnp.float8_e4m3fn)
    contracted = range(x.ndim - axes, x.ndim), range(axes)
    return multiplied(x8, w8, contracted, FORWARD, x.dtype), (x8, w8)


def _backward(axes, saved, d_y):
    x8, w8 = saved
    d8 = rounded(d_y, jnp.float8_e5m2)
    lead = x8.values.ndim - axes
    outputs = range(lead, d_y.ndim), range(axes, w8.values.ndim)
    d_x = multiplied(d8, w8, outputs, BACKWARD, d_y.dtype)
    d_w = multiplied(x8, d8, (range(lead), range(lead)), BACKWARD, d_y.dtype)
    return d_x, d_w


product.defvjp(_forward, _backward)
