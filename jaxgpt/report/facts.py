"""What a report tells of a run: read from its folder, without training or measuring anything."""

import dataclasses
import functools
import glob
import json
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

import jaxgpt
from jaxgpt import config as configs
from jaxgpt.config import Config
from jaxgpt.config_files import list_configs, shipped_folder
from jaxgpt.loading import read_config
from jaxgpt.model import count_params
from jaxgpt.settings import ConfigError, get
from jaxgpt.trainer.logging import is_number, read_metrics
from jaxgpt.trainer.speed import count_step_flops

MAX_SAMPLES = 3
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclass(frozen=True)
class Facts:
    """All that a report tells of a run, as numbers and texts.

    Attributes:
        run: its folder.
        config: of the run.
        command: that repeats it; "" if its settings cannot be written as one.
        changed: {setting: (value, default)}, of those that are not the default.
        curves: {metric of training or evaluation, such as "train loss": [(step, value)]}.
        evaluations: the records of metrics.jsonl, in order.
        best: the record of the lowest held-out loss, None without any.
        samples: {"step 200": text}, the first, the middle and the last.
        parts: {component: parameters}, and "total".
        flops_per_token: forward and backward.
        tokens: that the run has trained on.
        speed: {"tokens_per_second": median, "mfu": median}, as far as they were logged.
        tasks: {task: {metric: number}} of benchmarks.
        environment: {what: value} of the machine that writes the report.
    """

    run: str
    config: Config
    command: str
    changed: dict[str, tuple[Any, Any]]
    curves: dict[str, list[tuple[int, float]]]
    evaluations: list[dict[str, Any]]
    best: dict[str, Any] | None
    samples: dict[str, str]
    parts: dict[str, int]
    flops_per_token: float
    tokens: int
    speed: dict[str, float]
    tasks: dict[str, dict[str, float]]
    environment: dict[str, str]

    @property
    def steps(self) -> int:
        """The last step that has a measurement."""
        return max((steps[-1][0] for steps in self.curves.values() if steps), default=0)


def read_facts(run: str, results: Sequence[str] = ()) -> Facts:
    """Read what a report tells of a run.

    Args:
        run: its folder.
        results: files of results of benchmarks, as `jaxgpt evaluate --tasks ... --out` writes them;
            those in the run folder, results*.json, are found without.

    Raises:
        ConfigError: the folder is not a run, or a file of results is none.
    """
    config = read_config(run)
    records = read_metrics(run)
    evaluations = [r for r in records if r.get("kind") == "eval" and is_number(r.get("loss"))]
    curves = _read_curves(records)
    steps = max((r["step"] for r in records if r.get("kind") == "train"), default=0)
    found = sorted(glob.glob(os.path.join(glob.escape(run), "results*.json")))
    return Facts(
        run=run,
        config=config,
        command=make_command(config),
        changed=list_changed(config),
        curves=curves,
        evaluations=evaluations,
        best=min(evaluations, key=lambda r: r["loss"], default=None),
        samples=read_samples(run),
        parts=count_params(config.model),
        flops_per_token=count_step_flops(config),
        tokens=int(steps) * config.train.batch * config.model.context,
        speed=_summarize_speed(curves),
        tasks=_read_tasks(records, [*found, *results]),
        environment=describe_environment(),
    )


# --- metrics ---------------------------------------------------------------------------------

CURVES = ("loss", "accuracy", "lr", "grad_norm", "tokens_per_second", "mfu")


def _read_curves(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name in CURVES:
            if record.get("kind") in ("train", "eval") and is_number(record.get(name)):
                point = int(record["step"]), float(record[name])
                curves.setdefault(f"{record['kind']} {name}", []).append(point)
    return curves


def _summarize_speed(curves: dict[str, list[tuple[int, float]]]) -> dict[str, float]:
    """Return medians: the first steps compile, and others are delayed by evaluations."""
    found = {}
    for name in ("tokens_per_second", "mfu"):
        if points := curves.get(f"train {name}"):
            found[name] = statistics.median(value for _, value in points)
    return found


def _read_tasks(records: Sequence[dict], files: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the numbers of benchmarks: the last ones of training, and those of files."""
    tasks: dict[str, dict[str, float]] = {}
    for record in records:
        if record.get("kind") == "task":
            name = str(record.get("task"))
            numbers = {k: v for k, v in record.items() if k != "step" and is_number(v)}
            tasks[name] = {k.removeprefix(f"{name}/"): float(v) for k, v in numbers.items()}
    for file in files:
        for name, result in _read_results(file).items():
            tasks[name] = flatten_numbers(result)
    return tasks


def _read_results(path: str) -> dict[str, Any]:
    """Read the tasks of a file of results: one JSON object with a key "tasks"."""
    try:
        with open(path, encoding="utf-8") as file:
            tasks = json.load(file)["tasks"]
        return dict(tasks.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "no JSON object with a key 'tasks'"
        raise ConfigError(
            f"{path} is no file of results ({reason}): `jaxgpt evaluate RUN --tasks ... --out "
            "results.json` writes one."
        ) from error


def flatten_numbers(tree: Any, prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested dicts by their path; lists, such as of answers, are left out.

    >>> flatten_numbers({"accuracy": 0.5, "parts": {"a": 1}, "answers": [1, 2]})
    {'accuracy': 0.5, 'parts/a': 1.0}
    """
    if is_number(tree):
        return {prefix: float(tree)}
    pairs = tree.items() if isinstance(tree, dict) else ()
    found: dict[str, float] = {}
    for key, value in pairs:
        found |= flatten_numbers(value, f"{prefix}/{key}" if prefix else str(key))
    return found


def read_samples(run: str) -> dict[str, str]:
    """Read the first, the middle and the last sample that training has written."""
    folder = os.path.join(run, "samples")
    names = sorted(glob.glob("step_*.txt", root_dir=folder))
    chosen = dict.fromkeys(names[i] for i in (0, len(names) // 2, -1)) if names else {}
    found = {}
    for name in [*chosen][:MAX_SAMPLES]:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            found[f"step {int(name[5:-4]):,}"] = file.read(4000).strip("\n")
    return found


# --- settings --------------------------------------------------------------------------------


def list_changed(config: Config, base: Config | None = None) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (its value, that of the base)} of all that differ from a base config."""
    base = Config() if base is None else base
    pairs = {key: (get(config, key), get(base, key)) for key in configs.list_fields(Config)}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def make_command(config: Config) -> str:
    """Return the command that trains a run with this config, from the nearest config that ships.

    It is "" if no command gives exactly this config.
    """
    bases = load_shipped()
    ranked = sorted(bases, key=lambda name: len(list_changed(config, bases[name])))
    for name in ranked:
        changed = list_changed(config, bases[name])
        assignments = [f"{key}={format_setting(value)}" for key, (value, _) in changed.items()]
        try:
            is_exact = configs.load(os.path.join(shipped_folder(), f"{name}.py"), assignments)
        except ConfigError:
            continue
        if is_exact == config:
            return shlex.join(["jaxgpt", "train", "--config", name, *assignments])
    return ""


@functools.cache
def load_shipped() -> dict[str, Config]:
    """Return the configs that come with jaxgpt, by name."""
    paths = {name: os.path.join(shipped_folder(), f"{name}.py") for name in list_configs()}
    return {name: configs.load(path) for name, path in paths.items() if os.path.isfile(path)}


def format_setting(value: Any) -> str:
    """Return a value as it is written in an assignment of the command line."""
    if isinstance(value, tuple):
        return ",".join(map(format_setting, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


# --- the machine -----------------------------------------------------------------------------


def describe_environment() -> dict[str, str]:
    """Return versions and processors of the machine that writes the report."""
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    versions = [f"{name} {_find_version(name)}" for name in LIBRARIES]
    return {
        "jaxgpt": jaxgpt.__version__,
        "Python": platform.python_version(),
        "libraries": ", ".join(versions),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{find_processor()}, {os.cpu_count()} cores",
        "devices": f"{len(devices)} x {kinds} ({devices[0].platform})",
    }


def _find_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def find_processor(path: str = "/proc/cpuinfo") -> str:
    """Return the name of the processor, as far as the system reports it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in file if line.startswith("model name")]
        return lines[0][2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def to_json(config: Config) -> str:
    """Return the settings as indented JSON, without the checksum of config.json."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)
