"""Norms against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from jaxgpt.dims import split
from jaxgpt.model.norms import NORMS

EPS = 1e-3  # large, so that a forgotten one shows


def apply_random_norm(name, x, bias=False):
    """Return (output, scale, bias) with random parameters."""
    module = NORMS[name](tiny(width=x.shape[-1], norm=name, norm_eps=EPS, bias=bias))
    params, _ = split(module.init(jax.random.key(0), x)["params"])
    rng = np.random.default_rng(7)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
    y = jax.jit(module.apply)({"params": params}, x)
    return y, params["scale"].astype(np.float64), params.get("bias", 0.0)


def rms_reference(x, scale, bias):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


def layer_reference(x, scale, bias):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + EPS) * scale + bias


def rms_plus_one_reference(x, scale, bias):
    return rms_reference(x, 1 + scale, bias)


REFERENCES = {
    "rms": rms_reference, "rms_plus_one": rms_plus_one_reference, "layer": layer_reference
}  # fmt: skip


def make_rows(seed=0):
    return (np.random.default_rng(seed).normal(size=(3, 5, 24)) * 0.1 + 0.3).astype(np.float32)


def test_every_norm_has_a_reference():
    assert REFERENCES.keys() == NORMS.keys()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_equals_its_formula_in_float64(name, bias):
    x = make_rows()
    y, scale, b = apply_random_norm(name, x, bias)
    # float32: relative error of some 1e-6 on values of order 1.
    np.testing.assert_allclose(y, REFERENCES[name](x.astype(np.float64), scale, b), atol=1e-5)


def test_only_layer_norm_has_a_bias_and_only_if_the_config_has():
    has = {
        (name, bias): "bias"
        in NORMS[name](tiny(bias=bias)).init(jax.random.key(0), make_rows()[..., :16])["params"]
        for name in NORMS
        for bias in (False, True)
    }
    assert [case for case, found in has.items() if found] == [("layer", True)]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_bfloat16_is_computed_in_float32(name):
    x = jnp.asarray(make_rows() * 100, jnp.bfloat16)
    y, scale, b = apply_random_norm(name, x)
    exact = REFERENCES[name](np.asarray(x, np.float64), scale, b)
    assert y.dtype == jnp.bfloat16
    # Only the result is rounded: half a unit of 8 bits, and float32's error beside it.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_a_row_of_zeros_stays_finite(name):
    y, _, _ = apply_random_norm(name, np.zeros((1, 1, 24), np.float32))
    np.testing.assert_array_equal(y, np.zeros((1, 1, 24)))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_heads_has_a_scale_for_each_channel_of_a_head(name):
    module = NORMS[name](tiny(head_width=6, bias=True), "K")
    x = make_rows()[..., :6]
    params, letters = split(module.init(jax.random.key(0), x)["params"])
    assert {x.shape for x in params.values()} == {(6,)}
    assert set(letters.values()) == {"K"}
    with pytest.raises(AssertionError):
        module.init(jax.random.key(0), make_rows())
