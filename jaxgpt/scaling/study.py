"""A scaling study from one command: rates, sweep, fit, a prediction, and the run that checks it.

    jaxgpt scaling study study/                       on two cores, in about an hour
    jaxgpt scaling study study/ --out docs/scaling_laws.md

Every step is kept in the folder, so that the same command goes on where it was interrupted. The
prediction of the larger run is written before that run begins, and is not made again.

    study/plan.json  lr.json  runs.jsonl  seeds.jsonl  prediction.json  held_out.json
    study/report.md  scaling.png                                        see study_report.py
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxgpt.config import Config, override
from jaxgpt.model import count_params
from jaxgpt.scaling.laws import Law, Run, fit
from jaxgpt.scaling.study_report import write_report
from jaxgpt.scaling.sweep import (
    LEARNING_RATES,
    Size,
    count_tokens,
    make_config,
    read_runs,
    read_transfer,
    run_sweep,
    train_missing,
    train_to_end,
    tune,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.logging import write_text_atomically
from jaxgpt.trainer.speed import flops_per_token

PLAN, PREDICTION, HELD_OUT, SEEDS = (
    "plan.json", "prediction.json", "held_out.json", "seeds.jsonl"
)  # fmt: skip
# Of the runs, on top of --config: rows so short and a vocabulary so small that most of the
# computation is in the layers, which is what grows. The optimizer is one whose short runs depend
# little on the seed: after 244 steps at width 32, three seeds of AdamW with 20 steps of warmup end
# at 5.11, 5.46 and 5.83, two with 100 steps at 4.98 and 5.07, and two of Muon at 4.80 and 4.81.
SETTINGS = (
    "model.vocab=2048", "model.context=128", "train.batch=16", "train.accumulate=1",
    "optimizer.name=muon", "optimizer.matrix_lr=2e-2", "optimizer.lr=5e-3", "optimizer.warmup=30",
    "model.width=96",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a study trains.

    Attributes:
        tuned: sizes whose learning rate is measured; others follow their power law of the width.
        tune_tokens: of each of those runs.
        sizes, budgets: of the sweep, every size on every budget of tokens.
        held_out: the larger size that is predicted before it is trained.
        held_out_tokens: its budget.
        settings: `path=value`, on top of the config.
        bootstrap: resamples of the fit.
        seeds: of the smallest size, on the smallest and the largest budget: how far runs differ
            that are equal but for their seed.
    """

    tuned: tuple[str, ...] = ("32x2", "64x2", "96x3")
    tune_tokens: float = 5e5
    sizes: tuple[str, ...] = ("24x2", "32x2", "48x2", "64x2", "96x3", "128x4")
    budgets: tuple[float, ...] = (5e5, 1e6, 2e6, 4e6)
    held_out: str = "224x7"
    held_out_tokens: float = 4e6
    settings: tuple[str, ...] = field(default=SETTINGS)
    bootstrap: int = 200
    seeds: int = 3


def make_plan(base: Config, plan: Plan, folder: str) -> tuple[Config, list[Config], Config]:
    """Return (the config that the runs share, those of the sweep, the held-out one).

    Their learning rates are those that are known now: of lr.json, if it is there.
    """
    shared = override(base, plan.settings)
    transfer = read_transfer(shared, folder)

    def make(size: str, tokens: float) -> Config:
        parsed = Size.parse(size)
        return make_config(shared, parsed, tokens, folder, float(transfer(parsed.width)))

    swept = [make(size, tokens) for size in plan.sizes for tokens in plan.budgets]
    return shared, swept, make(plan.held_out, plan.held_out_tokens)


def make_seeds(shared: Config, plan: Plan, folder: str) -> list[Config]:
    """Return the runs of the smallest size with other seeds than that of the sweep."""
    size = min(map(Size.parse, plan.sizes), key=lambda size: (size.width, size.layers))
    lr = float(read_transfer(shared, folder)(size.width))
    configs = []
    for tokens in sorted({min(plan.budgets), max(plan.budgets)}):
        for seed in range(1, plan.seeds):
            config = make_config(shared, size, tokens, folder, lr)
            changes = [f"seed={shared.seed + seed}", f"name={config.name}-seed{seed}"]
            configs.append(override(config, changes))
    return configs


def count_flops(base: Config, plan: Plan, folder: str) -> float:
    """Return the FLOPs of all runs of a study, those that measure learning rates included."""
    shared, swept, held_out = make_plan(base, plan, folder)
    total = 0.0
    for config in (*swept, held_out):
        total += flops_per_token(config.model) * count_tokens(config)
    for size in plan.tuned:
        config = make_config(shared, Size.parse(size), plan.tune_tokens, folder, 1e-3)
        total += 5 * flops_per_token(config.model) * plan.tune_tokens
    for config in make_seeds(shared, plan, folder):
        total += flops_per_token(config.model) * count_tokens(config)
    return total


def run_study(
    base: Config,
    folder: str,
    plan: Plan | None = None,
    out: str = "",
    report: Callable[[str], None] = print,
) -> str:
    """Run a study, or the rest of it, and write its report.

    Args:
        base: the config; `plan.settings` are on top of it.
        folder: of the study.
        out: where the report goes as well, with its figure beside it in images/; a .md file.
        report: is called with a line for each step.

    Returns:
        The path of the report.

    Raises:
        ConfigError: the folder has a study of another plan, or a run was interrupted.
    """
    plan = Plan() if plan is None else plan
    os.makedirs(folder, exist_ok=True)
    shared = override(base, plan.settings)
    _keep_plan(plan, folder)
    report(f"a study of {count_flops(base, plan, folder):.2g} FLOPs in {folder}")
    if not os.path.exists(os.path.join(folder, LEARNING_RATES)):
        tune(shared, [Size.parse(x) for x in plan.tuned], plan.tune_tokens, folder, report=report)
    sizes = [Size.parse(size) for size in plan.sizes]
    run_sweep(shared, sizes, plan.budgets, folder, report)
    others = make_seeds(shared, plan, folder)
    seeds = train_missing(others, folder, SEEDS, "another seed, run", report) if others else []
    law = fit(read_runs(folder), bootstrap=plan.bootstrap)
    _, _, config = make_plan(base, plan, folder)
    prediction = _predict_before(config, law, folder, report)
    path = os.path.join(folder, HELD_OUT)
    if not os.path.exists(path):
        report(f"the held-out run: {config.name}, lr {config.optimizer.lr:.2g}")
        write_text_atomically(path, json.dumps(train_to_end(config), indent=1))
    with open(path, encoding="utf-8") as file:
        measured = json.load(file)
    report(f"  predicted {prediction['loss']:.4f}, measured {measured['loss']:.4f}")
    return write_report(folder, shared, law, prediction, measured, seeds, out)


def _keep_plan(plan: Plan, folder: str):
    """Write the plan of a new study, or check that of the one in the folder."""
    path, content = os.path.join(folder, PLAN), json.loads(json.dumps(asdict(plan)))
    if not os.path.exists(path):
        write_text_atomically(path, json.dumps(content, indent=1))
        return
    with open(path, encoding="utf-8") as file:
        there = json.load(file)
    default = json.loads(json.dumps(asdict(Plan())))  # of a study that is older than a field
    keys = [key for key in content if content[key] != there.get(key, default[key])]
    settings = [part.get("settings", ()) for part in (content, there)]
    new, old = (dict(x.split("=", 1) for x in part) for part in settings)
    if new == old:  # the later of two values is the one that counts
        keys = [key for key in keys if key != "settings"]
    if keys:
        raise ConfigError(
            f"{folder} has a study of another plan: {', '.join(keys)} differ. Use another folder, "
            "or the arguments of that study."
        )


def _predict_before(
    config: Config, law: Law, folder: str, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return the prediction of the held-out run, made and written before it begins."""
    path = os.path.join(folder, PREDICTION)
    if not os.path.exists(path):
        if os.path.exists(config.run_folder):
            raise ConfigError(
                f"{config.run_folder} is there, but no {path}: the run began before it was "
                "predicted. Delete that folder, and the same command predicts and trains it."
            )
        run = _describe_size(config)
        low, high = law.predict_interval(run.parameters, run.tokens)
        loss = float(law.predict(run.parameters, run.tokens))
        content = {
            "name": config.name, "parameters": run.parameters, "tokens": run.tokens,
            "loss": loss, "interval": [float(low), float(high)],
            "constants": law.constants.tolist(), "errors": law.errors.tolist(), "runs": law.count,
        }  # fmt: skip
        write_text_atomically(path, json.dumps(content, indent=1))
        report(f"predicted: {config.name}, loss {loss:.4f} ({low:.4f} to {high:.4f})")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _describe_size(config: Config) -> Run:
    count = count_params(config.model)["total"]
    return Run(count, count_tokens(config), math.nan, name=config.name)
