"""Figures of scaling laws."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.optional import require
from jaxgpt.scaling.laws import Law, Run


def _break_line(text: str) -> str:
    """Break a list of constants into two lines, which a panel is wide enough for."""
    parts = text.split(", ")
    return "\n".join(", ".join(part) for part in (parts[:3], parts[3:]) if part)


def plot_law(law: Law, runs: Sequence[Run], held_out: Sequence[Run] = (), title: str = "") -> Any:
    """Draw runs and their law: loss over compute, and predicted over measured loss.

    Args:
        held_out: runs that the law was not fitted to, with their prediction and its interval.

    Returns:
        A matplotlib Figure.
    """
    matplotlib = require("matplotlib", "a figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    everything = [*runs, *held_out]
    sizes = sorted({run.parameters for run in everything})
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(sizes)))
    for size, color in zip(sizes, colors, strict=True):
        own = sorted((r for r in runs if r.parameters == size), key=lambda r: r.tokens)
        left.plot([r.compute for r in own], [r.loss for r in own], "o", color=color, markersize=4)
        span = [r.tokens for r in everything if r.parameters == size]
        tokens = np.geomspace(min(span), max(span), 50)
        left.plot(6 * size * tokens, law.predict(size, tokens), color=color, linewidth=1,
                  label=f"{size:.3g} parameters")  # fmt: skip
    budgets = [run.compute for run in everything]
    grid = np.geomspace(min(budgets), max(budgets), 50)
    best = [law.predict(*law.optimum(c)) for c in grid]
    left.plot(grid, best, "k--", linewidth=1, label="best size at each budget")
    left.set_xscale("log")
    left.set_xlabel("training compute, FLOPs")
    left.set_ylabel("held-out loss, nats per token")
    left.set_title(title or _break_line(law.format()), fontsize=9)
    measured = [run.loss for run in runs]
    right.plot(measured, [law.predict(r.parameters, r.tokens) for r in runs], "o", markersize=4,
               label="fitted runs")  # fmt: skip
    for run in held_out:
        predicted = float(law.predict(run.parameters, run.tokens))
        bar = None
        if law.samples is not None:
            low, high = law.predict_interval(run.parameters, run.tokens)
            bar = [[max(0.0, predicted - low)], [max(0.0, high - predicted)]]
        left.errorbar(run.compute, predicted, yerr=bar, fmt="o", color="tab:red", markersize=7,
                      markerfacecolor="white", capsize=4, label=f"{run.name}: predicted, 95%",
                      zorder=3)  # fmt: skip
        left.plot(run.compute, run.loss, "*", color="tab:red", markersize=12, zorder=4,
                  label=f"{run.name}: measured")  # fmt: skip
        right.errorbar(run.loss, predicted, yerr=bar, fmt="*", color="tab:red", markersize=12,
                       capsize=3, label=f"held out: {run.name}")  # fmt: skip
    losses = [run.loss for run in everything]
    ends = [min(losses), max(losses)]
    right.plot(ends, ends, color="gray", linewidth=1)
    right.set_xlabel("measured loss")
    right.set_ylabel("predicted loss")
    right.set_title("What the law predicts")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure
