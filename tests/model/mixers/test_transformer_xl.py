"""Transformer-XL against equation 3.3 in float64 loops; its segments, and where gradients stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny
from references import (
    apply,
    iterate_visible,
    make_packed_coords,
    make_random_mixer,
    project,
    repeat_heads,
    softmax,
)

from jaxgpt.architecture import MixerConfig
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.mixers.transformer_xl import TransformerXL


def encode_distance(distance, width):
    out = np.zeros(width)
    for i in range(0, width, 2):
        angle = distance / 10_000 ** (i / width)
        out[i], out[i + 1] = np.sin(angle), np.cos(angle)
    return out


@pytest.mark.parametrize(("size", "kv_heads"), [(3, 2), (1, 4), (4, 1), (64, 2)])
def test_transformer_xl_equals_its_formula_in_float64(size, kv_heads):
    cfg, params, x = make_random_mixer("transformer_xl", "causal", kv_heads=kv_heads, memory=size)
    q, k, v = (project(params, name, x) for name in "qkv")
    k, v = repeat_heads(cfg, k), repeat_heads(cfg, v)
    u, w, coords = params["u_bias"], params["v_bias"], make_packed_coords()
    out = np.zeros_like(q)
    for b, t, h, keys in iterate_visible(coords, "causal", cfg.heads):
        positions = coords.positions[b]
        keys = [s for s in keys if positions[t] // size - positions[s] // size <= 1]
        score = []
        for s in keys:
            r = encode_distance(positions[t] - positions[s], cfg.width) @ params["r"]["w"][:, h]
            score.append((q[b, t, h] + u[h]) @ k[b, s, h] + (q[b, t, h] + w[h]) @ r)
        out[b, t, h] = softmax(np.array(score) / np.sqrt(cfg.sizes["K"])) @ v[b, keys, h]
    expected = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    actual = apply(cfg, params, "causal", x, coords)
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5, rtol=1e-5)


def test_gradients_stop_at_the_border_of_a_segment_but_values_do_not():
    cfg, params, x = make_random_mixer("transformer_xl", "causal")
    coords = single_document_coords(jnp.zeros((1, 14), jnp.int32))
    params = jax.tree.map(jnp.float32, params)

    @jax.jit
    def run(x):
        y, _ = TransformerXL(cfg).apply({"params": params}, x, LayerContext(coords, coords), None)
        return y[0]

    x = jnp.float32(x[:1])
    gradient = np.abs(jax.jit(jax.jacrev(lambda x: run(x).sum(-1)))(x)[:, 0]).max(-1)  # [T S]
    segment = np.arange(14) // cfg.mixer.memory
    segment_distance = np.subtract.outer(segment, segment)
    is_causal = np.tri(14, dtype=bool)
    np.testing.assert_array_equal(gradient > 1e-6, (segment_distance == 0) & is_causal)
    np.testing.assert_array_equal(gradient[segment_distance != 0], 0)
    influence = np.stack([np.abs(run(x.at[0, s].add(1.0)) - run(x)).max(-1) for s in range(14)], 1)
    np.testing.assert_array_equal(influence > 1e-6, (segment_distance <= 1) & is_causal)
    np.testing.assert_array_equal(influence[segment_distance > 1], 0)


def test_the_projections_of_the_memory_get_its_gradient():
    """As in the paper: hidden states are cached, and keys and values are computed from them."""
    cfg, params, x = make_random_mixer("transformer_xl", "causal", memory=1)
    # With segments of one token, all that a token receives from the previous one is memory.
    params = jax.tree.map(jnp.float32, params)
    coords = single_document_coords(jnp.zeros((1, 2), jnp.int32))

    def sum_second_token(value):
        changed_params = params | {"v": {"w": value}}
        x_ = jnp.float32(x[:1, :2]).at[0, 1].set(0)  # its own value is 0 whatever the weights
        layer_context = LayerContext(coords, coords)
        y, _ = TransformerXL(cfg).apply({"params": changed_params}, x_, layer_context, None)
        return y[0, 1].sum()

    assert np.abs(jax.jit(jax.grad(sum_second_token))(params["v"]["w"])).max() > 1e-3


def test_each_layer_extends_the_dependence_by_one_segment():
    size, tokens = 3, 14
    for layers in (1, 3):
        cfg = tiny(mixers=("transformer_xl",), position="none", layers=layers,
                   mixer=MixerConfig(memory=size))  # fmt: skip
        params, row = random_params(cfg), random_tokens(cfg, 0, 1, tokens)
        changed = jnp.where(jnp.eye(tokens, dtype=bool), (row + 1) % cfg.vocab, row)
        rows = jnp.concatenate([changed, row])
        hidden, _ = forward(cfg, params, rows, single_document_coords(rows))
        influence = np.abs(hidden[:tokens, -1] - hidden[tokens, -1]).max(-1) > 1e-6
        first = max(0, ((tokens - 1) // size - layers) * size)
        np.testing.assert_array_equal(influence, np.arange(tokens) >= first)
