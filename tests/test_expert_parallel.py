"""Expert parallelism: results, shards and communication."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import NamedSharding
from tiny_runs import config, make_training, random_batch

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.config import MeshConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.sharding import make_mesh, make_shardings, make_spec

DROPLESS = ExpertsConfig(8, 2)
TIGHT = ExpertsConfig(8, 2, capacity=0.5)  # drops half of the choices
INDIVISIBLE = ExpertsConfig(6, 1, capacity=0.75)
FOUR, MIXED = dict(expert=4), dict(expert=2, fsdp=2, tensor=2)
CASES = {
    "experts": ("moe_plain", DROPLESS, FOUR, 16, 8),
    "experts and all axes that shard weights": ("moe_gated", TIGHT, MIXED, 16, 8),
    "experts and all axes that shard tokens": (
        "moe_plain", TIGHT, dict(data=2, expert=2, context=2), 16, 8),
    "a number of experts that is not divisible": ("moe_plain", INDIVISIBLE, FOUR, 16, 8),
    "a number of tokens that is not divisible": ("moe_gated", TIGHT, MIXED, 3, 1),
}  # fmt: skip


def make_test_mesh(sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)


@functools.cache
def run_layer(kind, moe, sizes, B, T):
    """Run one MoE layer on a mesh: ((gradients, (output, auxiliary loss)), HLO text)."""
    cfg = tiny(feedforward=kind, moe=moe, bias=True)
    module, rng = FEEDFORWARDS[kind](cfg), np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, output_weights = draw(B, T, cfg.width), draw(B, T, cfg.width)
    segment_ids = jnp.asarray(rng.random((B, T)) < 0.8, jnp.int32).at[0, 0].set(1)
    coords = Coords(jnp.zeros_like(segment_ids), segment_ids)
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x, coords)["params"])
    shapes, letters = split(boxed)
    params = jax.tree.map(lambda s: 0.4 * draw(*s.shape), shapes)

    def loss(params, x):
        y, losses = module.apply({"params": params}, x, coords, mutable=["losses"])
        (aux_loss,) = jax.tree.leaves(losses)
        return jnp.sum(output_weights * y) + 50 * aux_loss, (y, aux_loss)

    mesh = make_test_mesh(dict(sizes))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, make_shardings(shapes, letters, mesh))
        x = jax.device_put(x, NamedSharding(mesh, make_spec(x.shape, "BTD", mesh)))
        compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(params, x).compile()
        return compiled(params, x), compiled.as_text()


def run_case(name, sizes=None):
    kind, moe, case_sizes, B, T = CASES[name]
    return run_layer(kind, moe, tuple((case_sizes if sizes is None else sizes).items()), B, T)


@pytest.mark.parametrize("name", CASES)
def test_an_moe_layer_and_its_gradients_do_not_depend_on_the_devices(name):
    actual, expected = jax.device_get((run_case(name)[0], run_case(name, {})[0]))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Sums over devices in another order; one token with another expert would differ by 1e-2.
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())
        assert np.abs(b).max() > 0.1


def count_shards(tree):
    """Return the set of shard counts of the arrays of a tree."""
    return {x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree)}


def select_experts(tree):
    """Select the arrays of the experts' matrices from parameters or optimizer state."""
    named = [
        (jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [x for name, x in named if "experts" in name and name.endswith("['w']")]


def test_gradients_of_experts_are_sharded_as_the_experts_are():
    for name, shards in {"experts": 4, "experts and all axes that shard weights": 8}.items():
        (gradients, _), _ = run_case(name)[0]
        assert count_shards(select_experts(gradients)) == {shards}


def count_collectives(text, kind):
    """Count the result shapes of a collective in a compiled program."""
    results = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return Counter(shape for result in results for shape in re.findall(r"\w+\[[\d,]*\]", result))


def test_expert_parallelism_communicates_tokens_and_no_weights():
    text = run_case("experts")[1]  # of 4 * 32 tokens of width 16, with 2 picks each
    router = {"f32[16,8]": 1}
    # Tokens and their gradient.
    expected = {"f32[128,16]": 2, "f32[128,2]": 1, "s32[128,2]": 1}
    assert count_collectives(text, "all-gather") == expected | router
    # The reverse.
    assert count_collectives(text, "reduce-scatter") == {"f32[32,16]": 2, "f32[32,2]": 1}
    # For the auxiliary loss: mean probabilities and their gradient, counts of picks and of tokens.
    expected = {"f32[8]": 2, "s32[8]": 1, "s32[1]": 1}
    expected |= {"f32[8,16]": 1}  # the router's gradient
    assert count_collectives(text, "all-reduce") == expected
    assert not count_collectives(text, "all-to-all") + count_collectives(text, "collective-permute")


def test_the_weights_of_experts_are_gathered_over_fsdp_only():
    text = run_case("experts and all axes that shard weights")[1]  # of 4 experts, 12 of 24 ffn
    gathered = count_collectives(text, "all-gather")
    scattered = count_collectives(text, "reduce-scatter")
    assert (gathered["f32[4,16,12]"], gathered["f32[4,12,16]"]) == (2, 1)  # up and gate, down
    assert (scattered["f32[4,8,12]"], scattered["f32[4,12,8]"]) == (2, 1)
    of_all_experts = [shape for shape in gathered if re.match(r"f32\[8,\d+,\d+\]", shape)]
    assert not of_all_experts
    # Over the tensor axis, sums of inputs and of outputs; the gathered array is counts per row.
    assert count_collectives(text, "all-reduce")["f32[4,8,16]"] == 2
    assert gathered["s32[16,1,2,8]"] == 1


# --- whole training steps ---

STEPS = 20


@functools.cache
def train(*settings, **sizes):
    cfg = config(
        *settings,
        "model.layers=1",
        "model.feedforward=moe_gated",
        "model.moe.experts=8",
        "model.remat=full",
        "optimizer.lr=1e-3",
        mesh=MeshConfig(**{"data": 1, **sizes}),
    )
    runs = make_training(cfg, math.prod(sizes.values()))
    return runs.run(STEPS, batch_of=lambda step: random_batch(step % 4))


@pytest.mark.parametrize("sizes", [dict(expert=2), FOUR, dict(expert=8), MIXED], ids=str)
def test_training_an_moe_model_does_not_depend_on_the_devices(sizes):
    # Rounding may flip a token between two experts, which changes the loss by 1e-4: here none does.
    actual, expected = train(**sizes)[1], train()[1]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert expected[-1] < expected[0]


def test_training_experts_of_llama4_does_not_depend_on_the_devices():
    settings = ("model.moe.shared=1", "model.moe.scoring=sigmoid", "model.moe.gated=inputs")
    actual, expected = train(*settings, **MIXED)[1], train(*settings)[1]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(("sizes", "shards"), [(FOUR, 4), (MIXED, 8)])
def test_experts_and_their_moments_are_sharded(sizes, shards):
    state = train(**sizes)[0]
    assert count_shards(select_experts(state.params)) == {shards}
    moments = select_experts(state.opt_state)
    assert len(moments) == 2 * len(select_experts(state.params))
    assert count_shards(moments) == {shards}
