"""Dropout on attention weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, single_document_coords, tiny

from jaxgpt.config import MeshConfig
from jaxgpt.model import EncoderInput, build
from jaxgpt.model.kernels import ScoreMod, attend
from jaxgpt.model.masks import Causal
from jaxgpt.sharding import make_mesh

KEY = jax.random.key(0)
RATE = 0.4


def apply_model(cfg, params, tokens, rngs, **model_args):
    coords = single_document_coords(tokens)
    return build(cfg).apply({"params": params}, tokens, coords, rngs=rngs, **model_args)[0]


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_weights_are_zeroed_at_the_rate_and_the_others_scaled_up(kernel):
    B, T, H = 3, 64, 4
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(B, T, H, T)), jnp.float32) for _ in range(2))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, H, T))  # the output is the weights
    coords = single_document_coords(np.zeros((B, T), np.int32))
    score_mod = ScoreMod(Causal(), is_self=True)
    weights = attend("dense", q, k, v, coords, coords, score_mod)
    dropped = score_mod.replace(dropout=RATE, dropout_key=KEY)
    found = np.asarray(attend(kernel, q, k, v, coords, coords, dropped))
    is_visible = np.asarray(weights) > 1e-9
    is_kept = is_visible & (found != 0)
    np.testing.assert_allclose(found[is_kept], weights[is_kept] / (1 - RATE), rtol=1e-5)
    n = is_visible.sum()
    # Within 5 standard deviations of a binomial distribution: one of n draws and of T sums.
    deviation = (RATE * (1 - RATE) / n) ** 0.5
    assert abs(is_kept.sum() / n - (1 - RATE)) < 5 * deviation
    assert abs(found.sum() / (B * T * H) - 1) < 0.05  # each query's weights sum to 1 on average


def test_without_a_key_nothing_is_dropped():
    params, tokens = random_params(tiny()), random_tokens(tiny(), 0, 2, 8)
    plain = apply_model(tiny(), params, tokens, {})
    np.testing.assert_array_equal(
        apply_model(tiny(attention_dropout=RATE), params, tokens, {}), plain
    )
    dropped = apply_model(tiny(attention_dropout=RATE), params, tokens, {"dropout": KEY})
    assert np.abs(dropped - plain).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (dict(layers=3, unroll=1), 3),
        (dict(layers=3, pattern=("full", "full")), 3),  # with a tail
        (dict(layers=2, family="encoder_decoder", encoder_layers=1), 5),  # two of them across
    ],
    ids=str,
)
def test_every_layer_draws_for_itself(changes, count, monkeypatch):
    cfg = tiny(attention_dropout=RATE, **changes)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    args = {}
    if cfg.family == "encoder_decoder":
        args = dict(source=EncoderInput(tokens, single_document_coords(tokens)))
    found, original = [], ScoreMod.compute_weights

    def record(score_mod, logits):
        weights = original(score_mod, logits)
        jax.debug.callback(lambda w: found.append(np.asarray(w) == 0), weights)
        return weights

    monkeypatch.setattr(ScoreMod, "compute_weights", record)
    jax.jit(lambda p: apply_model(cfg, p, tokens, {"dropout": KEY}, **args))(params)
    jax.effects_barrier()
    assert len(found) == count
    assert len({x.tobytes() for x in found}) == count
    assert all(not np.array_equal(*x) for x in found)  # rows differ too


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(context=4)], ids=str)
def test_the_draws_do_not_depend_on_the_devices(sizes):
    cfg = tiny(attention_dropout=RATE)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)

    def run(params):
        return apply_model(cfg, params, tokens, {"dropout": KEY})

    wanted = jax.jit(run)(params)
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[:4])):
        found = jax.jit(run)(params)
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)  # float32, in another order


def test_gradients_use_the_same_draws_with_and_without_recomputation():
    tokens, gradients = random_tokens(tiny(), 0, 2, 8), []
    for remat in ("none", "full", "dots"):
        cfg = tiny(attention_dropout=RATE, remat=remat)

        def loss(params, cfg=cfg):
            return jnp.sum(jnp.sin(apply_model(cfg, params, tokens, {"dropout": KEY})))

        gradients.append(jax.jit(jax.grad(loss))(random_params(cfg)))
    for other in gradients[1:]:
        for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
