"""A plan says what a run takes before it starts: memory, exchanges, what fits, and how long."""

import json
import math
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from tiny_runs import config, single_device_env

import jaxgpt
from jaxgpt import cli, sharding
from jaxgpt import config as configs
from jaxgpt.config import ConfigError, override
from jaxgpt.model import count_params
from jaxgpt.planning import advice, footprint, hlo, rates, tpu
from jaxgpt.planning.advice import ScaledEstimate, find_changes, find_largest_batch, search_largest
from jaxgpt.planning.chips import CHIPS, arrange_chips, parse_device, parse_topology
from jaxgpt.planning.fit import find_fit, list_candidates
from jaxgpt.planning.footprint import (
    Footprint,
    Target,
    compile_footprint,
    estimate_footprint,
    make_target,
    parse_needed_bytes,
)
from jaxgpt.planning.plan import Plan, make_plan, predict_seconds
from jaxgpt.planning.step import lower_step
from jaxgpt.trainer import RunError, report
from jaxgpt.trainer.estimate import TYPICAL_MFU, make_abstract_mesh
from jaxgpt.trainer.memory import describe_step_memory_errors
from jaxgpt.trainer.speed import flops_per_token
from jaxgpt.trainer.state import make_abstract_state

MIB = 2**20
# Parameters, moments and activations are all large enough to matter.
BASE = override(
    config(), ["model.width=64", "model.ffn=192", "model.vocab=512", "model.context=64",
               "train.batch=32", "data.source=tests"]
)  # fmt: skip


def one_device(memory: int = 2**40) -> Target:
    return Target("a CPU", "cpu", 1, memory, tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def compiled():
    """The footprint of the base config on one device."""
    return compile_footprint(BASE, one_device())


# --- what a step takes ---

MEASURE = """
import ctypes, gc, sys
import jax, numpy as np
from jaxgpt.config import load
from jaxgpt.planning.footprint import compile_footprint, find_devices_here
from jaxgpt.planning.step import lower_step, make_abstract_batch
from jaxgpt.trainer.state import make_state

def read(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

cfg = load(sys.argv[1], sys.argv[2:])
planned = compile_footprint(cfg, find_devices_here()).peak
step = lower_step(cfg, jax.devices())
run = step.lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
jax.jit(lambda x: x @ x)(np.ones((512, 512), np.float32)).block_until_ready()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = read("VmRSS")
state = jax.block_until_ready(make_state(cfg.model, step.optimizer, cfg.seed, step.state))
batch = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), make_abstract_batch(cfg, step.mesh))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what the initialization has freed
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted from here
with jax.set_mesh(step.mesh):
    for _ in range(2):  # one after the other
        state, metrics = jax.block_until_ready(run(state, batch))
print(planned, read("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.parametrize(
    "settings",
    [
        # Mostly activations; mostly parameters and moments.
        ("model.layers=2", "train.batch=96", "train.accumulate=1"),
        ("model.vocab=80000", "model.width=256", "model.layers=1", "optimizer.name=adamw",
         "train.batch=4"),
    ],
    ids=["activations", "state"],
)  # fmt: skip
def test_a_real_step_takes_the_planned_memory_within_a_tenth(settings):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "stdlib", *settings],
        env=single_device_env(is_fast=False),
        capture_output=True,
        text=True,
        check=True,
    )
    planned, measured = map(int, done.stdout.split())
    assert measured > 200 * MIB  # so large that what the process itself takes does not matter
    assert planned == pytest.approx(measured, rel=0.1)


def test_the_footprint_is_that_of_the_compiled_step(compiled):
    memory = lower_step(BASE, jax.devices()[:1]).lowered.compile().memory_analysis()
    assert compiled.source == "compiled"
    assert compiled.arguments == memory.argument_size_in_bytes
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert compiled.temporaries == memory.temp_size_in_bytes + extra
    # Parameters and two moments of each, float32, and a batch of five arrays.
    state = 3 * 4 * count_params(BASE.model)["total"]
    assert compiled.arguments == pytest.approx(state + 5 * 4 * 32 * 64, rel=0.001)


def test_the_estimate_counts_the_state_to_the_byte_and_the_rest_roughly(compiled):
    found = estimate_footprint(BASE, one_device())
    assert found.source == "estimated"
    assert found.microbatches == compiled.microbatches
    batch = 5 * 4 * 32 * 64
    assert found.arguments == pytest.approx(compiled.arguments - batch, abs=64)
    assert 0.5 < found.temporaries / compiled.temporaries < 2


@pytest.mark.parametrize(
    "change",
    ["model.remat=full", "optimizer.moments=int8", "train.accumulate=4", "model.layers=1"],
)
def test_what_saves_memory_is_estimated_to(change):
    before, after = (
        estimate_footprint(cfg, one_device())
        for cfg in (override(BASE, ["train.accumulate=1"]), override(BASE, [change]))
    )
    assert after.peak < before.peak


def test_devices_divide_the_estimate():
    target = Target("GPUs", "gpu", 8, 0)
    data, fsdp = (
        estimate_footprint(override(BASE, ["train.accumulate=1", *mesh]), target)
        for mesh in ([], ["mesh.data=1", "mesh.fsdp=-1"])
    )
    assert fsdp.arguments == pytest.approx(data.arguments / 8, rel=0.05)
    assert fsdp.temporaries < data.temporaries


def test_a_refusal_of_the_compiler_says_how_much_is_needed():
    message = "RESOURCE_EXHAUSTED: Ran out of memory. Used 30.25G of 15.75G hbm. Exceeded"
    assert parse_needed_bytes(message) == 30.25 * 2**30
    assert parse_needed_bytes("INTERNAL: Used 30.25G of 15.75G hbm") is None
    assert parse_needed_bytes("RESOURCE_EXHAUSTED: too many requests") is None


# --- exchanges ---


@pytest.fixture(scope="module")
def fsdp_plan():
    cfg = override(BASE, ["mesh.data=1", "mesh.fsdp=8", "train.accumulate=1"])
    target = Target("CPUs", "cpu", 8, 2**40, tuple(jax.devices()))
    return cfg, make_plan(cfg, target, 0.5, quick=True)


def test_a_plan_sums_the_bytes_that_are_sent_along_each_axis(fsdp_plan):
    cfg, plan = fsdp_plan
    compiled = lower_step(cfg, jax.devices()).lowered.compile()
    expected = {}
    for found in hlo.list_collectives(compiled.as_text()):
        sizes = [size for size in found.arrays if size > footprint.MAX_SCALAR_BYTES]
        expected[found.kind] = expected.get(found.kind, 0) + sum(sizes) * found.times
    assert {x.kind: x.bytes for x in plan.exchanges} == {k: n for k, n in expected.items() if n}
    assert all(x.axes == ("fsdp",) and x.is_whole for x in plan.exchanges)
    gathered = next(x for x in plan.exchanges if x.kind == "all-gather")
    assert gathered.sent == pytest.approx(gathered.bytes * 7 / 8, abs=gathered.arrays)
    assert plan.mesh == {"fsdp": 8}
    assert "all-gather" in str(plan)


PROGRAM = """HloModule step, num_partitions=4

%cond (p: (u32[])) -> pred[] {
  %bound = u32[] constant(8)
  %p = (u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %is_less = pred[] compare(%i, %bound), direction=LT
}

%body (p: (u32[])) -> (u32[]) {
  %p = (u32[]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%p), index=0
  %next = u32[] add(%i, %two)
  %moved = f32[10]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %out = (u32[]) tuple(%next)
}

%all-reduce-scatter.1 (x: f32[8]) -> f32[2] {
  %sum = f32[8]{0} all-reduce(%x), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
}

%async_collective_fusion.1 (x: f32[2]) -> f32[8] {
  %part = f32[8]{0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}
}

%async_collective_fusion.2 (x: f32[2]) -> f32[8] {
  %part = f32[8]{0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (u32[]) while(%t), condition=%cond, body=%body
  %s = f32[2]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %g = f32[8]{0} fusion(%s), kind=kCustom, calls=%async_collective_fusion.1
  %h = f32[8]{0} fusion(%s), kind=kCustom, calls=%async_collective_fusion.2
}
"""


def test_collectives_of_a_tpu_are_counted_as_they_run():
    found = hlo.list_collectives(hlo.add_trip_counts(PROGRAM))
    assert [(x.kind, x.arrays, x.times) for x in found] == [
        ("collective-permute", (40,), 4),  # 0, 2, 4, 6
        ("reduce-scatter", (32,), 1),  # an all-reduce in a fusion that keeps a part of it
        ("all-gather", (32,), 1),  # in two parts that share a channel
    ]


# --- a 3D torus: gathers in two stages ---


def test_a_3d_torus_gathers_and_scatters_in_two_stages(monkeypatch):
    """Eight devices as planes of 4 and lines of 2, in place of a torus of 4 x 4 x 4."""
    cfg = override(BASE, ["mesh.data=1", "mesh.fsdp=8", "train.accumulate=1", "model.remat=full"])
    monkeypatch.setattr(sharding, "TORUS_LINES", {8: 2})
    monkeypatch.setattr(sharding, "TORUS_KINDS", ("cpu",))
    jax.clear_caches()
    text = lower_step(cfg, jax.devices()).lowered.compile().as_text()
    jax.clear_caches()
    layers = [x for x in hlo.list_collectives(text) if "/while/body" in x.label]
    matrices = [x for x in layers if max(x.arrays) >= 2048]  # others belong to norms
    sizes = {
        kind: [len(x.groups[0]) for x in matrices if x.kind == kind]
        for kind in ("all-gather", "all-reduce")
    }
    assert sizes["all-reduce"] == [4, 2]  # gradients: planes, then lines
    # q, k, v, the output and three of the feed-forward, forward and again backward: lines, planes.
    assert {*sizes["all-gather"]} == {2, 4}
    assert sizes["all-gather"][:14] == 7 * [2] + 7 * [4]


def test_gathering_in_stages_changes_no_value_and_no_gradient(monkeypatch):
    mesh = sharding.make_mesh(configs.MeshConfig(data=1, fsdp=8), jax.devices())
    w = jax.random.normal(jax.random.key(0), (16, 24))
    x = jax.random.normal(jax.random.key(1), (8, 16))

    def loss(w, x):
        return jnp.sum(jnp.square(x @ sharding.gather_param(w, "D>F")))

    expected = jax.value_and_grad(loss)(w, x)
    monkeypatch.setattr(sharding, "TORUS_LINES", {8: 2})
    monkeypatch.setattr(sharding, "TORUS_KINDS", ("cpu",))
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, jax.NamedSharding(mesh, jax.P("fsdp")))
        rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp")))
        found = jax.jit(jax.value_and_grad(loss))(placed, rows)
        assert "sharding_constraint" in str(jax.make_jaxpr(loss)(placed, rows))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)  # sums in another order
    assert jnp.allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_only_a_whole_3d_torus_gathers_in_stages():
    def find(kind, count, **axes):
        cfg = override(BASE, [f"mesh.{axis}={size}" for axis, size in axes.items()])
        return sharding.find_gather_stages(make_abstract_mesh(cfg, count, "tpu", kind))

    assert find("TPU v5", 64, data=1, fsdp=64) == (16, 4)
    assert find("TPU v5", 128, data=1, fsdp=128) == (16, 8)
    assert find("TPU v5", 64, data=4, fsdp=16) is None  # a plane: the compiler can
    assert find("TPU v5", 16, data=1, fsdp=16) is None
    assert find("TPU v5 lite", 64, data=1, fsdp=64) is None  # a 2D torus


HAS_LIBTPU = tpu.is_available()


def test_the_cores_of_a_v4_are_one_device(monkeypatch):
    asked = []

    def describe(**arguments):
        asked.append(arguments.get("chip_config_name"))
        return SimpleNamespace(devices=[])

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    assert [tpu.get_devices(name) for name in ("v4:2x2x1", "v5p:2x2x1")] == [[], []]
    assert asked == ["megacore", None]


@pytest.mark.skipif(not HAS_LIBTPU, reason=f"needs libtpu ({tpu.PYTHON_VARIABLE})")
def test_a_slice_has_as_many_devices_as_chips():
    """The two cores of a v4 and of a v5p are one device."""
    names = ["v4:1x1x1", "v4:2x2x1", "v4:2x2x4", "v5p:2x2x1", "v5e:1x1", "v5e:2x4", "v6e:2x2"]
    code = "import sys; from jaxgpt.planning.tpu import get_devices\n"
    code += "print(*(len(get_devices(name)) for name in sys.argv[1:]))"
    done = subprocess.run(
        [tpu.find_python(), "-c", code, *names], env=os.environ | tpu.ENVIRONMENT,
        cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = list(map(int, done.stdout.split()))
    assert counts == [parse_topology(name).count for name in names] == [1, 4, 16, 4, 1, 8, 4]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason=f"needs libtpu ({tpu.PYTHON_VARIABLE})")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_the_mini_gpt_compiles_for_tpus(topology):
    cfg = configs.load("gpt_mini", ["model.dtype=bfloat16"])
    plan = jaxgpt.plan(cfg, topology=topology, quick=True)
    assert plan.source == "compiled"
    assert plan.platform == "tpu"
    assert plan.is_fitting
    assert bool(plan.exchanges) == (topology == "v5e:2x2")
    assert plan.memory["arguments"] > 12 * plan.parameters["total"]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason=f"needs libtpu ({tpu.PYTHON_VARIABLE})")
def test_a_narrow_65b_gathers_its_parameters_on_a_3d_torus():
    narrow = ["model.layers=2", "model.width=1024", "model.heads=8", "model.ffn=2816",
              "model.vocab=2048", "model.context=512", "model.dtype=bfloat16", "model.remat=full",
              "mesh.data=1", "mesh.fsdp=64", "train.batch=64", "train.accumulate=1"]  # fmt: skip
    plan = jaxgpt.plan(configs.load("llama_65b", narrow), topology="v5p:4x4x4", quick=True)
    sent = {x.kind: x.sent for x in plan.exchanges}
    # Forward and backward: every parameter of a layer twice in bfloat16.
    layers = sum(plan.parameters[part] for part in ("attention", "feedforward"))
    assert sent["all-gather"] >= 2 * 2 * layers * 63 / 64 * 0.99


# --- what fits ---


def test_changes_are_ranked_those_that_fit_first(compiled):
    estimate = ScaledEstimate(BASE, compiled, one_device())
    assert estimate(BASE).peak == pytest.approx(compiled.peak, rel=1e-6)
    least = compile_footprint(override(BASE, ["model.remat=full"]), one_device()).peak
    target = one_device(int((least + compiled.peak) / 2 / 0.9))
    changes = find_changes(BASE, target, compiled, is_quick=False)
    flags = [change.fits for change in changes]
    assert flags == sorted(flags, reverse=True)
    assert True in flags
    usable = advice.count_usable_bytes(target)
    assert all(change.fits == (change.peak <= usable) for change in changes)
    rest = [change.peak for change in changes if not change.fits]
    assert rest == sorted(rest)
    remat = next(c for c in changes if c.settings == ("model.remat=full",))
    assert remat.fits
    assert remat.source == "compiled"
    assert remat.peak == least
    for change in changes:
        override(BASE, list(change.settings))


def test_the_largest_batch_fits_and_is_compiled(compiled):
    target = one_device(int(compiled.peak * 3 / 0.9))
    cfg = override(BASE, ["train.accumulate=1"])
    now = compile_footprint(cfg, one_device())
    batch, source = find_largest_batch(cfg, target, now, is_quick=False)
    assert source == "compiled"
    assert batch > 0
    usable = advice.count_usable_bytes(target)
    assert compile_footprint(override(cfg, [f"train.batch={batch}"]), target).peak <= usable
    twice = override(cfg, [f"train.batch={2 * batch}"])
    assert compile_footprint(twice, target).peak > usable


def test_no_batch_fits_what_the_parameters_fill(compiled):
    assert find_largest_batch(BASE, one_device(compiled.arguments), compiled, True)[0] == 0
    assert find_largest_batch(BASE, one_device(0), compiled, True)[0] == 0  # memory not known


@pytest.mark.parametrize("largest", [0, 1, 2, 7, 15, 16])
def test_the_search_finds_the_largest_number_that_passes(largest):
    assert search_largest(lambda n: n <= largest, 100) == largest


def test_the_search_ends_at_its_limit():
    assert search_largest(lambda n: True, 100) == 100


def test_a_plan_that_does_not_fit_lists_what_would(compiled):
    plan = make_plan(BASE, one_device(compiled.peak // 2), 0.5, quick=True)
    assert not plan.is_fitting
    assert plan.changes
    text = str(plan)
    assert "It does not fit" in text
    assert all(" ".join(change.settings) in text for change in plan.changes)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# --- time ---


def test_the_time_is_the_flops_at_the_given_utilization():
    target = make_target(parse_device("8xH100"))
    cfg = override(BASE, ["model.dtype=bfloat16"])
    now = Footprint("estimated", 0, 0)
    fraction, seconds, _ = predict_seconds(cfg, target, now, 0.25)
    flops = flops_per_token(cfg.model) * 32 * 64
    assert fraction == 0.25
    assert seconds == pytest.approx(flops / (0.25 * 8 * 989e12))


def test_the_time_on_this_machine_is_made_of_measured_products(monkeypatch):
    monkeypatch.setattr(rates, "measure_product", lambda dtype, n, a, b: 2e-12 * n * a * b)
    monkeypatch.setattr(rates, "measure_attention", lambda dtype, T, H, K: 0.0)
    monkeypatch.setattr(rates, "measure_bandwidth", lambda: 1e9)
    now = Footprint("compiled", 0, 0, (), 2)
    found = rates.predict_step_seconds(BASE, one_device(), now)
    d, tokens = BASE.model.sizes, 32 * 64
    weights = 2 * d["D"] * (d["H"] + d["G"]) * d["K"] + 3 * d["D"] * d["F"]
    assert found.products == pytest.approx(3 * 2 * tokens * weights * 2e-12)
    assert found.vocabulary == pytest.approx(3 * tokens * d["V"] * d["D"] * 2e-12)
    repeated = override(BASE, ["model.remat=full"])
    again = rates.predict_step_seconds(repeated, one_device(), now)
    assert again.products == pytest.approx(found.products * 4 / 3)
    bytes_moved = 4 * count_params(BASE.model)["total"]
    assert found.optimizer == pytest.approx(bytes_moved * (12 + 3 * 2) / 1e9)


# --- devices and topologies ---


@pytest.mark.parametrize(
    ("name", "topology", "count"),
    [
        ("v5e-1", "v5e:1x1", 1), ("v5e-8", "v5e:2x4", 8), ("v5e:2x2", "v5e:2x2", 4),
        ("v5p-8", "v5p:2x2x1", 4), ("v5p-128", "v5p:4x4x4", 64), ("V6E-256", "v6e:16x16", 256),
        ("v4-8", "v4:2x2x1", 4), ("T4", "", 1), ("h100", "", 1), ("8xA100", "", 8),
    ],
)  # fmt: skip
def test_devices_have_the_names_that_clouds_give_them(name, topology, count):
    found = parse_device(name)
    assert (found.topology, found.count) == (topology, count)
    assert found.chip == CHIPS[found.kind]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 64, 512])
def test_a_slice_is_as_near_to_a_cube_as_possible(dims, count):
    sizes = list(map(int, arrange_chips(count, dims, "x").split("x")))
    assert math.prod(sizes) == count
    assert len(sizes) == dims
    assert max(sizes) <= 2 * min(sizes) or count < 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", r"2 axes of its torus, such as v5e:2x2"),
        ("v5p:2x2", r"3 axes of its torus, such as v5p:2x2x2"),
        ("v5e:2x0", r"such as v5e:2x2"),
        ("v5f:2x2", r"--topology='v5f' is not known\."),
        ("H100:2", r"is not known"),
    ],
)
def test_a_wrong_topology_is_refused_with_a_right_one(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


def test_a_wrong_device_is_refused():
    with pytest.raises(ConfigError, match=r"device='H10' is not known.*H100"):
        parse_device("H10")
    with pytest.raises(ConfigError, match="1, 2, 4, 8"):
        parse_device("v5e-3")
    with pytest.raises(ConfigError, match="give one"):
        jaxgpt.plan(BASE, topology="v5e:2x2", device="T4")


def test_without_the_compiler_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv(tpu.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu.*environment of its own[^$]*tpu-plan\]"):
        jaxgpt.plan(BASE, topology="v5e:2x2")
    monkeypatch.setenv(tpu.PYTHON_VARIABLE, "/no/python")
    with pytest.raises(ConfigError, match="/no/python is no interpreter"):
        jaxgpt.plan(BASE, topology="v5e:2x2")


def test_an_answer_of_the_other_process_is_read_among_its_log(monkeypatch, tmp_path):
    script = tmp_path / "python"
    monkeypatch.setenv(tpu.PYTHON_VARIABLE, str(script))

    def write(lines):
        script.write_text(f"#!/bin/sh\ncat > /dev/null\ncat <<'END'\n{lines}\nEND\nexit 3\n")
        script.chmod(0o755)

    write(f'I0000 a log\n{tpu.RESULT}{{"x": 1}}')
    assert tpu.plan_in_process({}) == {"x": 1}
    write(f'{tpu.RESULT}{{"error": "mesh.data=3 needs 3 devices"}}')
    with pytest.raises(ConfigError, match="needs 3 devices"):
        tpu.plan_in_process({})
    write("a crash")
    with pytest.raises(ConfigError, match="exit status 3"):
        tpu.plan_in_process({})


# --- the largest config for a device ---


def test_the_largest_config_that_fits_comes_with_a_command_that_works(monkeypatch):
    monkeypatch.setattr("jaxgpt.planning.fit.list_configs", lambda: SIZES)
    found = find_fit("T4", [], None, quick=True)
    assert found.config == "gpt2_355m"
    words = found.command.split()
    assert words[:4] == ["jaxgpt", "train", "--config", "gpt2_355m"]
    cfg = configs.load(words[3], words[4:])
    assert cfg.model.dtype == "float32"  # a T4 has no bfloat16
    target = make_target(parse_device("T4"))
    assert advice.fits(estimate_footprint(cfg, target), target)
    assert found.plan.is_fitting
    assert found.command in str(found)
    assert found.faster in ("", "gpt2_124m", "gpt_mini")


SIZES = ["gpt_mini", "llama_65b", "gpt2_355m", "llama_7b", "gpt2_124m"]


def test_settings_that_cost_nothing_are_tried_first():
    target = make_target(parse_device("8xH100"))
    tried = list(list_candidates(configs.load("gpt_mini"), target))
    assert tried[0] == (
        "model.dtype=bfloat16", "mesh.data=1", "mesh.fsdp=-1", "train.accumulate=1"
    )  # fmt: skip
    assert any("optimizer.moments=int8" in settings for settings in tried[1:])


def test_no_config_fits_a_device_without_memory(monkeypatch):
    monkeypatch.setattr("jaxgpt.planning.fit.list_configs", lambda: SIZES)
    monkeypatch.setitem(CHIPS, "T4", CHIPS["T4"]._replace(memory=1000))
    found = find_fit("T4", [], None, quick=True)
    assert not found.config
    assert "None of the configs" in str(found)


# --- the command ---


def run_cli(name, *argv):
    import importlib

    return importlib.import_module(f"jaxgpt.cli.{name}").main(list(argv), f"jaxgpt {name}")


@pytest.mark.parametrize("command", [("plan",), ("train", "--plan")])
def test_the_command_prints_the_plan_as_json_and_allocates_nothing(command, capsys, monkeypatch):
    monkeypatch.setattr("jaxgpt.compile_cache.enable_compile_cache", lambda: None)
    before = len(jax.live_arrays())
    settings = ["model.width=64", "model.layers=2", "train.batch=8", "data.source=tests"]
    name, *options = command
    status = run_cli(name, *options, "--quick", "--mfu", "0.5", "--json", *settings)
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["is_fitting"]
    cfg = configs.load("stdlib", settings)
    assert found["parameters"] == count_params(cfg.model)
    assert found["flops_per_step"] == flops_per_token(cfg.model) * 8 * 128
    assert found["tokens"] == 600 * 8 * 128
    assert found["epochs"] > 0
    assert found["seconds"] == pytest.approx(600 * found["seconds_per_step"])
    assert found["memory"]["peak"] == sum(found["memory"][k] for k in ("arguments", "temporaries"))
    assert len(jax.live_arrays()) <= before + 2  # of the measured peak at most


def test_the_command_for_another_device_returns_1_if_it_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr("jaxgpt.compile_cache.enable_compile_cache", lambda: None)
    settings = ["model.dtype=float32", "train.batch=4", "train.accumulate=1"]
    assert run_cli("plan", "--config", "gpt2_1558m", "--device", "T4", *settings) == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "optimizer.moments=int8" in out
    assert "estimated; nothing was compiled" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--mfu", "2"], "--mfu 2 must be above 0"),
        (["plan", "--topology", "v5e"], "such as v5e:2x2"),
        (["plan", "--device", "H10"], "H100"),
        (["plan", "--fit", "T4", "--config", "gpt_mini"], "leave out --config"),
        (["plan", "gpt_mini"], "write jaxgpt plan --config gpt_mini"),
        (["train", "--topology", "v5e:2x2"], "write jaxgpt train --plan"),
        (["train", "--plan", "--device", "T4", "model.dtype=bfloat16"], "has no bfloat16"),
    ],
)
def test_wrong_options_are_refused(argv, message, monkeypatch):
    monkeypatch.setattr("jaxgpt.compile_cache.enable_compile_cache", lambda: None)
    with pytest.raises(ConfigError, match=message):
        run_cli(*argv)


def test_the_plan_is_a_command_and_a_function():
    assert "plan" in cli.COMMANDS
    code = "import sys, jaxgpt; print('jax' in sys.modules, callable(jaxgpt.plan))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# --- what is said unasked ---


def test_a_run_that_takes_days_or_may_not_fit_says_so_before_it_starts(monkeypatch):
    mesh = sharding.make_mesh(BASE.mesh, jax.devices()[:1])
    run = SimpleNamespace(
        cfg=BASE,
        mesh=mesh,
        state=make_abstract_state(BASE, mesh)[2],
        progress=SimpleNamespace(step=0),
        task=SimpleNamespace(tokens_per_batch=32 * 64),
        corpus=SimpleNamespace(train=SimpleNamespace(ids=np.zeros(2**20, np.uint16))),
        peak_flops=1e12,
    )
    assert not report.list_warnings(run)
    days = 12 * flops_per_token(BASE.model) * 32 * 64 / (41 * 86400 * TYPICAL_MFU["cpu"])
    run.peak_flops = days
    (line,) = report.list_warnings(run)
    assert line.startswith("warning: about 41 days on this CPU; --plan shows what would fit.")
    run.peak_flops = 1e12
    monkeypatch.setattr(report, "read_memory_bytes", lambda device: 1000)
    (line,) = report.list_warnings(run)
    assert "a step needs about" in line
    assert "it may not fit; --plan" in line


def test_running_out_of_memory_ends_with_what_needs_less(tmp_path):
    mesh = sharding.make_mesh(BASE.mesh, jax.devices()[:1])
    cfg = replace(BASE, name="x")
    with (
        pytest.raises(RunError, match="out of memory") as error,
        describe_step_memory_errors(cfg, mesh),
    ):
        raise MemoryError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.")
    message = str(error.value)
    assert "model.remat=full" in message
    assert "optimizer.moments=int8" in message
    assert "jaxgpt plan" in message
    with pytest.raises(ValueError, match="other"), describe_step_memory_errors(cfg, mesh):
        raise ValueError("other")


ROOT = pathlib.Path(__file__).parent.parent


def test_the_table_of_pods_is_written_between_its_marks(tmp_path):
    sys.path.insert(0, str(ROOT))  # benchmarks are not installed
    from benchmarks import pods

    page = tmp_path / "page.md"
    page.write_text(f"a\n{pods.BEGIN}\nold\n{pods.END}\nb\n")
    pods.write_table(page, "new")
    assert page.read_text() == f"a\n{pods.BEGIN}\nnew\n{pods.END}\nb\n"
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="around the table"):
        pods.write_table(page, "new")
