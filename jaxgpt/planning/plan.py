"""The plan of a run: what its step needs, how long it takes, and what fits.

    plan = jaxgpt.plan(config)                            the devices of this machine
    plan = jaxgpt.plan(config, topology="v5e:2x2")        TPUs that are not here
    plan = jaxgpt.plan(config, device="T4")               a GPU that is not here: an estimate
    print(plan)

Nothing is allocated, and no step runs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxgpt import config as configs
from jaxgpt.config import Config
from jaxgpt.data import sources
from jaxgpt.model import count_params
from jaxgpt.planning import tpu
from jaxgpt.planning.advice import (
    Change,
    count_usable_bytes,
    find_changes,
    find_largest_batch,
    fits,
)
from jaxgpt.planning.chips import Slice, parse_device, parse_topology
from jaxgpt.planning.footprint import (
    Exchange,
    Footprint,
    Target,
    compile_footprint,
    estimate_footprint,
    find_devices_here,
    find_peak_flops,
    make_target,
)
from jaxgpt.planning.rates import predict_step_seconds
from jaxgpt.planning.report import format_plan
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.estimate import TYPICAL_MFU, make_abstract_mesh
from jaxgpt.trainer.speed import count_step_flops, peak_flops

BYTES_PER_TOKEN = 4.0  # of English text, with a vocabulary of some ten thousand tokens


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is in bytes on one device, time in seconds.

    Args:
        name: of the config.
        device: the devices, for people.
        platform: cpu, gpu or tpu.
        devices: how many.
        mesh: sizes of the mesh axes above 1.
        parameters: by component of the model, and in "total".
        flops_per_token: forward and backward.
        flops_per_step: of all devices.
        source: where memory and exchanges are from: "compiled" or "estimated".
        memory: arguments, temporaries, peak, and available (0 if not known).
        is_fitting: whether the peak fits.
        microbatches: parts of a batch, one after the other.
        batch: rows of a step.
        largest_batch: that fits; 0 if none does, or the memory is not known.
        largest_batch_source: "compiled", "estimated", or why there is none.
        tokens_per_step: of text.
        tokens: of the whole run.
        epochs: of the text, about; None where its size is not known.
        mfu: fraction of the peak FLOP/s that the time is for.
        time_source: where the time is from.
        seconds_per_step: of training.
        seconds: of all steps.
        steps: of the run.
        exchanges: collectives by kind and mesh axes, of one device and one step.
        changes: settings that need less memory, if the step does not fit.
    """

    name: str
    device: str
    platform: str
    devices: int
    mesh: dict[str, int]
    parameters: dict[str, int]
    flops_per_token: float
    flops_per_step: float
    source: str
    memory: dict[str, int]
    is_fitting: bool
    microbatches: int
    batch: int
    largest_batch: int
    largest_batch_source: str
    tokens_per_step: int
    tokens: int
    epochs: float | None
    mfu: float
    time_source: str
    seconds_per_step: float
    seconds: float
    steps: int
    exchanges: tuple[Exchange, ...] = ()
    changes: tuple[Change, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values of JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Return the plan whose `to_dict` gave these values."""
        exchanges = tuple(Exchange(**{**x, "axes": tuple(x["axes"])}) for x in values["exchanges"])
        changes = tuple(
            Change(**{**x, "settings": tuple(x["settings"])}) for x in values["changes"]
        )
        return cls(**{**values, "exchanges": exchanges, "changes": changes})

    def __str__(self) -> str:
        return format_plan(self)


def plan(
    config: Config,
    *,
    topology: str = "",
    device: str = "",
    mfu: float | None = None,
    quick: bool = False,
) -> Plan:
    """Plan a run without allocating or running anything.

    Args:
        config: the run.
        topology: a TPU slice, such as v5e:2x2 or v5p:4x4x4: compiled by the TPU compiler.
        device: another device, such as T4, 8xH100 or v5e-8; "" and "here" are this machine.
        mfu: fraction of the peak FLOP/s for the time; by default a typical one, and on this
            machine's CPU the time that follows from a few measured products.
        quick: compile one step only; the largest batch and the changes are estimates.

    Returns:
        The plan; `print` shows it.

    Raises:
        ConfigError: the config does not fit the number of devices, there is no such device, or the
            TPU compiler is missing.
    """
    chips = find_chips(topology, device)
    if chips and chips.topology:
        request = dict(
            config=configs.to_json(config), topology=chips.topology, mfu=mfu, quick=quick
        )
        return Plan.from_dict(tpu.plan_in_process(request))
    target = make_target(chips) if chips else find_devices_here()
    return make_plan(config, target, mfu, quick)


def find_chips(topology: str, device: str) -> Slice | None:
    """Return the devices that the arguments of `plan` name; None for those of this machine."""
    if topology and device:
        raise ConfigError(f"topology={topology} and device={device} name two devices: give one.")
    if topology:
        return parse_topology(topology)
    return parse_device(device) if device not in ("", "here") else None


def answer(config: str, topology: str, mfu: float | None, quick: bool) -> dict[str, Any]:
    """Plan for a TPU slice, in a process that has its compiler: see `tpu.plan_in_process`."""
    cfg = configs.from_json(config)
    target = make_target(parse_topology(topology), tpu.get_devices(topology))
    return make_plan(cfg, target, mfu, quick).to_dict()


def measure_footprint(cfg: Config, target: Target) -> Footprint:
    """Compile the step for the devices of a target, or estimate it if there is no compiler."""
    return compile_footprint(cfg, target) if target.devices else estimate_footprint(cfg, target)


def make_plan(cfg: Config, target: Target, mfu: float | None, quick: bool) -> Plan:
    """Plan a run on a target."""
    if not target.has_bfloat16 and cfg.model.dtype == "bfloat16":
        raise ConfigError(f"model.dtype=bfloat16: a {target.kind} has no bfloat16; use float32.")
    now = measure_footprint(cfg, target)
    is_fitting = fits(now, target)
    changes = () if is_fitting else tuple(find_changes(cfg, target, now, quick))
    largest, largest_source = find_largest_batch(cfg, target, now, quick)
    T = cfg.objective.task.compute_row_tokens(cfg)
    tokens_per_step = cfg.train.batch * T
    per_token = count_step_flops(cfg)
    fraction, seconds, time_source = predict_seconds(cfg, target, now, mfu)
    available = count_usable_bytes(target)
    mesh = make_abstract_mesh(cfg, target.count, target.platform, target.kind)
    return Plan(
        name=cfg.name,
        device=target.name,
        platform=target.platform,
        devices=target.count,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        parameters=count_params(cfg.model),
        flops_per_token=per_token,
        flops_per_step=per_token * tokens_per_step,
        source=now.source,
        memory=dict(
            arguments=now.arguments,
            temporaries=now.temporaries,
            peak=now.peak,
            available=available,
            device=target.memory,
        ),
        is_fitting=is_fitting,
        microbatches=now.microbatches,
        batch=cfg.train.batch,
        largest_batch=largest,
        largest_batch_source=largest_source,
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * cfg.train.steps,
        epochs=estimate_epochs(cfg, tokens_per_step * cfg.train.steps),
        mfu=fraction,
        time_source=time_source,
        seconds_per_step=seconds,
        seconds=seconds * cfg.train.steps,
        steps=cfg.train.steps,
        exchanges=now.exchanges,
        changes=changes,
    )


def predict_seconds(
    cfg: Config, target: Target, now: Footprint, mfu: float | None
) -> tuple[float, float, str]:
    """Return (MFU, seconds of a step, where they are from)."""
    flops = count_step_flops(cfg) * cfg.train.batch * cfg.model.context
    peak = find_peak_flops(target)
    if peak is None:
        total, peak_source = peak_flops(target.devices)
    else:
        total, peak_source = peak * target.count, "data sheet, bfloat16"
        if cfg.model.dtype == "float32" and target.platform == "gpu":
            total, peak_source = total / 8, "an eighth of the data sheet's, for float32"
    if mfu is None and target.chip is None and target.platform == "cpu":
        seconds = predict_step_seconds(cfg, target, now).total
        return flops / (seconds * total), seconds, f"a few measured products; peak: {peak_source}"
    fraction = TYPICAL_MFU[target.platform] if mfu is None else mfu
    how = "a typical MFU" if mfu is None else "the MFU that was given"
    return fraction, flops / (fraction * total), f"{how}; peak: {peak_source}"


def estimate_epochs(cfg: Config, tokens: int) -> float | None:
    """Estimate how often a run goes through its text, from the sizes of its files.

    Nothing is downloaded, and nothing is read: None where that would be needed.
    """
    if any(kind in cfg.data.source for kind in ("hf:", "tfds:")):
        return None
    try:
        size = sum(unit.size for unit in sources.list_units(cfg.data))
    except (ConfigError, OSError):
        return None
    per_token = 1.0 if cfg.data.tokenizer == "bytes" else BYTES_PER_TOKEN
    return tokens * per_token / max(size * (1 - cfg.data.holdout), 1)
