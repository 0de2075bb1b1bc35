"""Matrix products: the one place that decides how they are laid out in memory.

Each is a plain product whose gradient has a layout, or a dtype, that XLA would not choose. Which
layout suits a platform is in `backend.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.backend import get_backend
from jaxgpt.model import fp8
from jaxgpt.quantized_array import QuantizedArray
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


Matmul = Callable[[jax.Array, jax.Array, int], jax.Array]
MAX_BLOCK_WEIGHTS = 2**19  # weights that are dequantized at once: 2 MiB of float32
MAX_DECODED_ROWS = 64  # of a product inside the loop of decoding


def matmul_quantized(x: jax.Array, w: QuantizedArray, axes: int, multiply: Matmul) -> jax.Array:
    """Contract `axes` dimensions: x [... inputs] · w [inputs outputs] -> [... outputs].

    Args:
        multiply: the product for weights that are dequantized as a whole, of MATMULS.
    """
    rows = math.prod(x.shape[: x.ndim - axes])
    if rows <= get_backend().max_rows_of_blocks and multiply is matmul:
        blocks = count_blocks(w.values.shape[_find_block_axis(w)], w.size)
        if blocks > 1:
            return _matmul_in_blocks(x, w, axes, blocks)
    if rows <= MAX_DECODED_ROWS:  # else the compiler would dequantize all weights before the loop
        w = jax.lax.optimization_barrier(w)
    return multiply(x, w.astype(x.dtype), axes)


def count_blocks(length: int, weights: int) -> int:
    """Return in how many equal parts, 2 or more, a dimension is divided for its blocks to be small.

    It is 1 if the length has no fitting divisor.

    >>> count_blocks(576, 576 * 1536), count_blocks(8, 64), count_blocks(7919, 2**20)
    (2, 2, 1)
    """
    wanted = max(2, -(-weights // MAX_BLOCK_WEIGHTS))
    return next((n for n in range(wanted, 8 * wanted) if length % n == 0), 1)


def _find_block_axis(w: QuantizedArray) -> int:
    """Return the dimension of `values` that blocks divide: groups, or inputs if there is one."""
    return w.group_axis if w.groups > 1 else w.group_axis + 1


def _matmul_in_blocks(x: jax.Array, w: QuantizedArray, axes: int, blocks: int) -> jax.Array:
    """Multiply as `matmul_quantized`, dequantizing some inputs at a time, and add in float32.

    A CPU keeps a block in its cache, where dequantizing costs little: for [1 4096] · [4096 4096] it
    takes 2.0 ms, as the product with float32 weights does, and 10 ms with all of w at once. And of
    a model whose layers are unrolled, XLA would hold all dequantized weights at the same time.
    """
    batch_shape, size = x.shape[: x.ndim - axes], math.prod(w.inputs) // blocks
    # A block of one packed group has inputs of its first half and, above them, of its second half.
    halves = 2 if w.groups == 1 and w.bits == 4 else 1
    flat = x.reshape(-1, halves, blocks, size // halves).swapaxes(1, 2).reshape(-1, blocks, size)

    def add_block(i, total):
        block = take_block(w, i, blocks).astype(x.dtype).reshape(size, -1)
        part = jax.lax.dynamic_index_in_dim(flat, i, axis=1, keepdims=False)
        return total + jnp.dot(part, block, preferred_element_type=jnp.float32)

    outputs = w.shape[axes:]
    zero = jnp.zeros((flat.shape[0], math.prod(outputs)), jnp.float32)
    y = jax.lax.fori_loop(0, blocks, add_block, zero)
    return y.astype(x.dtype).reshape(*batch_shape, *outputs)


def take_block(w: QuantizedArray, i: jax.Array, blocks: int) -> QuantizedArray:
    """Return the i-th of `blocks` equal parts of the inputs of w, which are one dimension then."""
    axis = _find_block_axis(w)
    size = w.values.shape[axis] // blocks
    values = jax.lax.dynamic_slice_in_dim(w.values, i * size, size, axis)
    scales = w.scales
    if w.groups > 1:
        scales = jax.lax.dynamic_slice_in_dim(scales, i * size, size, w.group_axis)
    inputs = (math.prod(w.inputs) // blocks,)
    return dataclasses.replace(w, values=values, scales=scales, inputs=inputs)


def score_quantized(hidden: jax.Array, table: QuantizedArray) -> jax.Array:
    """Compute hidden [... D] · table [V D] -> float32 [... V], some of V at a time on a CPU."""
    rows, (V, D) = hidden.reshape(-1, hidden.shape[-1]), table.shape
    is_divided = len(rows) <= get_backend().max_rows_of_blocks
    blocks = count_blocks(V, V * D) if is_divided else 1

    def score_block(part: QuantizedArray) -> jax.Array:
        weights = part.astype(hidden.dtype)
        return jnp.einsum("ND,VD->NV", rows, weights, preferred_element_type=jnp.float32)

    if blocks == 1:
        scores = score_block(table)
    else:
        parts = jax.tree.map(lambda x: x.reshape(blocks, V // blocks, *x.shape[1:]), table)
        scores = jnp.moveaxis(jax.lax.map(score_block, parts), 0, 1)
    return scores.reshape(*hidden.shape[:-1], V)


MATMULS = {"plain": matmul, "fp8": fp8.matmul}
