"""What a layout sends and holds is what its letters say, and the reader of programs reads right."""

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
from tiny_runs import training

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # benchmarks are not installed

from benchmarks import hlo, scaling
from benchmarks.hlo import axes_of, collectives, groups_of
from benchmarks.scaling import BASE, LAYOUTS, Theory, compile_step, configured, exchanged, measured
from jaxgpt.config import ConfigError, MeshConfig, override
from jaxgpt.sharding import make_mesh

SMALL = ("model.vocab=260", "model.context=32", "model.width=32", "model.layers=2",
         "model.ffn=48", "model.moe.experts=4", "train.batch=8",
         "train.loss_chunk=16")  # fmt: skip
DEVICES = dict.fromkeys(LAYOUTS, 2) | {
    "fsdp x context": 4,
    "data x pipe": 4,
    "data x fsdp x tensor": 8,
}


# Not all: `expert with capacity` has all that `expert` has, and one mix with tensor is enough.
MEASURED = [name for name in LAYOUTS if name not in ("expert", "data x tensor x context")]


@functools.cache
def step(layout: str, devices: int):
    cfg = configured(override(BASE, ["model.heads=4"]), LAYOUTS[layout], devices)
    return compile_step(override(cfg, SMALL), devices)


# --- layouts against theory ---


@pytest.mark.parametrize("layout", MEASURED)
def test_a_layout_sends_what_theory_says_and_nothing_else(layout):
    this = step(layout, DEVICES[layout])
    assert exchanged(this) == Theory(this).exchanged()
    assert exchanged(this)


@pytest.mark.parametrize("layout", MEASURED)
def test_a_device_holds_the_parameters_and_moments_that_theory_says(layout):
    this = step(layout, DEVICES[layout])
    told = measured(layout, this)
    assert told["parameters"] == told["parameters in theory"]
    counts = 16  # steps taken, of the optimizer and its schedule
    assert told["optimizer"] == pytest.approx(told["optimizer in theory"], abs=counts)
    # The compiled program asks for just that: the state, a batch, a step number and a key.
    batch = 5 * 4 * Theory(this).n
    arguments = told["parameters"] + told["optimizer"] + batch
    assert this.memory.argument_size_in_bytes == pytest.approx(arguments, abs=64)


@pytest.mark.parametrize("layout", MEASURED)
def test_the_peak_of_memory_is_near_to_theory(layout):
    told = measured(layout, step(layout, DEVICES[layout]))
    # What the theory leaves out are temporary copies: more in pipelines, which shift and select.
    assert told["peak"] == pytest.approx(told["peak in theory"], rel=0.25)


@pytest.mark.parametrize("layout", ["data", "fsdp", "context by heads", "pipe"])
def test_activations_are_divided(layout):
    one, two = (step(name, n).memory.temp_size_in_bytes for name, n in (("data", 1), (layout, 2)))
    assert two < 0.7 * one


def test_a_real_state_has_the_shards_of_the_abstract_one():
    layout = "data x fsdp x tensor"
    runs = training(step(layout, 8).cfg, 8)
    state = runs.make()
    first = jax.devices()[0]

    def held(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.dtype != state.rng.dtype]
        shards = [s for x in leaves for s in x.addressable_shards if s.device == first]
        return sum(shard.data.nbytes for shard in shards)

    assert held(state.params) == measured(layout, step(layout, 8))["parameters"]
    assert held(state.opt_state) == measured(layout, step(layout, 8))["optimizer"]


# --- the command ---


def test_the_command_writes_its_numbers_and_its_page(tmp_path, capsys):
    given = ["--layouts", "data", "--devices", "2", "--config", *SMALL]
    scaling.main([*given, "--json", str(tmp_path / "out.json"), "--docs", str(tmp_path)])
    (two,) = json.loads((tmp_path / "out.json").read_text())["layouts"]
    (gradients,) = two["exchanges"]
    # Everything once, and the table, 260 x 32, once more.
    assert gradients["bytes"] == two["parameters"] + 4 * 260 * 32
    assert two["sent"] == gradients["bytes"]  # around a ring of two
    assert "| all-reduce | data" in (tmp_path / "scaling.md").read_text()
    assert "| all-reduce | data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [("--layouts", "fdsp"), ("--devices", "3"), ("--devices", "16"), ("--devices", "")]
)
def test_the_command_refuses_what_it_does_not_know(given):
    with pytest.raises(ConfigError, match=f"{given[0]}.*{given[1]}"):
        scaling.main([*given])


def test_a_layout_has_more_devices_on_the_axes_named_first():
    assert LAYOUTS["data x tensor x context"].sizes(8) == dict(data=2, tensor=2, context=2)
    assert LAYOUTS["data x pipe"].sizes(8) == dict(data=4, pipe=2)
    assert LAYOUTS["data x tensor x context"].sizes(4) is None


# --- the reader ---


def program(f, shape, in_specs, out_specs, **sizes):
    """The text of f compiled for a mesh of these sizes, and the mesh."""
    mesh = make_mesh(
        MeshConfig(**{"data": 1, **sizes}), jax.devices()[: np.prod([*sizes.values()])]
    )
    run = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(run).lower(jnp.zeros(shape)).compile().as_text(), mesh


def test_collectives_in_loops_run_as_often_as_the_loops_turn():
    def f(x):  # [8 4] on 2 devices: [4 4] each
        def inner(x, _):
            return jax.lax.psum(jnp.sin(x), "data"), None

        def outer(x, _):
            x = jax.lax.scan(inner, x, None, length=5)[0]
            return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

        x = jax.lax.scan(outer, x, None, length=3)[0]
        return jax.lax.all_gather(x, "data", tiled=True)

    text, mesh = program(f, (8, 4), PartitionSpec("data"), PartitionSpec(), data=2)
    found = {(c.kind, c.arrays, c.times, c.axes(mesh)) for c in collectives(text)}
    assert found == {
        ("all-reduce", (64,), 15, ("data",)),
        ("collective-permute", (64,), 3, ("data",)),
        ("all-gather", (128,), 1, ("data",)),
    }


def test_the_axes_of_groups_are_those_that_were_summed_over():
    names = ("data", "fsdp", "tensor")
    subsets = [s for n in (1, 2, 3) for s in itertools.combinations(names, n)]

    def f(x):  # for every subset an array of its own size
        return [jax.lax.psum(x[: i + 1], axes) for i, axes in enumerate(subsets)]

    text, mesh = program(f, (64,), PartitionSpec(names), PartitionSpec(), data=2, fsdp=2, tensor=2)
    found = {size: c.axes(mesh) for c in collectives(text) for size in c.arrays}
    assert found == {4 * (i + 1): axes for i, axes in enumerate(subsets)}


def test_reduce_scatter_and_all_to_all_are_counted_by_the_larger_side():
    def f(x):  # [16] each
        scattered = jax.lax.psum_scatter(x, "data", tiled=True)
        return scattered, jax.lax.all_to_all(x[:8], "data", 0, 0, tiled=True)

    data = PartitionSpec("data")
    text, _ = program(f, (32,), data, (data, data), data=2)
    assert {(c.kind, c.arrays) for c in collectives(text)} == {
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
def test_groups_are_read_in_every_form(form):
    assert list(groups_of(f"x, replica_groups={form}, y=z", 8)) == FORMS[form]


def test_groups_of_another_form_are_refused():
    with pytest.raises(ValueError, match="unknown form"):
        groups_of("x, replica_groups=<8>, y", 8)


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
  %alone = f32[9]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %c = (f32[2], f32[2], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %w = (s32[]) while(%x), condition=%no, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %u = (s32[]) while(%w), condition=%no, body=%unknown
}

%unknown (p: (s32[])) -> (s32[]) {
  %s = (pred[3]{0}, s8[2]{0}) all-reduce-start(%a, %b), replica_groups={}, metadata={op_name="any"}
}
"""


def test_asynchronous_forms_are_read_as_the_others():
    found = [(c.kind, c.arrays, c.times, c.label) for c in collectives(ASYNCHRONOUS)]
    assert sorted(found, key=lambda row: row[0]) == [
        ("all-gather", (48,), 7, ""),
        ("all-reduce", (3, 2), None, "any"),  # how often, nobody knows
        ("collective-permute", (8,), 1, ""),
        ("reduce-scatter", (16,), 7, ""),
    ]


def test_an_axis_is_along_groups_that_change_it():
    shape = dict(a=2, b=1, c=4)
    assert axes_of([(0, 1), (2, 3)], shape) == ("c",)
    assert axes_of([(0, 4)], shape) == ("a",)
    assert axes_of([(0, 5)], shape) == ("a", "c")


def test_what_a_ring_sends_adds_up():
    # An all-reduce is a reduce-scatter and an all-gather; of one device nobody sends anything.
    for n in (1, 2, 8):
        two = hlo.SENDS["reduce-scatter"](n) + hlo.SENDS["all-gather"](n)
        assert hlo.SENDS["all-reduce"](n) == two
    assert hlo.SENDS["all-to-all"](1) == 0
