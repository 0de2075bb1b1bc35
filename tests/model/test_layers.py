"""Linear maps against the einsum of their letters."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from jaxgpt.dims import split
from jaxgpt.model.layers import DTYPES, Linear, compute_once, make_residual_init
from jaxgpt.model.products import einsum_float32, matmul_2d

B, T = 2, 5


def apply_random_linear(letters, bias=False, dtype=jnp.float32):
    """Return (x, w, b, output of Linear) with random values."""
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
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_linear_map_is_the_einsum_of_its_letters(letters, bias, platform, monkeypatch):
    monkeypatch.setattr("jaxgpt.backend.get_platform", lambda: platform)
    inputs, outputs = letters.split(">")
    x, w, b, y = apply_random_linear(letters, bias)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    wanted = np.einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, w) + np.asarray(b)
    # float32 sums of up to 24 products of order 1.
    np.testing.assert_allclose(y, wanted, atol=2e-5)


def test_the_output_has_the_dtype_of_the_input_and_the_weight_stays_float32():
    _, w, b, y = apply_random_linear("D>HK", bias=True, dtype=jnp.bfloat16)
    assert (w.dtype, b.dtype, y.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)


def test_input_fn_equals_mapping_its_output_in_values_and_gradients():
    module = Linear(tiny(), "F>D")
    rng = np.random.default_rng(0)
    gate, up, out = (jnp.asarray(rng.normal(size=(B, T, n)), jnp.float32) for n in (24, 24, 16))
    params = split(module.init(jax.random.key(0), gate)["params"])[0]

    def compute_with_input_fn(params, gate, up):
        return jnp.vdot(
            out, module.apply({"params": params}, gate, up, input_fn=lambda a, b: a**2 * b)
        )

    def compute_directly(params, gate, up):
        return jnp.vdot(out, gate**2 * up @ params["w"])

    found, wanted = (
        jax.value_and_grad(f, (0, 1, 2))(params, gate, up)
        for f in (compute_with_input_fn, compute_directly)
    )
    # float32 sums of products of order 1, in another order.
    chex.assert_trees_all_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_what_is_computed_once_has_the_bits_of_what_is_recomputed(platform, monkeypatch):
    monkeypatch.setattr("jaxgpt.backend.get_platform", lambda: platform)
    x = jnp.linspace(-20, 20, 24).reshape(2, 3, 4)
    compute = jax.jit(lambda x: compute_once(jnp.sin, jnp.cos, x))
    assert ("while" in compute.lower(x).as_text()) == (platform == "cpu")
    found, wanted = compute(x), (jax.jit(jnp.sin)(x), jax.jit(jnp.cos)(x))
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (8, 3)])
def test_matmul_2d_has_the_gradient_of_a_product(inputs, outputs):
    rng = np.random.default_rng(0)
    x, w, d_y = (rng.normal(size=s) for s in ((5, inputs), (inputs, outputs), (5, outputs)))
    y, pull = jax.vjp(matmul_2d, jnp.float32(x), jnp.float32(w))
    # float32 sums of up to 8 products of order 1.
    chex.assert_trees_all_close((y, *pull(jnp.float32(d_y))), (x @ w, d_y @ w.T, x.T @ d_y),
                                atol=5e-6)  # fmt: skip


@pytest.mark.parametrize("letters", ["BTD,VD->BTV", "BD,VD->BV", "BD,DV->BV", "BGMTK,BGSK->BGMTS"])
def test_einsum_float32_rounds_only_the_incoming_gradient(letters):
    left, right, out = letters.replace("->", ",").split(",")
    sizes = dict(zip("BTDVGMSK", (2, 5, 16, 7, 2, 3, 5, 8), strict=True))
    rng = np.random.default_rng(0)
    a, b, d_out = (rng.normal(size=[sizes[c] for c in part]) for part in (left, right, out))
    a, b, d_out = jnp.bfloat16(a), jnp.float32(b), jnp.float32(d_out)
    found, pull = jax.vjp(partial(einsum_float32, letters), a, b)
    d_a, d_b = pull(d_out)
    assert [x.dtype for x in (found, d_a, d_b)] == [jnp.float32, jnp.bfloat16, jnp.float32]

    def exact(letters, *factors):
        return np.einsum(letters, *(np.float64(jnp.bfloat16(x)) for x in factors))

    # Products of bfloat16 are exact in float32; sums are of up to 70 of them, of order 1.
    np.testing.assert_allclose(found, exact(letters, a, b), atol=2e-5)
    np.testing.assert_allclose(d_b, exact(f"{out},{left}->{right}", d_out, a), atol=2e-5)
    wanted = exact(f"{out},{right}->{left}", d_out, b)
    np.testing.assert_allclose(np.float64(d_a), wanted, rtol=2**-8, atol=2e-5)  # rounded once


def test_the_keys_of_dtypes_are_their_names():
    assert {name: jnp.dtype(kind).name for name, kind in DTYPES.items()} == {n: n for n in DTYPES}


@pytest.mark.parametrize("layers", [1, 8])
def test_projections_into_the_residual_stream_start_smaller_in_deeper_models(layers):
    x = make_residual_init(tiny(layers=layers))(jax.random.key(0), (300, 300))
    # Of 90,000 draws the standard deviation is known to 0.24%: 1% is four of these.
    np.testing.assert_allclose(x.std(), 0.02 / np.sqrt(2 * layers), rtol=0.01)
