"""Compare position encodings, norms, activations, mixers, ... on the same text and budget.

    python -m benchmarks.ablate                                change the base one choice at a time
    python -m benchmarks.ablate --axes position,mixer          only these
    python -m benchmarks.ablate --product position,norm        every combination of these
    python -m benchmarks.ablate --steps 2000 model.width=256   a longer run around another base

The choices are the rows of the registries, so a new row is included automatically; a choice that
the config rejects is listed with the reason. For each seed, every choice trains on the same batches
(steps x batch x context). The trained model's held-out loss is also computed in windows of 2 and 4
times the training length: the same text is cut into longer pieces, so the three losses are means
over the same tokens and differ only in how much context a token has. Each configuration adds one
line of JSON to rows.jsonl under --out; a configuration that is already there is not run again.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.architecture import MixerConfig, SparseConfig
from jaxgpt.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
    to_json,
)
from jaxgpt.data import tasks
from jaxgpt.data.loader import make_eval_batches
from jaxgpt.data.shards import prepare
from jaxgpt.model import abstract_params, build, count_params
from jaxgpt.model.block import WIRINGS
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITION_ENCODINGS
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.script import run
from jaxgpt.trainer.logging import format_duration, write_text_atomically
from jaxgpt.trainer.state import init_state
from jaxgpt.trainer.step import make_eval_step, make_train_step

# Patterns and mixers get sizes well below the 64 tokens of context, or they would attend to all.
BASE = Config(
    name="ablate",
    model=ModelConfig(
        vocab=260,
        context=64,
        width=64,
        layers=2,
        heads=4,
        ffn=128,
        sparse=SparseConfig(window=16, stride=8, block=8, random=1),
        mixer=MixerConfig(chunk=16, summary=4, memory=32, bucket_window=16),
    ),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(lr=2e-3, warmup=40),
    train=TrainConfig(steps=400, batch=16, eval_batches=64),
)
CONTEXT_FACTORS = (1, 2, 4)  # lengths of the held-out windows, relative to the training length


# --- choices ---------------------------------------------------------------------------------


class Choice(NamedTuple):
    """One row of a table: its name, and the settings that it changes in the base."""

    name: str
    settings: tuple[str, ...]  # path=value


class Entry(NamedTuple):
    """A choice that can be trained."""

    axis: str
    name: str
    cfg: Config


class Rejection(NamedTuple):
    """A choice that cannot be trained with the rest of the base."""

    axis: str
    name: str
    reason: str  # the first sentence of the error message
    objectives: tuple[str, ...]  # those with which it can be trained


def list_choices(key: str, table) -> Callable[[Config], list[Choice]]:
    return lambda base: [Choice(name, (f"{key}={name}",)) for name in table]


# A gated layer has three matrices, a plain one two: F in this proportion makes their sizes equal.
FEEDFORWARD_MATRICES = {"gated": 3, "moe_gated": 3, "plain": 2, "moe_plain": 2}


def set_feedforward(base: Config, name: str) -> tuple[str, str]:
    """Return the settings for a kind of feed-forward with as many parameters as the base's."""
    old, new = (FEEDFORWARD_MATRICES.get(kind) for kind in (base.model.feedforward, name))
    ffn = base.model.ffn * old // new if old and new else base.model.ffn
    return f"model.feedforward={name}", f"model.ffn={ffn}"


def list_activations(base: Config) -> list[Choice]:
    return [
        Choice(f"{kind} {name}", (*set_feedforward(base, kind), f"model.activation={name}"))
        for kind in ("gated", "plain")
        for name in ACTIVATIONS
    ]


AXES: dict[str, Callable[[Config], list[Choice]]] = {
    "position": list_choices("model.position", POSITION_ENCODINGS),
    "norm": list_choices("model.norm", NORMS),
    "activation": list_activations,
    "mixer": list_choices("model.mixers", MIXERS),
    "wiring": list_choices("model.wiring", WIRINGS),
    "feedforward": lambda base: [
        Choice(name, set_feedforward(base, name)) for name in FEEDFORWARDS
    ],
    "pattern": list_choices("model.pattern", PATTERNS),
}


def combine_axes(base: Config, axes: Sequence[str]) -> list[Choice]:
    """Return every combination of the choices of these axes.

    Raises:
        ConfigError: two of the axes change the same setting.
    """
    choices = [AXES[axis](base) for axis in axes]
    keys = [
        key
        for axis_choices in choices
        for key in sorted({s.partition("=")[0] for c in axis_choices for s in c.settings})
    ]
    shared = next((key for key in keys if keys.count(key) > 1), None)
    if shared:
        raise ConfigError(f"--product {','.join(axes)}: two of these set {shared}; leave one out.")
    return [
        Choice(" / ".join(c.name for c in combined), tuple(s for c in combined for s in c.settings))
        for combined in itertools.product(*choices)
    ]


def plan(base: Config, axes: Sequence[str], is_product: bool) -> list[Entry | Rejection]:
    """Return all choices, in the order of the registries."""
    if is_product:
        name = " x ".join(axes)
        return [resolve_choice(base, name, choice) for choice in combine_axes(base, axes)]
    return [resolve_choice(base, axis, choice) for axis in axes for choice in AXES[axis](base)]


def resolve_choice(base: Config, axis: str, choice: Choice) -> Entry | Rejection:
    """Apply a choice to the base, with another position encoding if the mixer needs one."""
    is_chosen = any(s.startswith("model.position=") for s in choice.settings)
    positions = [None] if is_chosen else [None, "rope", "none"]
    errors = []
    for position in positions:
        replaced = [f"model.position={position}"] if position else []
        try:
            cfg = override(base, [*choice.settings, *replaced])
        except ConfigError as error:
            errors.append(str(error))
        else:
            name = f"{choice.name} (position {position})" if position else choice.name
            return Entry(axis, name, cfg)
    reason = errors[0].partition(": use ")[0].partition(". ")[0].removesuffix(".") + "."
    return Rejection(axis, choice.name, reason, find_objectives(base, choice))


def find_objectives(base: Config, choice: Choice) -> tuple[str, ...]:
    """Return the objectives with which the config accepts a rejected choice."""
    accepting = []
    for name, objective in OBJECTIVES.items():
        changed = [f"train.objective={name}", f"model.family={objective.family}"]
        vocab = f"model.vocab={base.model.vocab + base.model.context}"  # with room for mask tokens
        try:
            override(base, [*choice.settings, *changed, vocab])
        except ConfigError:
            continue
        accepting.append(name)
    return tuple(accepting)


# --- measurement -----------------------------------------------------------------------------


class Batches:
    """The batches that all choices share: for training per seed, held out per window length."""

    def __init__(self, base: Config):
        self.base, self.corpus = base, prepare(base.data, base.model.vocab)
        self._train_batches: dict[int, list] = {}  # by seed

    def get_train_batches(self, seed: int) -> list:
        """Return the batches of a run, in order."""
        if seed not in self._train_batches:
            task = tasks.CausalTask(dataclasses.replace(self.base, seed=seed), self.corpus)
            batches = [task.make_batch(step) for step in range(self.base.train.steps)]
            self._train_batches[seed] = batches
        return self._train_batches[seed]

    def iterate_held_out(self, factor: int):
        """Iterate over held-out batches in windows of `factor` times the training length.

        A batch has as many tokens for every factor.
        """
        train, corpus = self.base.train, self.corpus
        return make_eval_batches(
            corpus.held_out,
            train.batch // factor,
            self.base.model.context * factor,
            train.eval_batches,
            pad=corpus.tokenizer.pad,
            mask_documents=self.base.model.documents == "separate",
        )


def extend_context(cfg: Config, factor: int) -> tuple[Config, str]:
    """Return the config with a longer context, and the parameters that do not fit it."""
    longer = override(cfg, [f"model.context={cfg.model.context * factor}"])
    before, after = (jax.tree.leaves_with_path(abstract_params(c.model)[0]) for c in (cfg, longer))
    fixed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), (_, y) in zip(before, after, strict=True)
        if x.shape != y.shape
    ]
    return longer, " and ".join(f"`{name}`" for name in fixed)


def measure(cfg: Config, batches: Batches, seeds: Sequence[int]) -> dict[str, Any]:
    """Train from scratch with every seed, and return the losses, speed and memory."""
    optimizer, schedule = build_optimizer(
        cfg.optimizer, cfg.train.steps, abstract_params(cfg.model)[1]
    )
    start = time.perf_counter()
    init = jax.jit(lambda seed: init_state(cfg.model, optimizer, seed))
    state, batch = init(seeds[0]), batches.get_train_batches(seeds[0])[0]
    step = make_train_step(cfg, build(cfg.model), optimizer, schedule)
    step = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    evaluate, reason = {}, ""
    for factor in CONTEXT_FACTORS:
        longer, why = extend_context(cfg, factor)
        reason = reason or why
        if not why:
            lowered = jax.jit(make_eval_step(longer, build(longer.model)))
            batch = next(batches.iterate_held_out(factor))
            evaluate[factor] = lowered.lower(state.params, batch).compile()
    compiled = time.perf_counter()

    seconds: list[float] = []  # per step, the median of each seed
    losses: dict[int, list[float]] = {factor: [] for factor in evaluate}
    for seed in seeds:
        state, step_seconds = train(step, init(seed), batches.get_train_batches(seed))
        seconds.append(statistics.median(step_seconds))
        for factor, run_eval in evaluate.items():
            held_out = batches.iterate_held_out(factor)
            losses[factor].append(compute_held_out_loss(run_eval, state.params, held_out))
    memory = step.memory_analysis()
    return {
        "parameters": count_params(cfg.model)["total"],
        "losses": losses,
        "reason": reason,
        "seconds_per_step": seconds,
        "tokens_per_second": cfg.train.batch * cfg.model.context / statistics.median(seconds),
        "megabytes": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6
        if memory
        else None,
        "compile_seconds": compiled - start,
        "run_seconds": time.perf_counter() - compiled,
    }


def train(step, state, batches: list):
    """Train on all batches; return the final state and the seconds of each step."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return state, seconds


def compute_held_out_loss(run_eval, params, batches) -> float:
    """Return the loss in nats per token."""
    sums = [run_eval(params, batch) for batch in batches]
    return float(np.sum([s["nats"] for s in sums]) / np.sum([s["weight"] for s in sums]))


# --- rows.jsonl ------------------------------------------------------------------------------


def describe_environment(base: Config, seeds: Sequence[int]) -> dict[str, str]:
    """Return what a measurement depends on besides its config."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "seeds": ", ".join(map(str, seeds)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {cores} cores",
    }


def hash_inputs(cfg: Config, facts: dict[str, str], batches: Batches) -> str:
    parts = [to_json(cfg), facts, batches.corpus.fingerprint]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """Return the finished rows by key; skip a line truncated when its process was killed."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        row["losses"] = {int(factor): losses for factor, losses in row["losses"].items()}
        rows[row["key"]] = row
    return rows


def measure_all(entries: Sequence[Entry], batches: Batches, seeds: Sequence[int], facts, path):
    """Return the row of every entry, in order: read from the file if present, else measured."""
    rows, result = read_rows(path), []
    for entry in entries:
        key = hash_inputs(entry.cfg, facts, batches)
        if key not in rows:
            rows[key] = {"key": key} | measure(entry.cfg, batches, seeds)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[key]) + "\n")
        result.append(rows[key])
        print(format_line(entry, rows[key]), flush=True)
    return result


# --- tables and text -------------------------------------------------------------------------

HEADER = (
    "loss",
    "±",
    *(f"{n}x" for n in CONTEXT_FACTORS[1:]),
    "parameters",
    "ms",
    "tokens/s",
    "MB",
)


def average_loss(row: dict, factor: int = 1) -> float:
    return statistics.mean(row["losses"][factor])


def measure_spread(row: dict, factor: int = 1) -> float:
    losses = row["losses"][factor]
    return (max(losses) - min(losses)) / 2


def format_cells(row: dict) -> tuple[str, ...]:
    """Return the figures of a row, in the order of HEADER."""
    longer = (
        f"{average_loss(row, n):.3f}" if n in row["losses"] else "-" for n in CONTEXT_FACTORS[1:]
    )
    return (
        f"{average_loss(row):.3f}",
        f"{measure_spread(row):.3f}" if len(row["losses"][1]) > 1 else "-",
        *longer,
        f"{row['parameters']:,}",
        f"{1e3 * statistics.median(row['seconds_per_step']):.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['megabytes']:.1f}" if row["megabytes"] else "-",
    )


def format_line(entry: Entry | None, row: dict | None) -> str:
    """Format a line of the table for the terminal; without a row, its header."""
    start = (entry.axis, entry.name) if entry else ("axis", "choice")
    figures = " ".join(f"{cell:>10}" for cell in (format_cells(row) if row else HEADER))
    return f"{start[0]:12} {start[1]:36} {figures}"


def format_table(entries: Sequence[Entry], rows: Sequence[dict], base: Config) -> str:
    """Format the table of one axis in Markdown, with the reasons for its dashes."""
    lines = [f"| choice | {' | '.join(HEADER)} |", "|---" + "|---:" * len(HEADER) + "|"]
    reasons: dict[str, list[str]] = {}
    for entry, row in zip(entries, rows, strict=True):
        name = f"**{entry.name}**" if entry.cfg == base else entry.name
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(entry.name)
        lines.append(f"| {name} | {' | '.join(format_cells(row))} |")
    notes = [
        f"\\- {', '.join(names)}: {why} has no rows for longer windows."
        for why, names in reasons.items()
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def estimate_noise(rows: Sequence[dict]) -> float | None:
    """Return the relative spread of the seeds' median step times: the median over the rows."""
    spreads = [max(s) / min(s) - 1 for s in (row["seconds_per_step"] for row in rows) if len(s) > 1]
    return statistics.median(spreads) if spreads else None


def summarize(entries: Sequence[Entry], rows: Sequence[dict], base: Config) -> str:
    """Summarize the figures of one axis in sentences that are valid for any figures."""
    ranked = sorted(
        zip((e.name for e in entries), rows, strict=True), key=lambda x: average_loss(x[1])
    )
    if len(ranked) < 2:
        return "There is nothing to compare."
    (best, low), (worst, high) = ranked[0], ranked[-1]
    sentences = [
        f"Lowest loss: {best}, {average_loss(low):.3f}; highest: {worst}, {average_loss(high):.3f}."
    ]
    base_row = next((row for e, row in zip(entries, rows, strict=True) if e.cfg == base), None)
    if base_row and len(base_row["losses"][1]) > 1:
        near = [
            name
            for name, row in ranked
            if row is not base_row
            and abs(average_loss(row) - average_loss(base_row))
            <= measure_spread(row) + measure_spread(base_row)
        ]
        sentences.append(f"Seed ranges that overlap with the base's: {', '.join(near) or 'none'}.")
    longest = CONTEXT_FACTORS[-1]
    changes = [
        (average_loss(r, longest) - average_loss(r), n) for n, r in ranked if longest in r["losses"]
    ]
    if len(changes) > 1:
        (least, a), (most, b) = min(changes), max(changes)
        sentences.append(
            f"From 1x to {longest}x the length the loss changes by {least:+.3f} ({a}) "
            f"to {most:+.3f} ({b})."
        )
    fast, slow = (f(ranked, key=lambda x: x[1]["tokens_per_second"]) for f in (max, min))
    ratio = fast[1]["tokens_per_second"] / slow[1]["tokens_per_second"]
    sentences.append(f"Fastest: {fast[0]}, {ratio:.1f} times the tokens/s of {slow[0]}.")
    return " ".join(sentences)


PAGE_TEMPLATE = """\
# Ablation

Generated by the command below, which rewrites this page and its figures; do not edit.

```sh
{command}
```

{facts}

Each choice replaces one part of the base (bold); nothing else changes except what its name states.
Where gated and plain feed-forwards are exchanged, F is chosen to keep the number of parameters.
Mixers that cannot use the base's position encoding run without one, as their names state. For each
seed, all choices train on the same {steps:,} batches of {batch} windows of {context} tokens
({tokens:,} tokens), at one learning rate ({lr:g}), which was tuned for none of them: the page shows
how they compare in a small model and a short run, not which is best. design.md has what was found
about the scales of those that lag.

* **loss**: nats per token on the same {held_out:,} held-out tokens, mean over the seeds; **±** is
  half of the distance between the lowest and the highest seed.
* **{longer}**: the same model on the same tokens, in windows of that many times the training
  length. There, attention reaches distances that did not occur in training.
* **ms**, **tokens/s**: of a training step after compilation, the median.
{noise}* **MB**: arguments and temporary memory of the compiled training step.

"""


NOISE_TEMPLATE = (
    "  Machine noise: the seeds of a choice differ by {spread:.0%} (median over choices).\n"
)


def describe_base(base: Config, facts: dict[str, str]) -> str:
    m = base.model
    shape = f"{m.layers} layers, width {m.width}, {m.heads} heads, F {m.ffn}, {m.vocab} tokens"
    kind = f"{m.position}, {m.norm}, {m.wiring}, {m.feedforward} {m.activation}"
    facts = {
        "base": f"{shape}; {kind}; {'/'.join(m.mixers)}",
        "text": f"{base.data.source}, tokenizer {base.data.tokenizer}",
    } | facts
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


class Result(NamedTuple):
    """The data of a report."""

    base: Config
    entries: list[Entry]
    rows: list[dict]
    rejections: list[Rejection]
    facts: dict[str, str]
    command: str
    held_out_tokens: int

    def group_by_axis(self) -> dict[str, tuple[list[Entry], list[dict]]]:
        """Return the entries and rows of each axis."""
        names = dict.fromkeys([e.axis for e in self.entries] + [r.axis for r in self.rejections])
        pairs = list(zip(self.entries, self.rows, strict=True))
        return {
            name: ([e for e, _ in pairs if e.axis == name], [r for e, r in pairs if e.axis == name])
            for name in names
        }


def format_page(result: Result) -> str:
    base, spread = result.base, estimate_noise(result.rows)
    text = PAGE_TEMPLATE.format(
        command=result.command,
        facts=describe_base(base, result.facts),
        steps=base.train.steps,
        batch=base.train.batch,
        context=base.model.context,
        tokens=base.train.steps * base.train.batch * base.model.context,
        lr=base.optimizer.lr,
        held_out=result.held_out_tokens,
        longer="**, **".join(f"{n}x" for n in CONTEXT_FACTORS[1:]),
        noise="" if spread is None else NOISE_TEMPLATE.format(spread=spread),
    )
    plots = list_plots(result)
    parts = [text, f"![loss by choice](images/{plots['loss']})\n"]
    for axis, (entries, rows) in result.group_by_axis().items():
        parts.append(f"\n## {axis}\n")
        if entries:
            parts.append(f"\n{format_table(entries, rows, base)}\n")
            parts.append(f"\n{summarize(entries, rows, base)}\n")
        for rejection in result.rejections:
            if rejection.axis == axis:
                objectives = ", ".join(rejection.objectives)
                accepted = f" Accepted with train.objective={objectives}." if objectives else ""
                parts.append(f"\nLeft out: **{rejection.name}**. {rejection.reason}{accepted}\n")
        if axis in plots:
            parts.append(f"\n![{axis}](images/{plots[axis]})\n")
    return "".join(parts)


def list_plots(result: Result) -> dict[str, str]:
    """Return the file of each plot, by "loss" or by its axis."""
    files = {"position": "ablation_length.png", "mixer": "ablation_speed.png"}
    axes = {axis for axis, (entries, _) in result.group_by_axis().items() if entries}
    plots = {axis: file for axis, file in files.items() if axis in axes}
    return {"loss": "ablation_loss.png"} | plots


# --- plots -----------------------------------------------------------------------------------

BLUE, RED = "#2980b9", "#c0392b"


def draw_plots(result: Result, folder: pathlib.Path):
    """Draw the plots and write them as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    by_axis = result.group_by_axis()
    plotters = {"loss": plot_losses, "position": plot_lengths, "mixer": plot_speed}
    for name, file in list_plots(result).items():
        figure = plotters[name](result, *by_axis.get(name, ([], [])))
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure).print_png(str(folder / file))


def make_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def plot_losses(result: Result, *_):
    """Plot the loss of every choice with the range over the seeds, one panel per axis."""
    measured = {axis: x for axis, x in result.group_by_axis().items() if x[0]}
    sizes = [len(entries) for entries, _ in measured.values()]
    figure = make_figure(7.5, 0.8 + 0.24 * sum(sizes) + 0.25 * len(sizes))
    panels = figure.subplots(len(sizes), sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for panel, (axis, (entries, rows)) in zip(panels, measured.items(), strict=True):
        order = sorted(range(len(rows)), key=lambda i: -average_loss(rows[i]))
        for height, i in enumerate(order):
            color = RED if entries[i].cfg == result.base else BLUE
            panel.errorbar(average_loss(rows[i]), height, xerr=measure_spread(rows[i]), fmt="o",
                           ms=4, capsize=2, color=color)  # fmt: skip
        panel.set_yticks(range(len(order)), [entries[i].name for i in order], fontsize=8)
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.set_title(axis, fontsize=9, loc="left")
        panel.grid(alpha=0.3)
        panel.tick_params(axis="x", labelsize=8)
    panels[-1].set_xlabel("held-out loss (nats per token); the base is red", fontsize=9)
    return figure


def plot_lengths(result: Result, entries, rows):
    """Plot the loss against the length of the window, for the position encodings."""
    figure = make_figure(7, 4)
    panel = figure.subplots()
    for entry, row in zip(entries, rows, strict=True):
        lengths = [n * result.base.model.context for n in row["losses"]]
        means = [average_loss(row, n) for n in row["losses"]]
        ranges = [measure_spread(row, n) for n in row["losses"]]
        panel.errorbar(lengths, means, ranges, marker="o", ms=4, capsize=2, lw=1.2,
                       label=entry.name)  # fmt: skip
    panel.set_xscale("log", base=2)
    ticks = [n * result.base.model.context for n in CONTEXT_FACTORS]
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set(xlabel=f"tokens in a window (trained: {ticks[0]})",
              ylabel="held-out loss (nats per token)")  # fmt: skip
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def plot_speed(result: Result, entries, rows):
    """Plot the loss against the speed, for the mixers."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = make_figure(8, 4)
    panel = figure.subplots()
    colors = colormaps["turbo"].resampled(max(len(rows), 2))  # one for each mixer
    for i, ((entry, row), marker) in enumerate(
        zip(zip(entries, rows, strict=True), itertools.cycle("os^vDPX<>*hdp"))
    ):
        point = (row["tokens_per_second"], average_loss(row))
        name = entry.name.partition(" (")[0]
        panel.errorbar(*point, yerr=measure_spread(row), fmt=marker, ms=6, capsize=2, label=name,
                       color=colors(i))  # fmt: skip
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="training tokens per second", ylabel="held-out loss (nats per token)")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


# --- the command -----------------------------------------------------------------------------


def parse_axes(text: str) -> list[str]:
    """Parse axes from the command line."""
    axes = text.split(",")
    for name in axes:
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"no axis {name!r}; there are: {', '.join(AXES)}")
    return axes


def parse_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="path=value", help="changes to the base")
    choices = parser.add_mutually_exclusive_group()
    choices.add_argument(
        "--axes", type=parse_axes, default=[*AXES], help=f"some of {','.join(AXES)}"
    )
    choices.add_argument("--product", type=parse_axes, help="every combination of these axes")
    parser.add_argument("--seeds", type=parse_integers, default=[0, 1], help="such as 0,1,2")
    parser.add_argument("--steps", type=int, default=BASE.train.steps, help="training steps")
    parser.add_argument("--source", default=BASE.data.source, help="text; see data.source")
    parser.add_argument(
        "--out", type=pathlib.Path, default="runs/ablate", help="folder for rows.jsonl"
    )
    parser.add_argument(
        "--docs", type=pathlib.Path, help="folder for ablation.md and images/ (default: --out)"
    )
    return parser


def make_base(a: argparse.Namespace) -> Config:
    """Return the base config that the command requests.

    Raises:
        ConfigError: the config is invalid, or its windows cannot be joined to longer ones.
    """
    warmup = min(BASE.optimizer.warmup, a.steps // 10)
    budget = (f"train.steps={a.steps}", f"data.source={a.source}", f"optimizer.warmup={warmup}")
    base = override(BASE, [*budget, *a.settings])
    if base.train.batch % CONTEXT_FACTORS[-1]:
        raise ConfigError(
            f"train.batch={base.train.batch} must be a multiple of {CONTEXT_FACTORS[-1]}, so that "
            "batches of longer windows have as many tokens."
        )
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    a = make_parser().parse_args(arguments)
    base = make_base(a)
    planned = plan(base, a.product or a.axes, is_product=bool(a.product))
    entries = [x for x in planned if isinstance(x, Entry)]
    rejections = [x for x in planned if isinstance(x, Rejection)]
    batches, facts = Batches(base), describe_environment(base, a.seeds)
    held_out_tokens = int(sum(batch.weights.sum() for batch in batches.iterate_held_out(1)))
    command = shlex.join(["python", "-m", "benchmarks.ablate", *arguments])
    print(f"{command}\n{describe_base(base, facts)}\n\n{format_line(None, None)}", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = measure_all(entries, batches, a.seeds, facts, a.out / "rows.jsonl")
    for rejection in rejections:
        print(f"{rejection.axis:12} {rejection.name:36} left out: {rejection.reason}")
    result = Result(base, entries, rows, rejections, facts, command, held_out_tokens)
    docs = a.docs or a.out
    draw_plots(result, docs / "images")
    write_text_atomically(str(docs / "ablation.md"), format_page(result))
    print(f"{format_duration(time.perf_counter() - start)}; {docs / 'ablation.md'}")
    return 0


if __name__ == "__main__":
    run(main)
