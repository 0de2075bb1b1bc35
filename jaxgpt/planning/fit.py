"""The largest shipped config that fits a device, and the settings for it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt import config as configs
from jaxgpt.config import Config, override
from jaxgpt.config_files import list_configs
from jaxgpt.model import count_params
from jaxgpt.planning.advice import count_usable_bytes, find_batch_unit, fits
from jaxgpt.planning.footprint import (
    Target,
    estimate_footprint,
    find_devices_here,
    make_target,
)
from jaxgpt.planning.plan import Plan, find_chips, make_plan, plan
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.estimate import has_moments
from jaxgpt.trainer.report import format_duration

MIN_STATE_BYTES = 4 + 2  # per parameter: float32, and two moments in int8
MAX_DAYS = 30.0
MAX_VERIFIED = 3  # candidates that are compiled before the next smaller config is tried


@dataclass(frozen=True)
class Fit:
    """The largest config that fits a device.

    Args:
        device: for people.
        config: its name; "" if none fits.
        settings: to add to it.
        command: that trains it.
        plan: of this config with these settings; None if there is none.
        faster: the name of the largest config that also ends within MAX_DAYS; "" if it is the same.
    """

    device: str
    config: str
    settings: tuple[str, ...]
    command: str
    plan: Plan | None
    faster: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values of JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if not self.plan:
            return f"None of the configs that come with jaxgpt fits {self.device}."
        lines = [f"The largest config that fits {self.device}:", f"  {self.command}", ""]
        lines.append(str(self.plan))
        if self.faster:
            lines.append(
                f"It takes about {format_duration(self.plan.seconds)}; the largest that ends "
                f"within {MAX_DAYS:g} days: {self.faster}"
            )
        return "\n".join(lines)


def find_fit(device: str, settings: Sequence[str], mfu: float | None, quick: bool) -> Fit:
    """Find the largest config that comes with jaxgpt and fits a device.

    Args:
        device: T4, H100, 8xH100, v5e-1, v5p:2x2x1, or here.
        settings: to be kept in every config.
        mfu: as for `plan`.
        quick: as for `plan`.

    Raises:
        ConfigError: there is no such device, or the settings are invalid.
    """
    chips = find_chips("", device)
    target = make_target(chips) if chips else find_devices_here()
    sized = sorted(_load_configs(settings), key=lambda item: -item[0])
    for size, name, cfg in sized:
        if target.memory and size * MIN_STATE_BYTES > count_usable_bytes(target) * target.count:
            continue
        found = _find_settings(cfg, target, device, bool(chips and chips.topology), mfu, quick)
        if not found:
            continue
        chosen, its_plan = found
        command = " ".join(["jaxgpt train --config", name, *settings, *chosen])
        faster = ""
        if its_plan.seconds > MAX_DAYS * 86400:
            faster = _find_faster(sized, target, its_plan, size)
        return Fit(target.name, name, (*settings, *chosen), command, its_plan, faster)
    return Fit(target.name, "", (), "", None)


def _load_configs(settings: Sequence[str]) -> Iterator[tuple[int, str, Config]]:
    """Yield (parameters, name, config) of the shipped configs that take these settings."""
    refused: ConfigError | None = None
    is_any = False
    for name in list_configs():
        try:
            cfg = configs.load(name, list(settings))
        except ConfigError as error:
            refused = error
            continue
        is_any = True
        yield count_params(cfg.model)["total"], name, cfg
    if not is_any and refused:
        raise refused


def list_candidates(cfg: Config, target: Target) -> Iterator[tuple[str, ...]]:
    """Yield settings under which a config may fit a target, the fastest first."""
    base = []
    if not target.has_bfloat16 and cfg.model.dtype == "bfloat16":
        base.append("model.dtype=float32")
    elif target.platform != "cpu" and cfg.model.dtype == "float32" and target.has_bfloat16:
        base.append("model.dtype=bfloat16")
    if target.count > 1:
        base += ["mesh.data=1", "mesh.fsdp=-1"]
    elif cfg.mesh.fsdp != 1:
        base += ["mesh.data=-1", "mesh.fsdp=1"]
    savings = [[], ["model.remat=dots"], ["model.remat=full"]]
    if has_moments(cfg):
        savings += [["optimizer.moments=int8"], ["model.remat=full", "optimizer.moments=int8"]]
    for saving in savings:
        for parts in _list_microbatches(override(cfg, base), target):
            yield (*base, *saving, *parts)


def _list_microbatches(cfg: Config, target: Target) -> Iterator[tuple[str, ...]]:
    """Yield settings of gradient accumulation, from the whole batch to one row a device."""
    divided = find_batch_unit(override(cfg, ["train.accumulate=1"]), target)
    batch = max(cfg.train.batch // divided, 1) * divided
    change = () if batch == cfg.train.batch else (f"train.batch={batch}",)
    if target.platform == "cpu" and not cfg.train.accumulate and target.count == 1:
        yield change  # chosen by platform
    for parts in range(1, batch // divided + 1):
        if batch % (parts * divided) == 0:
            yield (*change, f"train.accumulate={parts}")


def _find_settings(
    cfg: Config, target: Target, device: str, is_tpu: bool, mfu: float | None, quick: bool
) -> tuple[tuple[str, ...], Plan] | None:
    """Return the first settings under which a config fits, and its plan; None if there are none."""
    tried = 0
    for settings in list_candidates(cfg, target):
        try:
            changed = override(cfg, list(settings))
            if not fits(estimate_footprint(changed, target), target):
                continue
        except ConfigError:
            continue
        found = _verify(changed, target, device, is_tpu, mfu, quick)
        if found.is_fitting:
            return settings, found
        tried += 1
        if tried == MAX_VERIFIED:
            break
    return None


def _verify(
    cfg: Config, target: Target, device: str, is_tpu: bool, mfu: float | None, quick: bool
) -> Plan:
    """Plan a candidate: by the compiler for TPUs if it is installed, else as an estimate."""
    if is_tpu:
        from jaxgpt.planning import tpu

        if tpu.is_available():
            return plan(cfg, device=device, mfu=mfu, quick=True)
    return make_plan(cfg, target, mfu, quick=True)


def _find_faster(
    sized: list[tuple[int, str, Config]], target: Target, slow: Plan, size: int
) -> str:
    """Return the largest smaller config that ends within MAX_DAYS at the speed of a slow one."""
    rate = slow.flops_per_step / slow.seconds_per_step
    from jaxgpt.trainer.speed import flops_per_token

    for parameters, name, cfg in sized:
        tokens = cfg.train.batch * cfg.model.context * cfg.train.steps
        if parameters < size and tokens * flops_per_token(cfg.model) / rate <= MAX_DAYS * 86400:
            return name
    return ""
