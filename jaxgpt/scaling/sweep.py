"""A sweep over sizes and token budgets, through the ordinary trainer; and its table of results.

Every run is an ordinary run folder inside the sweep's folder, so that an interrupted sweep goes on
where it stopped. What is finished is a line of runs.jsonl.

    sweep/lr.json  sweep/runs.jsonl  sweep/<run>/
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.config import Config, override
from jaxgpt.model import count_params
from jaxgpt.scaling.laws import PowerLaw, Run, fit_power_law
from jaxgpt.settings import ConfigError, choose
from jaxgpt.trainer import DivergedError, train
from jaxgpt.trainer.logging import read_metrics, write_text_atomically
from jaxgpt.trainer.speed import flops_per_token

RUNS, LEARNING_RATES = "runs.jsonl", "lr.json"
HEAD_WIDTH = 32  # of the models of a sweep, at most
FFN_RATIO = 8 / 3  # as in Llama
TRANSFER_EXPONENT = -1.0  # of the best learning rate over the width, where it was not measured
MEASURED = 20  # batches of the final measurement, at least

# Parameters that are counted as N, by the name of the convention.
COUNTS: dict[str, Callable[[dict[str, int]], int]] = {
    "all": lambda count: count["total"],
    "no_embeddings": lambda count: (
        count["total"] - count["embedding"] - count["position"] - count["head"]
    ),
}


@dataclass(frozen=True)
class Size:
    """The shape of a model of the sweep; depth grows with the width."""

    width: int
    layers: int

    @property
    def name(self) -> str:
        """The size as text, as `parse` reads it."""
        return f"{self.width}x{self.layers}"

    @staticmethod
    def parse(text: str) -> "Size":
        """Read "128x4", or "128", whose depth is width / 32.

        Raises:
            ConfigError: it is neither.
        """
        width, _, layers = text.partition("x")
        try:
            size = Size(int(width), int(layers) if layers else max(2, round(int(width) / 32)))
        except ValueError:
            size = Size(0, 0)
        if size.width < 8 or size.width % 8 or size.layers < 1:
            raise ConfigError(
                f"--sizes {text}: a size is a width, a multiple of 8, with or without a number of "
                "layers, such as 128 or 128x4."
            )
        return size


def make_config(
    base: Config, size: Size, tokens: float, folder: str, lr: float, name: str = ""
) -> Config:
    """Return the config of a run of a sweep: the base with another size, budget and learning rate.

    Args:
        base: data, context, batch, optimizer, ...
        tokens: to train on, rounded to whole steps.
        folder: of the sweep.
        lr: the peak learning rate.

    Raises:
        ConfigError: the budget is less than a step.
    """
    heads = max(1, size.width // HEAD_WIDTH)
    while size.width % heads:
        heads -= 1
    steps = round(tokens / (base.train.batch * base.model.context))
    if steps < 1:
        raise ConfigError(
            f"{tokens:,.0f} tokens are less than one step of train.batch={base.train.batch} rows "
            f"of model.context={base.model.context} tokens."
        )
    settings = {
        "model.width": size.width,
        "model.layers": size.layers,
        "model.heads": heads,
        "model.kv_heads": "none",
        "model.ffn": 8 * round(size.width * FFN_RATIO / 8),
        "optimizer.lr": lr,
        "train.steps": steps,
        "train.eval_every": max(1, steps // 4),
        "train.eval_batches": max(MEASURED, base.train.eval_batches),
        "train.save_every": max(1, steps // 2),
        "train.sample_every": 0,
        "train.eval_tasks": "",
        "train.patience": 0,
        "name": name or f"{size.name}-{steps}",
        "folder": folder,
    }
    return override(base, [f"{key}={value}" for key, value in settings.items()])


def read_runs(folder: str, count: str = "all", flops: str = "6ND") -> list[Run]:
    """Return the finished runs of a sweep.

    Args:
        count: which parameters are N: "all" or "no_embeddings".
        flops: "6ND", or "counted": what the model's products cost (see trainer.speed).

    Raises:
        ConfigError: there are none, or the table is damaged.
    """
    key = {"all": "parameters", "no_embeddings": "parameters_without_embeddings"}[
        choose({name: name for name in COUNTS}, count, "--count")
    ]
    is_counted = choose({"6ND": False, "counted": True}, flops, "--flops")
    return [
        Run(row[key], row["tokens"], row["loss"], row["flops"] if is_counted else None, row["name"])
        for row in read_rows(folder)
    ]


def read_rows(folder: str, table: str = RUNS) -> list[dict[str, Any]]:
    """Return the lines of runs.jsonl, or of another such table.

    Raises:
        ConfigError: there are none, or one is damaged.
    """
    path = os.path.join(folder, table)
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. `jaxgpt scaling sweep {folder}` makes it."
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            for key in ("parameters", "parameters_without_embeddings", "tokens", "loss", "flops"):
                row[key] = float(row[key])
            row["name"] = str(row["name"])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}, line {number}: {error!r}: a line has name, parameters, "
                "parameters_without_embeddings, tokens, loss and flops."
            ) from error
        rows.append(row)
    return rows


def count_tokens(config: Config) -> int:
    """Return the tokens that a run is trained on."""
    return config.train.steps * config.train.batch * config.model.context


def describe_outcome(config: Config) -> dict[str, Any]:
    """Return the line of runs.jsonl for a run that is complete.

    Raises:
        ConfigError: it was not evaluated at its last step.
    """
    records = [r for r in read_metrics(config.run_folder) if r.get("kind") == "eval"]
    last = max(records, key=lambda r: r["step"], default=None)
    if last is None or last["step"] != config.train.steps:
        raise ConfigError(f"{config.run_folder} was not measured at step {config.train.steps}.")
    count, tokens = count_params(config.model), count_tokens(config)
    return {
        "name": config.name,
        "width": config.model.width,
        "layers": config.model.layers,
        "lr": config.optimizer.lr,
        "parameters": COUNTS["all"](count),
        "parameters_without_embeddings": COUNTS["no_embeddings"](count),
        "tokens": tokens,
        "flops": flops_per_token(config.model) * tokens,
        "loss": last["loss"],
    }


def run_sweep(
    base: Config,
    sizes: Sequence[Size],
    budgets: Sequence[float],
    folder: str,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train every size on every budget of tokens, at its own learning rate; finished ones are kept.

    Args:
        base: the config that the runs share; its learning rate is for its own width.
        report: is called with a line for each run.

    Returns:
        The lines of runs.jsonl.
    """
    os.makedirs(folder, exist_ok=True)
    transfer = read_transfer(base, folder)
    plan = [make_config(base, size, tokens, folder, float(transfer(size.width)))
            for size in sizes for tokens in budgets]  # fmt: skip
    plan.sort(key=lambda c: flops_per_token(c.model) * c.train.steps)
    return train_missing(plan, folder, RUNS, "run", report)


def train_missing(
    plan: Sequence[Config], folder: str, table: str, kind: str, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train the runs that a table lacks, and append the line of each.

    Args:
        table: a file in the folder, as runs.jsonl.
        kind: what a run is called in the lines for `report`.

    Returns:
        The lines of the table.
    """
    path = os.path.join(folder, table)
    done = {row["name"] for row in read_rows(folder, table)} if os.path.exists(path) else set()
    for number, config in enumerate(plan, 1):
        if config.name in done:
            continue
        report(f"{kind} {number} of {len(plan)}: {config.name}, lr {config.optimizer.lr:.2g}")
        row = train_to_end(config)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        report(f"  loss {row['loss']:.4f}")
    return read_rows(folder, table)


def train_to_end(config: Config) -> dict[str, Any]:
    """Train a run, or the rest of it, and return its line of runs.jsonl.

    Raises:
        ConfigError: it was interrupted: the same command goes on.
    """
    progress = train(config, is_quiet=True)
    if progress.step < config.train.steps:
        raise ConfigError(
            f"{config.name} was interrupted at step {progress.step} of {config.train.steps}: the "
            "same command goes on from there."
        )
    return describe_outcome(config) | {"seconds": round(progress.seconds, 1)}


# --- the learning rate of each size ----------------------------------------------------------


def read_transfer(base: Config, folder: str) -> PowerLaw:
    """Return the best learning rate as a power law of the width.

    It is that of lr.json, which `tune` measures. Without it, 1 / width through the learning rate of
    the base, as Adam's is in muP for matrices (Yang et al. 2022, arXiv:2203.03466, table 3).
    """
    path = os.path.join(folder, LEARNING_RATES)
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            return PowerLaw(float(found["coefficient"]), float(found["exponent"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged: {error!r}. Delete it and tune again.") from error
    width = base.model.width
    return PowerLaw(base.optimizer.lr / width**TRANSFER_EXPONENT, TRANSFER_EXPONENT)


def tune(
    base: Config,
    sizes: Sequence[Size],
    tokens: float,
    folder: str,
    factors: Iterable[float] = (0.25, 0.5, 1, 2, 4),
    report: Callable[[str], None] = print,
) -> PowerLaw:
    """Measure the best learning rate of several widths and keep it as a power law of the width.

    Each width is trained at multiples of the learning rate that 1 / width gives; the minimum of a
    parabola over its logarithm is the best one.

    Raises:
        ConfigError: there are fewer than three sizes.
    """
    if len({size.width for size in sizes}) < 3:
        raise ConfigError("--sizes: three widths or more show how the learning rate goes over.")
    os.makedirs(folder, exist_ok=True)
    guess = PowerLaw(base.optimizer.lr / base.model.width**TRANSFER_EXPONENT, TRANSFER_EXPONENT)
    widths, best, table = [], [], []
    for size in sizes:
        rates, losses = [], []
        for factor in factors:
            lr = float(guess(size.width)) * factor
            name = f"lr-{size.name}-{factor:g}"
            config = make_config(base, size, tokens, folder, lr, name)
            try:
                loss = train_to_end(config)["loss"]
            except DivergedError:
                loss = math.inf
            rates.append(lr)
            losses.append(loss)
            table.append({"width": size.width, "lr": lr, "loss": loss})
            report(f"width {size.width}, lr {lr:.2g}: loss {loss:.4f}")
        widths.append(size.width)
        best.append(find_best_rate(rates, losses))
        report(f"width {size.width}: best lr {best[-1]:.2g}")
    law = fit_power_law(widths, best)
    content = dataclasses.asdict(law) | {"best": dict(zip(map(str, widths), best, strict=True)),
                                         "runs": table}  # fmt: skip
    write_text_atomically(os.path.join(folder, LEARNING_RATES), json.dumps(content, indent=1))
    for path in (os.path.join(folder, f"lr-{size.name}-{f:g}") for size in sizes for f in factors):
        shutil.rmtree(path, ignore_errors=True)
    return law


def find_best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate of the lowest loss: of a parabola through the three around it.

    At an end of the range the lowest one itself is returned.
    """
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates)[order]), np.asarray(losses, float)[order]
    at = int(np.argmin(y))
    if not 0 < at < len(x) - 1 or not np.isfinite(y[at - 1 : at + 2]).all():
        return float(np.exp(x[at]))
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return float(np.exp(np.clip(-b / (2 * a), x[at - 1], x[at + 1])))
