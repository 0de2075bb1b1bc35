"""Data sheets of the devices that a run can be planned for, and names of TPU topologies.

A device is named as in `jaxgpt plan --fit NAME` (T4, H100, v5e-8, here), a slice of a TPU pod as in
`--topology v5e:2x2`: the generation, and the number of chips along each axis.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from jaxgpt.settings import ConfigError, choose
from jaxgpt.trainer.speed import PEAK_FLOPS

GIB = 2**30


class Chip(NamedTuple):
    """The data sheet of a chip; its peak FLOP/s are in trainer/speed.py."""

    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    platform: str = "gpu"
    has_bfloat16: bool = True
    matrix_units: int = 0  # of a TPU, 128 x 128 multiply-adds per cycle each
    dims: int = 2  # of a TPU's torus
    cores: int = 1  # TPU cores that a name such as v5p-8 counts for each chip
    host: tuple[int, ...] = ()  # chips of one host: a smaller slice is a part of them

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU."""
        return self.platform == "tpu"


# Sources: NVIDIA's data sheets; the system architecture pages of Cloud TPU. The memory of a GPU is
# what its driver leaves to programs, about 94% of what is on the label.
CHIPS = {
    "T4": Chip(15 * GIB, 320e9, has_bfloat16=False),
    "V100": Chip(16 * GIB * 0.98, 900e9, has_bfloat16=False),
    "L4": Chip(22 * GIB, 300e9),
    "A10": Chip(22 * GIB, 600e9),
    "A100": Chip(39.5 * GIB, 1555e9),
    "A100-80GB": Chip(79 * GIB, 2039e9),
    "H100": Chip(79 * GIB, 3350e9),
    "H200": Chip(140 * GIB, 4800e9),
    "v4": Chip(32 * GIB, 1228e9, "tpu", matrix_units=8, dims=3, cores=2, host=(2, 2, 1)),
    "v5e": Chip(16 * GIB, 819e9, "tpu", matrix_units=4, host=(2, 2)),
    "v5p": Chip(95 * GIB, 2765e9, "tpu", matrix_units=8, dims=3, cores=2, host=(2, 2, 1)),
    "v6e": Chip(32 * GIB, 1640e9, "tpu", matrix_units=8, host=(2, 2)),
}


@dataclass(frozen=True)
class Slice:
    """A number of chips of one kind, in a TPU's case with their topology."""

    name: str  # as in messages: "4 x v5e (v5e:2x2)"
    chip: Chip
    kind: str  # the row of CHIPS
    count: int
    topology: str = ""  # of TPUs: "v5e:2x2"


def parse_topology(text: str) -> Slice:
    """Parse the topology of a TPU slice, such as v5e:2x2 or v5p:4x4x4.

    Raises:
        ConfigError: the generation is unknown, or the sizes are not those of its torus.
    """
    kind, colon, sizes = text.partition(":")
    chip = choose({name: chip for name, chip in CHIPS.items() if chip.is_tpu}, kind, "--topology")
    parts = sizes.split("x")
    example = f"{kind}:{'x'.join(['2', '2', '2'][: chip.dims])}"
    if not colon or len(parts) != chip.dims or not all(p.isdecimal() and int(p) for p in parts):
        raise ConfigError(
            f"--topology {text}: write the number of chips along each of the {chip.dims} axes of "
            f"its torus, such as {example}."
        )
    count = math.prod(map(int, parts))
    return Slice(f"{count} x {kind} ({text})", chip, kind, count, text)


def parse_device(text: str) -> Slice:
    """Parse the name of a device: T4, H100, 8xH100, or of a TPU slice, v5e-8 or v5e:2x4.

    A number after a TPU's name counts as Cloud TPU does: chips of v5e and v6e, cores of v4 and v5p,
    which have two each.

    Raises:
        ConfigError: there is no such device.
    """
    if ":" in text:
        return parse_topology(text)
    times = re.fullmatch(r"(\d+)x(.+)", text)
    count, name = (int(times[1]), times[2]) if times else (1, text)
    by_lower = {known.lower(): known for known in CHIPS}
    tpu = re.fullmatch(r"(v\d\w*?)(?:-(\d+))?", name.lower())
    if tpu and tpu[1] in by_lower:
        kind = by_lower[tpu[1]]
        chips = max(1, int(tpu[2] or CHIPS[kind].cores) // CHIPS[kind].cores)
        return parse_topology(f"{kind}:{arrange_chips(chips, CHIPS[kind].dims, text)}")
    kind = by_lower.get(name.lower()) or name
    choose(dict.fromkeys([*CHIPS, "here"]), kind, "device")
    return Slice(f"{count} x {kind}" if count > 1 else kind, CHIPS[kind], kind, count)


def arrange_chips(count: int, dims: int, name: str) -> str:
    """Return the topology of a slice with so many chips: 8 chips in two dimensions are 2x4.

    Raises:
        ConfigError: the number is not a power of two.
    """
    if count & (count - 1):
        raise ConfigError(f"{name}: a slice has 1, 2, 4, 8, ... chips; found {count}.")
    doublings = count.bit_length() - 1
    sizes = [2 ** ((doublings + i) // dims) for i in range(dims)]  # as near to a cube as possible
    if dims == 3 and count < 8:
        sizes.reverse()  # the chips of one host are in a plane
    return "x".join(map(str, sizes))


def get_peak_flops(kind: str) -> float:
    """Return the peak FLOP/s of a row of CHIPS, in bfloat16 or, where it has none, float16."""
    return PEAK_FLOPS[kind.partition("-")[0]]
