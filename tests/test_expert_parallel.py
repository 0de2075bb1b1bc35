"""Experts divided over devices: the same numbers, their shards, and what is sent for them."""

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
from tiny_runs import config, random_batch, training

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.config import MeshConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.sharding import make_mesh, shardings, spec

DROPLESS, TIGHT = ExpertsConfig(8, 2), ExpertsConfig(8, 2, capacity=0.5)  # half are left out
ODD = ExpertsConfig(6, 1, capacity=0.75)
FOUR, MIXED = dict(expert=4), dict(expert=2, fsdp=2, tensor=2)
CASES = {
    "experts": ("moe_plain", DROPLESS, FOUR, 16, 8),
    "experts and all that divides weights": ("moe_gated", TIGHT, MIXED, 16, 8),
    "experts and all that divides tokens": (
        "moe_plain", TIGHT, dict(data=2, expert=2, context=2), 16, 8),
    "experts that do not divide": ("moe_plain", ODD, FOUR, 16, 8),
    "tokens that do not divide": ("moe_gated", TIGHT, MIXED, 3, 1),
}  # fmt: skip


def on(sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)


@functools.cache
def layer(kind, moe, sizes, B, T):
    """(numbers, compiled) of one mixture on a mesh: its output, balance and all gradients."""
    cfg = tiny(feedforward=kind, moe=moe, bias=True)
    module, rng = FEEDFORWARDS[kind](cfg), np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, weigh = draw(B, T, cfg.width), draw(B, T, cfg.width)
    document = jnp.asarray(rng.random((B, T)) < 0.8, jnp.int32).at[0, 0].set(1)
    at = Coords(jnp.zeros_like(document), document)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), x, at)["params"])
    shapes, letters = split(made)
    params = jax.tree.map(lambda s: 0.4 * draw(*s.shape), shapes)

    def loss(params, x):
        y, told = module.apply({"params": params}, x, at, mutable=["losses"])
        (uneven,) = jax.tree.leaves(told)
        return jnp.sum(weigh * y) + 50 * uneven, (y, uneven)

    mesh = on(dict(sizes))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(shapes, letters, mesh))
        x = jax.device_put(x, NamedSharding(mesh, spec(x.shape, "BTD", mesh)))
        run = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(params, x).compile()
        return run(params, x), run.as_text()


def case(name, sizes=None):
    kind, moe, asked, B, T = CASES[name]
    return layer(kind, moe, tuple((asked if sizes is None else sizes).items()), B, T)


@pytest.mark.parametrize("name", CASES)
def test_a_mixture_and_its_gradients_do_not_depend_on_the_devices(name):
    found, wanted = jax.device_get((case(name)[0], case(name, {})[0]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Sums over devices in another order; one token elsewhere would show as 1e-2.
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())
        assert np.abs(b).max() > 0.1


def divisions(tree):
    """In how many parts the arrays of a tree lie."""
    return {x.size // x.addressable_shards[0].data.size for x in jax.tree.leaves(tree)}


def experts(tree):
    """What belongs to the experts' matrices in a tree of parameters or of the optimizer."""
    words = [
        (jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [x for word, x in words if "experts" in word and word.endswith("['w']")]


def test_gradients_of_experts_are_divided_as_the_experts_are():
    for name, parts in {"experts": 4, "experts and all that divides weights": 8}.items():
        (gradients, _), _ = case(name)[0]
        assert divisions(experts(gradients)) == {parts}


def sent(text, kind):
    """The shapes that a collective of a compiled program gives, with how often each is there."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\(", text)
    return Counter(shape for result in found for shape in re.findall(r"\w+\[[\d,]*\]", result))


def test_devices_of_experts_show_each_other_tokens_and_no_weights():
    text = case("experts")[1]  # of 4 * 32 tokens of width 16, with 2 picks each
    router = {"f32[16,8]": 1}
    wanted = {"f32[128,16]": 2, "f32[128,2]": 1, "s32[128,2]": 1}  # the tokens' and the gradient's
    assert sent(text, "all-gather") == wanted | router
    assert sent(text, "reduce-scatter") == {"f32[32,16]": 2, "f32[32,2]": 1}  # the same, back
    # For the balance, the mean probabilities there and back, picks and tokens that count.
    wanted = {"f32[8]": 2, "s32[8]": 1, "s32[1]": 1}
    assert sent(text, "all-reduce") == wanted | {"f32[8,16]": 1}  # the router's gradient
    assert not sent(text, "all-to-all") + sent(text, "collective-permute")


def test_the_weights_of_experts_are_gathered_over_fsdp_only():
    text = case("experts and all that divides weights")[1]  # of 4 experts, 12 of 24 ffn
    gathered, scattered = sent(text, "all-gather"), sent(text, "reduce-scatter")
    assert (gathered["f32[4,16,12]"], gathered["f32[4,12,16]"]) == (2, 1)  # up and gate, down
    assert (scattered["f32[4,8,12]"], scattered["f32[4,12,8]"]) == (2, 1)
    of_eight = [shape for shape in gathered if re.match(r"f32\[8,\d+,\d+\]", shape)]
    assert not of_eight
    # Over tensor, sums of what goes in and of what comes out; first come, from each row, counts.
    assert sent(text, "all-reduce")["f32[4,8,16]"] == 2
    assert gathered["s32[16,1,2,8]"] == 1


# --- whole training steps ---

STEPS = 20


@functools.cache
def trained(**sizes):
    cfg = config(
        "model.layers=1",
        "model.feedforward=moe_gated",
        "model.moe.experts=8",
        "model.remat=full",
        "optimizer.lr=1e-3",
        mesh=MeshConfig(**{"data": 1, **sizes}),
    )
    runs = training(cfg, math.prod(sizes.values()))
    return runs.run(STEPS, batch_of=lambda step: random_batch(step % 4))


@pytest.mark.parametrize("sizes", [dict(expert=2), FOUR, dict(expert=8), MIXED], ids=str)
def test_training_a_mixture_does_not_depend_on_the_devices(sizes):
    # A token that stands between two experts may tip by rounding, which costs 1e-4: none does here.
    found, wanted = trained(**sizes)[1], trained()[1]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert wanted[-1] < wanted[0]


@pytest.mark.parametrize(("sizes", "parts"), [(FOUR, 4), (MIXED, 8)])
def test_experts_and_their_moments_are_divided(sizes, parts):
    state = trained(**sizes)[0]
    assert divisions(experts(state.params)) == {parts}
    moments = experts(state.opt_state)
    assert len(moments) == 2 * len(experts(state.params))
    assert divisions(moments) == {parts}
