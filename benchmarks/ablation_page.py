"""The page of benchmarks.ablate: its tables, sentences and plots."""

import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxgpt.config import Config

CONTEXT_FACTORS = (1, 2, 4)  # lengths of the held-out windows, relative to the training length


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
    """Return the figures of a row, in the order of HEADER; "-" for those that are missing."""
    losses = row.get("losses", {})
    cells = [f"{average_loss(row, n):.3f}" if n in losses else "-" for n in CONTEXT_FACTORS]
    cells.insert(1, f"{measure_spread(row):.3f}" if len(losses.get(1, ())) > 1 else "-")
    cells.append(f"{row['parameters']:,}" if "parameters" in row else "-")
    if "seconds_per_step" in row:
        cells.append(f"{1e3 * statistics.median(row['seconds_per_step']):.1f}")
        cells.append(f"{row['tokens_per_second']:,.0f}")
    else:
        cells += ["-", "-"]
    cells.append(f"{row['megabytes']:.1f}" if row.get("megabytes") else "-")
    return tuple(cells)


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
        if row.get("reason"):
            reasons.setdefault(row["reason"], []).append(entry.name)
        lines.append(f"| {name} | {' | '.join(format_cells(row))} |")
    notes = [
        f"\\- {', '.join(names)}: {why} has no rows for longer windows."
        for why, names in reasons.items()
    ]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def estimate_noise(rows: Sequence[dict]) -> float | None:
    """Return the relative spread of the median step times: the median over the rows."""
    times = [row.get("seconds_per_step", []) for row in rows]
    spreads = [max(s) / min(s) - 1 for s in times if len(s) > 1]
    return statistics.median(spreads) if spreads else None


def summarize(entries: Sequence[Entry], rows: Sequence[dict], base: Config) -> str:
    """Summarize the figures of one axis in sentences that are valid for any figures."""
    measured = [(e, row) for e, row in zip(entries, rows, strict=True) if "losses" in row]
    ranked = sorted(((e.name, row) for e, row in measured), key=lambda x: average_loss(x[1]))
    if len(ranked) < 2:
        return "There is nothing to compare."
    (best, lowest), (worst, highest) = ranked[0], ranked[-1]
    sentences = [
        f"Lowest loss: {best}, {average_loss(lowest):.3f}; "
        f"highest: {worst}, {average_loss(highest):.3f}."
    ]
    base_row = next((row for e, row in measured if e.cfg == base), None)
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
    speeds = [(r["tokens_per_second"], n) for n, r in ranked if "tokens_per_second" in r]
    if len(speeds) > 1:
        (low, slow), (high, fast) = min(speeds), max(speeds)
        sentences.append(f"Fastest: {fast}, {high / low:.1f} times the tokens/s of {slow}.")
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
* **ms**, **tokens/s**: of a training step after compilation, the median of blocks of steps that are
  measured separately from the losses.
{noise}* **MB**: arguments and temporary memory of the compiled training step.

"""


NOISE_TEMPLATE = (
    "  Machine noise: the blocks of a choice differ by {spread:.0%} (median over choices).\n"
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
    parts = [text]
    if "loss" in plots:
        parts.append(f"![loss by choice](images/{plots['loss']})\n")
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
    axes = {axis for axis, rows in result.group_by_axis().items() if select_plotted(axis, *rows)}
    plots = {axis: file for axis, file in files.items() if axis in axes}
    return ({"loss": "ablation_loss.png"} if axes else {}) | plots


def select_plotted(axis: str, entries, rows) -> list[tuple[Entry, dict]]:
    """Return the choices of an axis that have the figures of its plot."""
    needed = {"losses", "tokens_per_second"} if axis == "mixer" else {"losses"}
    return [(e, row) for e, row in zip(entries, rows, strict=True) if needed <= row.keys()]


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
    pairs = {axis: select_plotted("", *x) for axis, x in result.group_by_axis().items()}
    measured = {axis: tuple(zip(*x, strict=True)) for axis, x in pairs.items() if x}
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
    for entry, row in select_plotted("position", entries, rows):
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
    pairs = select_plotted("mixer", entries, rows)
    colors = colormaps["turbo"].resampled(max(len(pairs), 2))  # one for each mixer
    for i, ((entry, row), marker) in enumerate(zip(pairs, itertools.cycle("os^vDPX<>*hdp"))):
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
