"""A linear map spelled in letters is the einsum of its letters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from jaxgpt.dims import split
from jaxgpt.model.layers import DTYPES, Linear, into_residual

B, T = 2, 5


def mapped(letters, bias=False, dtype=jnp.float32):
    """(x, w, b, Linear's outcome) with random values."""
    cfg = tiny(bias=bias)
    inputs, outputs = letters.split(">")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, T, *(cfg.sizes[c] for c in inputs))), dtype)
    module = Linear(cfg, letters)
    params, names = split(module.init(jax.random.key(0), x)["params"])
    assert names == {"w": letters} | ({"b": outputs} if bias else {})
    params = {k: jnp.asarray(rng.normal(size=p.shape), p.dtype) for k, p in params.items()}
    return x, params["w"], params.get("b", 0.0), jax.jit(module.apply)({"params": params}, x)


@pytest.mark.parametrize("letters", ["D>HK", "D>GK", "HK>D", "D>F", "F>D"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_is_the_einsum_of_its_letters(letters, bias):
    inputs, outputs = letters.split(">")
    x, w, b, y = mapped(letters, bias)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    wanted = np.einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, w) + np.asarray(b)
    # float32 sums of up to 24 products of order 1.
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_the_outcome_has_the_dtype_of_the_input_and_the_weight_stays_float32():
    _, w, b, y = mapped("D>HK", bias=True, dtype=jnp.bfloat16)
    assert (w.dtype, b.dtype, y.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)


def test_the_dtypes_are_called_by_their_own_names():
    assert {name: jnp.dtype(kind).name for name, kind in DTYPES.items()} == {n: n for n in DTYPES}


@pytest.mark.parametrize("layers", [1, 8])
def test_maps_into_the_residual_stream_begin_smaller_the_deeper_the_model(layers):
    x = into_residual(tiny(layers=layers))(jax.random.key(0), (300, 300))
    # Of 90,000 draws the standard deviation is known to 0.24%: 1% is four of these.
    np.testing.assert_allclose(x.std(), 0.02 / np.sqrt(2 * layers), rtol=0.01)
