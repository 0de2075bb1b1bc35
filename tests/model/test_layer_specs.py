"""Layers that differ from each other, and a tail where their cycle does not divide the layers."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import ExpertsConfig, LayerSpec, ModelConfig, RopeConfig
from jaxgpt.config import Config, from_json, override, to_json
from jaxgpt.model import abstract_params, build, count_params, init_cache, unstack_layers
from jaxgpt.model.block import REMAT_POLICIES, Block
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITION_ENCODINGS
from jaxgpt.trainer.speed import flops_per_token

CLOSE = dict(atol=2e-5, rtol=2e-5)  # the same float32 sums in another order, through 11 layers

# Six kinds of layers; 11 are one cycle and a tail of five.
MIXED = tiny(
    layers=11,
    pattern=("window", "full"),
    position=("rope", "alibi", "none"),
    rope=RopeConfig(theta=(1e4, 1e2), scaling=("none", "linear"), factor=4.0),
    feedforward=("gated", "moe_plain", "plain"),
    ffn=(24, 20, 12),
    moe=ExpertsConfig(experts=3, active=2),
)
CASES = {
    "a tail": MIXED,
    "fewer layers than the cycle has": dataclasses.replace(MIXED, layers=4),
    "no tail": dataclasses.replace(MIXED, layers=6),
    "temperature": tiny(layers=3, position=("rope", "temperature"), temperature_floor=2),
    "mixers": tiny(layers=5, mixers=("attention", "mamba"), position=("rope", "none", "t5")),
}


def list_blocks(cfg: ModelConfig, stack: dict):
    """Return the parameters of every layer, from first to last."""
    groups = [stack["layers"], stack.get("tail", {})]
    return [
        jax.tree.map(lambda x, n=n: x[n], group[f"block_{i}"])
        for group in groups
        for n in range(len(jax.tree.leaves(group)[0]) if group else 0)
        for i in range(len(group))
    ]


def apply_one_by_one(cfg: ModelConfig, params, tokens):
    """Apply every layer by itself, with a position encoding of its own: a stack's slow twin."""
    coords = single_document_coords(tokens)
    x, blocks = params["embed"]["table"][tokens], list_blocks(cfg, params["stack"])
    assert len(blocks) == cfg.layers
    table = [p for name, p in params["stack"].items() if name.startswith("position")]
    for i, p in enumerate(blocks):
        spec = cfg.layer_cycle[i % len(cfg.layer_cycle)]
        layer_cfg = dataclasses.replace(cfg, position=spec.position, rope=spec.rope)
        variables = {"params": table[0]} if spec.position == "t5" else {}
        encoding = POSITION_ENCODINGS[spec.position](layer_cfg).bind(variables)
        context = LayerContext(
            coords,
            coords,
            rotate=encoding.make_rotation(coords.positions),
            bias=encoding.make_bias(),
            query_scale=encoding.make_query_scale(coords.positions),
        )
        x = Block(cfg, spec, "causal").apply({"params": p}, x, None, context)[0]
    return NORMS[cfg.norm](cfg).apply({"params": params["stack"]["norm"]}, x)


@pytest.mark.parametrize("name", CASES)
def test_a_stack_equals_its_layers_one_by_one(name):
    cfg = CASES[name]
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 9)
    found, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    wanted = jax.jit(partial(apply_one_by_one, cfg))(params, tokens)
    np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_unstacked", [False, True])
def test_cached_decoding_equals_uncached(name, is_unstacked):
    cfg = CASES[name]
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 9)
    coords = single_document_coords(tokens)
    wanted, _ = forward(cfg, params, tokens, coords)
    cache, found = init_cache(cfg, 2, 12), []
    assert len(cache.states) == cfg.layers
    for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        here = jax.tree.map(lambda x, a=begin, b=end: x[:, a:b], coords)
        used = unstack_layers(params) if is_unstacked and end - begin == 1 else params
        hidden, cache = forward(cfg, used, tokens[:, begin:end], here, cache)
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, 1), wanted, **CLOSE)


def test_a_tail_has_parameters_of_its_own_with_the_letters_of_the_other_layers():
    cfg = tiny(layers=5, pattern=("window", "full"))
    shapes, letters = abstract_params(cfg)
    layers, tail = shapes["stack"]["layers"], shapes["stack"]["tail"]
    assert (layers.keys(), tail.keys()) == ({"block_0", "block_1"}, {"block_0"})
    for group, repeats in ((layers, 2), (tail, 1)):
        assert {x.shape[0] for x in jax.tree.leaves(group)} == {repeats}
    chex.assert_trees_all_equal_structs(layers["block_0"], tail["block_0"])
    assert letters["stack"]["tail"]["block_0"] == letters["stack"]["layers"]["block_0"]


def test_layers_that_the_cycle_divides_have_no_tail():
    shapes, _ = abstract_params(tiny(layers=4, pattern=("window", "full")))
    assert shapes["stack"].keys() == {"layers", "norm"}


def test_parameters_of_every_layer_are_counted():
    cfg = tiny(layers=5, feedforward=("gated", "none"), ffn=(24, 20))
    assert count_params(cfg)["feedforward"] == 3 * 3 * 16 * 24
    # t5 is the second scheme: its table is a position encoding nevertheless.
    assert count_params(tiny(position=("none", "t5")))["position"] == 32 * 4


def test_flops_count_only_the_experts_that_a_token_uses():
    dense = tiny(layers=3, feedforward=("gated", "gated", "none"))
    mixed = tiny(
        layers=3, feedforward=("gated", "moe_gated", "none"), moe=ExpertsConfig(experts=4, active=1)
    )
    router = 16 * 4
    assert flops_per_token(mixed) == flops_per_token(dense) + 6 * router


@jax.jit
def square(x):
    return jnp.mean(jnp.sin(3 * x))


@pytest.mark.parametrize(
    "changes", [*(dict(remat=name) for name in REMAT_POLICIES), dict(layers=9, unroll=2)], ids=str
)
def test_a_tail_has_the_same_gradients_with_remat_and_unrolling(changes):
    cfg = tiny(layers=5, pattern=("window", "full"), feedforward=("gated", "plain"))
    plain = dataclasses.replace(cfg, layers=changes.get("layers", 5), unroll=1)
    tokens = random_tokens(cfg, 0, 2, 8)

    def loss(params, cfg):
        coords = single_document_coords(tokens)
        return square(build(cfg).apply({"params": params}, tokens, coords)[0])

    differentiate = jax.jit(jax.grad(loss), static_argnums=1)
    params = random_params(plain)
    found = differentiate(params, dataclasses.replace(cfg, **changes))
    chex.assert_trees_all_close(found, differentiate(params, plain), atol=1e-6, rtol=1e-4)
    assert jnp.abs(found["stack"]["tail"]["block_0"]["mixer"]["q"]["w"]).max() > 1e-5


def test_the_sines_of_a_scheme_are_computed_once():
    cfg = tiny(layers=7, rope=RopeConfig(theta=(1e2, 1e2, 1e4)), position=("rope",))
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 1, 5)

    def run(params):
        return build(cfg).apply({"params": params}, tokens, single_document_coords(tokens))[0]

    text = jax.jit(run).lower(params).as_text()
    schemes = (("rope", RopeConfig(theta=1e2)), ("rope", RopeConfig(theta=1e4)))
    assert cfg.position_schemes == schemes
    assert text.count("stablehlo.sine") == len(schemes)


# --- settings ---


def test_settings_per_layer_are_cycled_independently():
    cfg = tiny(
        pattern=("window", "full"), position=("rope", "rope", "none"), ffn=(24, 20), layers=8
    )
    assert cfg.layer_cycle[5] == LayerSpec("attention", "full", "gated", 20, "none", RopeConfig())
    assert len(cfg.layer_cycle) == 6
    assert [spec.position for spec in cfg.list_layers(8)[5:]] == ["none", "rope", "rope"]


def test_one_value_reads_as_before_and_one_in_a_list_is_the_same():
    assert tiny(position="rope") == tiny(position=("rope",)) == tiny(position=["rope"])
    assert tiny(position="rope").position == "rope"
    assert type(RopeConfig(theta=[500]).theta) is float


def test_settings_per_layer_are_set_on_the_command_line_and_survive_a_saved_config():
    changes = ["model.position=rope,none", "model.rope.theta=1e4,1e6", "model.ffn=[24, 20]"]
    config = override(Config(), changes)
    assert config.model.position == ("rope", "none")
    assert config.model.rope.theta == (1e4, 1e6)
    assert config.model.ffn == (24, 20)
    assert from_json(to_json(config)) == config
    assert override(config, ["model.position=rope"]).model.position == "rope"
