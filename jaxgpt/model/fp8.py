"""Matrix products in float8, which GPUs multiply at twice the speed of bfloat16.

Inputs and weights are rounded to float8_e4m3fn (4 bits of exponent, 3 of mantissa), output
gradients to float8_e5m2, which has more range; products accumulate in float32. Each tensor is first
divided by a scale that brings its largest number just below the maximum of the format. The scale
is a power of two, computed from the tensor itself (current scaling). So there is no state, nothing
overflows, and scaling is exact: a number is rounded to the same value whatever else is in its
tensor (the whole prompt or one new token, the batch or the shard of one device), except for numbers
2^13 times smaller than the largest (2^28 among gradients), which underflow gradually.

GPUs support it in hardware from Ada and Hopper on. Elsewhere it is the same arithmetic and no
faster; a compiler that widens products may leave out the rounding.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3 (the formats and their uses).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

EXPONENT_BITS = 0x7F800000  # mask of the exponent bits of a float32
MIN_SCALE = 2.0**-60  # so that the product of two scales is a normal number, even for zeros

# On Hopper, DEFAULT accumulates in the tensor core, with fewer bits than float32; HIGHEST promotes
# partial sums to float32 at intervals. Gradients need that: they are sums over all tokens.
FORWARD_PRECISION, BACKWARD_PRECISION = lax.Precision.DEFAULT, lax.Precision.HIGHEST

# Saved for the backward pass: recomputing a scale would read the tensor once more.
SCALE_NAME = "scale"


class Quantized(NamedTuple):
    """A float8 tensor: `values` times `scale`."""

    values: jax.Array  # float8
    scale: jax.Array  # float32 [], a power of two


def quantize(x: jax.Array, dtype) -> Quantized:
    """Quantize x, with its largest number between half the maximum of `dtype` and the maximum.

    If x has an infinity or NaN, every product of it is NaN.
    """
    largest = jnp.max(jnp.abs(x), initial=0.0).astype(jnp.float32)
    bits = lax.bitcast_convert_type(largest / float(jnp.finfo(dtype).max), jnp.int32)
    power = lax.bitcast_convert_type(
        bits & EXPONENT_BITS, jnp.float32
    )  # power of two, rounded down
    scale = checkpoint_name(jnp.maximum(2 * power, MIN_SCALE), SCALE_NAME)
    return Quantized((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


def dot_quantized(a: Quantized, b: Quantized, contracted, precision, dtype) -> jax.Array:
    """Contract pairs of dimensions of two quantized tensors, in `dtype`.

    XLA lowers a dot to a float8 product of cuBLASLt or Triton only if its operands are float8
    themselves; operands that are widened and scaled first may be multiplied in bfloat16. cuBLASLt
    takes a scale per tensor, and XLA fuses the multiplication of the output into it.
    """
    dims = (contracted, ((), ()))
    y = lax.dot_general(a.values, b.values, dims, precision, preferred_element_type=dtype)
    return y * (a.scale * b.scale).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    """Contract `axes` dimensions: x [... inputs] · w [inputs outputs] -> [... outputs]."""
    return _forward(x, w, axes)[0]


def _forward(x, w, axes):
    x8, w8 = quantize(x, jnp.float8_e4m3fn), quantize(w, jnp.float8_e4m3fn)
    contracted = range(x.ndim - axes, x.ndim), range(axes)
    return dot_quantized(x8, w8, contracted, FORWARD_PRECISION, x.dtype), (x8, w8)


def _backward(axes, saved, d_y):
    x8, w8 = saved
    d8 = quantize(d_y, jnp.float8_e5m2)
    lead = x8.values.ndim - axes
    outputs = range(lead, d_y.ndim), range(axes, w8.values.ndim)
    d_x = dot_quantized(d8, w8, outputs, BACKWARD_PRECISION, d_y.dtype)
    d_w = dot_quantized(x8, d8, (range(lead), range(lead)), BACKWARD_PRECISION, d_y.dtype)
    return d_x, d_w


matmul.defvjp(_forward, _backward)
