"""Which position scheme, norm, activation, mixer? All of them, on the same text and budget.

    python -m benchmarks.ablate                                one choice at a time around a base
    python -m benchmarks.ablate --axes position,mixer          only these
    python -m benchmarks.ablate --product position,norm        every combination of these
    python -m benchmarks.ablate --steps 2000 model.width=256   a longer run around another base

The choices are the rows of the registries, so a new row takes part by itself; what a config refuses
is listed with its reason. Every choice sees the same batches (steps x batch x context) for each
seed. The held-out loss is also taken with the model as trained in windows of 2 and 4 times the
training length: the same text cut in longer pieces, so that the three figures are means over the
same tokens, and differ by how far back a token can see. One line of JSON a configuration goes to
rows.jsonl under --out; what is there already is not run again.
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
from jaxgpt.data.loader import eval_batches
from jaxgpt.data.shards import prepare
from jaxgpt.model import abstract_params, build, count_params
from jaxgpt.model.block import WIRINGS
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITIONS
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.script import run
from jaxgpt.trainer.logging import duration, write_whole
from jaxgpt.trainer.state import init_state
from jaxgpt.trainer.step import make_eval_step, make_train_step

# Patterns and mixers have sizes at which a context of 64 tokens is long, or they would see it all.
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
TIMES = (1, 2, 4)  # lengths of the held-out windows, over the training length


# --- what is compared ------------------------------------------------------------------------


class Choice(NamedTuple):
    """One row of a table: what it is called, and what it sets in the base."""

    name: str
    settings: tuple[str, ...]  # path=value


class Entry(NamedTuple):
    """A choice that can be trained."""

    axis: str
    name: str
    cfg: Config


class Refused(NamedTuple):
    """A choice that can not be trained with the rest of the base."""

    axis: str
    name: str
    reason: str  # the first sentence of the message
    elsewhere: tuple[str, ...]  # objectives with which it can


def _choices(key: str, table) -> Callable[[Config], list[Choice]]:
    return lambda base: [Choice(name, (f"{key}={name}",)) for name in table]


# A gated layer has three matrices and a plain one two: with F in this proportion they are as large.
MATRICES = {"gated": 3, "moe_gated": 3, "plain": 2, "moe_plain": 2}


def _channels(base: Config, name: str) -> tuple[str, str]:
    now, then = (MATRICES.get(kind) for kind in (base.model.feedforward, name))
    ffn = base.model.ffn * now // then if now and then else base.model.ffn
    return f"model.feedforward={name}", f"model.ffn={ffn}"


def _activations(base: Config) -> list[Choice]:
    return [
        Choice(f"{kind} {name}", (*_channels(base, kind), f"model.activation={name}"))
        for kind in ("gated", "plain")
        for name in ACTIVATIONS
    ]


AXES: dict[str, Callable[[Config], list[Choice]]] = {
    "position": _choices("model.position", POSITIONS),
    "norm": _choices("model.norm", NORMS),
    "activation": _activations,
    "mixer": _choices("model.mixers", MIXERS),
    "wiring": _choices("model.wiring", WIRINGS),
    "feedforward": lambda base: [Choice(name, _channels(base, name)) for name in FEEDFORWARDS],
    "pattern": _choices("model.pattern", PATTERNS),
}


def product(base: Config, axes: Sequence[str]) -> list[Choice]:
    """Every combination of the choices of some axes.

    Raises:
        ConfigError: two of them set the same thing.
    """
    choices = [AXES[axis](base) for axis in axes]
    keys = [
        key
        for some in choices
        for key in sorted({s.partition("=")[0] for c in some for s in c.settings})
    ]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise ConfigError(f"--product {','.join(axes)}: two of these set {twice}; leave one out.")
    return [
        Choice(" / ".join(c.name for c in several), tuple(s for c in several for s in c.settings))
        for several in itertools.product(*choices)
    ]


def plan(base: Config, axes: Sequence[str], is_product: bool) -> list[Entry | Refused]:
    """All choices, in the order of the tables."""
    if is_product:
        return [settle(base, " x ".join(axes), choice) for choice in product(base, axes)]
    return [settle(base, axis, choice) for axis in axes for choice in AXES[axis](base)]


def settle(base: Config, axis: str, choice: Choice) -> Entry | Refused:
    """A choice in the base. A mixer that can do nothing with its positions has others."""
    is_asked = any(s.startswith("model.position=") for s in choice.settings)
    places = [None] if is_asked else [None, "rope", "none"]
    errors = []
    for place in places:
        more = [f"model.position={place}"] if place else []
        try:
            cfg = override(base, [*choice.settings, *more])
        except ConfigError as error:
            errors.append(str(error))
        else:
            name = f"{choice.name} (position {place})" if place else choice.name
            return Entry(axis, name, cfg)
    reason = errors[0].partition(": use ")[0].partition(". ")[0].removesuffix(".") + "."
    return Refused(axis, choice.name, reason, _elsewhere(base, choice))


def _elsewhere(base: Config, choice: Choice) -> tuple[str, ...]:
    """The objectives with which a refused choice would be accepted."""
    fits = []
    for name, objective in OBJECTIVES.items():
        there = [f"train.objective={name}", f"model.family={objective.family}"]
        room = f"model.vocab={base.model.vocab + base.model.context}"  # for masks
        try:
            override(base, [*choice.settings, *there, room])
        except ConfigError:
            continue
        fits.append(name)
    return tuple(fits)


# --- how one is measured ---------------------------------------------------------------------


class Text:
    """The batches of all choices: of training for every seed, and held out at every length."""

    def __init__(self, base: Config):
        self.base, self.corpus = base, prepare(base.data, base.model.vocab)
        self._made: dict[int, list] = {}  # by seed

    def train(self, seed: int) -> list:
        """The batches of a run, in order."""
        if seed not in self._made:
            task = tasks.Causal(dataclasses.replace(self.base, seed=seed), self.corpus)
            self._made[seed] = [task.batch(step) for step in range(self.base.train.steps)]
        return self._made[seed]

    def held(self, times: int):
        """Batches of as many tokens each, of windows of so many times the training length."""
        train, corpus = self.base.train, self.corpus
        return eval_batches(
            corpus.held,
            train.batch // times,
            self.base.model.context * times,
            train.eval_batches,
            pad=corpus.tokenizer.pad,
            mask_documents=self.base.model.documents == "apart",
        )


def stretched(cfg: Config, times: int) -> tuple[Config, str]:
    """The config at a longer context, and which parameters do not fit there."""
    longer = override(cfg, [f"model.context={cfg.model.context * times}"])
    before, after = (jax.tree.leaves_with_path(abstract_params(c.model)[0]) for c in (cfg, longer))
    fixed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), (_, y) in zip(before, after, strict=True)
        if x.shape != y.shape
    ]
    return longer, " and ".join(f"`{name}`" for name in fixed)


def measure(cfg: Config, text: Text, seeds: Sequence[int]) -> dict[str, Any]:
    """Trains from nothing with every seed, and returns what came of it and what it cost."""
    optimizer, schedule = build_optimizer(
        cfg.optimizer, cfg.train.steps, abstract_params(cfg.model)[1]
    )
    start = time.perf_counter()
    init = jax.jit(lambda seed: init_state(cfg.model, optimizer, seed))
    state, batch = init(seeds[0]), text.train(seeds[0])[0]
    step = make_train_step(cfg, build(cfg.model), optimizer, schedule)
    step = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    evaluate, reason = {}, ""
    for times in TIMES:
        longer, why = stretched(cfg, times)
        reason = reason or why
        if not why:
            lowered = jax.jit(make_eval_step(longer, build(longer.model)))
            evaluate[times] = lowered.lower(state.params, next(text.held(times))).compile()
    compiled = time.perf_counter()

    seconds: list[float] = []  # of a step, the median of each seed
    losses: dict[int, list[float]] = {times: [] for times in evaluate}
    for seed in seeds:
        state, taken = train(step, init(seed), text.train(seed))
        seconds.append(statistics.median(taken))
        for times, run_eval in evaluate.items():
            losses[times].append(held_out_loss(run_eval, state.params, text.held(times)))
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
    """(state after all batches, the seconds of each step)."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return state, seconds


def held_out_loss(evaluate, params, batches) -> float:
    """Nats per token."""
    sums = [evaluate(params, batch) for batch in batches]
    return float(np.sum([s.nats for s in sums]) / np.sum([s.weight for s in sums]))


# --- rows.jsonl ------------------------------------------------------------------------------


def about(base: Config, seeds: Sequence[int]) -> dict[str, str]:
    """What a figure depends on beside its config."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "seeds": ", ".join(map(str, seeds)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {cores} cores",
    }


def key_of(cfg: Config, facts: dict[str, str], text: Text) -> str:
    parts = [to_json(cfg), facts, text.corpus.fingerprint]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """The finished rows by their key; a line that a kill has cut does not count."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        row["losses"] = {int(times): losses for times, losses in row["losses"].items()}
        rows[row["key"]] = row
    return rows


def measure_all(entries: Sequence[Entry], text: Text, seeds: Sequence[int], facts, path):
    """A row for every entry, in their order: from the file where it is there, else measured."""
    rows, made = read_rows(path), []
    for entry in entries:
        key = key_of(entry.cfg, facts, text)
        if key not in rows:
            rows[key] = {"key": key} | measure(entry.cfg, text, seeds)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[key]) + "\n")
        made.append(rows[key])
        print(line(entry, rows[key]), flush=True)
    return made


# --- what is told ----------------------------------------------------------------------------

HEADER = ("loss", "±", *(f"{n}x" for n in TIMES[1:]), "parameters", "ms", "tokens/s", "MB")


def mean(row: dict, times: int = 1) -> float:
    return statistics.mean(row["losses"][times])


def half_range(row: dict, times: int = 1) -> float:
    losses = row["losses"][times]
    return (max(losses) - min(losses)) / 2


def cells(row: dict) -> tuple[str, ...]:
    """The figures of a row, in the order of HEADER."""
    longer = (f"{mean(row, n):.3f}" if n in row["losses"] else "-" for n in TIMES[1:])
    return (
        f"{mean(row):.3f}",
        f"{half_range(row):.3f}" if len(row["losses"][1]) > 1 else "-",
        *longer,
        f"{row['parameters']:,}",
        f"{1e3 * statistics.median(row['seconds_per_step']):.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['megabytes']:.1f}" if row["megabytes"] else "-",
    )


def line(entry: Entry | None, row: dict | None) -> str:
    """A line of the terminal's table; its head without a row."""
    start = (entry.axis, entry.name) if entry else ("axis", "choice")
    figures = " ".join(f"{cell:>10}" for cell in (cells(row) if row else HEADER))
    return f"{start[0]:12} {start[1]:36} {figures}"


def table(entries: Sequence[Entry], rows: Sequence[dict], base: Config) -> str:
    """One axis in Markdown, with the reasons for its dashes."""
    lines = [f"| choice | {' | '.join(HEADER)} |", "|---" + "|---:" * len(HEADER) + "|"]
    reasons: dict[str, list[str]] = {}
    for entry, row in zip(entries, rows, strict=True):
        name = f"**{entry.name}**" if entry.cfg == base else entry.name
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(entry.name)
        lines.append(f"| {name} | {' | '.join(cells(row))} |")
    notes = [
        f"\\- {', '.join(names)}: {why} has no rows for longer windows."
        for why, names in reasons.items()
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def noise(rows: Sequence[dict]) -> float | None:
    """How far apart the seeds' median times of a step are: the median over the rows."""
    apart = [max(s) / min(s) - 1 for s in (row["seconds_per_step"] for row in rows) if len(s) > 1]
    return statistics.median(apart) if apart else None


def findings(entries: Sequence[Entry], rows: Sequence[dict], base: Config) -> str:
    """What the figures of one axis say, in sentences that hold for any figures."""
    found = sorted(zip((e.name for e in entries), rows, strict=True), key=lambda x: mean(x[1]))
    if len(found) < 2:
        return "There is nothing to compare."
    (best, low), (worst, high) = found[0], found[-1]
    said = [f"Lowest loss: {best}, {mean(low):.3f}; highest: {worst}, {mean(high):.3f}."]
    own = next((row for e, row in zip(entries, rows, strict=True) if e.cfg == base), None)
    if own and len(own["losses"][1]) > 1:
        near = [n for n, r in found if r is not own
                and abs(mean(r) - mean(own)) <= half_range(r) + half_range(own)]  # fmt: skip
        said.append(f"Ranges over seeds overlap with the base's: {', '.join(near) or 'none'}.")
    stretch = [(mean(r, TIMES[-1]) - mean(r), n) for n, r in found if TIMES[-1] in r["losses"]]
    if len(stretch) > 1:
        (least, a), (most, b) = min(stretch), max(stretch)
        said.append(f"From 1x to {TIMES[-1]}x the length the loss changes by {least:+.3f} ({a}) "
                    f"to {most:+.3f} ({b}).")  # fmt: skip
    fast, slow = (f(found, key=lambda x: x[1]["tokens_per_second"]) for f in (max, min))
    ratio = fast[1]["tokens_per_second"] / slow[1]["tokens_per_second"]
    said.append(f"Fastest: {fast[0]}, {ratio:.1f} times the tokens/s of {slow[0]}.")
    return " ".join(said)


PAGE = """\
# Ablation

Made by the command below, which writes this page, its figures and its sentences anew; do not edit.

```
{command}
```

{facts}

Each choice stands in the base (bold), with nothing else changed but what is said in its name;
where gated and plain feed-forwards are exchanged, F is chosen so that they have as many parameters.
Mixers that can do nothing with the base's positions have none, and say so. All learn from the same
{steps:,} batches of {batch} windows of {context} tokens for each seed ({tokens:,} tokens), at one
learning rate ({lr:g}), which was tuned for none of them: this is how they compare in a small model
and a short run, not which is best.

* **loss**: nats per token of the same {held:,} held-out tokens, mean over the seeds; **±** is half
  of the distance between the lowest and the highest seed.
* **{longer}**: the same model on the same tokens in windows of so many times the training length.
  There a token sees further back, to distances that were not trained.
* **ms**, **tokens/s**: of a training step after compilation, the median.
{noise}* **MB**: arguments and temporary memory of the compiled training step.

"""


NOISE = "  Machine noise: the seeds of a choice are {apart:.0%} apart (median over the choices).\n"


def about_base(base: Config, facts: dict[str, str]) -> str:
    m = base.model
    shape = f"{m.layers} layers, width {m.width}, {m.heads} heads, F {m.ffn}, {m.vocab} tokens"
    kind = f"{m.position}, {m.norm}, {m.wiring}, {m.feedforward} {m.activation}"
    facts = {
        "base": f"{shape}; {kind}; {'/'.join(m.mixers)}",
        "text": f"{base.data.source}, tokenizer {base.data.tokenizer}",
    } | facts
    return "\n".join(f"* {name}: {value}" for name, value in facts.items())


class Result(NamedTuple):
    """All that a report is made of."""

    base: Config
    entries: list[Entry]
    rows: list[dict]
    refused: list[Refused]
    facts: dict[str, str]
    command: str
    held: int  # tokens

    def axes(self) -> dict[str, tuple[list[Entry], list[dict]]]:
        """The entries and rows of each axis."""
        names = dict.fromkeys([e.axis for e in self.entries] + [no.axis for no in self.refused])
        pairs = list(zip(self.entries, self.rows, strict=True))
        return {
            name: ([e for e, _ in pairs if e.axis == name], [r for e, r in pairs if e.axis == name])
            for name in names
        }


def page(result: Result) -> str:
    base, apart = result.base, noise(result.rows)
    text = PAGE.format(
        command=result.command,
        facts=about_base(base, result.facts),
        steps=base.train.steps,
        batch=base.train.batch,
        context=base.model.context,
        tokens=base.train.steps * base.train.batch * base.model.context,
        lr=base.optimizer.lr,
        held=result.held,
        longer="**, **".join(f"{n}x" for n in TIMES[1:]),
        noise="" if apart is None else NOISE.format(apart=apart),
    )
    drawn = plots(result)
    parts = [text, f"![loss by choice](images/{drawn['loss']})\n"]
    for axis, (entries, rows) in result.axes().items():
        parts.append(f"\n## {axis}\n")
        if entries:
            parts.append(f"\n{table(entries, rows, base)}\n\n{findings(entries, rows, base)}\n")
        for no in result.refused:
            if no.axis == axis:
                fits = f" Accepted with train.objective={', '.join(no.elsewhere)}."
                parts.append(f"\nLeft out: **{no.name}**. {no.reason}{fits * bool(no.elsewhere)}\n")
        if axis in drawn:
            parts.append(f"\n![{axis}](images/{drawn[axis]})\n")
    return "".join(parts)


def plots(result: Result) -> dict[str, str]:
    """The file of each plot there is, by "loss" or by its axis."""
    drawn = {"loss": "ablation_loss.png"}
    files = {"position": "ablation_length.png", "mixer": "ablation_speed.png"}
    have = {axis for axis, (entries, _) in result.axes().items() if entries}
    return drawn | {axis: file for axis, file in files.items() if axis in have}


# --- plots -----------------------------------------------------------------------------------

BLUE, RED = "#2980b9", "#c0392b"


def draw(result: Result, folder: pathlib.Path):
    """Writes the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    by_axis = result.axes()
    painters = {"loss": plot_losses, "position": plot_lengths, "mixer": plot_speed}
    for name, file in plots(result).items():
        figure = painters[name](result, *by_axis.get(name, ([], [])))
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(figure).print_png(str(folder / file))


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def plot_losses(result: Result, *_):
    """The loss of every choice, axis under axis, with the range over the seeds."""
    have = {axis: x for axis, x in result.axes().items() if x[0]}
    sizes = [len(entries) for entries, _ in have.values()]
    figure = _figure(7.5, 0.8 + 0.24 * sum(sizes) + 0.25 * len(sizes))
    panels = figure.subplots(len(sizes), sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for panel, (axis, (entries, rows)) in zip(panels, have.items(), strict=True):
        order = sorted(range(len(rows)), key=lambda i: -mean(rows[i]))
        for place, i in enumerate(order):
            colour = RED if entries[i].cfg == result.base else BLUE
            panel.errorbar(mean(rows[i]), place, xerr=half_range(rows[i]), fmt="o", ms=4,
                           capsize=2, color=colour)  # fmt: skip
        panel.set_yticks(range(len(order)), [entries[i].name for i in order], fontsize=8)
        panel.set_ylim(-0.6, len(order) - 0.4)
        panel.set_title(axis, fontsize=9, loc="left")
        panel.grid(alpha=0.3)
        panel.tick_params(axis="x", labelsize=8)
    panels[-1].set_xlabel("held-out loss (nats per token); the base is red", fontsize=9)
    return figure


def plot_lengths(result: Result, entries, rows):
    """The loss against the length of the window, for the positions."""
    figure = _figure(7, 4)
    panel = figure.subplots()
    for entry, row in zip(entries, rows, strict=True):
        lengths = [n * result.base.model.context for n in row["losses"]]
        spread = [half_range(row, n) for n in row["losses"]]
        panel.errorbar(lengths, [mean(row, n) for n in row["losses"]], spread, marker="o", ms=4,
                       capsize=2, lw=1.2, label=entry.name)  # fmt: skip
    panel.set_xscale("log", base=2)
    ticks = [n * result.base.model.context for n in TIMES]
    panel.set_xticks(ticks, [str(n) for n in ticks])
    panel.set(xlabel=f"tokens in a window (trained: {ticks[0]})",
              ylabel="held-out loss (nats per token)")  # fmt: skip
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def plot_speed(result: Result, entries, rows):
    """The loss against the speed, for the mixers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = _figure(8, 4)
    panel = figure.subplots()
    for (entry, row), mark in zip(
        zip(entries, rows, strict=True), itertools.cycle("os^vDPX<>*hdp")
    ):
        at = (row["tokens_per_second"], mean(row))
        name = entry.name.partition(" (")[0]
        panel.errorbar(*at, yerr=half_range(row), fmt=mark, ms=6, capsize=2, label=name)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="training tokens per second", ylabel="held-out loss (nats per token)")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


# --- the command -----------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """Reads axes from the shell."""
    given = text.split(",")
    for name in given:
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"no axis {name!r}; there are: {', '.join(AXES)}")
    return given


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("settings", nargs="*", metavar="path=value", help="changes of the base")
    some = made.add_mutually_exclusive_group()
    some.add_argument("--axes", type=names, default=[*AXES], help=f"of {','.join(AXES)}")
    some.add_argument("--product", type=names, help="every combination of these axes")
    made.add_argument("--seeds", type=numbers, default=[0, 1], help="such as 0,1,2")
    made.add_argument("--steps", type=int, default=BASE.train.steps, help="of training")
    made.add_argument("--source", default=BASE.data.source, help="text; see data.source")
    made.add_argument("--out", type=pathlib.Path, default="runs/ablate", help="of rows.jsonl")
    made.add_argument("--docs", type=pathlib.Path, help="of ablation.md and images/; default: out")
    return made


def base_of(a: argparse.Namespace) -> Config:
    """The base that the command asks for.

    Raises:
        ConfigError: it can not be, or its windows can not be joined to longer ones.
    """
    warmup = min(BASE.optimizer.warmup, a.steps // 10)
    given = (f"train.steps={a.steps}", f"data.source={a.source}", f"optimizer.warmup={warmup}")
    base = override(BASE, [*given, *a.settings])
    if base.train.batch % TIMES[-1]:
        raise ConfigError(
            f"train.batch={base.train.batch} must be a multiple of {TIMES[-1]}, so that as many "
            "tokens can be evaluated in longer windows."
        )
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    a = parser().parse_args(arguments)
    base = base_of(a)
    planned = plan(base, a.product or a.axes, is_product=bool(a.product))
    entries = [x for x in planned if isinstance(x, Entry)]
    refused = [x for x in planned if isinstance(x, Refused)]
    text, facts = Text(base), about(base, a.seeds)
    held = int(sum(batch.weights.sum() for batch in text.held(1)))
    command = shlex.join(["python", "-m", "benchmarks.ablate", *arguments])
    print(f"{command}\n{about_base(base, facts)}\n\n{line(None, None)}", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = measure_all(entries, text, a.seeds, facts, a.out / "rows.jsonl")
    for no in refused:
        print(f"{no.axis:12} {no.name:36} left out: {no.reason}")
    result = Result(base, entries, rows, refused, facts, command, held)
    docs = a.docs or a.out
    draw(result, docs / "images")
    write_whole(str(docs / "ablation.md"), page(result))
    print(f"{duration(time.perf_counter() - start)}; {docs / 'ablation.md'}")
    return 0


if __name__ == "__main__":
    run(main)
