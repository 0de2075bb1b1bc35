"""A scaling study from one command: rates, sweep, fit, a prediction, and the run that checks it.

    jaxgpt scaling study study/                       on two cores, in about an hour and a half
    jaxgpt scaling study study/ --out docs/scaling_laws.md

Every step is kept in the folder, so that the same command goes on where it was interrupted. The
prediction of the larger run is written before that run begins, and is not made again.

    study/plan.json  lr.json  runs.jsonl  prediction.json  held_out.json  report.md  scaling.png
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxgpt.config import Config, override
from jaxgpt.model import count_params
from jaxgpt.scaling.figures import plot_law
from jaxgpt.scaling.laws import FLOPS_PER_PARAMETER, Law, Run, fit
from jaxgpt.scaling.sweep import (
    LEARNING_RATES,
    Size,
    make_config,
    read_rows,
    read_runs,
    read_transfer,
    run_sweep,
    train_to_end,
    tune,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.logging import write_text_atomically
from jaxgpt.trainer.speed import flops_per_token

PLAN, PREDICTION, HELD_OUT, REPORT = (
    "plan.json", "prediction.json", "held_out.json", "report.md"
)  # fmt: skip
FIGURE = "scaling.png"
# Of the runs, on top of --config: rows so short and a vocabulary so small that most of the
# computation is in the layers, which is what grows.
SETTINGS = (
    "model.vocab=2048", "model.context=128", "train.batch=16", "train.accumulate=1",
    "optimizer.name=adamw", "optimizer.lr=3e-3", "optimizer.warmup=20", "model.width=96",
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
    """

    tuned: tuple[str, ...] = ("32x2", "64x2", "96x3")
    tune_tokens: float = 5e5
    sizes: tuple[str, ...] = ("24x2", "32x2", "48x2", "64x2", "96x3", "128x4")
    budgets: tuple[float, ...] = (5e5, 1e6, 2e6, 4e6)
    held_out: str = "224x7"
    held_out_tokens: float = 4e6
    settings: tuple[str, ...] = field(default=SETTINGS)
    bootstrap: int = 200


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


def count_flops(base: Config, plan: Plan, folder: str) -> float:
    """Return the FLOPs of all runs of a study, those that measure learning rates included."""
    shared, swept, held_out = make_plan(base, plan, folder)
    total = 0.0
    for config in (*swept, held_out):
        tokens = config.train.steps * config.train.batch * config.model.context
        total += flops_per_token(config.model) * tokens
    for size in plan.tuned:
        config = make_config(shared, Size.parse(size), plan.tune_tokens, folder, 1e-3)
        total += 5 * flops_per_token(config.model) * plan.tune_tokens
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
    return _write_report(folder, plan, law, prediction, measured, out)


def _keep_plan(plan: Plan, folder: str):
    """Write the plan of a new study, or check that of the one in the folder."""
    path, content = os.path.join(folder, PLAN), json.loads(json.dumps(asdict(plan)))
    if not os.path.exists(path):
        write_text_atomically(path, json.dumps(content, indent=1))
        return
    with open(path, encoding="utf-8") as file:
        there = json.load(file)
    if there != content:
        keys = [key for key in content if content[key] != there.get(key)]
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
    tokens = config.train.steps * config.train.batch * config.model.context
    return Run(count_params(config.model)["total"], tokens, math.nan, name=config.name)


# --- the report ------------------------------------------------------------------------------


def _write_report(
    folder: str, plan: Plan, law: Law, prediction: dict, measured: dict, out: str
) -> str:
    runs = read_runs(folder)
    held_out = Run(
        measured["parameters"], measured["tokens"], measured["loss"], name=measured["name"]
    )
    plot_law(law, runs, [held_out]).savefig(os.path.join(folder, FIGURE))
    text = format_report(folder, plan, law, runs, prediction, measured, FIGURE)
    path = os.path.join(folder, REPORT)
    write_text_atomically(path, text)
    if not out:
        return path
    images = os.path.join(os.path.dirname(os.path.abspath(out)), "images")
    os.makedirs(images, exist_ok=True)
    shutil.copyfile(os.path.join(folder, FIGURE), os.path.join(images, "scaling_laws.png"))
    write_text_atomically(out, text.replace(f"({FIGURE})", "(images/scaling_laws.png)"))
    return out


def format_report(
    folder: str,
    plan: Plan,
    law: Law,
    runs: Sequence[Run],
    prediction: dict[str, Any],
    measured: dict[str, Any],
    figure: str,
) -> str:
    """Return the report of a study as Markdown."""
    names = ("E", "A", "B", "alpha", "beta")
    constants = "\n".join(
        f"| {name} | {value:.4g} | {error:.2g} |"
        for name, value, error in zip(names, law.constants, law.errors, strict=True)
    )
    table = "\n".join(
        f"| {row['name']} | {row['parameters']:,.0f} | {row['tokens']:,.0f} | {row['lr']:.2g} | "
        f"{row['loss']:.4f} | {float(law.predict(row['parameters'], row['tokens'])):.4f} |"
        for row in sorted(read_rows(folder), key=lambda r: (r["parameters"], r["tokens"]))
    )
    loss, (low, high) = prediction["loss"], prediction["interval"]
    inside = "inside" if low <= measured["loss"] <= high else "outside of"
    exponent = law.beta / (law.alpha + law.beta)
    sizes, budgets = [run.parameters for run in runs], [run.tokens for run in runs]
    worst = max(abs(float(law.predict(r.parameters, r.tokens)) / r.loss - 1) for r in runs)
    return f"""# Scaling laws, measured

Made by `jaxgpt scaling study`, from {len(runs)} runs of {len(plan.sizes)} sizes.

    L(N, D) = E + A / N^alpha + B / D^beta

| constant | value | standard error |
|---|---|---|
{constants}

Errors are of {plan.bootstrap} fits to resampled runs. N counts all parameters, D the tokens trained
on, the loss is nats per token of held-out text.

![loss over compute, and predicted over measured loss]({figure})

## A larger run, predicted before it was trained

`{measured["name"]}`: {measured["parameters"]:,.0f} parameters, {measured["tokens"]:,.0f} tokens,
{measured["parameters"] / max(sizes):.1f} times the parameters of the largest run of the fit.

| | loss |
|---|---|
| predicted | {loss:.4f}, 95%: {low:.4f} to {high:.4f} |
| measured | {measured["loss"]:.4f} |

The prediction is {loss / measured["loss"] - 1:+.2%} off; the measurement is {inside} its interval.
The interval is of the fit alone: it leaves out the spread of seeds, of learning rates that were
transferred, or of a law that does not hold.

## Compute-optimal size

N ~ C^{exponent:.3f}, D ~ C^{1 - exponent:.3f}, with C = {FLOPS_PER_PARAMETER} N D:

{_format_optima(law, runs)}

## How far to trust it

- The fitted runs are predicted to {worst:.2%} or better; the spread of N is a factor of
  {max(sizes) / min(sizes):.0f}, of D {max(budgets) / min(budgets):.0f}.
- Embeddings are a large part of small models, and every run is one seed.
- Beyond a few times the largest run, E and the exponents trade off against each other: their
  standard errors are above.

## The runs

| run | parameters | tokens | learning rate | loss | law |
|---|---|---|---|---|---|
{table}
"""


def _format_optima(law: Law, runs: Sequence[Run]) -> str:
    largest = max(run.compute for run in runs)
    lines = ["| FLOPs | parameters | tokens | tokens a parameter | loss |", "|---|---|---|---|---|"]
    for factor in (0.1, 1, 10):
        size, tokens = law.optimum(factor * largest)
        lines.append(
            f"| {factor * largest:.2g} | {size:,.0f} | {tokens:,.0f} | {tokens / size:.1f} | "
            f"{float(law.predict(size, tokens)):.3f} |"
        )
    return "\n".join(lines)
