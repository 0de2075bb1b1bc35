"""Shardings, and training that does not depend on them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_runs import assert_same_bits, config, make_batch_fn, make_training, random_batch

from jaxgpt.config import MeshConfig
from jaxgpt.model import abstract_params
from jaxgpt.optimizer import AdafactorState
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import check_fits, constrain, list_unsharded_dims, make_mesh, make_spec


def make_test_mesh(**sizes):
    return make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])]
    )


# --- specs ---


def test_an_axis_shards_the_leftmost_dimension_with_a_rule_for_it():
    both = make_test_mesh(data=2, fsdp=2)
    # The batch takes data and fsdp, so nothing is left for the width; alone, the width has fsdp.
    assert make_spec((8, 4, 8), "BTD", both) == PartitionSpec(("data", "fsdp"), None, None)
    assert make_spec((4, 8), "TD", both) == PartitionSpec(None, ("fsdp",))


def test_several_dimensions_are_sharded_over_different_axes():
    all_three = make_test_mesh(data=2, fsdp=2, tensor=2)
    expected = PartitionSpec(("fsdp",), ("tensor",), None)
    assert make_spec((8, 4, 8), "DHK", all_three) == expected


def test_an_indivisible_dimension_is_not_sharded():
    both = make_test_mesh(fsdp=2, tensor=4)
    assert make_spec((6, 8), "VD", both) == PartitionSpec(None, ("fsdp",))
    assert make_spec((8, 8), "VD", both) == PartitionSpec(("tensor",), ("fsdp",))


def test_an_axis_unused_by_a_dimension_is_free_for_the_next():
    assert make_spec((3, 8), "BD", make_test_mesh(fsdp=2)) == PartitionSpec(None, ("fsdp",))
    assert make_spec((3, 8), "HF", make_test_mesh(tensor=2)) == PartitionSpec(None, ("tensor",))


def test_the_arrow_between_inputs_and_outputs_is_no_dimension():
    all_three = make_test_mesh(data=2, fsdp=2, tensor=2)
    assert make_spec((8, 4, 2), "D>HK", all_three) == make_spec((8, 4, 2), "DHK", all_three)


def test_letters_without_a_rule_are_not_sharded():
    all_three = make_test_mesh(data=2, fsdp=2, tensor=2)
    assert make_spec((8, 8, 8), "ZKS", all_three) == PartitionSpec(None, None, None)


# --- invalid meshes and batches ---


def test_a_size_of_minus_one_takes_the_remaining_devices():
    sizes = make_mesh(MeshConfig(tensor=2)).shape
    assert {axis: size for axis, size in sizes.items() if size > 1} == dict(data=4, tensor=2)


def test_a_mesh_of_another_number_of_devices_is_rejected_with_both_numbers():
    with pytest.raises(ConfigError, match=r"mesh.data=3 needs 3 devices, found 8"):
        make_mesh(MeshConfig(data=3))


def test_a_mesh_larger_than_the_machine_is_rejected_even_with_a_free_axis():
    with pytest.raises(ConfigError, match=r"mesh.tensor=16 needs a multiple of 16 devices"):
        make_mesh(MeshConfig(tensor=16))


def test_a_mesh_that_leaves_devices_unused_is_rejected():
    with pytest.raises(ConfigError, match=r"mesh.tensor=3 needs a multiple of 3 devices, found 8"):
        make_mesh(MeshConfig(tensor=3))


REFUSED = {
    "train.batch=10 cannot be divided in mesh.data=2 x mesh.fsdp=2 x train.accumulate=2 = 8 "
    "parts: use train.batch=8 or 16.": (
        dict(data=2, fsdp=2), ("train.batch=10", "train.accumulate=2")),
    "train.batch=3 cannot be divided in mesh.data=8: use train.batch=8.": (
        dict(data=8), ("train.batch=3",)),
    "train.batch=6 cannot be divided in mesh.expert=4: use train.batch=4 or 8.": (
        dict(expert=4), ("train.batch=6",)),
    "model.context=18 cannot be divided in mesh.context=4: use model.context=16 or 20.": (
        dict(context=4), ("model.context=18",)),
    "model.layers=6 cannot be divided in mesh.pipe=4: use model.layers=4 or 8.": (
        dict(pipe=4), ("model.layers=6",)),
    "model.layers=6 cannot be divided in mesh.pipe=2 x layers that repeat=2 = 4 parts: use "
    "model.layers=4 or 8.": (dict(pipe=2), ("model.layers=6", "model.pattern=full,window")),
    "model.layers=7 cannot be divided in mesh.pipe=2 x layers that repeat=2 = 4 parts: use "
    "model.layers=4 or 8.": (dict(pipe=2), ("model.layers=7", "model.position=rope,none")),
    "mesh.pipe=2 with model.feedforward='moe_gated': a pipeline does not add up": (
        dict(pipe=2), ("model.feedforward=moe_gated",)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_that_the_mesh_cannot_divide_are_rejected_with_the_nearest_valid_ones(message):
    sizes, assignments = REFUSED[message]
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_fits(config(*assignments), make_test_mesh(**sizes))


def test_axes_that_do_not_shard_the_batch_need_not_divide_it():
    check_fits(config("train.batch=2"), make_test_mesh(data=2, tensor=2, pipe=2))


def test_unsharded_dimensions_are_listed():
    cfg = config("model.kv_heads=1", "model.vocab=261").model
    unsharded = list_unsharded_dims(*abstract_params(cfg), make_test_mesh(tensor=4))
    assert unsharded == ["V=261 over tensor=4", "G=1 over tensor=4"]


# --- activations ---


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "BD") is x


def test_constrain_shards_an_activation_over_the_active_mesh():
    with jax.set_mesh(make_test_mesh(data=2, tensor=4)):
        y = jax.jit(lambda x: constrain(x, "NV"))(jnp.ones((8, 4)))
    assert y.addressable_shards[0].data.shape == (4, 1)


# --- whole training steps ---

SINGLE_AXES = ("data", "fsdp", "tensor", "context", "pipe")  # expert: test_expert_parallel.py
LAYOUTS = {f"{axis} {size}": {axis: size} for axis in SINGLE_AXES for size in (2, 4, 8)} | {
    "data, fsdp, tensor": dict(data=2, fsdp=2, tensor=2),
    "data, context, tensor": dict(data=2, context=2, tensor=2),
    "fsdp, context": dict(fsdp=2, context=4),
    "pipe, context, tensor": dict(pipe=2, context=2, tensor=2),
    "pipe, data, fsdp": dict(pipe=2, data=2, fsdp=2),
}
TWO_HEADS = ("model.heads=2", "model.kv_heads=1", "model.position=t5", "model.kernel=blockwise")
STEPS = 20


@functools.cache
def trained(layout="one", *assignments):
    """(initial state, trained state, losses), with dropout except in a pipeline."""
    sizes = LAYOUTS.get(layout, {})
    cfg = config(
        "model.layers=8", "model.heads=8", "model.kv_heads=4", "model.vocab=264",
        "optimizer.lr=1e-3", *assignments, mesh=MeshConfig(**{"data": 1, **sizes}),
    )  # fmt: skip
    runs = make_training(cfg, np.prod([*sizes.values()], dtype=int))
    initial = runs.make_state()
    return initial, *runs.run(STEPS, batch_of=lambda step: random_batch(step % 4))


def measure_shares(tree):
    """Return the fraction of every array that the first device holds."""
    return {
        jax.tree_util.keystr(path): x.addressable_shards[0].data.size / x.size
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.size > 1 and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    }


def expected_share(path: str, fsdp=1, tensor=1, pipe=1, **_) -> float:
    """Return the fraction of a parameter, or of its moments, that a device should hold."""
    is_key = "['k']" in path or "['v']" in path  # of which there are four heads
    is_divided_by_tensor = "norm" not in path and not (is_key and tensor > 4)
    is_divided_by_pipe = "layers" in path
    return 1 / (fsdp * tensor**is_divided_by_tensor * pipe**is_divided_by_pipe)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout_and_every_array_is_sharded_by_it(layout):
    dropout = "model.dropout=0" if "pipe" in layout else "model.dropout=0.1"
    initial, state, losses = trained(layout, dropout)
    first, _, expected = trained("one", dropout)
    assert_same_bits(initial, first)
    # Sums over devices round in another order: some 1e-7 of a loss of 5.6 in each step. Another
    # dropout mask on any device would show as 1e-2.
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    shares = measure_shares((state.params, state.opt_state))
    assert shares == {path: expected_share(path, **LAYOUTS[layout]) for path in shares}


def test_rows_are_sharded_over_keys_if_there_are_too_few_heads():
    # Four devices share a row, and there are two heads of one key.
    few = trained("fsdp, context", *TWO_HEADS)[2]
    np.testing.assert_allclose(few, trained("one", *TWO_HEADS)[2], atol=1e-5)


def test_a_pipeline_trains_with_dropout():  # what it draws: model/test_transformer.py
    losses = trained("pipe 2", "model.dropout=0.5")[2]
    plain = trained("pipe 2", "model.dropout=0")[2]
    assert np.all(np.isfinite(losses))
    assert losses[0] != plain[0]


def test_muon_which_mixes_whole_matrices_does_not_depend_on_the_devices():
    # Five Newton-Schulz steps enlarge rounding.
    many = trained("data, fsdp, tensor", "optimizer.name=muon")[2]
    np.testing.assert_allclose(many, trained("one", "optimizer.name=muon")[2], atol=1e-4)


VARIANTS = {
    "encoder_decoder": (
        dict(pipe=2, context=2, data=2),
        ("model.family=encoder_decoder", "train.objective=pairs", "model.position=t5",
         "train.accumulate=2", "model.layers=2")),
    "blockwise": (
        dict(data=2, context=2, tensor=2),
        ("model.kernel=blockwise", "model.position=alibi", "model.wiring=parallel",
         "model.layers=1")),
    "mamba": (
        dict(fsdp=2, context=2, tensor=2),
        ("model.mixers=mamba", "model.position=none", "model.layers=1")),
    "layers that differ, with a tail": (
        dict(data=2, fsdp=2, tensor=2),
        ("model.layers=3", "model.pattern=window,full", "model.position=rope,alibi",
         "model.feedforward=gated,plain", "model.sinks=true", "model.qk_norm=width")),
    "layers that differ, in a pipeline": (
        dict(data=2, pipe=2, tensor=2),
        ("model.layers=4", "model.position=rope,temperature", "model.temperature_floor=2",
         "model.feedforward=gated,plain")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_depends_on_the_devices(name):
    sizes, assignments = VARIANTS[name]

    def losses(sizes, devices):
        cfg = config(*assignments, mesh=MeshConfig(**{"data": 1, **sizes}))
        return make_training(cfg, devices).run(3, batch_of=make_batch_fn(cfg.train.objective))[1]

    # As above; a key missing on one device would show as 1e-3.
    one, many = losses({}, 1), losses(sizes, 8)
    np.testing.assert_allclose(many, one, atol=2e-5)
    assert len(set(one)) == 3


def test_adafactor_averages_are_sharded_like_the_parameter():
    cfg = config("optimizer.name=adafactor", mesh=MeshConfig(**LAYOUTS["data, fsdp, tensor"]))
    state = make_training(cfg, 8).abstract
    parts = jax.tree.leaves(state.opt_state, is_leaf=is_adafactor_state)
    (rows,) = [part.rows for part in parts if is_adafactor_state(part)]
    for name, parameter in state.params["stack"]["layers"]["block_0"]["mixer"].items():
        kept = rows["stack"]["layers"]["block_0"]["mixer"][name]
        expected = [
            axes if size > 1 else None
            for size, axes in zip(kept["w"].shape, parameter["w"].sharding.spec, strict=True)
        ]
        assert list(kept["w"].sharding.spec) == expected, name


def is_adafactor_state(x):
    return isinstance(x, AdafactorState)
