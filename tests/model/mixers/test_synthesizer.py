"""Synthesizers against their formulas in float64, and beyond the context."""

import dataclasses

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

from jaxgpt.model import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import LayerContext

NAMES = ["synthesizer_dense", "synthesizer_random"]
every_direction = pytest.mark.parametrize("direction", ["causal", "both"])


def attend_in_loops(cfg, params, x, coords, direction):
    """Compute the equations of sections 3.1 and 3.2, per head."""
    v = repeat_heads(cfg, project(params, "v", x))
    out, table = np.zeros((*x.shape[:2], cfg.heads, cfg.sizes["K"])), params["scores"]
    for b, t, h, keys in iterate_visible(coords, direction, cfg.heads):
        if "q" in params:
            score = np.maximum(x[b, t] @ params["q"]["w"][:, h], 0) @ table[h]
        else:
            score = table[h, coords.positions[b, t]]
        out[b, t, h] = softmax(score[coords.positions[b, keys]]) @ v[b, keys, h]
    return np.einsum("bthk,hkd->btd", out, params["o"]["w"])


@every_direction
@pytest.mark.parametrize("name", NAMES)
def test_a_synthesizer_equals_its_formula_in_float64(name, direction):
    cfg, params, x = make_random_mixer(name, direction)
    actual = apply(cfg, params, direction, x, make_packed_coords())
    expected = attend_in_loops(cfg, params, x, make_packed_coords(), direction)
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_positions_beyond_the_context_are_masked_and_give_no_nan(name):
    cfg, params, x = make_random_mixer(name, "causal")
    shift = cfg.context - 9  # the second row's tokens from column 9 on are beyond
    coords = Coords(
        make_packed_coords().positions[1:] + shift, make_packed_coords().segment_ids[1:]
    )
    scaled = x.copy()
    scaled[:, 9] *= 100
    a, b = (apply(cfg, params, "causal", y[1:], coords) for y in (x, scaled))
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    if name == "synthesizer_dense":  # whose queries have scores at any position
        np.testing.assert_array_equal(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("name", NAMES)
def test_a_synthesizer_applies_attention_patterns(name):
    cfg, params, x = make_random_mixer(name, "causal")
    sparse = dataclasses.replace(cfg.sparse, window=2)
    cfg = dataclasses.replace(cfg, sparse=sparse, pattern=("window",))
    module = MIXERS[name](cfg, "window", "causal")
    params = jax.tree.map(jnp.float32, params)
    coords = jax.tree.map(jnp.asarray, make_packed_coords())

    @jax.jit
    def run(x):
        return module.apply({"params": params}, x, LayerContext(coords, coords), None)[0]

    other = x.copy()
    other[1, 4] += 1
    changed = np.abs(run(np.float32(x)) - run(np.float32(other)))[1].max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5])
