"""Linear maps, initializers, and what is recomputed in the backward pass."""

import contextlib
import contextvars
import functools
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.backend import get_backend
from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model import fp8
from jaxgpt.model.lowrank import add_output, find_adapter, make_dropout_key
from jaxgpt.model.products import MATMULS, matmul_quantized
from jaxgpt.quantized_array import is_quantized
from jaxgpt.sharding import gather_param

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Names (`checkpoint_name`) of activations that are expensive to recompute.
ATTENTION_OUTPUT = "attended"  # of a kernel, with the residuals of its backward pass
ATTENTION_LOGITS = "logits"  # where a kernel materializes them
COMMUNICATED = "received"  # received from other devices
NORM_STATISTICS = "statistics"  # one or two numbers per token


def make_save_policy(*names: str) -> Callable[..., bool]:
    """Return a policy for `jax.checkpoint` that saves only these names and cuDNN's outputs.

    cuDNN's softmax statistics cannot be named, but its kernel is a primitive of its own.
    """
    is_named = jax.checkpoint_policies.save_only_these_names(*names)
    is_statistic = jax.checkpoint_policies.save_only_these_names(NORM_STATISTICS)

    def is_kept(primitive, *shapes, **params) -> bool:
        is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
        is_saved = is_named(primitive, *shapes, **params)
        if get_backend().use_saved_norm_statistics:
            is_saved = is_saved or is_statistic(primitive, *shapes, **params)
        return is_cudnn or is_saved

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


def compute_once(f: Callable, g: Callable, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return f(x) and g(x), elementwise functions of x, computed once however often they are used.

    Where the compiler would rather recompute them at every use, they are computed in a loop.
    """
    if not get_backend().use_loop_to_compute_once:
        return f(x), g(x)

    def compute(is_f):
        return jnp.where(is_f, f(x), g(x))

    y, z = jax.lax.map(compute, jnp.array([True, False]))
    return y, z


normal = nn.initializers.normal(0.02)
glorot = nn.initializers.glorot_uniform()
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def make_residual_init(cfg: ModelConfig):
    """Return the initializer of projections into the residual stream: smaller in deeper models.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return nn.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)


def identity(x: jax.Array) -> jax.Array:
    """Return x [...] unchanged."""
    return x


class Linear(nn.Module):
    """A linear map declared by its letters: Linear(cfg, "D>HK") maps [B T D] to [B T H K].

    With `input_fn` it maps input_fn(*inputs). For the backward pass it saves w and the inputs as
    passed: neither the output of `input_fn` (see `recompute`), nor cast or transposed copies. It
    has a bias if `site` is one of `cfg.bias_sites`, and adds the output of an adapter (see
    lowrank.py) if its parameters have one.
    """

    cfg: ModelConfig
    letters: str
    initial: nn.initializers.Initializer = normal
    site: str = "other"

    @nn.compact
    def __call__(self, *inputs: jax.Array, input_fn: Callable = identity) -> jax.Array:
        in_letters, out_letters = self.letters.split(">")
        w = declare_param(self, "w", self.letters, self.cfg.sizes, self.initial)
        multiply = MATMULS[self.cfg.products]
        adapter = find_adapter(self)
        key = make_dropout_key(self, adapter)

        @recompute
        def apply_matmul(w, adapter, key, *inputs):
            x, axes = input_fn(*inputs), len(in_letters)
            if is_quantized(w):
                y = matmul_quantized(x, w, axes, multiply)
                return add_output(y, adapter, x, axes, key)
            w = gather_param(w.astype(inputs[0].dtype), self.letters)
            chex.assert_shape(x, (*x.shape[: x.ndim - axes], *w.shape[:axes]))
            return add_output(multiply(x, w, axes), adapter, x, axes, key)

        y = apply_matmul(w, adapter, key, *inputs)
        if self.site in self.cfg.bias_sites:
            y = y + declare_param(self, "b", out_letters, self.cfg.sizes, zeros).astype(y.dtype)
        return y


def check_indices(indices, size: int, name: str):
    """Raise ValueError for an index of a table that is outside of it, where its value is known.

    JAX would read another row, or NaN, without a word. Under jit the values are not known, and
    nothing is checked.

    Args:
        indices: integers of any shape.
        size: rows of the table.
        name: what they are, such as "token id".
    """
    if isinstance(indices, jax.core.Tracer) or not getattr(indices, "is_fully_addressable", True):
        return
    values = np.asarray(indices)
    outside = values[(values < 0) | (values >= size)]
    if outside.size:
        raise ValueError(f"{name} {outside[0]} is outside of the model's table: 0 to {size - 1}.")


def check_token_ids(jitted):
    """Return a jitted function (cfg, params, tokens, ...) that checks its tokens before it runs."""

    @functools.wraps(jitted)
    def checked(cfg, params, tokens, *args, **kwargs):
        check_indices(tokens, cfg.vocab, "token id")
        return jitted(cfg, params, tokens, *args, **kwargs)

    return checked
