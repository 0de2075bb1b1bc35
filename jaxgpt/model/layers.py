"""Linear maps: the one place that decides how matrix products are laid out."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model import fp8
from jaxgpt.sharding import get_platform, is_sharded

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Names (`checkpoint_name`) of activations that are expensive to recompute.
ATTENTION_OUTPUT = "attended"  # of a kernel, with the residuals of its backward pass
ATTENTION_LOGITS = "logits"  # where a kernel materializes them
COMMUNICATED = "received"  # received from other devices
NORM_STATISTICS = "statistics"  # one or two numbers per token

# With the statistics at hand, XLA's GPU compiler computes a norm's gradient in one pass over its
# inputs; without, it writes a float32 [N D] product and reads it again for the sum.
SAVES_NORM_STATISTICS = ("gpu",)


def make_save_policy(*names: str) -> Callable[..., bool]:
    """Return a policy for `jax.checkpoint` that saves only these names and cuDNN's outputs.

    cuDNN's softmax statistics cannot be named, but its kernel is a primitive of its own.
    """
    is_named = jax.checkpoint_policies.save_only_these_names(*names)
    is_statistic = jax.checkpoint_policies.save_only_these_names(NORM_STATISTICS)

    def is_kept(primitive, *shapes, **params) -> bool:
        is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
        is_saved_here = get_platform() in SAVES_NORM_STATISTICS
        is_saved_here = is_saved_here and is_statistic(primitive, *shapes, **params)
        return is_cudnn or is_saved_here or is_named(primitive, *shapes, **params)

    return is_kept


SAVED = make_save_policy(ATTENTION_OUTPUT, ATTENTION_LOGITS, COMMUNICATED, fp8.SCALE_NAME)
_prevents_cse = contextvars.ContextVar("prevents_cse", default=False)


def recompute(f: Callable) -> Callable:
    """Save f's inputs and the named values for the backward pass and recompute the rest.

    It is for steps that cost less than the memory of their outputs. Inside a scan,
    common-subexpression elimination does not cross iterations: `prevent_cse` sets the guard against
    it where layers are unrolled.
    """

    @functools.wraps(f)
    def run(*inputs):
        return jax.checkpoint(f, prevent_cse=_prevents_cse.get(), policy=SAVED)(*inputs)

    return run


@contextlib.contextmanager
def prevent_cse(is_guarded: bool):
    """Keep the compiler from merging what `recompute` recomputes with the forward pass."""
    before = _prevents_cse.set(is_guarded)
    try:
        yield
    finally:
        _prevents_cse.reset(before)


normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def make_residual_init(cfg: ModelConfig):
    """Return the initializer of projections into the residual stream: smaller in deeper models.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return nn.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)


def transpose_copy(x: jax.Array) -> jax.Array:
    """Transpose x [... N K] -> [... K N] in memory.

    CPUs multiply xᵀ at two thirds of the speed, so a copy pays. The barrier keeps the compiler from
    fusing the transposition into the product.
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
    if get_platform() == "cpu" and a.ndim == 2:  # see `transpose_copy`
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
    if get_platform() == "cpu" and not (len(batch_shape) > 1 and is_sharded("T", x.shape[1])):
        # Two dimensions on either side: the same product on [B T D] takes 1.8 times as long. But
        # B and T that are both sharded cannot be merged without moving tokens.
        size = math.prod(w.shape[:axes])
        y = matmul_2d(x.reshape(-1, size), w.reshape(size, -1))
        return y.reshape(*batch_shape, *w.shape[axes:])
    # A TPU would copy q, k, v and the output to make heads contiguous.
    return jnp.tensordot(x, w, axes=axes)


MATMULS = {"plain": matmul, "fp8": fp8.matmul}


def identity(x: jax.Array) -> jax.Array:
    """Return x [...] unchanged."""
    return x


class Linear(nn.Module):
    """A linear map declared by its letters: Linear(cfg, "D>HK") maps [B T D] to [B T H K].

    With `input_fn` it maps input_fn(*inputs). For the backward pass it saves w and the inputs as
    passed: neither the output of `input_fn` (see `recompute`), nor cast or transposed copies.
    """

    cfg: ModelConfig
    letters: str
    initial: nn.initializers.Initializer = normal

    @nn.compact
    def __call__(self, *inputs: jax.Array, input_fn: Callable = identity) -> jax.Array:
        in_letters, out_letters = self.letters.split(">")
        w = declare_param(self, "w", self.letters, self.cfg.sizes, self.initial)
        multiply = MATMULS[self.cfg.products]

        @recompute
        def apply_matmul(w, *inputs):
            x, w = input_fn(*inputs), w.astype(inputs[0].dtype)
            axes = len(in_letters)
            chex.assert_shape(x, (*x.shape[: x.ndim - axes], *w.shape[:axes]))
            return multiply(x, w, axes)

        y = apply_matmul(w, *inputs)
        if self.cfg.bias:
            y = y + declare_param(self, "b", out_letters, self.cfg.sizes, zeros).astype(y.dtype)
        return y
