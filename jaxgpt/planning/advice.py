"""What to change when a step does not fit, and the largest batch that fits.

Every change is estimated first; the estimate is scaled so that it agrees with the compiled step of
the config as it is. The best ones are then compiled, where there is a compiler for the devices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxgpt.config import Config, get, override
from jaxgpt.planning.footprint import (
    Footprint,
    Target,
    compile_footprint,
    estimate_footprint,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.estimate import list_changes

MAX_COMPILATIONS = {"cpu": 6, "gpu": 3, "tpu": 1}  # of changes; one takes a minute for TPUs
MAX_BATCH_FACTOR = 1024
MAX_BATCH_TRIES = 3
# A part of the memory that is left free: what the process, the runtime and fragmentation take.
RESERVED_FRACTION = {"cpu": 0.1, "gpu": 0.04, "tpu": 0.02}

Measure = Callable[[Config], Footprint]


@dataclass(frozen=True)
class Change:
    """Settings that change what a step takes.

    Args:
        settings: to add to the command line.
        peak: bytes on one device.
        fits: whether that is within the memory of the device.
        source: "compiled" or "estimated".
        cost: what it costs, in words.
    """

    settings: tuple[str, ...]
    peak: int
    fits: bool
    source: str
    cost: str


def count_usable_bytes(target: Target) -> int:
    """Return the bytes of a device that a step may take."""
    return int(target.memory * (1 - RESERVED_FRACTION[target.platform]))


def fits(footprint: Footprint, target: Target) -> bool:
    """Return whether a step fits the memory of a target. Unknown memory is large enough."""
    return not target.memory or footprint.peak <= count_usable_bytes(target)


class ScaledEstimate:
    """Estimates that agree with the measured footprint of one config.

    Args:
        base: the config.
        measured: its footprint.
    """

    def __init__(self, base: Config, measured: Footprint, target: Target):
        self.target = target
        estimate = estimate_footprint(base, target)
        self.factor = measured.temporaries / max(estimate.temporaries, 1)
        self.extra = measured.arguments - estimate.arguments

    def __call__(self, cfg: Config) -> Footprint:
        found = estimate_footprint(cfg, self.target)
        temporaries = round(found.temporaries * self.factor)
        return Footprint(
            "estimated", found.arguments + self.extra, temporaries, (), found.microbatches
        )


def find_changes(cfg: Config, target: Target, now: Footprint, is_quick: bool) -> list[Change]:
    """Try changes that save memory, alone and all together, and rank them.

    Those that fit come first, the cheapest first; then the others, by memory.

    Args:
        now: the footprint of the config as it is.
        is_quick: whether to estimate only.
    """
    estimate = ScaledEstimate(cfg, now, target)
    singles = list(
        list_changes(cfg, target.count, target.platform, now.microbatches, target.has_bfloat16)
    )
    last = {kind: settings for kind, settings, _ in singles}  # the strongest of each kind
    combined: list[tuple[str, str]] = []
    for count in range(2, len(last) + 1):
        combined.append((" ".join(list(last.values())[:count]), "all of these"))
    tried = []
    for settings, cost in [(s, c) for _, s, c in singles] + combined:
        try:
            found = estimate(override(cfg, settings.split()))
        except ConfigError:
            continue  # not with this model, or this number of devices
        if found.peak < now.peak:
            tried.append((settings, cost, found))
    fitting = [i for i, (*_, found) in enumerate(tried) if fits(found, target)]
    others = sorted({*range(len(tried))} - {*fitting}, key=lambda i: tried[i][2].peak)
    order = fitting + others
    limit = 0 if is_quick or not target.devices else MAX_COMPILATIONS[target.platform]
    changes = []
    for rank, i in enumerate(order):
        settings, cost, found = tried[i]
        if rank < limit:
            found = compile_footprint(override(cfg, settings.split()), target)
        changes.append(
            Change(tuple(settings.split()), found.peak, fits(found, target), found.source, cost)
        )
    place = {change.settings: i for i, change in enumerate(changes)}
    return sorted(
        changes,
        key=lambda c: (not c.fits, place[c.settings] if c.fits else c.peak),
    )


def find_largest_batch(
    cfg: Config, target: Target, now: Footprint, is_quick: bool
) -> tuple[int, str]:
    """Return the largest batch whose step fits, and how it is known; 0 if not even the smallest.

    Args:
        now: the footprint of the config as it is.
        is_quick: whether to estimate only.
    """
    if not target.memory:
        return 0, "the memory of the device is not known"
    estimate = ScaledEstimate(cfg, now, target)
    unit = find_batch_unit(cfg, target)

    def set_batch(units: int) -> Config:
        return override(cfg, [f"train.batch={units * unit}"])

    def check(units: int) -> bool:
        return fits(estimate(set_batch(units)), target)

    most = search_largest(check, max(cfg.train.batch * MAX_BATCH_FACTOR // unit, 1))
    can_compile = bool(target.devices) and not is_quick
    for _ in range(MAX_BATCH_TRIES if can_compile else 0):
        if not most:
            break
        found = compile_footprint(set_batch(most), target)
        if fits(found, target):
            return most * unit, "compiled"
        excess = found.temporaries / max(count_usable_bytes(target) - found.arguments, 1)
        most = min(most - 1, int(most / excess)) if excess > 0 else 0
    return most * unit, "estimated"


def find_batch_unit(cfg: Config, target: Target) -> int:
    """Return the number that a batch must be a multiple of, on the devices of a target."""
    sizes = [get(cfg, f"mesh.{axis}") for axis in ("data", "fsdp", "expert")]
    others = math.prod(get(cfg, f"mesh.{axis}") for axis in ("pipe", "context", "tensor"))
    divided = target.count // abs(others) if -1 in sizes else math.prod(sizes)
    return max(divided, 1) * (cfg.train.accumulate or 1)


def search_largest(check: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that passes a monotone check; 0 if none does."""
    low, high = 0, 1
    while high <= limit and check(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if check(middle) else (low, middle)
    return low


def join_settings(settings: Sequence[str]) -> str:
    """Join settings for a command line."""
    return " ".join(settings)
