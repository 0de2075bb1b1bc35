"""Transformer-XL against equation 3.3 in float64 loops; its segments, and where gradients end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, tiny, whole
from twins import apply, heads, packed, project, random_mixer, softmax, visible

from jaxgpt.architecture import MixerConfig
from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.model.mixers.transformer_xl import TransformerXL


def sinusoid(distance, width):
    out = np.zeros(width)
    for i in range(0, width, 2):
        angle = distance / 10_000 ** (i / width)
        out[i], out[i + 1] = np.sin(angle), np.cos(angle)
    return out


@pytest.mark.parametrize(("size", "kv_heads"), [(3, 2), (1, 4), (4, 1), (64, 2)])
def test_transformer_xl_equals_its_formula_in_float64(size, kv_heads):
    cfg, params, x = random_mixer("transformer_xl", "causal", kv_heads=kv_heads, memory=size)
    q, k, v = (project(params, name, x) for name in "qkv")
    k, v = heads(cfg, k), heads(cfg, v)
    u, w, at = params["u_bias"], params["v_bias"], packed()
    out = np.zeros_like(q)
    for b, t, h, keys in visible(at, "causal", cfg.heads):
        place = at.position[b]
        keys = [s for s in keys if place[t] // size - place[s] // size <= 1]
        score = []
        for s in keys:
            r = sinusoid(place[t] - place[s], cfg.width) @ params["r"]["w"][:, h]
            score.append((q[b, t, h] + u[h]) @ k[b, s, h] + (q[b, t, h] + w[h]) @ r)
        out[b, t, h] = softmax(np.array(score) / np.sqrt(cfg.sizes["K"])) @ v[b, keys, h]
    wanted = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    found = apply(cfg, params, "causal", x, at)
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5, rtol=1e-5)


def test_gradients_stop_at_the_border_of_a_segment_but_values_do_not():
    cfg, params, x = random_mixer("transformer_xl", "causal")
    at = whole(jnp.zeros((1, 14), jnp.int32))
    params = jax.tree.map(jnp.float32, params)

    @jax.jit
    def run(x):
        return TransformerXL(cfg).apply({"params": params}, x, Sight(at, at), None)[0][0]

    x = jnp.float32(x[:1])
    slope = np.abs(jax.jit(jax.jacrev(lambda x: run(x).sum(-1)))(x)[:, 0]).max(-1)  # [T S]
    segment = np.arange(14) // cfg.mixer.memory
    apart = np.subtract.outer(segment, segment)
    before = np.tri(14, dtype=bool)
    np.testing.assert_array_equal(slope > 1e-6, (apart == 0) & before)
    np.testing.assert_array_equal(slope[apart != 0], 0)
    heard = np.stack([np.abs(run(x.at[0, s].add(1.0)) - run(x)).max(-1) for s in range(14)], 1)
    np.testing.assert_array_equal(heard > 1e-6, (apart <= 1) & before)
    np.testing.assert_array_equal(heard[apart > 1], 0)


def test_the_weights_that_make_memory_have_its_gradient():
    """As in the paper: what is kept is the hidden state, and keys and values are made of it."""
    cfg, params, x = random_mixer("transformer_xl", "causal", memory=1)
    # With segments of one token, what a token takes from the one before is memory, all of it.
    params = jax.tree.map(jnp.float32, params)
    at = whole(jnp.zeros((1, 2), jnp.int32))

    def second(value):
        given = params | {"v": {"w": value}}
        x_ = jnp.float32(x[:1, :2]).at[0, 1].set(0)  # its own value is 0 whatever the weights
        return TransformerXL(cfg).apply({"params": given}, x_, Sight(at, at), None)[0][0, 1].sum()

    assert np.abs(jax.jit(jax.grad(second))(params["v"]["w"])).max() > 1e-3


def test_each_layer_hears_of_one_segment_more():
    size, tokens = 3, 14
    for layers in (1, 3):
        cfg = tiny(mixers=("transformer_xl",), position="none", layers=layers,
                   mixer=MixerConfig(memory=size))  # fmt: skip
        params, row = random_params(cfg), random_tokens(cfg, 0, 1, tokens)
        changed = jnp.where(jnp.eye(tokens, dtype=bool), (row + 1) % cfg.vocab, row)
        hidden, _ = forward(cfg, params, jnp.concatenate([changed, row]),
                            whole(jnp.zeros((tokens + 1, tokens), jnp.int32)))  # fmt: skip
        heard = np.abs(hidden[:tokens, -1] - hidden[tokens, -1]).max(-1) > 1e-6
        first = max(0, ((tokens - 1) // size - layers) * size)
        np.testing.assert_array_equal(heard, np.arange(tokens) >= first)
