"""The same computation, wherever its parts lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_runs import assert_same_bits, batch_for, config, training

from jaxgpt.config import MeshConfig
from jaxgpt.optimizer import AdafactorState
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import check_batch, constrain, make_mesh, spec

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(data=1, fsdp=8),
    "data and tensor": dict(data=4, tensor=2),
    "all three": dict(data=2, fsdp=2, tensor=2),
}
DEVICES = 8


def mesh(**sizes):
    return make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])]
    )


# --- specs ---


def test_an_axis_serves_the_leftmost_dimension_that_asks_for_it():
    both = mesh(data=2, fsdp=2)
    # The batch takes data and fsdp, so nothing is left for the width; alone, the width has fsdp.
    assert spec((8, 4, 8), "BTD", both) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec((4, 8), "TD", both) == PartitionSpec(None, ("fsdp",))


def test_several_dimensions_are_divided_by_different_axes():
    all_three = mesh(data=2, fsdp=2, tensor=2)
    expected = PartitionSpec(("fsdp",), ("tensor",), None)
    assert spec((8, 4, 8), "DHK", all_three) == expected


def test_a_dimension_that_does_not_divide_stays_whole():
    both = mesh(fsdp=2, tensor=4)
    assert spec((6, 8), "VD", both) == PartitionSpec(None, ("fsdp",))
    assert spec((8, 8), "VD", both) == PartitionSpec(("tensor",), ("fsdp",))


def test_an_axis_that_a_dimension_can_not_use_is_free_for_the_next():
    assert spec((3, 8), "BD", mesh(fsdp=2)) == PartitionSpec(None, ("fsdp",))
    assert spec((3, 8), "HF", mesh(tensor=2)) == PartitionSpec(None, ("tensor",))


def test_the_arrow_between_inputs_and_outputs_is_no_dimension():
    all_three = mesh(data=2, fsdp=2, tensor=2)
    assert spec((8, 4, 2), "D>HK", all_three) == spec((8, 4, 2), "DHK", all_three)


def test_letters_without_a_rule_stay_whole():
    assert spec((8, 8, 8), "ZKS", mesh(data=2, fsdp=2, tensor=2)) == PartitionSpec(None, None, None)


# --- meshes and batches that do not work ---


def test_a_mesh_takes_what_is_left():
    sizes = make_mesh(MeshConfig(tensor=2)).shape
    assert {axis: size for axis, size in sizes.items() if size > 1} == dict(data=4, tensor=2)


def test_a_mesh_of_another_number_of_devices_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"mesh.data=3 needs 3 devices, found 8"):
        make_mesh(MeshConfig(data=3))


def test_a_mesh_larger_than_the_machine_is_refused_even_where_the_rest_is_left():
    with pytest.raises(ConfigError, match=r"mesh.tensor=16 needs a multiple of 16 devices"):
        make_mesh(MeshConfig(tensor=16))


def test_a_mesh_that_leaves_devices_over_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.tensor=3 needs a multiple of 3 devices, found 8"):
        make_mesh(MeshConfig(tensor=3))


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do():
    with pytest.raises(ConfigError, match=r"train.batch=10 .* = 8 parts: use train.batch=8 or 16"):
        check_batch(10, 2, mesh(data=2, fsdp=2))


def test_a_batch_smaller_than_its_parts_is_told_the_one_size_that_fits():
    with pytest.raises(ConfigError, match=r"use train.batch=8\.$"):
        check_batch(3, 1, mesh(data=8))


def test_the_tensor_axis_does_not_divide_the_batch():
    check_batch(2, 1, mesh(data=2, tensor=4))


# --- activations ---


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "BD") is x


def test_constrain_divides_an_activation_over_the_mesh_in_force():
    with jax.set_mesh(mesh(data=2, tensor=4)):
        y = jax.jit(lambda x: constrain(x, "NV"))(jnp.ones((8, 4)))
    assert y.addressable_shards[0].data.shape == (4, 1)


# --- whole training steps ---

STEPS = 5


@functools.cache
def trained(mesh_name, optimizer="adamw"):
    """(initial state, trained state, losses) of five steps with dropout; `one` is one device."""
    sizes = MESHES.get(mesh_name, dict(data=1))
    cfg = config(
        "model.dropout=0.1",
        f"optimizer.name={optimizer}",
        mesh=MeshConfig(**sizes),
    )
    runs = training(cfg, DEVICES if mesh_name in MESHES else 1)
    initial = runs.make()
    return initial, *runs.run(STEPS)


@pytest.mark.parametrize("name", MESHES)
def test_initialisation_does_not_depend_on_the_devices(name):
    assert_same_bits(trained("one")[0], trained(name)[0])


@pytest.mark.parametrize("name", MESHES)
def test_training_with_dropout_does_not_depend_on_the_devices(name):
    # Sums over devices round in another order: some 1e-7 of a loss of 5.6 in each step. Another
    # dropout mask on any device would show as 1e-2.
    np.testing.assert_allclose(trained(name)[2], trained("one")[2], atol=1e-5)


def test_muon_which_mixes_whole_matrices_does_not_depend_on_the_devices():
    # Five Newton-Schulz steps enlarge rounding.
    expected = trained("one", "muon")[2]
    np.testing.assert_allclose(trained("all three", "muon")[2], expected, atol=1e-4)


VARIANTS = {
    "encoder_decoder": ("model.family=encoder_decoder", "train.objective=pairs",
                        "model.position=t5", "train.accumulate=2"),
    "experts": ("model.feedforward=moe_gated", "model.moe.experts=4"),
    "blockwise": ("model.kernel=blockwise", "model.position=alibi", "model.wiring=parallel"),
    "mamba": ("model.mixers=mamba", "model.position=none"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_no_variant_depends_on_the_devices(name):
    def losses(sizes, devices):
        cfg = config(*VARIANTS[name], "model.layers=1", mesh=MeshConfig(**sizes))
        return training(cfg, devices).run(3, batch_of=batch_for(cfg.train.objective))[1]

    # As above; a token that went to another expert or bucket by rounding would show as 1e-3.
    one, many = losses(dict(data=1), 1), losses(MESHES["all three"], DEVICES)
    np.testing.assert_allclose(many, one, atol=2e-5)
    assert len(set(one)) == 3


def shares(tree):
    """The share of every array that the first device holds."""
    return {
        jax.tree_util.keystr(path): x.addressable_shards[0].data.size / x.size
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.size > 1 and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    }


def test_fsdp_divides_every_parameter_and_its_moments():
    state = trained("fsdp")[1]
    assert set(shares((state.params, state.opt_state)).values()) == {1 / 8}


def test_tensor_and_fsdp_divide_every_matrix_by_both():
    state = trained("all three")[1]
    divided = {k: v for k, v in shares((state.params, state.opt_state)).items() if "norm" not in k}
    assert divided
    assert set(divided.values()) == {1 / 4}


def test_data_alone_copies_the_parameters():
    assert set(shares(trained("data")[1].params).values()) == {1.0}


def test_what_adafactor_averages_lies_like_the_parameter():
    cfg = config("optimizer.name=adafactor", mesh=MeshConfig(**MESHES["all three"]))
    state = training(cfg, DEVICES).abstract
    parts = jax.tree.leaves(state.opt_state, is_leaf=is_factored)
    (rows,) = [part.rows for part in parts if is_factored(part)]
    for name, parameter in state.params["stack"]["layers"]["block_0"]["mixer"].items():
        kept = rows["stack"]["layers"]["block_0"]["mixer"][name]
        expected = [
            axes if size > 1 else None
            for size, axes in zip(kept["w"].shape, parameter["w"].sharding.spec, strict=True)
        ]
        assert list(kept["w"].sharding.spec) == expected, name


def is_factored(x):
    return isinstance(x, AdafactorState)
