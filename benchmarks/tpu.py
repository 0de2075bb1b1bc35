"""Analyze a training step compiled for TPUs, without a TPU.

    python -m benchmarks.tpu                                   every model on every chip
    python -m benchmarks.tpu --models gpt2_124m --chips v5e --config train.batch=16 --text step.txt

The compiler for TPUs is in the package libtpu and runs on any Linux machine. It is not a dependency
of this project; install the version that `pip install "jax[tpu]"` selects, for example with
`pip install "libtpu==0.0.42.*"` for jax 0.10.2. A compilation takes one to three minutes.

Nothing runs, so no time here is measured. For one step on one chip, the report lists:

    floor       model FLOPs (trainer/speed.py) at the chip's peak
    compiler    cycles that the compiler estimates for its instructions, times how often each runs.
                It has no estimate for Pallas kernels, which have their own line:
    kernel      attention's products at the chip's peak: the causal half of those that splash
                computes (2 forward, 3 for queries, 4 for keys and values), at K / 128 of the peak
                where heads are narrower than the matrix unit
    traffic     bytes that instructions read and write in HBM, at its bandwidth. Of an array that a
                loop of n iterations stacks n high, an iteration uses one slice. Kernels are
                included, once.
    memory      arguments and temporaries, as a fraction of the chip's memory
    copies      bytes of arrays that are only copied, transposed or given another layout
    saved       what the forward pass stacks, layer by layer, for the backward pass

Clock and FLOP/s are related: a matrix unit does 128 x 128 multiply-adds per cycle.
Source: the system architecture pages of Cloud TPU v5e and v5p, for units, memory and bandwidth.
"""

import argparse
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from collections import Counter
from importlib.metadata import version
from typing import NamedTuple

from jaxgpt.planning import tpu

# Set before jax is imported: there is no TPU to search for, and no cloud metadata to query.
os.environ.update(tpu.ENVIRONMENT)

import jax

from jaxgpt.config import Config, load, override
from jaxgpt.planning.chips import CHIPS
from jaxgpt.planning.hlo import (
    ARRAY,
    add_trip_counts,
    count_array_bytes,
    count_runs,
    list_collectives,
    split_computations,
)
from jaxgpt.planning.step import lower_step
from jaxgpt.script import run
from jaxgpt.settings import choose
from jaxgpt.trainer.speed import PEAK_FLOPS, flops_per_token

MATRIX_UNIT_WIDTH = 128
MIN_COPY_BYTES = 2**20  # smaller copies are not listed


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}  # of four chips

# Name: (config, chips, settings). Batches fit the memory of the smaller chip.
MODELS = {
    "gpt2_124m": ("gpt2_124m", 1, ("train.batch=16",)),
    "llama3_1b": ("llama3_1b", 4, ("train.batch=4", "model.context=4096")),
    "gpt2_1558m": ("gpt2_1558m", 4, ("train.batch=32", "model.remat=dots")),
}


# --- parsing of a program ---------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction that is not part of a fusion."""

    name: str
    kind: str
    line: str
    type: str
    operands: tuple[str, ...]
    times: int  # per run of the program

    @property
    def cycles(self) -> int:
        """The compiler's estimate for all of its runs; 0 if there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return self.times * int(found[1]) if found else 0

    @property
    def label(self) -> str:
        """The end of the path of the operation that it implements."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        names = found[1].split("/") if found else []
        prefix = "backward: " if any(name.startswith("transpose(") for name in names) else ""
        return prefix + "/".join(names[-3:])


INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<kind>[a-z][a-z\-]*)\((?P<rest>.*)"
)
FREE_KINDS = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "iota",
        "after-all", "partition-id"}  # fmt: skip


def parse_instructions(text: str) -> tuple[list[Instruction], dict[str, str]]:
    """Return the instructions that a program runs, fusions as one, and every type by name."""
    programs = split_computations(text)
    times = count_runs(programs)
    inside = set(re.findall(r" (?:fusion|custom-call)\(.*?calls=%([\w.\-]+)", text))
    found, types = [], {}
    for name, lines in programs.items():
        for line in lines:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            types[match["name"]] = match["type"]
            # Neither the parts of a fusion nor the operator of a reduction runs on its own.
            if name in inside or not times.get(name):
                continue
            operands = tuple(re.findall(r"%([\w.\-]+)", match["rest"].partition(")")[0]))
            fields = match["name"], match["kind"], line, match["type"], operands
            found.append(Instruction(*fields, times[name] or 0))
    return found, types


def count_hbm_bytes(kind: str, iterations: int) -> int:
    """Count the bytes of a type's arrays in HBM that one of a loop's iterations uses."""
    total = 0
    for match in re.finditer(ARRAY.pattern + r"(\{[^}]*\})?", kind):
        if "S(" in (match[3] or ""):  # in the chip's on-chip memory
            continue
        size = count_array_bytes(match[1], match[2])
        is_stacked = iterations > 1 and match[2].partition(",")[0] == str(iterations)
        total += size // iterations if is_stacked else size
    return total


class ProgramStats(NamedTuple):
    """Statistics of a program, for one chip."""

    cycles: Counter[str]  # by kind
    slowest: list[Instruction]
    traffic: int  # bytes
    copies: Counter[str]  # bytes, by type
    kernels: Counter[str]  # runs, by name
    scores: list[str]  # arrays [T S] outside of kernels
    saved: Counter[str]  # number of arrays of each type


def analyze_program(text: str, cfg: Config) -> ProgramStats:
    """Analyze a program with the trip counts that `add_trip_counts` adds."""
    instructions, types = parse_instructions(text)
    cycles: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    traffic = 0
    for x in instructions:
        cycles[x.kind] += x.cycles
        if x.kind not in FREE_KINDS and not x.kind.endswith("-done"):
            used = [x.type, *(types.get(name, "") for name in x.operands)]
            traffic += x.times * sum(count_hbm_bytes(kind, x.times) for kind in used)
        if (
            x.kind in ("copy", "transpose")
            and (size := count_hbm_bytes(x.type, 1)) > MIN_COPY_BYTES
        ):
            copies[remove_layout(x.type)] += x.times * size
        if "tpu_custom_call" in x.line:
            kernels[x.name.rstrip(".0123456789")] += x.times
    T = cfg.model.context
    arrays = {array for kind in types.values() for array in ARRAY.findall(kind)}
    # Scores have dimensions of rows and heads before [T T]; a weight may be [T T].
    scores = {
        f"{kind}[{shape}]" for kind, shape in arrays if re.fullmatch(rf".+,.+,{T},{T}", shape)
    }
    return ProgramStats(
        cycles,
        sorted(instructions, key=lambda x: -x.cycles),
        traffic,
        copies,
        kernels,
        sorted(scores),
        count_saved_arrays(instructions, cfg.model.layers // len(cfg.model.layer_cycle)),
    )


def count_saved_arrays(instructions: list[Instruction], repeats: int) -> Counter[str]:
    """Count the arrays that the loop with the largest carry has stacked.

    Parameters and their gradients are excluded.
    """
    # The program's own parameters are arrays; a loop's is a tuple.
    inputs = [x.type for x in instructions if x.kind == "parameter" and x.type[0] != "("]
    sizes = {count_array_bytes("u8", shape) for kind in inputs for _, shape in ARRAY.findall(kind)}
    carries = [
        Counter(
            f"{kind}[{shape}]"
            for kind, shape in ARRAY.findall(x.type)
            if shape.partition(",")[0] == str(repeats)
            and count_array_bytes("u8", shape) > repeats * MIN_COPY_BYTES
            and count_array_bytes("u8", shape) not in sizes
        )
        for x in instructions
        if x.kind == "while"
    ]
    return max(
        carries, key=lambda arrays: sum(map(count_bytes, arrays.elements())), default=Counter()
    )


def remove_layout(kind: str) -> str:
    """Return a type without its layout."""
    return re.sub(r"\{[^}]*\}", "", kind)


def count_bytes(kind: str) -> int:
    return sum(count_array_bytes(*array) for array in ARRAY.findall(kind))


# --- one model on one chip --------------------------------------------------------------------


SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # products per run of each kernel


def estimate_attention_seconds(
    cfg: Config, tokens: float, peak: float, kernels: Counter[str]
) -> float:
    """Estimate the time of the causal half of splash's products at the chip's peak."""
    d = cfg.model.sizes
    products = sum(
        n * count
        for name, n in kernels.items()
        for part, count in SPLASH_PRODUCTS.items()
        if part in name
    )
    product_flops = 2 * tokens * cfg.model.context * d["H"] * d["K"]
    return products * product_flops / 2 / (peak * min(1, d["K"] / MATRIX_UNIT_WIDTH))


def describe_step(cfg: Config, name: str, count: int, text_file: pathlib.Path | None) -> list[str]:
    """Return lines that describe the step of a config on `count` chips."""
    chip, peak = CHIPS[name], PEAK_FLOPS[name]
    clock = peak / (chip.matrix_units * 2 * MATRIX_UNIT_WIDTH * MATRIX_UNIT_WIDTH)
    start = time.perf_counter()
    lowered = lower_step(cfg, tpu.get_devices(TOPOLOGIES[name])[:count]).lowered
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [f"does not fit: {str(error).splitlines()[0]}"]
    seconds = time.perf_counter() - start
    text = add_trip_counts(compiled.as_text() or "")
    if text_file:
        text_file.write_text(text)
    stats, memory = analyze_program(text, cfg), compiled.memory_analysis()
    tokens = cfg.train.batch * cfg.model.context / count
    flops = flops_per_token(cfg.model) * tokens
    estimate = sum(stats.cycles.values()) / clock
    kernel = estimate_attention_seconds(cfg, tokens, peak, stats.kernels)
    fraction = flops / peak / (estimate + kernel)
    used_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    lines = [
        f"tokens      {tokens:,.0f}",
        f"floor       {flops / peak * 1e3:.1f} ms, {flops / 1e12:.1f} TFLOP",
        f"compiler    {estimate * 1e3:.1f} ms, {format_shares(stats.cycles)}",
        f"kernel      {kernel * 1e3:.1f} ms at best; {format_counts(stats.kernels) or 'none'}",
        f"reached     {fraction:.0%} of the peak at best",
        f"traffic     {stats.traffic / 1e9:.1f} GB, {stats.traffic / chip.bandwidth * 1e3:.1f} ms",
        f"memory      {memory.argument_size_in_bytes / 1e9:.2f} GB of arguments, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} of temporaries: {used_bytes / chip.memory:.0%} of "
        f"{chip.memory / 1e9:.0f}",
        f"copies      {sum(stats.copies.values()) / 1e9:.2f} GB",
        *(
            f"              {size / 1e9:.2f} GB {kind}"
            for kind, size in stats.copies.most_common(5)
        ),
        f"[T S] left  {', '.join(stats.scores) or 'none'}",
        f"saved       {sum(count_bytes(kind) * n for kind, n in stats.saved.items()) / 1e9:.2f} GB",
        *(f"              {n} x {kind}" for kind, n in list_largest(stats.saved)),
    ]
    sent: Counter[str] = Counter()
    for collective in list_collectives(text):
        sent[collective.kind] += sum(collective.arrays) * (collective.times or 0)
    lines += [f"sent        {size / 1e9:.2f} GB {kind}" for kind, size in sent.most_common()]
    lines += ["slowest"]
    for x in stats.slowest[:8]:
        milliseconds = x.cycles / clock * 1e3
        lines.append(f"  {milliseconds:6.2f} ms  {x.times:3} x {x.label or x.kind}")
    return [*lines, f"compiled in {seconds:.0f} s"]


def format_shares(cycles: Counter[str]) -> str:
    total = max(1, sum(cycles.values()))
    return ", ".join(f"{kind} {n / total:.0%}" for kind, n in cycles.most_common(3))


def format_counts(kernels: Counter[str]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in kernels.items())


def list_largest(arrays: Counter[str]) -> list[tuple[str, int]]:
    most = sorted(arrays, key=lambda kind: -count_bytes(kind) * arrays[kind])[:8]
    return [(kind, arrays[kind]) for kind in most]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names")
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help="comma-separated names")
    parser.add_argument(
        "--config", nargs="*", default=[], help="path=value, such as train.batch=16"
    )
    parser.add_argument("--text", type=pathlib.Path, help="where to write the last program")
    arguments = sys.argv[1:] if arguments is None else arguments
    a = parser.parse_args(arguments)
    models = {name: choose(MODELS, name, "--models") for name in a.models.split(",")}
    chips = {name: choose(TOPOLOGIES, name, "--chips") for name in a.chips.split(",")}
    tpu.get_devices(next(iter(chips.values())))
    print(f"command  {shlex.join(['python', '-m', 'benchmarks.tpu', *arguments])}")
    print(f"python {platform.python_version()}, jax {jax.__version__}, libtpu {version('libtpu')}")
    for model, (config, count, settings) in models.items():
        grid = ("train.accumulate=1", "mesh.data=1", f"mesh.fsdp={count}")
        cfg = override(load(config, [*grid, *settings]), a.config)
        for name in chips:
            print(f"\n{model} on {count} x {name}", flush=True)
            print(
                "\n".join(f"  {line}" for line in describe_step(cfg, name, count, a.text)),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    run(main)
