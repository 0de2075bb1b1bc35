"""Performer against sums over features in float64, and against softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import (
    apply,
    iterate_visible,
    make_packed_coords,
    make_random_mixer,
    project,
    repeat_heads,
    softmax,
)

from jaxgpt.model.mixers.performer import Performer, draw_feature_projections


def attend_in_loops(cfg, params, x, coords, direction, log_kernel):
    """Compute y_t = Σ_s κ(q_t, k_s) v_s / Σ_s κ(q_t, k_s) in float64 loops, from log κ."""
    q, k, v = (project(params, name, x) for name in "qkv")
    k, v = repeat_heads(cfg, k), repeat_heads(cfg, v)
    out = np.zeros_like(q)
    for b, t, h, keys in iterate_visible(coords, direction, cfg.heads):
        weight = softmax(np.array([log_kernel(q[b, t, h], k[b, s, h]) for s in keys]))
        out[b, t, h] = weight @ v[b, keys, h]
    return np.einsum("bthk,hkd->btd", out, params["o"]["w"])


def compute_log_features(x, w):
    """Compute log φ(x) = w·x' - |x'|²/2 - log √m, x' = x / K^¼: lemma 1, with softmax's scale."""
    x = x / len(x) ** 0.25
    return w @ x - x @ x / 2 - np.log(len(w)) / 2


def make_log_kernel(cfg):
    """Return (q, k) -> log φ(q)·φ(k), with the features of the config."""
    w = np.float64(draw_feature_projections(cfg.mixer.features, cfg.sizes["K"]))

    def log_kernel(q, k):
        return np.logaddexp.reduce(compute_log_features(q, w) + compute_log_features(k, w))

    return log_kernel


@pytest.mark.parametrize("direction", Performer.DIRECTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_performer_equals_its_formula_in_float64(direction, kv_heads):
    cfg, params, x = make_random_mixer("performer", direction, kv_heads=kv_heads)
    actual = apply(cfg, params, direction, x, make_packed_coords())
    expected = attend_in_loops(
        cfg, params, x, make_packed_coords(), direction, make_log_kernel(cfg)
    )
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5)


def test_many_features_approximate_softmax_attention():
    error = {}
    for m in (16, 4096):
        cfg, params, x = make_random_mixer("performer", "causal", std=0.1, features=m)
        actual = apply(cfg, params, "causal", x, make_packed_coords())
        expected = attend_in_loops(
            cfg,
            params,
            x,
            make_packed_coords(),
            "causal",
            lambda q, k: q @ k / np.sqrt(len(q)),
        )
        error[m] = np.abs(actual - expected)[:, :12].mean() / np.abs(expected[:, :12]).mean()
    # The error decreases with √m, 16 times here, except for a few queries with rare features.
    assert error[4096] < 0.015
    assert error[4096] < error[16] / 5


def test_projections_are_orthogonal_in_blocks_and_have_norms_of_normals():
    w = draw_feature_projections(4096, 8)
    blocks = w[:4096].reshape(-1, 8, 8)
    products = np.einsum("nik,njk->nij", blocks, blocks)
    off_diagonal = products[:, ~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-5)
    # The mean of 4096 |w|² of mean K = 8 and variance 2K = 16: five deviations.
    np.testing.assert_allclose(np.mean(np.sum(w * w, axis=1)), 8, atol=5 * 4 / 64)
    # No direction is preferred: the mean of 4096 is known to 1/64 of a deviation; five of them.
    np.testing.assert_allclose(w.mean(0), 0, atol=5 / 64)
    np.testing.assert_allclose(w.T @ w / 4096, np.eye(8), atol=0.1)
    assert draw_feature_projections(10, 8).shape == (10, 8)


@pytest.mark.parametrize("direction", Performer.DIRECTIONS)
def test_large_keys_neither_overflow_nor_suppress_the_others(direction):
    cfg, params, x = make_random_mixer("performer", direction)
    # For these keys exp(-|k|²/2) is far below the smallest float32.
    scaled = x.copy()
    scaled[:, 5:11] *= 20
    coords = make_packed_coords()
    actual = apply(cfg, params, direction, scaled, coords)
    assert np.isfinite(actual).all()
    expected = attend_in_loops(cfg, params, scaled, coords, direction, make_log_kernel(cfg))
    # Values are 20 times as large, and float32 rounds logs of some 1000 by 6e-5.
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=2e-3, rtol=2e-3)
    plain = apply(cfg, params, direction, x, coords)
    np.testing.assert_allclose(actual[0, :5], plain[0, :5], atol=1e-5)  # the other document


def test_the_size_of_the_state_does_not_depend_on_the_slots():
    cfg, _, _ = make_random_mixer("performer", "causal")
    sizes = [
        sum(x.size for x in jax.tree.leaves(Performer.init_state(cfg, 1, n))) for n in (1, 1000)
    ]
    assert sizes[0] == sizes[1]
    assert {x.dtype for x in Performer.init_state(cfg, 1, 1)} == {jnp.dtype("float32")}
