"""What the step of a config needs on a device: compiled, or estimated where nothing can compile."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxgpt.config import Config
from jaxgpt.planning.chips import Chip, Slice, get_peak_flops
from jaxgpt.planning.hlo import (
    SENT_FRACTION,
    add_trip_counts,
    list_collectives,
)
from jaxgpt.planning.step import lower_step
from jaxgpt.trainer.estimate import count_microbatches, estimate_step
from jaxgpt.trainer.memory import read_memory_bytes

MAX_SCALAR_BYTES = 8  # losses, counts and norms, which are not listed


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for.

    Args:
        name: for people.
        platform: "cpu", "gpu" or "tpu".
        count: number of devices.
        memory: bytes of each; 0 if not known.
        devices: to compile for; empty if no compiler for them is on this machine.
        chip: the data sheet, or None for the devices of this machine.
        kind: the row of the data sheet.
    """

    name: str
    platform: str
    count: int
    memory: int
    devices: tuple = ()
    chip: Chip | None = None
    kind: str = ""

    @property
    def has_bfloat16(self) -> bool:
        """Whether the devices compute in bfloat16."""
        return self.chip is None or self.chip.has_bfloat16


def find_devices_here() -> Target:
    """Return the devices of this machine."""
    devices = tuple(jax.devices())
    memory = read_memory_bytes(devices[0])
    if devices[0].platform == "cpu":
        memory //= len(devices)  # virtual devices share it
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    name = f"{count}{devices[0].device_kind} of this machine"
    return Target(name, devices[0].platform, len(devices), memory, devices)


def make_target(chips: Slice, devices: Sequence = ()) -> Target:
    """Return the devices of a data sheet; `devices`: those of its compiler, if it is here."""
    memory = int(chips.chip.memory)
    return Target(
        chips.name, chips.chip.platform, chips.count, memory, tuple(devices), chips.chip, chips.kind
    )


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same mesh axes, in one step.

    Args:
        kind: all-gather, all-reduce, ...
        axes: of the mesh.
        arrays: how many arrays.
        bytes: of these arrays, on one device.
        sent: bytes that a device sends if they run around a ring.
        is_whole: whether all of it is counted; not where a loop's length is unknown.
    """

    kind: str
    axes: tuple[str, ...]
    arrays: int
    bytes: int
    sent: int
    is_whole: bool = True


@dataclass(frozen=True)
class Footprint:
    """What a training step takes on one device, in bytes.

    Args:
        source: "compiled" or "estimated".
        arguments: state and batch, updated in place.
        temporaries: of the compiled program, with outputs that are not updates in place.
        exchanges: the collectives of a compiled program.
        microbatches: parts of a batch, one after the other.
    """

    source: str
    arguments: int
    temporaries: int
    exchanges: tuple[Exchange, ...] = ()
    microbatches: int = 1

    @property
    def peak(self) -> int:
        """The memory that the step needs at once."""
        return self.arguments + self.temporaries


def estimate_footprint(cfg: Config, target: Target) -> Footprint:
    """Estimate the step of a config on a target without compiling anything.

    Raises:
        ConfigError: the config does not fit this number of devices.
    """
    found, microbatches = estimate_step(cfg, target.count, target.platform, target.kind)
    arguments = found.parameters + found.optimizer
    return Footprint("estimated", arguments, found.temporaries, (), microbatches)


def compile_footprint(cfg: Config, target: Target) -> Footprint:
    """Compile the step of a config for the devices of a target, and read what it takes.

    Raises:
        ConfigError: the config does not fit this number of devices.
    """
    step = lower_step(cfg, target.devices)
    with jax.set_mesh(step.mesh):
        total = sum(x.size for x in jax.tree.leaves((step.state.params, step.state.base)))
        microbatches = count_microbatches(cfg, total)
    try:
        compiled = step.lowered.compile(compiler_options=choose_compiler_options(target))
    except jax.errors.JaxRuntimeError as error:
        size = parse_needed_bytes(str(error))
        if size is None:
            raise
        estimate = estimate_footprint(cfg, target)
        arguments = min(estimate.arguments, size)
        return Footprint("compiled", arguments, size - arguments, (), microbatches)
    memory = compiled.memory_analysis()
    extra = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    exchanges: tuple[Exchange, ...] = ()
    if target.count > 1:
        exchanges = list_exchanges(add_trip_counts(compiled.as_text() or ""), step.mesh)
    return Footprint(
        "compiled",
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + extra,
        exchanges,
        microbatches,
    )


def choose_compiler_options(target: Target) -> dict[str, Any] | None:
    """Return options for a program that is not run: without optimizing the machine code of a CPU.

    They change neither the order of the instructions nor their memory.
    """
    return {"xla_backend_optimization_level": 0} if target.platform == "cpu" else None


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_needed_bytes(message: str) -> int | None:
    """Return the memory that a compiler's RESOURCE_EXHAUSTED says a program needs, or None.

    "Used 30.21G of 15.75G hbm": the compiler for TPUs refuses programs that do not fit.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def list_exchanges(text: str, mesh: Any) -> tuple[Exchange, ...]:
    """Sum the collectives of a compiled program by kind and mesh axes, the largest first."""
    found: dict[tuple[str, tuple[str, ...]], Exchange] = {}
    counts: dict = defaultdict(lambda: [0, 0, 0, True])
    for collective in list_collectives(text):
        arrays = [size for size in collective.arrays if size > MAX_SCALAR_BYTES]
        if not arrays:
            continue
        times, n = collective.times or 1, len(collective.groups[0])
        fraction = SENT_FRACTION[collective.kind](n)
        entry = counts[collective.kind, collective.axes(mesh)]
        entry[0] += len(arrays) * times
        entry[1] += sum(arrays) * times
        entry[2] += round(sum(arrays) * times * fraction)
        entry[3] &= collective.times is not None
    for key, values in counts.items():
        found[key] = Exchange(*key, *values)
    return tuple(sorted(found.values(), key=lambda x: -x.sent))


def find_peak_flops(target: Target) -> float | None:
    """Return the peak FLOP/s of one device by its data sheet; None for a device without one."""
    return get_peak_flops(target.kind) if target.chip else None
