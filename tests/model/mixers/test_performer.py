"""Performer against sums over features in float64, and against the softmax it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import apply, heads, packed, project, random_mixer, visible

from jaxgpt.model.mixers.performer import Performer, directions


def by_loops(cfg, params, x, at, direction, kernel):
    """y_t = Σ_s κ(q_t, k_s) v_s / Σ_s κ(q_t, k_s), in float64."""
    q, k, v = (project(params, name, x) for name in "qkv")
    k, v = heads(cfg, k), heads(cfg, v)
    out = np.zeros_like(q)
    for b, t, h, keys in visible(at, direction, cfg.heads):
        weight = np.array([kernel(q[b, t, h], k[b, s, h]) for s in keys])
        out[b, t, h] = weight @ v[b, keys, h] / weight.sum()
    return np.einsum("bthk,hkd->btd", out, params["o"]["w"])


def features(x, w):
    """φ(x) = exp(w·x' - |x'|²/2) / √m with x' = x / K^(1/4): lemma 1, and the scale of softmax."""
    x = x / len(x) ** 0.25
    return np.exp(w @ x - x @ x / 2) / np.sqrt(len(w))


@pytest.mark.parametrize("direction", Performer.DIRECTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_performer_equals_its_formula_in_float64(direction, kv_heads):
    cfg, params, x = random_mixer("performer", direction, kv_heads=kv_heads)
    w = np.float64(directions(cfg.mixer.features, cfg.sizes["K"]))
    found = apply(cfg, params, direction, x, packed())
    wanted = by_loops(
        cfg, params, x, packed(), direction, lambda q, k: features(q, w) @ features(k, w)
    )
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5)


def test_many_features_come_near_softmax_attention():
    error = {}
    for m in (16, 4096):
        cfg, params, x = random_mixer("performer", "causal", std=0.1, features=m)
        found = apply(cfg, params, "causal", x, packed())
        wanted = by_loops(
            cfg, params, x, packed(), "causal", lambda q, k: np.exp(q @ k / np.sqrt(len(q)))
        )
        error[m] = np.abs(found - wanted)[:, :12].mean() / np.abs(wanted[:, :12]).mean()
    # It falls with √m, 16 times here, but for a few queries that meet rare features.
    assert error[4096] < 0.015
    assert error[4096] < error[16] / 5


def test_directions_are_orthogonal_by_blocks_and_as_long_as_normals():
    w = directions(4096, 8)
    blocks = w[:4096].reshape(-1, 8, 8)
    products = np.einsum("nik,njk->nij", blocks, blocks)
    off = products[:, ~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(off, 0, atol=1e-5)
    # The mean of 4096 |w|² of mean K = 8 and variance 2K = 16: five deviations.
    np.testing.assert_allclose(np.mean(np.sum(w * w, axis=1)), 8, atol=5 * 4 / 64)
    # No direction is preferred: the mean of 4096 is known to 1/64 of a deviation; five of them.
    np.testing.assert_allclose(w.mean(0), 0, atol=5 / 64)
    np.testing.assert_allclose(w.T @ w / 4096, np.eye(8), atol=0.1)
    assert directions(10, 8).shape == (10, 8)


@pytest.mark.parametrize("direction", Performer.DIRECTIONS)
def test_large_keys_neither_overflow_nor_silence_the_others(direction):
    cfg, params, x = random_mixer("performer", direction)
    # Of these keys exp(-|k|²/2) is far below the smallest float32.
    loud = x.copy()
    loud[:, 5:11] *= 20
    found = apply(cfg, params, direction, loud, packed())
    assert np.isfinite(found).all()
    wanted = apply(cfg, params, direction, x, packed())
    np.testing.assert_allclose(found[0, :5], wanted[0, :5], atol=1e-5)  # the other document


def test_the_state_does_not_grow_with_the_slots():
    cfg, _, _ = random_mixer("performer", "causal")
    sizes = [sum(x.size for x in jax.tree.leaves(Performer.state(cfg, 1, n))) for n in (1, 1000)]
    assert sizes[0] == sizes[1]
    assert {x.dtype for x in Performer.state(cfg, 1, 1)} == {jnp.dtype("float32")}
