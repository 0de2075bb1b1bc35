"""What each way of dividing a training step costs: memory, and messages between devices.

    python -m benchmarks.scaling                          every layout on 1, 2, 4 and 8 devices
    python -m benchmarks.scaling --layouts fsdp,tensor --devices 8 --config model.width=512
    python -m benchmarks.scaling --docs docs              writes docs/scaling.md anew

Training steps are compiled for virtual devices of this machine and not run; what they send is read
from the compiled program. Beside it stands what must be so by the letters, of which a device has

    b = B / (data fsdp expert)    t = T / context    n = b t tokens    P parts of a pipeline's batch
    W  a parameter with fsdp gathered    w = W / fsdp

in numbers of 4 bytes each. A product over tokens that several devices have gives each of them a
part of the sum, which an all-reduce completes; a dimension that is needed whole is gathered.

    gradients   all-reduce of every W along all axes that divide tokens. A table that embeds and
                scores has two gradients, which are summed one by one (at least: one). In a
                pipeline, axes other than data sum at every turn (at least: once).
    fsdp        every W of a layer is gathered twice, forward and backward, the table once. The CPU
                compiler completes W and cuts w out of it (at least: a reduce-scatter, half of it).
    tensor      [n D] after each of the two products that sum over what is divided, forward. Back,
                the gradients of the inputs of q, k, v, gate and up, one by one (at least: two sums
                of them). [n D] of the embedding and of the loss; four [n] for the softmax.
    context     all-to-all of q, k, v and the output, forward and backward, where heads divide;
                else keys and values [b T G K] are gathered, and their gradients summed (at least:
                a reduce-scatter). [b T] of positions and of documents, forward and backward.
    pipe        P + stages - 1 turns, each passing a part [b t D / P] on, and back twice, half of it
                for nothing; what the first stage is fed has a gradient that all hear (at least:
                none, for only the first stage needs it). All parts go from the last stage to all
                at the end, by a permutation of all turns and an all-reduce, and their gradients
                back by a gathering and a permutation (at least: a message of n tokens each way).
    expert      tokens [n D] of all are gathered and the sums scattered, forward and backward, with
                shares and choices [n active] and their gradient; see model/experts.py.

Memory of a step, of a model that keeps all activations for its backward pass (`model.remat=none`):

    arguments   parameters and two moments of each, as divided; they are updated in place
    gradients   of all parameters, as divided, and the table whole once for each of its uses
    saved       L layers of n (4 D + 2 H K + 2 G K + 2 F + H) numbers, D being not divided: what
                goes into norms and comes out of them; q, k, v; what attention gives and its sums;
                gate and up. In `context`, what attention gives once more, as it is sent. (The
                papers' 34 n D is for 2-byte numbers: Korthikanti et al. 2022, arXiv:2205.05198,
                section 4.1.)
    at work     two chunks of scores [chunk V], or what the backward pass of one layer computes (of
                a part of the batch in a pipeline), whichever is more: the steps that are not saved
                and the gradients of all, about n (9 D + 3 H K + 2 G K + 6 F)

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

# Before jax is imported, for it reads these once.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from benchmarks.hlo import SENDS, Collective, collectives
from benchmarks.step import lower_step
from jaxgpt.config import Config, ConfigError, ModelConfig, TrainConfig, override
from jaxgpt.model import abstract_params
from jaxgpt.model.pipeline import parts
from jaxgpt.objectives import CHUNK_SCORES
from jaxgpt.script import run
from jaxgpt.settings import choose
from jaxgpt.sharding import named
from jaxgpt.trainer.logging import write_whole

BASE = Config(
    name="scaling",
    model=ModelConfig(
        vocab=4096, context=256, width=256, layers=8, heads=8, ffn=704, kernel="blockwise"
    ),
    train=TrainConfig(batch=16),
)
# Nobody runs the machine code, so none of it is made well: a compilation takes a third of the time.
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones have one way only to make kernels
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
DEVICES = 8
SCALAR = 8  # bytes: losses, counts and norms are not listed

EXPERTS = ("model.feedforward=moe_gated", "model.moe.experts=8", "model.ffn=352")


class Layout(NamedTuple):
    """Axes that devices are divided over, and what the model must be for it."""

    axes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def sizes(self, devices: int) -> dict[str, int] | None:
        """Factors of two, dealt to the axes in turn; None where there are too few of them."""
        sizes = dict.fromkeys(self.axes, 1)
        for deal in range(devices.bit_length() - 1):
            sizes[self.axes[deal % len(self.axes)]] *= 2
        return None if 1 in sizes.values() and devices > 1 else sizes


LAYOUTS = {
    "data": Layout(("data",)),
    "fsdp": Layout(("fsdp",)),
    "tensor": Layout(("tensor",)),
    "context by heads": Layout(("context",)),
    "context by keys": Layout(("context",), ("model.heads=1",)),  # one head can not be divided
    "pipe": Layout(("pipe",)),
    "expert": Layout(("expert",), EXPERTS),
    "expert with capacity": Layout(("expert",), (*EXPERTS, "model.moe.capacity=1.25")),
    "fsdp x context": Layout(("fsdp", "context")),
    "data x pipe": Layout(("data", "pipe")),
    "data x fsdp x tensor": Layout(("data", "fsdp", "tensor")),
    "data x tensor x context": Layout(("data", "tensor", "context")),
}


def configured(base: Config, layout: Layout, devices: int) -> Config | None:
    """The base on so many devices; None where the layout needs more."""
    sizes = layout.sizes(devices)
    if sizes is None:
        return None
    mesh = [f"mesh.{axis}={size}" for axis, size in ({"data": 1} | sizes).items()]
    return override(base, (*layout.settings, *mesh))


# --- what the compiler makes of it -----------------------------------------------------------


class Step(NamedTuple):
    """A training step, compiled and not run."""

    cfg: Config
    mesh: Any
    state: Any  # abstract, with shardings
    memory: Any
    collectives: list[Collective]


def compile_step(cfg: Config, devices: int) -> Step:
    """The training step of a config for the first so many devices."""
    mesh, _, state, lowered = lower_step(cfg, jax.devices()[:devices])
    compiled = lowered.compile(compiler_options=QUICKLY)
    found = collectives(compiled.as_text() or "")
    return Step(cfg, mesh, state, compiled.memory_analysis(), found)


def device_bytes(tree) -> int:
    """Bytes that one device has of a tree of abstract arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


Exchanges = dict[tuple[str, tuple[str, ...]], list[int]]  # (kind, axes) -> bytes of every array


def exchanged(step: Step) -> Exchanges:
    """Every array that a step sends, once for each time."""
    sent: Exchanges = defaultdict(list)
    for each in step.collectives:
        arrays = [size for size in each.arrays if size > SCALAR]
        if arrays and each.times is None:
            raise ValueError(f"{each.kind} in a loop of unknown length: {each.label}")
        sent[each.kind, each.axes(step.mesh)] += arrays * (each.times or 0)
    return {key: sorted(sizes) for key, sizes in sent.items() if sizes}


# --- what it must be -------------------------------------------------------------------------


class Row(NamedTuple):
    """An exchange that a layout asks for."""

    what: str
    kind: str
    axes: tuple[str, ...]
    size: float  # bytes of the array on one device
    times: int = 1
    least: float = 1.0  # share of the traffic that would do


# The axis that divides a dimension of a parameter.
DIVIDES = dict(L="pipe", E="expert", D="fsdp", H="tensor", G="tensor", F="tensor", V="tensor")


class Theory:
    """Exchanges and memory of a training step of a gated decoder, by its letters."""

    def __init__(self, step: Step):
        self.cfg, self.mesh = step.cfg, dict(step.mesh.shape)
        self.m, self.d = step.cfg.model, dict(step.cfg.model.sizes)
        self.state = step.state
        self.L = self.m.layers // self.mesh["pipe"]  # layers of a device
        self.b = step.cfg.train.batch // self.size("data", "fsdp", "expert")
        self.n = self.b * self.m.context // self.mesh["context"]
        self.stream = 4 * self.n * self.d["D"]
        self.P, stages = 1, self.mesh["pipe"]
        if stages > 1:
            with jax.set_mesh(step.mesh):
                self.P = parts(step.cfg.train.batch, stages)
        self.turns = self.P + stages - 1
        self.scored = self.n // stages  # tokens whose loss a device computes
        most = step.cfg.train.loss_chunk or CHUNK_SCORES["cpu"] // self.d["V"]
        self.chunk = next(c for c in range(min(most, self.scored), 0, -1) if self.scored % c == 0)

    def size(self, *axes: str) -> int:
        return math.prod(self.mesh[axis] for axis in axes)

    def along(self, *axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in self.mesh if axis in axes and self.mesh[axis] > 1)

    def parameters(self, where: str):
        """(name, shape, W in bytes, axes that divide it) of parameters of "layers", or "rest"."""
        for path, x in jax.tree.leaves_with_path(self.state.params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if ("layers/" in name) == (where == "layers"):
                axes = {axis for part in x.sharding.spec for axis in named(part)}
                # What is used whole: experts are not, but the router's table of them is.
                gathered = axes & ({"fsdp", "expert"} if "router" in name else {"fsdp"})
                yield name, x.shape, device_bytes(x) * self.size(*gathered), axes

    @property
    def by_heads(self) -> bool:
        """Whether heads can be divided over context as well; see model/kernels."""
        return self.d["H"] % math.lcm(self.d["G"], self.size("tensor", "context")) == 0

    def rows(self) -> list[Row]:
        """All exchanges of more than one device."""
        rows = [*self.gradients(), *self.fsdp(), *self.tensor(), *self.context()]
        rows += [*self.pipe(), *self.expert()]
        return [row for row in rows if row.axes and self.size(*row.axes) > 1]

    def gradients(self):
        rows, columns = self.along("data", "fsdp", "expert"), self.along("context")
        turns, is_pipeline = self.turns, self.mesh["pipe"] > 1
        for name, shape, W, divided in self.parameters("layers"):
            if is_pipeline:  # over the copies once, over what else divides rows at every turn
                yield Row(name, "all-reduce", self.along("data"), W)
                rows = self.along("fsdp", "expert")
            W, times = W / self.L, self.L * turns
            axes = tuple(axis for axis in rows if "experts/" not in name or axis not in divided)
            if "fsdp" in axes and len(shape) > 2:  # a matrix: what is kept goes on alone
                yield Row(name, "all-reduce", ("fsdp",), W, times, 0.5 / turns)
                axes, W = tuple(axis for axis in axes if axis != "fsdp"), W / self.mesh["fsdp"]
            yield Row(name, "all-reduce", axes, W, times, 1 / turns)
            yield Row(name, "all-reduce", columns, W, times, 1 / turns)
        rows = self.along("data", "fsdp", "expert")
        for name, _, W, _ in self.parameters("rest"):
            least = 0.5 if self.mesh["fsdp"] > 1 else 1.0
            apart = rows, columns
            if name == "embed/table":
                everywhere = self.along("data", "fsdp", "expert", "context", "pipe")
                yield Row("table, scoring", "all-reduce", everywhere, W, 1, least)
                least = 0
            else:
                apart += (self.along("pipe"),)
            for axes in apart:
                yield Row(name, "all-reduce", axes, W, 1, least)

    def fsdp(self):
        axes = self.along("fsdp")
        for name, _, W, _ in self.parameters("layers"):
            yield Row(name, "all-gather", axes, W / self.L, 2 * self.L)
        for name, _, W, _ in self.parameters("rest"):
            yield Row(name, "all-gather", axes, W, 1 if name == "embed/table" else 2)

    def tensor(self):
        axes, ffn = self.along("tensor"), 2 if self.m.feedforward == "gated" else 0
        yield Row("sums of o, down", "all-reduce", axes, self.stream, 2 * self.L)
        yield Row("inputs of q, k, v", "all-reduce", axes, self.stream, 3 * self.L, 1 / 3)
        yield Row("inputs of gate, up", "all-reduce", axes, self.stream, ffn * self.L, 1 / 2)
        yield Row("embedding", "all-reduce", axes, self.stream)
        chunk = self.chunk
        times = self.scored // chunk
        yield Row("scored", "all-reduce", axes, 4 * chunk * self.d["D"], times)
        yield Row("softmax", "all-reduce", axes, 4 * chunk, 4 * times, 3 / 4)

    def context(self):
        axes = self.along("context")
        H, K = self.d["H"], self.d["K"]
        if self.by_heads:
            G = math.lcm(self.d["G"], self.size("tensor", "context"))
            for name, heads in (("q", H), ("k", G), ("v", G), ("out", H)):
                size = 4 * self.n * heads * K / self.mesh["tensor"]
                yield Row(name, "all-to-all", axes, size, 2 * self.L)
        else:
            G = self.d["G"] // math.gcd(self.d["G"], self.mesh["tensor"])
            size = 4 * self.b * self.m.context * G * K
            yield Row("k, v", "all-gather", axes, size, 2 * self.L)
            yield Row("gradients of k, v", "all-reduce", axes, size, 2 * self.L, 1 / 2)
        yield Row("places", "all-gather", axes, 4 * self.b * self.m.context, 4, 1 / 2)

    def pipe(self):
        axes, part = self.along("pipe"), self.stream / self.P
        turns = self.turns
        yield Row("passed on", "collective-permute", axes, part, turns)
        yield Row("passed back", "collective-permute", axes, part, 2 * turns, 1 / 2)
        yield Row("fed", "all-reduce", axes, part, turns, 0)
        yield Row("out", "collective-permute", axes, part * turns, 1, 0)
        yield Row("out", "all-reduce", axes, self.stream, 1, 1 / 2)
        yield Row("out, back", "all-gather", axes, self.stream)
        yield Row("out, back", "collective-permute", axes, self.stream, 1, 0)

    def expert(self):
        axes, moe, count = self.along("expert"), self.m.moe, self.mesh["expert"]
        if not self.m.has_experts:
            return
        tokens, picks = self.stream * count, 4 * self.n * count * moe.active
        yield Row("tokens, and back", "all-gather", axes, tokens, 2 * self.L)
        yield Row("shares, choices", "all-gather", axes, picks, 2 * self.L)
        yield Row("sums, and back", "reduce-scatter", axes, tokens, 2 * self.L)
        yield Row("shares, back", "reduce-scatter", axes, picks, self.L)
        yield Row("load", "all-reduce", axes, 4 * moe.experts, 3 * self.L)
        router = 4 * self.d["D"] * moe.experts
        yield Row("router", "all-gather", axes, router, 2 * self.L)
        if moe.capacity:
            counted = 4 * count * self.b * moe.active * moe.experts
            yield Row("counts", "all-gather", axes, counted, self.L)

    def exchanged(self) -> Exchanges:
        sent: Exchanges = defaultdict(list)
        for row in self.rows():
            sent[row.kind, row.axes] += [round(row.size)] * row.times
        return {key: sorted(sizes) for key, sizes in sent.items()}

    def parameter_bytes(self) -> float:
        """Bytes of the parameters of a device."""
        shapes, letters = abstract_params(self.m)
        total = 0.0
        for x, d in zip(jax.tree.leaves(shapes), jax.tree.leaves(letters), strict=True):
            axes = {DIVIDES[letter] for letter in d if letter in DIVIDES}
            total += 4 * math.prod(x.shape) / self.size(*axes)
        return total

    def layer(self, streams: int, heads: int, channels: int) -> float:
        """Bytes of so many arrays [n D], [n H K] and [n F] of a layer, with keys and values.

        Half as many as [n F] are those of all tokens of the devices that divide experts.
        """
        d, tensor, moe = self.d, self.mesh["tensor"], self.m.moe
        keys = 2 * d["G"] * d["K"] * (1 if self.by_heads else self.mesh["context"])
        mixed = heads * d["H"] * d["K"] + keys + d["H"]
        wide = channels * d["F"] / tensor
        if self.m.has_experts:
            gathered = self.mesh["expert"] * (d["D"] + 3 * moe.active)
            wide = channels / 2 * gathered + 2 * moe.experts
        return 4 * self.n * (streams * d["D"] + mixed / tensor + wide)

    def saved(self) -> float:
        """Bytes of activations that the backward pass needs."""
        idle = self.turns / self.P  # turns of nothing are kept too
        heads = 2 if self.mesh["context"] == 1 else 3  # what attention gives, as made and as sent
        return idle * self.L * self.layer(streams=4, heads=heads, channels=2)

    def peak(self) -> float:
        """Bytes of everything, when it is most."""
        table = sum(W for name, _, W, _ in self.parameters("rest") if "table" in name)
        scores = 2 * 4 * self.chunk * self.d["V"] / self.mesh["tensor"]
        work = max(scores, self.layer(streams=9, heads=3, channels=6) / self.P)
        batch = 5 * 4 * self.n
        state = 4 * self.parameter_bytes()  # with two moments and the gradients
        return state + batch + 2 * table + self.saved() + work


# --- tables ----------------------------------------------------------------------------------


def sent(exchanges, mesh) -> float:
    """Bytes that a device sends: (kind, axes, bytes) of arrays -> their sum by the best ring."""
    return sum(
        SENDS[kind](math.prod(mesh.shape[axis] for axis in axes)) * size
        for kind, axes, size in exchanges
    )


def measured(name: str, step: Step) -> dict[str, Any]:
    """What a layout costs and should cost, in bytes of one device."""
    theory, memory = Theory(step), step.memory
    found, expected = exchanged(step), theory.exchanged()
    rows = theory.rows()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "layout": name,
        "devices": step.mesh.size,
        "mesh": {axis: size for axis, size in step.mesh.shape.items() if size > 1},
        "parameters": device_bytes(step.state.params),
        "parameters in theory": round(theory.parameter_bytes()),
        "optimizer": device_bytes(step.state.opt_state),
        "optimizer in theory": round(2 * theory.parameter_bytes()),
        "peak": peak,
        "peak in theory": round(theory.peak()),
        "sent": sent(((*key, sum(sizes)) for key, sizes in found.items()), step.mesh),
        "sent in theory": sent(((r.kind, r.axes, r.size * r.times) for r in rows), step.mesh),
        "sent at least": sent(
            ((r.kind, r.axes, r.size * r.times * r.least) for r in rows), step.mesh
        ),
        "theory": [row._asdict() for row in rows],
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


def table(header: str, rows) -> list[str]:
    """Lines of Markdown; the columns after the first that hold numbers stand at the right."""
    head = [cell.strip() for cell in header.split("|")]
    rows = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in r] for r in rows]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    is_text = [any(c.isalpha() for c in column[0]) for column in zip(*rows, strict=True)]

    def line(cells):
        cells = zip(cells, widths, is_text, strict=True)
        return f"| {' | '.join(c.ljust(w) if text else c.rjust(w) for c, w, text in cells)} |"

    rule = [
        "-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text, strict=True)
    ]
    return [line(head), line(rule), *map(line, rows)]


def memory_table(results) -> list[str]:
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
    return table(header, rows)


def exchange_table(results) -> list[str]:
    header = "layout|devices|kind|along|arrays|MB|theory"
    return table(
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


def page(about: dict[str, str], results) -> str:
    """docs/scaling.md."""
    by = {(r["layout"], r["devices"]): r for r in results}
    most = max(r["devices"] for r in results)
    memory = "\n".join(memory_table(results))
    exchanges = "\n".join(exchange_table([r for r in results if r["devices"] == most]))
    lowest, highest = (f(r["peak"] / r["peak in theory"] for r in results) for f in (min, max))
    exact = all(e["bytes"] == e["bytes in theory"] for r in results for e in r["exchanges"])
    facts = "\n".join(f"* {name}: {value}" for name, value in about.items() if name != "command")

    def of(name, key):
        return by[name, most][key] / 1e6 if (name, most) in by else math.nan

    return f"""# Scaling

Made by the command below, which writes this page and its figures anew; do not edit.

```
{about["command"]}
```

{facts}

Training steps compiled for virtual devices, and what they hold and send: bytes of **one** device
and **one** step, in MB of 10^6. `benchmarks/scaling.py` says how the theory is derived;
`tests/test_scaling.py` holds every layout to it.

## Memory and traffic

**Peak** is what the compiled step needs at once: arguments, outputs that are not updates in place,
and temporary memory. Here it is {lowest:.2f} to {highest:.2f} times the theory. **Sent** is what a
device sends if every exchange runs around a ring; **at least** is what the same layout would send
without what the compiler for CPUs, and in places this library, do not do yet: a reduce-scatter in
place of an all-reduce (fsdp, and keys and values), the sum of the gradients of q, k and v and of
gate and up before it is sent (tensor), what the ends of a pipeline send (pipe), one gradient of the
table for its two uses (all).

{memory}

## Exchanges

Of {most} devices. An all-gather is counted by what comes of it, a reduce-scatter by what it begins
with, and numbers of at most {SCALAR} bytes are not listed. {
        "Measured and theory agree to the byte in every layout and on every number of devices."
        if exact
        else "Where measured and theory differ, the theory does not know why."
    }

{exchanges}

## How to choose

Begin with **data**: it sends the gradients ({of("data", "sent"):,.0f} MB here, whatever the batch)
and nothing else, but every device holds all parameters and moments. Where these do not fit,
**fsdp** divides them and the gradients ({of("fsdp", "peak"):,.0f} MB at the peak against
{of("data", "peak"):,.0f}) for {of("fsdp", "sent at least") / of("data", "sent at least"):.1f} times
the traffic at least. Its messages do not grow with the batch either, so that with tokens enough on
each device they hide behind the work. Put fsdp within a group of devices that are near to each
other, and data between the groups. **expert** divides the experts of a mixture, which fsdp would
gather; what it sends is tokens, not weights, so it is for experts that outweigh their tokens.

The other axes send activations, in every layer, and are for what the first ones can not do.
**tensor** divides the widest activations, the scores and the work of a single row
({of("tensor", "sent"):,.0f} MB here): keep it within a machine, and no larger than it must be.
**context** is for rows too long for one device. By heads it sends
{of("context by heads", "sent"):,.0f} MB, fewer for activations the more devices there are; by keys
{
        of(
            "context by keys", "sent"
        ):,.0f} MB: choose heads that it divides. **pipe** sends one part a turn
to a neighbour ({of("pipe", "sent"):,.0f} MB), which suits slow links, but is idle for a share of
(stages - 1) / (parts + stages - 1) of the time; and beside fsdp weights are gathered and
gradients sent at every turn, so put it beside data or tensor.
"""


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="names, with commas between")
    parser.add_argument("--devices", default="1,2,4,8", help="powers of two, with commas between")
    parser.add_argument(
        "--config", nargs="*", default=[], help="path=value, such as model.width=64"
    )
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    parser.add_argument("--docs", type=pathlib.Path, help="the folder in which to write scaling.md")
    given = sys.argv[1:] if given is None else given
    a = parser.parse_args(given)
    base = override(BASE, a.config)
    layouts = {name: choose(LAYOUTS, name, "--layouts") for name in a.layouts.split(",")}
    counts = [int(count) for count in a.devices.split(",") if count.isdigit()]
    if not counts or any(n < 1 or n & (n - 1) or n > DEVICES for n in counts):
        raise ConfigError(f"--devices {a.devices}: use powers of two up to {DEVICES}, as in 2,8.")
    m = base.model
    about = {
        "command": f"python -m benchmarks.scaling {shlex.join(given)}".strip(),
        "model": f"{m.layers} layers, width {m.width}, {m.heads} heads, F {m.ffn}, V {m.vocab}; "
        f"{base.train.batch} rows of {m.context}; float32, {base.optimizer.name}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{DEVICES} virtual, {jax.default_backend()}",
    }
    print("\n".join(f"{name:8} {value}" for name, value in about.items()), flush=True)
    results = []
    alone = set()
    for name, layout in layouts.items():
        for count in counts:
            cfg = configured(base, layout, count)
            if cfg is None or (count == 1 and layout.settings in alone):
                continue
            if count == 1:  # nothing is divided: the same for all layouts of one model
                alone.add(layout.settings)
            start = time.perf_counter()
            results.append(measured(name, compile_step(cfg, count)))
            print(f"{name} on {count}: {time.perf_counter() - start:.1f} s", flush=True)
    for lines in (memory_table(results), exchange_table(results)):
        print("\n" + "\n".join(lines))
    if a.json:
        write_whole(str(a.json), json.dumps(about | {"layouts": results}, indent=2) + "\n")
    if a.docs:
        write_whole(str(a.docs / "scaling.md"), page(about, results))
    return 0


if __name__ == "__main__":
    run(main)
