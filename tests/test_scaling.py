"""Exchanges and memory of every layout agree with theory; compiled programs are parsed right."""

import functools
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_runs import make_training

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import scaling
from benchmarks.scaling import (
    BASE,
    LAYOUTS,
    Theory,
    compare_with_theory,
    compile_step,
    list_exchanges,
    make_config,
)
from jaxgpt.config import ConfigError, MeshConfig, override
from jaxgpt.planning import hlo
from jaxgpt.planning.hlo import find_axes, list_collectives, parse_groups
from jaxgpt.sharding import make_mesh

SMALL = ("model.vocab=260", "model.context=32", "model.width=32", "model.layers=2",
         "model.ffn=48", "model.moe.experts=4", "train.batch=8",
         "train.loss_chunk=16")  # fmt: skip
DEVICES = dict.fromkeys(LAYOUTS, 2) | {
    "fsdp x context": 4,
    "data x pipe": 4,
    "data x fsdp x tensor": 8,
}


# Not all: `expert with capacity` includes all of `expert`, and one mix with tensor is enough.
MEASURED = [name for name in LAYOUTS if name not in ("expert", "data x tensor x context")]


@functools.cache
def compile_layout(layout: str, devices: int):
    cfg = make_config(override(BASE, ["model.heads=4"]), LAYOUTS[layout], devices)
    return compile_step(override(cfg, SMALL), devices)


# --- layouts against theory ---


@pytest.mark.parametrize("layout", MEASURED)
def test_exchanges_of_a_layout_equal_theory(layout):
    step = compile_layout(layout, DEVICES[layout])
    assert list_exchanges(step) == Theory(step).list_exchanges()
    assert list_exchanges(step)


@pytest.mark.parametrize("layout", MEASURED)
def test_parameters_and_moments_of_a_device_equal_theory(layout):
    step = compile_layout(layout, DEVICES[layout])
    costs = compare_with_theory(layout, step)
    assert costs["parameters"] == costs["parameters in theory"]
    counts = 16  # bytes: step counts of the optimizer and its schedule
    assert costs["optimizer"] == pytest.approx(costs["optimizer in theory"], abs=counts)
    # The compiled program takes exactly the state, a batch, a step number and a key.
    batch = 5 * 4 * Theory(step).n
    arguments = costs["parameters"] + costs["optimizer"] + batch
    assert step.memory.argument_size_in_bytes == pytest.approx(arguments, abs=64)


@pytest.mark.parametrize("layout", MEASURED)
def test_peak_memory_is_close_to_theory(layout):
    costs = compare_with_theory(layout, compile_layout(layout, DEVICES[layout]))
    # The theory omits temporary copies, of which pipelines have more since they shift and select.
    assert costs["peak"] == pytest.approx(costs["peak in theory"], rel=0.25)


@pytest.mark.parametrize("layout", ["data", "fsdp", "context by heads", "pipe"])
def test_activations_are_divided(layout):
    one, two = (
        compile_layout(name, devices).memory.temp_size_in_bytes
        for name, devices in (("data", 1), (layout, 2))
    )
    assert two < 0.7 * one


def test_a_concrete_state_has_the_shards_of_the_abstract_one():
    layout = "data x fsdp x tensor"
    runs = make_training(compile_layout(layout, 8).cfg, 8)
    state = runs.make_state()
    first = jax.devices()[0]

    def count_first_device_bytes(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.dtype != state.rng.dtype]
        shards = [s for x in leaves for s in x.addressable_shards if s.device == first]
        return sum(shard.data.nbytes for shard in shards)

    costs = compare_with_theory(layout, compile_layout(layout, 8))
    assert count_first_device_bytes(state.params) == costs["parameters"]
    assert count_first_device_bytes(state.opt_state) == costs["optimizer"]


# --- the command ---


def test_the_command_writes_numbers_and_page(tmp_path, capsys):
    arguments = ["--layouts", "data", "--devices", "2", "--config", *SMALL]
    scaling.main([*arguments, "--json", str(tmp_path / "out.json"), "--docs", str(tmp_path)])
    (two,) = json.loads((tmp_path / "out.json").read_text())["layouts"]
    (gradients,) = two["exchanges"]
    # Every parameter once, and the table, 260 x 32, once more.
    assert gradients["bytes"] == two["parameters"] + 4 * 260 * 32
    assert two["sent"] == gradients["bytes"]  # around a ring of two
    assert "| all-reduce | data" in (tmp_path / "scaling.md").read_text()
    assert "| all-reduce | data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [("--layouts", "fdsp"), ("--devices", "3"), ("--devices", "16"), ("--devices", "")],
)
def test_the_command_rejects_unknown_values(arguments):
    with pytest.raises(ConfigError, match=f"{arguments[0]}.*{arguments[1]}"):
        scaling.main([*arguments])


def test_a_layout_has_more_devices_on_the_axes_listed_first():
    triple = LAYOUTS["data x tensor x context"]
    assert triple.divide_devices(8) == dict(data=2, tensor=2, context=2)
    assert LAYOUTS["data x pipe"].divide_devices(8) == dict(data=4, pipe=2)
    assert triple.divide_devices(4) is None


# --- parsing of compiled programs ---


def compile_program(f, shape, in_specs, out_specs, **sizes):
    """Return the text of f compiled for a mesh of these sizes, and the mesh."""
    mesh = make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])]
    )
    run = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(run).lower(jnp.zeros(shape)).compile().as_text(), mesh


def test_collectives_in_loops_are_counted_once_per_iteration():
    def f(x):  # [8 4] on 2 devices: [4 4] each
        def inner(x, _):
            return jax.lax.psum(jnp.sin(x), "data"), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, None, length=5)[0]
            return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

        x = jax.lax.scan(outer, x, None, length=3)[0]
        return jax.lax.all_gather(x, "data", tiled=True)

    text, mesh = compile_program(f, (8, 4), PartitionSpec("data"), PartitionSpec(), data=2)
    found = {(c.kind, c.arrays, c.times, c.axes(mesh)) for c in list_collectives(text)}
    assert found == {
        ("all-reduce", (64,), 15, ("data",)),
        ("collective-permute", (64,), 3, ("data",)),
        ("all-gather", (128,), 1, ("data",)),
    }


def test_the_axes_of_device_groups_are_the_axes_summed_over():
    names = ("data", "fsdp", "tensor")
    subsets = [s for n in (1, 2, 3) for s in itertools.combinations(names, n)]

    def f(x):  # for every subset an array of its own size
        return [jax.lax.psum(x[: i + 1], axes) for i, axes in enumerate(subsets)]

    text, mesh = compile_program(
        f, (64,), PartitionSpec(names), PartitionSpec(), data=2, fsdp=2, tensor=2
    )
    found = {size: c.axes(mesh) for c in list_collectives(text) for size in c.arrays}
    assert found == {4 * (i + 1): axes for i, axes in enumerate(subsets)}


def test_reduce_scatter_and_all_to_all_are_counted_by_the_larger_side():
    def f(x):  # [16] each
        scattered = jax.lax.psum_scatter(x, "data", tiled=True)
        return scattered, jax.lax.all_to_all(x[:8], "data", 0, 0, tiled=True)

    data = PartitionSpec("data")
    text, _ = compile_program(f, (32,), data, (data, data), data=2)
    assert {(c.kind, c.arrays) for c in list_collectives(text)} == {
        ("reduce-scatter", (64,)),
        ("all-to-all", (32,)),
    }


FORMS = {
    "{{0,1},{2,3}}": [(0, 1), (2, 3)],
    "{{0,2,1,3}}": [(0, 2, 1, 3)],
    "[2,4]<=[8]": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "[4,2]<=[2,4]T(1,0)": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "mesh['a'=2,'b'=4] {'b'}": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "mesh['a'=2,'b'=4] {'a'}": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "mesh['a'=2,'b'=4] {'b':(2)2}": [(0, 1), (2, 3), (4, 5), (6, 7)],
    "mesh['a'=2,'b'=4] {'a','b':(1)2}": [(0, 2, 4, 6), (1, 3, 5, 7)],
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "{}": [(0, 1, 2, 3, 4, 5, 6, 7)],
}


@pytest.mark.parametrize("form", FORMS)
def test_device_groups_are_parsed_in_every_form(form):
    assert list(parse_groups(f"x, replica_groups={form}, y=z", 8)) == FORMS[form]


def test_device_groups_of_an_unknown_form_are_rejected():
    with pytest.raises(ValueError, match="unknown form"):
        parse_groups("x, replica_groups=<8>, y", 8)


ASYNCHRONOUS = """HloModule m, entry_computation_layout={()->()}, num_partitions=4

%wrapped (p: bf16[8]) -> bf16[4] {
  ROOT %r = bf16[4]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%body (p: (s32[])) -> (s32[]) {
  %s = ((f32[2,3]{1,0}), (f32[4,3]{1,0})) all-gather-start(%a), replica_groups={{0,2},{1,3}}
  %d = f32[4,3]{1,0} all-gather-done(%s)
  %t = ((bf16[8]{0}), bf16[4]{0}) async-start(%p), calls=%wrapped
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %single = f32[9]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %c = (f32[2], f32[2], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %w = (s32[]) while(%x), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %u = (s32[]) while(%w), condition=%no, body=%unknown
}

%unknown (p: (s32[])) -> (s32[]) {
  %s = (pred[3]{0}, s8[2]{0}) all-reduce-start(%a, %b), replica_groups={}, metadata={op_name="any"}
}
"""


def test_asynchronous_collectives_are_parsed_like_synchronous_ones():
    found = [(c.kind, c.arrays, c.times, c.label) for c in list_collectives(ASYNCHRONOUS)]
    assert sorted(found, key=lambda row: row[0]) == [
        ("all-gather", (48,), 7, ""),
        ("all-reduce", (3, 2), None, "any"),  # in a loop of unknown length
        ("collective-permute", (8,), 1, ""),
        ("reduce-scatter", (16,), 7, ""),
    ]


def test_a_group_runs_along_the_axes_whose_index_varies_in_it():
    shape = dict(a=2, b=1, c=4)
    assert find_axes([(0, 1), (2, 3)], shape) == ("c",)
    assert find_axes([(0, 4)], shape) == ("a",)
    assert find_axes([(0, 5)], shape) == ("a", "c")


def test_the_traffic_of_an_all_reduce_is_a_reduce_scatter_plus_an_all_gather():
    for n in (1, 2, 8):
        both = hlo.SENT_FRACTION["reduce-scatter"](n) + hlo.SENT_FRACTION["all-gather"](n)
        assert hlo.SENT_FRACTION["all-reduce"](n) == both
    # A single device sends nothing.
    assert hlo.SENT_FRACTION["all-to-all"](1) == 0
