"""The selection of parameters to train."""

import jax
import numpy as np
import optax
import pytest
from tiny_runs import MODEL, config, make_training, random_batch

from jaxgpt.config import OptimizerConfig
from jaxgpt.model import abstract_params, build
from jaxgpt.moments import MOMENT_FORMATS
from jaxgpt.optimizer import OPTIMIZERS, OPTIMIZERS_WITHOUT_MOMENTS
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.selection import merge, select, select_letters
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.step import compute_gradient

LETTERS = {
    "embed": {"table": "V>D"},
    "stack": {"layers": {"ffn": {"w": "LD>F"}, "norm": {"scale": "LD"}}, "norm": {"scale": "D"}},
}


def list_paths(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        ([], ["embed.table", "stack.layers.ffn.w", "stack.layers.norm.scale", "stack.norm.scale"]),
        (["stack.layers.*"], ["stack.layers.ffn.w", "stack.layers.norm.scale"]),
        (["stack.layers"], ["stack.layers.ffn.w", "stack.layers.norm.scale"]),
        (["embed.table"], ["embed.table"]),
        (["*.scale"], ["stack.layers.norm.scale", "stack.norm.scale"]),
        (["*>*"], ["embed.table", "stack.layers.ffn.w"]),
        (["D", "embed"], ["embed.table", "stack.norm.scale"]),
    ],
)
def test_parameters_are_selected_by_path_group_or_letters(patterns, paths):
    assert list_paths(select_letters(LETTERS, patterns)) == paths


def test_a_pattern_without_a_match_is_rejected_with_the_nearest_paths():
    with pytest.raises(ConfigError, match=r"optimizer.train='stack.layer.*' matches no") as error:
        select_letters(LETTERS, ["embed", "stack.layer.*"])
    assert "stack.layers.ffn.w" in str(error.value)


def test_merging_a_selection_replaces_its_leaves_only():
    numbers = {"a": {"b": 1, "c": 2}, "d": 3}
    selected = select(numbers, {"a": {"b": "D"}})
    assert selected == {"a": {"b": 1}}
    assert merge({"a": {"b": 9}}, numbers) == {"a": {"b": 9, "c": 2}, "d": 3}
    assert select(numbers, None) is numbers


# --- training of a selection ---

PATTERNS = ("stack.layers.*.ffn", "embed")
RULES = [(name, "float32") for name in OPTIMIZERS] + [
    (name, moments)
    for name in ("adamw", "muon", "lion")
    for moments in MOMENT_FORMATS
    if moments != "float32" and name not in OPTIMIZERS_WITHOUT_MOMENTS
]


@pytest.mark.parametrize(("name", "moments"), RULES)
def test_a_step_of_a_selection_is_the_rule_on_its_part_of_the_gradient(name, moments):
    optimizer = OptimizerConfig(
        name=name, moments=moments, lr=1e-2, warmup=2, train=PATTERNS, clip=0.1
    )
    cfg = config(optimizer=optimizer)
    run = make_training(cfg)
    before = run.make_state()
    after, _ = run.run(2)

    _, letters = abstract_params(MODEL)
    selection = select_letters(letters, PATTERNS)
    plain = OptimizerConfig(name=name, moments=moments, lr=1e-2, warmup=2, clip=0.1)
    rule, _ = build_optimizer(plain, cfg.train.steps, selection)
    params, state = before.params, rule.init(select(before.params, selection))

    @jax.jit
    def step(params, state, batch):
        grads, sums = compute_gradient(build(MODEL), cfg.train, params, batch, None)
        grads = select(jax.tree.map(lambda g: g / sums["weight"], grads), selection)
        selected = select(params, selection)
        updates, state = rule.update(grads, state, selected)
        return merge(optax.apply_updates(selected, updates), params), state

    for number in range(2):
        params, state = step(params, state, random_batch(number))
    for path, x, y, first in zip(
        list_paths(params), *map(jax.tree.leaves, (params, after.params, before.params)),
        strict=True,
    ):  # fmt: skip
        is_trained = path in list_paths(selection)
        assert np.array_equal(y, first) != is_trained, path
        # Quantized moments and signs amplify the rounding of another order of sums.
        tolerance = 1e-6 if moments == "float32" and name not in ("lion", "muon") else 1e-3
        np.testing.assert_allclose(y, x, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_has_no_state_for_other_parameters(name):
    cfg = config(optimizer=OptimizerConfig(name=name, warmup=2, train=("embed",)))
    state = make_training(cfg).abstract
    table = state.params["embed"]["table"].shape
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    coefficients = {(3,)} if name == "muon" else set()  # of the Newton-Schulz polynomial
    assert shapes <= {table, (table[0], 1), (1, table[1])} | coefficients
    assert name == "sgd" or shapes & {table, (table[0], 1)}


def count_flops(*patterns):
    cfg = config(optimizer=OptimizerConfig(warmup=2, train=patterns))
    run = make_training(cfg)
    with jax.set_mesh(run.mesh):
        lowered = run.step.lower(run.abstract, random_batch())
    return lowered.compile().cost_analysis()["flops"]


def test_no_gradient_is_computed_for_other_parameters():
    whole = count_flops()
    # With the final norm alone no layer has a backward pass: a third of the products, the head's
    # backward pass aside. With all layers but not the embedding, its gradient is left out.
    assert count_flops("stack.norm") < 0.6 * whole
    assert count_flops("stack") < 0.95 * whole


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_selection_trains_alike_on_one_device_and_sharded(moments):
    optimizer = OptimizerConfig(warmup=2, lr=1e-2, train=("stack.layers",), moments=moments)
    one, losses = make_training(config(optimizer=optimizer)).run(3)
    sharded = config("mesh.fsdp=2", "mesh.data=2", optimizer=optimizer)
    other, sharded_losses = make_training(sharded, devices=4).run(3)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(one.params["embed"]["table"], other.params["embed"]["table"])
