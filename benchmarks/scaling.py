"""Compute the memory and the communication of each layout of a training step over devices.

    python -m benchmarks.scaling                          every layout on 1, 2, 4 and 8 devices
    python -m benchmarks.scaling --layouts fsdp,tensor --devices 8 --config model.width=512
    python -m benchmarks.scaling --docs docs              rewrite docs/scaling.md

Training steps are compiled for virtual devices of this machine and not run; the exchanges are read
from the compiled program and compared with theory. The theory follows from the dimensions, of which
a device holds

    b = B / (data fsdp expert)    t = T / context    n = b t tokens    P microbatches of a pipeline
    W  a parameter with fsdp gathered    w = W / fsdp

in numbers of 4 bytes each. A product that sums over a divided dimension leaves each device with a
partial sum, which an all-reduce completes; a dimension that is needed whole is gathered. "At least"
is what the same layout could do with.

    gradients   All-reduce of every W along all axes that divide tokens. A table used both to embed
                and to score has two gradients, which are summed separately (at least: one). In a
                pipeline, axes other than data sum in every tick (at least: once).
    fsdp        Every W of a layer is gathered twice, forward and backward, the table once. The CPU
                compiler all-reduces W and slices w from it (at least: a reduce-scatter, half as
                much).
    tensor      Forward, [n D] after each of the two products that sum over a divided dimension.
                Backward, the gradients of the inputs of q, k, v, gate and up, each separately (at
                least: two sums of them). [n D] for the embedding and for the loss; four [n] for the
                softmax.
    context     All-to-all of q, k, v and the output, forward and backward, where heads divide;
                otherwise keys and values [b T G K] are gathered, and their gradients summed (at
                least: a reduce-scatter). [b T] of positions and of segment ids, forward and
                backward.
    pipe        P + stages - 1 ticks, each passing a microbatch [b t D / P] on, and back twice, one
                of these without need. The gradient of the first stage's input is all-reduced (at
                least: nothing, since only the first stage needs it). At the end the outputs of all
                microbatches go from the last stage to all, by a permutation of all ticks and an
                all-reduce, and their gradients back by an all-gather and a permutation (at least: a
                message of n tokens each way).
    expert      Tokens [n D] of all devices are gathered and the sums scattered, forward and
                backward, with routing weights and expert indices [n active] and the gradient of the
                weights; see model/experts.py.

Memory of a step, of a model that keeps all activations for its backward pass (`model.remat=none`):

    arguments   parameters and two moments of each, as divided; they are updated in place
    gradients   of all parameters, as divided, and the whole table once for each of its uses
    saved       L layers of n (4 D + 2 H K + 2 G K + 2 F + H) numbers, with D not divided: inputs
                and outputs of norms; q, k, v; the attention output and its log-sum-exp; gate and
                up. With `context`, the attention output a second time, as it is sent. (The papers'
                34 n D is for 2-byte numbers: Korthikanti et al. 2022, arXiv:2205.05198, section
                4.1.)
    temporary   two chunks of scores [chunk V], or the backward pass of one layer (in a pipeline, of
                one microbatch), whichever is more: the intermediate results that are not saved and
                the gradients of all, about n (9 D + 3 H K + 2 G K + 6 F)

Sources: Shoeybi et al. 2019 (Megatron), arXiv:1909.08053, section 3; Rajbhandari et al. 2020
(ZeRO), arXiv:1910.02054, section 7; Jacobs et al. 2023 (Ulysses), arXiv:2309.14509.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import shlex
import sys
import time
from collections import defaultdict
from typing import Any, NamedTuple

# Set before jax is imported, because it reads these only once.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxgpt.backend import BACKENDS
from jaxgpt.config import Config, ConfigError, ModelConfig, TrainConfig, override
from jaxgpt.model import abstract_params
from jaxgpt.model.pipeline import count_microbatches
from jaxgpt.planning.hlo import SENT_FRACTION, Collective, list_collectives
from jaxgpt.planning.step import lower_step
from jaxgpt.script import run
from jaxgpt.settings import choose
from jaxgpt.sharding import get_axis_names
from jaxgpt.trainer.logging import write_text_atomically

BASE = Config(
    name="scaling",
    model=ModelConfig(
        vocab=4096, context=256, width=256, layers=8, heads=8, ffn=704, kernel="blockwise"
    ),
    train=TrainConfig(batch=16),
)
# The machine code is not run, so it is not optimized: a compilation takes a third of the time.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later versions have only one kernel emitter
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False
MAX_DEVICES = 8
MAX_SCALAR_BYTES = 8  # losses, counts and norms, which are not listed

EXPERT_SETTINGS = ("model.feedforward=moe_gated", "model.moe.experts=8", "model.ffn=352")


class Layout(NamedTuple):
    """The mesh axes that devices are divided over, and the settings that they require."""

    axes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def divide_devices(self, devices: int) -> dict[str, int] | None:
        """Distribute factors of two over the axes in turn; None if there are too few of them."""
        sizes = dict.fromkeys(self.axes, 1)
        for index in range(devices.bit_length() - 1):
            sizes[self.axes[index % len(self.axes)]] *= 2
        return None if 1 in sizes.values() and devices > 1 else sizes


LAYOUTS = {
    "data": Layout(("data",)),
    "fsdp": Layout(("fsdp",)),
    "tensor": Layout(("tensor",)),
    "context by heads": Layout(("context",)),
    "context by keys": Layout(("context",), ("model.heads=1",)),  # one head cannot be divided
    "pipe": Layout(("pipe",)),
    "expert": Layout(("expert",), EXPERT_SETTINGS),
    "expert with capacity": Layout(("expert",), (*EXPERT_SETTINGS, "model.moe.capacity=1.25")),
    "fsdp x context": Layout(("fsdp", "context")),
    "data x pipe": Layout(("data", "pipe")),
    "data x fsdp x tensor": Layout(("data", "fsdp", "tensor")),
    "data x tensor x context": Layout(("data", "tensor", "context")),
}


def make_config(base: Config, layout: Layout, devices: int) -> Config | None:
    """Return the base config on this many devices; None if the layout needs more."""
    sizes = layout.divide_devices(devices)
    if sizes is None:
        return None
    mesh = [f"mesh.{axis}={size}" for axis, size in ({"data": 1} | sizes).items()]
    return override(base, (*layout.settings, *mesh))


# --- measurement: the compiled program -------------------------------------------------------


class Step(NamedTuple):
    """A compiled training step, which is not run."""

    cfg: Config
    mesh: Any
    state: Any  # abstract, with shardings
    memory: Any
    collectives: list[Collective]


def compile_step(cfg: Config, devices: int) -> Step:
    """Compile the training step of a config for the first `devices` devices."""
    mesh, _, state, lowered = lower_step(cfg, jax.devices()[:devices])
    compiled = lowered.compile(compiler_options=FAST_COMPILE)
    found = list_collectives(compiled.as_text() or "")
    return Step(cfg, mesh, state, compiled.memory_analysis(), found)


def count_device_bytes(tree) -> int:
    """Count the bytes of a tree of abstract arrays that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


Exchanges = dict[tuple[str, tuple[str, ...]], list[int]]  # (kind, axes) -> bytes of every array


def list_exchanges(step: Step) -> Exchanges:
    """List every array that a step sends, as many times as it is sent."""
    sent: Exchanges = defaultdict(list)
    for collective in step.collectives:
        arrays = [size for size in collective.arrays if size > MAX_SCALAR_BYTES]
        if arrays and collective.times is None:
            raise ValueError(f"{collective.kind} in a loop of unknown length: {collective.label}")
        sent[collective.kind, collective.axes(step.mesh)] += arrays * (collective.times or 0)
    return {key: sorted(sizes) for key, sizes in sent.items() if sizes}


# --- theory ----------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """An exchange between devices that a layout requires."""

    name: str
    kind: str
    axes: tuple[str, ...]
    size: float  # bytes of the array on one device
    times: int = 1
    least: float = 1.0  # fraction of the traffic that would suffice


# The mesh axis that divides a dimension of a parameter.
MESH_AXIS_OF = dict(L="pipe", E="expert", D="fsdp", H="tensor", G="tensor", F="tensor", V="tensor")


class Theory:
    """Exchanges and memory of a training step of a gated decoder, derived from its dimensions."""

    def __init__(self, step: Step):
        self.cfg, self.mesh = step.cfg, dict(step.mesh.shape)
        self.m, self.d = step.cfg.model, dict(step.cfg.model.sizes)
        self.state = step.state
        self.L = self.m.layers // self.mesh["pipe"]  # layers of a device
        self.b = step.cfg.train.batch // self.count_devices("data", "fsdp", "expert")
        self.n = self.b * self.m.context // self.mesh["context"]
        self.stream = 4 * self.n * self.d["D"]
        self.P, stages = 1, self.mesh["pipe"]
        if stages > 1:
            with jax.set_mesh(step.mesh):
                self.P = count_microbatches(step.cfg.train.batch, stages)
        self.ticks = self.P + stages - 1
        self.scored = self.n // stages  # tokens whose loss a device computes
        limit = step.cfg.train.loss_chunk or BACKENDS["cpus"].max_chunk_scores // self.d["V"]
        self.chunk = next(c for c in range(min(limit, self.scored), 0, -1) if self.scored % c == 0)

    def count_devices(self, *axes: str) -> int:
        return math.prod(self.mesh[axis] for axis in axes)

    def select_axes(self, *axes: str) -> tuple[str, ...]:
        """Return those of the axes that have more than one device, in the mesh's order."""
        return tuple(axis for axis in self.mesh if axis in axes and self.mesh[axis] > 1)

    def iterate_parameters(self, is_layer: bool):
        """Iterate over the parameters of the layers, or over all others.

        Yields (name, shape, W in bytes, axes that divide it).
        """
        for path, x in jax.tree.leaves_with_path(self.state.params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if ("layers/" in name) == is_layer:
                axes = {axis for part in x.sharding.spec for axis in get_axis_names(part)}
                # Gathered before use: experts are not, but the router's table of them is.
                gathered = axes & ({"fsdp", "expert"} if "router" in name else {"fsdp"})
                yield name, x.shape, count_device_bytes(x) * self.count_devices(*gathered), axes

    @property
    def has_divided_heads(self) -> bool:
        """Whether heads can be divided over context as well; see model/kernels."""
        return self.d["H"] % math.lcm(self.d["G"], self.count_devices("tensor", "context")) == 0

    def derive_exchanges(self) -> list[Exchange]:
        """Return all exchanges between more than one device."""
        exchanges = [
            *self.derive_gradients(),
            *self.derive_fsdp(),
            *self.derive_tensor(),
            *self.derive_context(),
            *self.derive_pipe(),
            *self.derive_expert(),
        ]
        return [x for x in exchanges if x.axes and self.count_devices(*x.axes) > 1]

    def derive_gradients(self):
        rows, columns = self.select_axes("data", "fsdp", "expert"), self.select_axes("context")
        ticks, is_pipeline = self.ticks, self.mesh["pipe"] > 1
        for name, shape, W, divided in self.iterate_parameters(is_layer=True):
            if is_pipeline:  # once over data, in every tick over the other axes that divide rows
                yield Exchange(name, "all-reduce", self.select_axes("data"), W)
                rows = self.select_axes("fsdp", "expert")
            W, times = W / self.L, self.L * ticks
            axes = tuple(axis for axis in rows if "experts/" not in name or axis not in divided)
            if "fsdp" in axes and len(shape) > 2:  # a matrix: only the slice w is sent further
                yield Exchange(name, "all-reduce", ("fsdp",), W, times, 0.5 / ticks)
                axes, W = tuple(axis for axis in axes if axis != "fsdp"), W / self.mesh["fsdp"]
            yield Exchange(name, "all-reduce", axes, W, times, 1 / ticks)
            yield Exchange(name, "all-reduce", columns, W, times, 1 / ticks)
        rows = self.select_axes("data", "fsdp", "expert")
        for name, _, W, _ in self.iterate_parameters(is_layer=False):
            least = 0.5 if self.mesh["fsdp"] > 1 else 1.0
            axes_of_sums = rows, columns
            if name == "embed/table":
                all_axes = self.select_axes("data", "fsdp", "expert", "context", "pipe")
                yield Exchange("table, scoring", "all-reduce", all_axes, W, 1, least)
                least = 0
            else:
                axes_of_sums += (self.select_axes("pipe"),)
            for axes in axes_of_sums:
                yield Exchange(name, "all-reduce", axes, W, 1, least)

    def derive_fsdp(self):
        axes = self.select_axes("fsdp")
        for name, _, W, _ in self.iterate_parameters(is_layer=True):
            yield Exchange(name, "all-gather", axes, W / self.L, 2 * self.L)
        for name, _, W, _ in self.iterate_parameters(is_layer=False):
            yield Exchange(name, "all-gather", axes, W, 1 if name == "embed/table" else 2)

    def derive_tensor(self):
        axes, ffn = self.select_axes("tensor"), 2 if self.m.feedforward == "gated" else 0
        yield Exchange("sums of o, down", "all-reduce", axes, self.stream, 2 * self.L)
        yield Exchange("inputs of q, k, v", "all-reduce", axes, self.stream, 3 * self.L, 1 / 3)
        yield Exchange("inputs of gate, up", "all-reduce", axes, self.stream, ffn * self.L, 1 / 2)
        yield Exchange("embedding", "all-reduce", axes, self.stream)
        chunk = self.chunk
        times = self.scored // chunk
        yield Exchange("input of the loss", "all-reduce", axes, 4 * chunk * self.d["D"], times)
        yield Exchange("softmax", "all-reduce", axes, 4 * chunk, 4 * times, 3 / 4)

    def derive_context(self):
        axes = self.select_axes("context")
        H, K = self.d["H"], self.d["K"]
        if self.has_divided_heads:
            G = math.lcm(self.d["G"], self.count_devices("tensor", "context"))
            for name, heads in (("q", H), ("k", G), ("v", G), ("out", H)):
                size = 4 * self.n * heads * K / self.mesh["tensor"]
                yield Exchange(name, "all-to-all", axes, size, 2 * self.L)
        else:
            G = self.d["G"] // math.gcd(self.d["G"], self.mesh["tensor"])
            size = 4 * self.b * self.m.context * G * K
            yield Exchange("k, v", "all-gather", axes, size, 2 * self.L)
            yield Exchange("gradients of k, v", "all-reduce", axes, size, 2 * self.L, 1 / 2)
        size = 4 * self.b * self.m.context
        yield Exchange("positions, segment ids", "all-gather", axes, size, 4, 1 / 2)

    def derive_pipe(self):
        axes, microbatch = self.select_axes("pipe"), self.stream / self.P
        ticks = self.ticks
        yield Exchange("forward", "collective-permute", axes, microbatch, ticks)
        yield Exchange("backward", "collective-permute", axes, microbatch, 2 * ticks, 1 / 2)
        yield Exchange("gradient of input", "all-reduce", axes, microbatch, ticks, 0)
        yield Exchange("output", "collective-permute", axes, microbatch * ticks, 1, 0)
        yield Exchange("output", "all-reduce", axes, self.stream, 1, 1 / 2)
        yield Exchange("gradient of output", "all-gather", axes, self.stream)
        yield Exchange("gradient of output", "collective-permute", axes, self.stream, 1, 0)

    def derive_expert(self):
        axes, moe, count = self.select_axes("expert"), self.m.moe, self.mesh["expert"]
        if not self.m.has_experts:
            return
        tokens, picks = self.stream * count, 4 * self.n * count * moe.active
        yield Exchange("tokens, both passes", "all-gather", axes, tokens, 2 * self.L)
        yield Exchange("routing weights and indices", "all-gather", axes, picks, 2 * self.L)
        yield Exchange("sums, both passes", "reduce-scatter", axes, tokens, 2 * self.L)
        yield Exchange("gradient of routing weights", "reduce-scatter", axes, picks, self.L)
        yield Exchange("load", "all-reduce", axes, 4 * moe.experts, 3 * self.L)
        router = 4 * self.d["D"] * moe.experts
        yield Exchange("router", "all-gather", axes, router, 2 * self.L)
        if moe.capacity:
            counted = 4 * count * self.b * moe.active * moe.experts
            yield Exchange("counts", "all-gather", axes, counted, self.L)

    def list_exchanges(self) -> Exchanges:
        sent: Exchanges = defaultdict(list)
        for exchange in self.derive_exchanges():
            sent[exchange.kind, exchange.axes] += [round(exchange.size)] * exchange.times
        return {key: sorted(sizes) for key, sizes in sent.items()}

    def count_parameter_bytes(self) -> float:
        """Count the bytes of the parameters that a device holds."""
        shapes, letters = abstract_params(self.m)
        total = 0.0
        for x, d in zip(jax.tree.leaves(shapes), jax.tree.leaves(letters), strict=True):
            axes = {MESH_AXIS_OF[letter] for letter in d if letter in MESH_AXIS_OF}
            total += 4 * math.prod(x.shape) / self.count_devices(*axes)
        return total

    def count_layer_bytes(self, streams: int, heads: int, channels: int) -> float:
        """Count the bytes of a layer's activations, with keys and values.

        With experts, arrays of all tokens of the devices that divide the experts take the place of
        [n F], half as many.

        Args:
            streams: number of arrays [n D].
            heads: number of arrays [n H K].
            channels: number of arrays [n F].
        """
        d, tensor, moe = self.d, self.mesh["tensor"], self.m.moe
        keys = 2 * d["G"] * d["K"] * (1 if self.has_divided_heads else self.mesh["context"])
        mixed = heads * d["H"] * d["K"] + keys + d["H"]
        wide = channels * d["F"] / tensor
        if self.m.has_experts:
            gathered = self.mesh["expert"] * (d["D"] + 3 * moe.active)
            wide = channels / 2 * gathered + 2 * moe.experts
        return 4 * self.n * (streams * d["D"] + mixed / tensor + wide)

    def count_saved_bytes(self) -> float:
        """Count the bytes of the activations that are saved for the backward pass."""
        overhead = self.ticks / self.P  # activations of idle ticks are saved too
        heads = 2 if self.mesh["context"] == 1 else 3  # attention output, computed and as sent
        return overhead * self.L * self.count_layer_bytes(streams=4, heads=heads, channels=2)

    def count_peak_bytes(self) -> float:
        """Count the bytes of everything at the peak."""
        others = self.iterate_parameters(is_layer=False)
        table = sum(W for name, _, W, _ in others if "table" in name)
        scores = 2 * 4 * self.chunk * self.d["V"] / self.mesh["tensor"]
        layer = self.count_layer_bytes(streams=9, heads=3, channels=6) / self.P
        batch = 5 * 4 * self.n
        state = 4 * self.count_parameter_bytes()  # with two moments and the gradients
        return state + batch + 2 * table + self.count_saved_bytes() + max(scores, layer)


# --- tables ----------------------------------------------------------------------------------


def count_sent_bytes(exchanges, mesh) -> float:
    """Count the bytes that a device sends around a ring; an array is (kind, axes, bytes)."""
    return sum(
        SENT_FRACTION[kind](math.prod(mesh.shape[axis] for axis in axes)) * size
        for kind, axes, size in exchanges
    )


def compare_with_theory(name: str, step: Step) -> dict[str, Any]:
    """Return the measured and the theoretical costs of a layout, in bytes of one device."""
    theory, memory = Theory(step), step.memory
    found, expected = list_exchanges(step), theory.list_exchanges()
    exchanges = theory.derive_exchanges()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "layout": name,
        "devices": step.mesh.size,
        "mesh": {axis: size for axis, size in step.mesh.shape.items() if size > 1},
        "parameters": count_device_bytes(step.state.params),
        "parameters in theory": round(theory.count_parameter_bytes()),
        "optimizer": count_device_bytes(step.state.opt_state),
        "optimizer in theory": round(2 * theory.count_parameter_bytes()),
        "peak": peak,
        "peak in theory": round(theory.count_peak_bytes()),
        "sent": count_sent_bytes(((*key, sum(sizes)) for key, sizes in found.items()), step.mesh),
        "sent in theory": count_sent_bytes(
            ((x.kind, x.axes, x.size * x.times) for x in exchanges), step.mesh
        ),
        "sent at least": count_sent_bytes(
            ((x.kind, x.axes, x.size * x.times * x.least) for x in exchanges), step.mesh
        ),
        "theory": [exchange._asdict() for exchange in exchanges],
        "exchanges": [
            {
                "kind": kind,
                "along": list(axes),
                "arrays": len(found.get((kind, axes), ())),
                "bytes": sum(found.get((kind, axes), ())),
                "bytes in theory": sum(expected.get((kind, axes), ())),
            }
            for kind, axes in sorted({*found, *expected})
        ],
    }


def format_table(header: str, rows) -> list[str]:
    """Format the lines of a Markdown table, with columns of numbers aligned to the right."""
    head = [cell.strip() for cell in header.split("|")]
    rows = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    is_text = [any(c.isalpha() for c in column[0]) for column in zip(*rows, strict=True)]

    def format_line(cells):
        cells = zip(cells, widths, is_text, strict=True)
        return f"| {' | '.join(c.ljust(w) if text else c.rjust(w) for c, w, text in cells)} |"

    rule = [
        "-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text, strict=True)
    ]
    return [format_line(head), format_line(rule), *map(format_line, rows)]


def format_memory_table(results) -> list[str]:
    header = (
        "layout|devices|parameters MB|theory|optimizer MB|theory|peak MB|theory|"
        "measured / theory|sent MB|theory|at least"
    )
    keys = ("parameters", "optimizer", "peak")
    rows = []
    for r in results:
        pairs = [r[key + end] / 1e6 for key in keys for end in ("", " in theory")]
        traffic = [r["sent" + end] / 1e6 for end in ("", " in theory", " at least")]
        rows.append([r["layout"], r["devices"], *pairs, r["peak"] / r["peak in theory"], *traffic])
    return format_table(header, rows)


def format_exchange_table(results) -> list[str]:
    header = "layout|devices|kind|along|arrays|MB|theory"
    return format_table(
        header,
        (
            [
                *(r["layout"], r["devices"], e["kind"], " ".join(e["along"]), e["arrays"]),
                *(e[key] / 1e6 for key in ("bytes", "bytes in theory")),
            ]
            for r in results
            for e in r["exchanges"]
        ),
    )


def format_page(about: dict[str, str], results) -> str:
    """Format docs/scaling.md."""
    by_layout = {(r["layout"], r["devices"]): r for r in results}
    most = max(r["devices"] for r in results)
    memory = "\n".join(format_memory_table(results))
    exchanges = "\n".join(format_exchange_table([r for r in results if r["devices"] == most]))
    lowest, highest = (f(r["peak"] / r["peak in theory"] for r in results) for f in (min, max))
    exact = all(e["bytes"] == e["bytes in theory"] for r in results for e in r["exchanges"])
    facts = "\n".join(f"* {name}: {value}" for name, value in about.items() if name != "command")

    def get_megabytes(name, key):
        return by_layout[name, most][key] / 1e6 if (name, most) in by_layout else math.nan

    def format_megabytes(name, key):
        return f"{get_megabytes(name, key):,.0f}"

    ratio = get_megabytes("fsdp", "sent at least") / get_megabytes("data", "sent at least")

    return f"""# Scaling

Generated by the command below, which rewrites this page and its figures; do not edit.

```sh
{about["command"]}
```

{facts}

Memory and communication of training steps compiled for virtual devices: bytes of **one** device
and **one** step, in MB of 10^6. `benchmarks/scaling.py` describes how the theory is derived;
`tests/test_scaling.py` checks every layout against it.

## Memory and traffic

**Peak** is what the compiled step needs at once: arguments, outputs that are not updates in place,
and temporary memory. Here it is {lowest:.2f} to {highest:.2f} times the theory. **Sent** is what a
device sends if every exchange runs around a ring. **At least** is what the same layout would send
with optimizations that the compiler for CPUs, and in places this library, lack: a reduce-scatter in
place of an all-reduce (fsdp, and keys and values), summing the gradients of q, k and v and those of
gate and up before they are sent (tensor), fewer messages at the ends of a pipeline (pipe), and one
gradient of the table for its two uses (all).

{memory}

## Exchanges

On {most} devices. An all-gather is counted by its output and a reduce-scatter by its input; arrays
of at most {MAX_SCALAR_BYTES} bytes are not listed. {
        "Measurement and theory agree to the byte in every layout and on every number of devices."
        if exact
        else "Where measurement and theory differ, the theory is incomplete."
    }

{exchanges}

## How to choose

Begin with **data**: it sends the gradients
({format_megabytes("data", "sent")} MB here, whatever the batch)
and nothing else, but every device holds all parameters and moments. Where these do not fit,
**fsdp** divides them and the gradients ({format_megabytes("fsdp", "peak")} MB at the peak against
{format_megabytes("data", "peak")}) for at least {ratio:.1f} times
the traffic. Its messages do not grow with the batch either, so with enough tokens on each device
they overlap with computation. Put fsdp within a group of devices with fast links, and data between
the groups. **expert** divides the experts of a mixture, which fsdp would gather; it sends tokens,
not weights, so it is for experts that are larger than their tokens.

The other axes send activations, in every layer, and are for what the first ones cannot do.
**tensor** divides the widest activations, the scores and the computation of a single row
({format_megabytes("tensor", "sent")} MB here): keep it within a machine, and as small as possible.
**context** is for rows too long for one device. By heads it sends
{
        format_megabytes("context by heads", "sent")
    } MB, and less for activations the more devices there are; by keys
{
        format_megabytes("context by keys", "sent")
    } MB: choose a number of heads that it divides. **pipe** sends one microbatch per tick
to the next stage ({
        format_megabytes("pipe", "sent")
    } MB), which suits slow links, but is idle for a fraction
(stages - 1) / (microbatches + stages - 1) of the time. Combined with fsdp, it gathers weights and
sends gradients in every tick, so combine it with data or tensor.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated names")
    parser.add_argument("--devices", default="1,2,4,8", help="comma-separated powers of two")
    parser.add_argument(
        "--config", nargs="*", default=[], help="path=value, such as model.width=64"
    )
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    parser.add_argument("--docs", type=pathlib.Path, help="the folder in which to write scaling.md")
    arguments = sys.argv[1:] if arguments is None else arguments
    a = parser.parse_args(arguments)
    base = override(BASE, a.config)
    layouts = {name: choose(LAYOUTS, name, "--layouts") for name in a.layouts.split(",")}
    counts = [int(count) for count in a.devices.split(",") if count.isdigit()]
    if not counts or any(n < 1 or n & (n - 1) or n > MAX_DEVICES for n in counts):
        raise ConfigError(
            f"--devices {a.devices}: use powers of two up to {MAX_DEVICES}, such as 2,8."
        )
    m = base.model
    about = {
        "command": f"python -m benchmarks.scaling {shlex.join(arguments)}".strip(),
        "model": f"{m.layers} layers, width {m.width}, {m.heads} heads, F {m.ffn}, V {m.vocab}; "
        f"{base.train.batch} rows of {m.context}; float32, {base.optimizer.name}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{MAX_DEVICES} virtual, {jax.default_backend()}",
    }
    print("\n".join(f"{name:8} {value}" for name, value in about.items()), flush=True)
    results = []
    undivided = set()
    for name, layout in layouts.items():
        for count in counts:
            cfg = make_config(base, layout, count)
            if cfg is None or (count == 1 and layout.settings in undivided):
                continue
            if count == 1:  # nothing is divided: the same for all layouts of one model
                undivided.add(layout.settings)
            start = time.perf_counter()
            results.append(compare_with_theory(name, compile_step(cfg, count)))
            print(f"{name} on {count}: {time.perf_counter() - start:.1f} s", flush=True)
    for lines in (format_memory_table(results), format_exchange_table(results)):
        print("\n" + "\n".join(lines))
    if a.json:
        write_text_atomically(
            str(a.json), json.dumps(about | {"layouts": results}, indent=2) + "\n"
        )
    if a.docs:
        write_text_atomically(str(a.docs / "scaling.md"), format_page(about, results))
    return 0


if __name__ == "__main__":
    run(main)
