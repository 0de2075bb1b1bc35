"""Linear maps. The one place that decides how a matrix product is laid out."""

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
from jaxgpt.dims import weight
from jaxgpt.model import fp8
from jaxgpt.sharding import is_divided, platform

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Names (`checkpoint_name`) of what is not cheap to compute again.
ATTENDED = "attended"  # what an attention kernel gives, and what it needs for its backward pass
LOGITS = "logits"  # of attention, where a kernel has them whole
RECEIVED = "received"  # from other devices
STATISTICS = "statistics"  # of a norm: a number or two for each token

# A GPU's compiler computes a norm's gradient in one pass where it has these; where they are to be
# computed again it writes the product of both factors, float32 [N D], and reads it for the sum.
KEEPS_STATISTICS = ("gpu",)


def keeping(*names: str) -> Callable[..., bool]:
    """A policy for `jax.checkpoint`: only what has such a name is kept, and what cuDNN has made.

    cuDNN's kernel can not give its sums a name, but it is a primitive of its own.
    """
    is_named = jax.checkpoint_policies.save_only_these_names(*names)
    is_statistic = jax.checkpoint_policies.save_only_these_names(STATISTICS)

    def is_kept(primitive, *shapes, **how) -> bool:
        is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
        is_kept_here = platform() in KEEPS_STATISTICS and is_statistic(primitive, *shapes, **how)
        return is_cudnn or is_kept_here or is_named(primitive, *shapes, **how)

    return is_kept


KEPT = keeping(ATTENDED, LOGITS, RECEIVED, fp8.SCALE)
_has_guard = contextvars.ContextVar("has_guard", default=False)


def again(f: Callable) -> Callable:
    """Keep for the backward pass of f what came in and what has a name; compute the rest again.

    It is for steps that cost less than memory for what they make. Inside a scan nothing can be
    merged across iterations, so that a guard against it is needed only where `guarding` sets it.
    """

    @functools.wraps(f)
    def run(*given):
        return jax.checkpoint(f, prevent_cse=_has_guard.get(), policy=KEPT)(*given)

    return run


@contextlib.contextmanager
def guarding(has_guard: bool):
    """Keep the compiler from merging what `again` computes again with what was computed before."""
    before = _has_guard.set(has_guard)
    try:
        yield
    finally:
        _has_guard.reset(before)


normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def into_residual(cfg: ModelConfig):
    """Maps back into the residual stream start smaller the deeper the model.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return nn.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)


def columns(x: jax.Array) -> jax.Array:
    """x [... N K] -> [... K N], also in memory.

    CPUs multiply xᵀ at two thirds of the speed, so a copy pays. The barrier keeps the compiler from
    moving the transposition into the product.
    """
    return jax.lax.optimization_barrier(x.swapaxes(-1, -2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum(letters, a, b) in float32, out of factors in the dtype of a, forward and backward.

    Left to itself, jax multiplies the gradient, which is float32, in float32: on a GPU that is at
    half the speed of bfloat16. The gradient of b has b's own dtype.
    """
    return jnp.einsum(letters, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _forward(letters, a, b):
    return wide_product(letters, a, b), (a, b)


def _backward(letters, saved, d_out):
    a, b = saved
    left, right, out = letters.replace("->", ",").split(",")
    d_out = d_out.astype(a.dtype)
    d_a = wide_product(f"{out},{right}->{left}", d_out, b)
    if platform() == "cpu" and a.ndim == 2:  # see `columns`
        d_b = wide_product(f"{left[::-1]},{out}->{right}", columns(a), d_out)
    else:
        d_b = wide_product(f"{out},{left}->{right}", d_out, a)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


wide_product.defvjp(_forward, _backward)


@jax.custom_vjp
def flat_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [N I] · w [I O] -> [N O], in their dtype, with a gradient that suits CPUs."""
    return x @ w


def _flat_forward(x, w):
    return flat_product(x, w), (x, w)


def _flat_backward(saved, d_y):
    x, w = saved
    # xᵀ · d_y, where the smaller of the two is laid out anew. Without the barrier the compiler
    # would make (d_yᵀ · x)ᵀ one product, with both of its factors transposed.
    if x.size <= d_y.size:
        d_w = columns(x) @ d_y
    else:
        d_w = jax.lax.optimization_barrier(columns(d_y) @ x).T
    return d_y @ w.T, d_w


flat_product.defvjp(_flat_forward, _flat_backward)


def plain(x: jax.Array, w: jax.Array, inputs: int) -> jax.Array:
    """x [... inputs] · w [inputs outputs] -> [... outputs], in their dtype."""
    lead = x.shape[: x.ndim - inputs]
    if platform() == "cpu" and not (len(lead) > 1 and is_divided("T", x.shape[1])):
        # Two plain dimensions on either side: the same product on [B T D] takes 1.8 times as
        # long. But B and T that are both divided can not be made one without moving tokens.
        rows = math.prod(w.shape[:inputs])
        y = flat_product(x.reshape(-1, rows), w.reshape(rows, -1))
        return y.reshape(*lead, *w.shape[inputs:])
    # A TPU would copy q, k, v and the output to lay heads out side by side.
    return jnp.tensordot(x, w, axes=inputs)


PRODUCTS = {"plain": plain, "fp8": fp8.product}


def identity(x: jax.Array) -> jax.Array:
    return x


class Linear(nn.Module):
    """A linear map spelled by its letters: Linear(cfg, "D>HK") maps [B T D] to [B T H K].

    With `of` it maps of(*given). For the backward pass it keeps w and what is given, as they came:
    neither what `of` makes of it (see `again`), nor copies that are cast or laid out anew.
    """

    cfg: ModelConfig
    letters: str
    initial: nn.initializers.Initializer = normal

    @nn.compact
    def __call__(self, *given: jax.Array, of: Callable = identity) -> jax.Array:
        inputs, outputs = self.letters.split(">")
        w = weight(self, "w", self.letters, self.cfg.sizes, self.initial)
        product = PRODUCTS[self.cfg.products]

        @again
        def mapped(w, *given):
            x, w = of(*given), w.astype(given[0].dtype)
            chex.assert_shape(x, (*x.shape[: x.ndim - len(inputs)], *w.shape[: len(inputs)]))
            return product(x, w, len(inputs))

        y = mapped(w, *given)
        if self.cfg.bias:
            y = y + weight(self, "b", outputs, self.cfg.sizes, zeros).astype(y.dtype)
        return y
