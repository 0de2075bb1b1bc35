"""What the TPU's compiler makes of a training step, read without a TPU.

    python -m benchmarks.tpu                                   every model on every chip
    python -m benchmarks.tpu --models gpt2_124m --chips v5e --config train.batch=16 --text step.txt

The compiler for TPUs comes in the package libtpu and runs on any Linux machine. It is no dependency
of this project; install the version that `pip install "jax[tpu]"` would take, for example with
`pip install "libtpu==0.0.42.*"` for jax 0.10.2. A compilation takes one to three minutes.

Nothing runs, so no time here is measured. Beside each other stand, for one step on one chip:

    floor       model FLOPs (trainer/speed.py) at the chip's peak
    compiler    cycles that the compiler expects of its instructions, times how often each runs. It
                expects nothing of a Pallas kernel, which stands in its own column:
    kernel      attention's products at the chip's peak: of those that splash makes (2 forward, 3
                for queries, 4 for keys and values) the causal half, at K / 128 of the peak where
                heads are narrower than the matrix unit
    traffic     bytes that instructions read and write in HBM, at its bandwidth. What a loop of n
                turns has stacked n high is used a turn at a time. Kernels are included, once.
    memory      arguments and temporaries, of the chip's
    copies      bytes of arrays that are only copied, transposed or laid out anew
    kept        what the forward pass stacks, layer by layer, for the backward pass

Clock and FLOP/s hang together: a matrix unit does 128 x 128 products and sums a cycle.
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
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

# Before jax is imported: there is no TPU to look for, nor a cloud to ask about it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it is not one of a machine's chips
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
from jax.experimental import topologies

from benchmarks.hlo import ARRAY, array_bytes, collectives, computations, runs
from benchmarks.step import lower_step
from jaxgpt.config import Config, ConfigError, load, override
from jaxgpt.script import run
from jaxgpt.settings import choose
from jaxgpt.trainer.speed import PEAK, flops_per_token

LANES = 128
LARGE = 2**20  # bytes: smaller copies are not worth a line


class Chip(NamedTuple):
    """What a data sheet says of a chip; its FLOP/s are in trainer/speed.py."""

    topology: str  # four of them
    units: int  # matrix units
    memory: float  # bytes
    bandwidth: float  # bytes/s


CHIPS = {
    "v5e": Chip("v5e:2x2", 4, 16 * 2**30, 819e9),
    "v5p": Chip("v5p:2x2x1", 8, 95 * 2**30, 2765e9),
}

# Name: (config, chips, settings). Batches are what the smaller chip holds.
MODELS = {
    "gpt2_124m": ("gpt2_124m", 1, ("train.batch=16",)),
    "llama3_1b": ("llama3_1b", 4, ("train.batch=4", "model.context=4096")),
    "gpt2_1558m": ("gpt2_1558m", 4, ("train.batch=32", "model.remat=dots")),
}


def chips_of(chip: Chip) -> list:
    """Four chips to compile for.

    Raises:
        ConfigError: the compiler is not installed.
    """
    try:
        version("libtpu")
    except PackageNotFoundError:
        wanted = "the libtpu that `pip install 'jax[tpu]'` names (0.0.42.* for jax 0.10.2)"
        raise ConfigError(f"the TPU's compiler is not installed: install {wanted}.") from None
    return list(topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices)


# --- reading a program ------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One instruction that is not part of a fusion."""

    name: str
    kind: str
    line: str
    type: str
    operands: tuple[str, ...]
    times: int  # in a run of the program

    @property
    def cycles(self) -> int:
        """As the compiler estimates, of all its runs; 0 where it does not."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return self.times * int(found[1]) if found else 0

    @property
    def label(self) -> str:
        """Where it comes from, in short."""
        found = re.search(r'op_name="([^"]*)"', self.line)
        words = found[1].split("/") if found else []
        back = "back: " if any(word.startswith("transpose(") for word in words) else ""
        return back + "/".join(words[-3:])


INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<kind>[a-z][a-z\-]*)\((?P<rest>.*)"
)
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "iota",
        "after-all", "partition-id"}  # fmt: skip


def with_turns(text: str) -> str:
    """The TPU's compiler leaves out how many turns a loop has: its condition tells."""
    programs = computations(text)
    lines = text.splitlines()
    for number, line in enumerate(lines):
        condition = re.search(r" while\(.*condition=%([\w.\-]+)", line)
        if not condition or "known_trip_count" in line:
            continue
        tests = "\n".join(programs[condition[1]])
        bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", tests)
        if len(bounds) == 1 and "direction=LT" in tests:
            lines[number] += f', "known_trip_count":{{"n":"{bounds[0]}"}}'
    return "\n".join(lines)


def instructions(text: str) -> tuple[list[Instruction], dict[str, str]]:
    """What a program runs, fusions whole; and the type of everything by its name."""
    programs = computations(text)
    times = runs(programs)
    inside = set(re.findall(r" (?:fusion|custom-call)\(.*?calls=%([\w.\-]+)", text))
    found, types = [], {}
    for name, lines in programs.items():
        for line in lines:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            types[match["name"]] = match["type"]
            # A fusion's parts are never run on their own; nor is what sums up for a reduction.
            if name in inside or not times.get(name):
                continue
            operands = tuple(re.findall(r"%([\w.\-]+)", match["rest"].partition(")")[0]))
            about = match["name"], match["kind"], line, match["type"], operands
            found.append(Instruction(*about, times[name] or 0))
    return found, types


def in_memory(kind: str, turns: int) -> int:
    """Bytes of a type's arrays in HBM that one of so many turns uses."""
    total = 0
    for each in re.finditer(ARRAY.pattern + r"(\{[^}]*\})?", kind):
        if "S(" in (each[3] or ""):  # in the chip's own memory
            continue
        size = array_bytes(each[1], each[2])
        is_stacked = turns > 1 and each[2].partition(",")[0] == str(turns)
        total += size // turns if is_stacked else size
    return total


class Reading(NamedTuple):
    """What a program says about itself, for one chip."""

    cycles: Counter[str]  # by kind
    slowest: list[Instruction]
    traffic: int  # bytes
    copies: Counter[str]  # bytes, by type
    kernels: Counter[str]  # runs, by name
    scores: list[str]  # arrays [T S] outside of kernels
    kept: Counter[str]  # how many arrays of each type


def read(text: str, cfg: Config) -> Reading:
    """Reads a program that `with_turns` has completed."""
    todo, types = instructions(text)
    cycles: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    traffic = 0
    for each in todo:
        cycles[each.kind] += each.cycles
        if each.kind not in FREE and not each.kind.endswith("-done"):
            used = [each.type, *(types.get(name, "") for name in each.operands)]
            traffic += each.times * sum(in_memory(kind, each.times) for kind in used)
        if each.kind in ("copy", "transpose") and (size := in_memory(each.type, 1)) > LARGE:
            copies[short(each.type)] += each.times * size
        if "tpu_custom_call" in each.line:
            kernels[each.name.rstrip(".0123456789")] += each.times
    T = cfg.model.context
    arrays = {array for kind in types.values() for array in ARRAY.findall(kind)}
    # Of rows and heads: [T T] alone may be a weight.
    scores = {
        f"{kind}[{shape}]" for kind, shape in arrays if re.fullmatch(rf".+,.+,{T},{T}", shape)
    }
    return Reading(
        cycles,
        sorted(todo, key=lambda each: -each.cycles),
        traffic,
        copies,
        kernels,
        sorted(scores),
        kept(todo, cfg.model.layers // len(cfg.model.unit)),
    )


def kept(todo: list[Instruction], repeats: int) -> Counter[str]:
    """What the loop that carries most has stacked, besides the parameters and their gradients."""
    # The program's own parameters are arrays; a loop's is a tuple.
    given = [each.type for each in todo if each.kind == "parameter" and each.type[0] != "("]
    sizes = {array_bytes("u8", shape) for kind in given for _, shape in ARRAY.findall(kind)}
    carried = [
        Counter(
            f"{kind}[{shape}]"
            for kind, shape in ARRAY.findall(each.type)
            if shape.partition(",")[0] == str(repeats)
            and array_bytes("u8", shape) > repeats * LARGE
            and array_bytes("u8", shape) not in sizes
        )
        for each in todo
        if each.kind == "while"
    ]
    return max(carried, key=lambda arrays: sum(map(size_of, arrays.elements())), default=Counter())


def short(kind: str) -> str:
    """A type without its layout."""
    return re.sub(r"\{[^}]*\}", "", kind)


def size_of(kind: str) -> int:
    return sum(array_bytes(*array) for array in ARRAY.findall(kind))


# --- one model on one chip --------------------------------------------------------------------


SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products that a run of each kernel makes


def attention_seconds(cfg: Config, tokens: float, peak: float, kernels: Counter[str]) -> float:
    """The products of splash, the causal half, at the chip's peak."""
    d = cfg.model.sizes
    runs = sum(n * SPLASH[part] for name, n in kernels.items() for part in SPLASH if part in name)
    product = 2 * tokens * cfg.model.context * d["H"] * d["K"]
    return runs * product / 2 / (peak * min(1, d["K"] / LANES))


def measured(cfg: Config, name: str, count: int, text_file: pathlib.Path | None) -> list[str]:
    """Lines about the step of a config on so many chips."""
    chip, peak = CHIPS[name], PEAK[name]
    clock = peak / (chip.units * 2 * LANES * LANES)
    start = time.perf_counter()
    lowered = lower_step(cfg, chips_of(chip)[:count]).lowered
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [f"does not fit: {str(error).splitlines()[0]}"]
    seconds = time.perf_counter() - start
    text = with_turns(compiled.as_text() or "")
    if text_file:
        text_file.write_text(text)
    this, memory = read(text, cfg), compiled.memory_analysis()
    tokens = cfg.train.batch * cfg.model.context / count
    flops = flops_per_token(cfg.model) * tokens
    estimate = sum(this.cycles.values()) / clock
    kernel = attention_seconds(cfg, tokens, peak, this.kernels)
    reached = flops / peak / (estimate + kernel)
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    lines = [
        f"tokens      {tokens:,.0f}",
        f"floor       {flops / peak * 1e3:.1f} ms, {flops / 1e12:.1f} TFLOP",
        f"compiler    {estimate * 1e3:.1f} ms, {shares(this.cycles)}",
        f"kernel      {kernel * 1e3:.1f} ms at best; {named(this.kernels) or 'none'}",
        f"reached     {reached:.0%} of the peak at best",
        f"traffic     {this.traffic / 1e9:.1f} GB, {this.traffic / chip.bandwidth * 1e3:.1f} ms",
        f"memory      {memory.argument_size_in_bytes / 1e9:.2f} GB of arguments, "
        f"{memory.temp_size_in_bytes / 1e9:.2f} of temporaries: {held / chip.memory:.0%} of "
        f"{chip.memory / 1e9:.0f}",
        f"copies      {sum(this.copies.values()) / 1e9:.2f} GB",
        *(f"              {size / 1e9:.2f} GB {kind}" for kind, size in this.copies.most_common(5)),
        f"[T S] left  {', '.join(this.scores) or 'none'}",
        f"kept        {sum(size_of(kind) * n for kind, n in this.kept.items()) / 1e9:.2f} GB",
        *(f"              {n} x {kind}" for kind, n in by_size(this.kept)),
    ]
    sent: Counter[str] = Counter()
    for one in collectives(text):
        sent[one.kind] += sum(one.arrays) * (one.times or 0)
    lines += [f"sent        {size / 1e9:.2f} GB {kind}" for kind, size in sent.most_common()]
    lines += ["slowest"]
    for each in this.slowest[:8]:
        part = each.cycles / clock * 1e3
        lines.append(f"  {part:6.2f} ms  {each.times:3} x {each.label or each.kind}")
    return [*lines, f"compiled in {seconds:.0f} s"]


def shares(cycles: Counter[str]) -> str:
    whole = max(1, sum(cycles.values()))
    return ", ".join(f"{kind} {n / whole:.0%}" for kind, n in cycles.most_common(3))


def named(kernels: Counter[str]) -> str:
    return ", ".join(f"{n} x {name}" for name, n in kernels.items())


def by_size(arrays: Counter[str]) -> list[tuple[str, int]]:
    most = sorted(arrays, key=lambda kind: -size_of(kind) * arrays[kind])[:8]
    return [(kind, arrays[kind]) for kind in most]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between")
    parser.add_argument("--chips", default=",".join(CHIPS), help="names, with commas between")
    parser.add_argument("--config", nargs="*", default=[], help="path=value, as train.batch=16")
    parser.add_argument("--text", type=pathlib.Path, help="where to write the last program")
    given = sys.argv[1:] if given is None else given
    a = parser.parse_args(given)
    models = {name: choose(MODELS, name, "--models") for name in a.models.split(",")}
    chips = {name: choose(CHIPS, name, "--chips") for name in a.chips.split(",")}
    chips_of(next(iter(chips.values())))
    print(f"command  {shlex.join(['python', '-m', 'benchmarks.tpu', *given])}")
    print(f"python {platform.python_version()}, jax {jax.__version__}, libtpu {version('libtpu')}")
    for model, (config, count, settings) in models.items():
        grid = ("train.accumulate=1", "mesh.data=1", f"mesh.fsdp={count}")
        cfg = override(load(config, [*grid, *settings]), a.config)
        for name in chips:
            print(f"\n{model} on {count} x {name}", flush=True)
            print("\n".join(f"  {line}" for line in measured(cfg, name, count, a.text)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
