"""Synthesizers against their formulas in float64, and what they do beyond the context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import apply, heads, packed, project, random_mixer, softmax, visible

from jaxgpt.model import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import Sight

NAMES = ["synthesizer_dense", "synthesizer_random"]
every_way = pytest.mark.parametrize("direction", ["causal", "both"])


def by_loops(cfg, params, x, at, direction):
    """Equations of sections 3.1 and 3.2, per head."""
    v = heads(cfg, project(params, "v", x))
    out, table = np.zeros((*x.shape[:2], cfg.heads, cfg.sizes["K"])), params["scores"]
    for b, t, h, keys in visible(at, direction, cfg.heads):
        if "q" in params:
            score = np.maximum(x[b, t] @ params["q"]["w"][:, h], 0) @ table[h]
        else:
            score = table[h, at.position[b, t]]
        out[b, t, h] = softmax(score[at.position[b, keys]]) @ v[b, keys, h]
    return np.einsum("bthk,hkd->btd", out, params["o"]["w"])


@every_way
@pytest.mark.parametrize("name", NAMES)
def test_a_synthesizer_equals_its_formula_in_float64(name, direction):
    cfg, params, x = random_mixer(name, direction)
    found = apply(cfg, params, direction, x, packed())
    wanted = by_loops(cfg, params, x, packed(), direction)
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_positions_beyond_the_context_are_not_seen_and_give_no_nan(name):
    cfg, params, x = random_mixer(name, "causal")
    shift = cfg.context - 9  # the second row's tokens from column 9 on are beyond
    at = Coords(packed().position[1:] + shift, packed().document[1:])
    loud = x.copy()
    loud[:, 9] *= 100
    a, b = (apply(cfg, params, "causal", y[1:], at) for y in (x, loud))
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    if name == "synthesizer_dense":  # whose queries have scores wherever they stand
        np.testing.assert_array_equal(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("name", NAMES)
def test_a_synthesizer_obeys_patterns(name):
    cfg, params, x = random_mixer(name, "causal")
    sparse = dataclasses.replace(cfg.sparse, window=2)
    cfg = dataclasses.replace(cfg, sparse=sparse)
    module = MIXERS[name](cfg, "window", "causal")
    params = jax.tree.map(jnp.float32, params)
    at = jax.tree.map(jnp.asarray, packed())

    @jax.jit
    def run(x):
        return module.apply({"params": params}, x, Sight(at, at), None)[0]

    other = x.copy()
    other[1, 4] += 1
    changed = np.abs(run(np.float32(x)) - run(np.float32(other)))[1].max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5])
