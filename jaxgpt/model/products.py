"""Matrix products: the one place that decides how they are laid out in memory.

Each is a plain product whose gradient has a layout, or a dtype, that XLA would not choose. Which
layout suits a platform is in `backend.py`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxgpt.backend import get_backend
from jaxgpt.model import fp8
from jaxgpt.sharding import is_sharded


def transpose_copy(x: jax.Array) -> jax.Array:
    """Transpose x [... N K] -> [... K N] in memory.

    The barrier keeps the compiler from fusing the transposition into a product.
    """
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute einsum(letters, a, b) in float32, of factors in a's dtype, forward and backward.

    By default JAX multiplies the float32 gradient in float32, which a GPU does at half the speed of
    bfloat16. The gradient of b has b's own dtype.
    """
    return jnp.einsum(letters, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _einsum_forward(letters, a, b):
    return einsum_float32(letters, a, b), (a, b)


def _einsum_backward(letters, saved, d_out):
    a, b = saved
    left, right, out = letters.replace("->", ",").split(",")
    d_out = d_out.astype(a.dtype)
    d_a = einsum_float32(f"{out},{right}->{left}", d_out, b)
    if get_backend().use_transposed_copies and a.ndim == 2:
        d_b = einsum_float32(f"{left[::-1]},{out}->{right}", transpose_copy(a), d_out)
    else:
        d_b = einsum_float32(f"{out},{left}->{right}", d_out, a)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


einsum_float32.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def matmul_2d(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply x [N I] · w [I O] -> [N O] in their dtype, with a gradient laid out for CPUs."""
    return x @ w


def _matmul_forward(x, w):
    return matmul_2d(x, w), (x, w)


def _matmul_backward(saved, d_y):
    x, w = saved
    # xᵀ · d_y, where the smaller of the two is copied. Without the barrier the compiler would
    # turn (d_yᵀ · x)ᵀ into one product with both factors transposed.
    if x.size <= d_y.size:
        d_w = transpose_copy(x) @ d_y
    else:
        d_w = jax.lax.optimization_barrier(transpose_copy(d_y) @ x).T
    return d_y @ w.T, d_w


matmul_2d.defvjp(_matmul_forward, _matmul_backward)


def matmul(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    """Contract `axes` dimensions: x [... inputs] · w [inputs outputs] -> [... outputs]."""
    batch_shape = x.shape[: x.ndim - axes]
    # B and T that are both sharded cannot be merged without moving tokens.
    is_mergeable = not (len(batch_shape) > 1 and is_sharded("T", x.shape[1]))
    if get_backend().use_flat_products and is_mergeable:
        size = math.prod(w.shape[:axes])
        y = matmul_2d(x.reshape(-1, size), w.reshape(size, -1))
        return y.reshape(*batch_shape, *w.shape[axes:])
    return jnp.tensordot(x, w, axes=axes)


MATMULS = {"plain": matmul, "fp8": fp8.matmul}
