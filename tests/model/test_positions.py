"""Position schemes against their formulas, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from jaxgpt.dims import split
from jaxgpt.model.positions import POSITIONS, rope, sinusoidal

B, T, H, K, THETA = 2, 9, 3, 8, 500.0


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hooks(name: str, **changes):
    """Inputs of `embed`, x [B T D] and position [B T], then the parameters, then the scheme."""
    cfg = tiny(position=name, **changes)
    place = POSITIONS[name](cfg)
    x, position = normal(0, B, T, cfg.width), np.random.default_rng(1).integers(0, 20, (B, T))
    at = (jnp.asarray(x), jnp.asarray(position))
    params, _ = split(place.init(jax.random.key(0), *at, method="embed").get("params", {}))
    bound = place.bind({"params": params})
    return x, position, params, bound


def test_rope_is_multiplication_by_a_complex_number():
    x = normal(0, B, T, H, K)
    position = np.random.default_rng(1).integers(0, 50, (B, T))
    turn = np.exp(1j * position[:, :, None, None] * THETA ** (-2 * np.arange(K // 2) / K))
    turned = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * turn
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    # Angles up to 50 in float32 are off by 50 * 6e-8 = 3e-6 at most.
    np.testing.assert_allclose(jax.jit(rope)(THETA, x, position), wanted, atol=2e-5)


@pytest.mark.parametrize("shift", [1, 40])
def test_rope_scores_depend_only_on_the_distance(shift):
    q, k = normal(0, 1, T, H, K), normal(1, 1, T, H, K)
    position = jnp.arange(T)[None]

    @jax.jit
    def scores(position):
        return jnp.einsum("BTHK,BSHK->BHTS", rope(THETA, q, position), rope(THETA, k, position))

    near, far = scores(position), scores(position + shift)
    np.testing.assert_allclose(far, near, atol=1e-4)  # sums of 8 products at angles to 50
    assert np.abs(near - jnp.einsum("BTHK,BSHK->BHTS", q, k)).max() > 0.1


def test_rope_keeps_the_dtype_and_turns_in_float32():
    x = jnp.asarray(normal(0, B, T, H, K), jnp.bfloat16)
    position = jnp.full((B, T), 1000)  # in bfloat16 1001 would be 1000 as well
    turned = rope(THETA, x, position + 1)
    assert turned.dtype == jnp.bfloat16
    exact = rope(THETA, x.astype(jnp.float32), position + 1)
    # Rounding the outcome to bfloat16: 2^-9 of values up to 4.
    np.testing.assert_allclose(turned.astype(jnp.float32), exact, atol=4 * 2**-8)


def test_the_rope_scheme_turns_by_the_theta_of_the_config():
    _, position, params, place = hooks("rope", rope_theta=THETA)
    assert params == {}
    y = normal(3, B, T, H, K)
    np.testing.assert_array_equal(place.rotation()(y, position), rope(THETA, y, position))
    assert place.bias() is None


def test_sinusoidal_is_the_papers_formula():
    width, position = 12, np.array([[0, 1, 2, 30, 99]])
    wanted = np.empty((1, 5, width))
    for t, place in enumerate(position[0]):
        for i in range(width // 2):
            angle = place / 10_000 ** (2 * i / width)
            wanted[0, t, 2 * i] = np.sin(angle)
            wanted[0, t, 2 * i + 1] = np.cos(angle)
    # Angles up to 99 in float32 are off by 99 * 6e-8 = 6e-6 each way.
    np.testing.assert_allclose(sinusoidal(jnp.asarray(position), width), wanted, atol=3e-5)


def test_the_sinusoidal_scheme_adds_to_the_embedding_only():
    x, position, params, place = hooks("sinusoidal")
    assert params == {}
    added = place.embed(x, position) - x
    np.testing.assert_allclose(added, sinusoidal(position, x.shape[-1]), atol=1e-6)
    assert place.rotation() is None
    assert place.bias() is None


def test_the_learned_scheme_adds_its_row_for_the_position():
    x, position, params, place = hooks("learned")
    assert params["table"].shape == (32, 16)  # context, width
    wanted = x + np.asarray(params["table"])[position]
    np.testing.assert_array_equal(place.embed(x, position), wanted)
    assert place.rotation() is None
    assert place.bias() is None


def test_the_scheme_none_is_the_identity_in_all_three_places():
    x, position, params, place = hooks("none")
    assert params == {}
    np.testing.assert_array_equal(place.embed(x, position), x)
    assert place.rotation() is None
    assert place.bias() is None
