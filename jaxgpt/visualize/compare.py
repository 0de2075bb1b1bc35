"""Runs side by side: their curves in one figure, the settings that differ, and samples."""

import base64
import html
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt import config as configs
from jaxgpt import console
from jaxgpt.loading import read_config
from jaxgpt.settings import ConfigError, list_fields
from jaxgpt.settings import get as get_setting
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.visualize.figures import draw_curves
from jaxgpt.visualize.page import Page

PATHS = ("name", "folder")  # settings that say where a run is, not what it is


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: their folders.
        curves: {run: (steps, held-out losses)}.
        settings: {key: one value a run}, of those that differ.
        samples: {run: text}; empty if they were left out.
        unit: of the loss: "token", "text", ...
    """

    runs: tuple[str, ...]
    curves: dict[str, tuple[list[int], list[float]]]
    settings: dict[str, tuple[Any, ...]]
    samples: dict[str, str]
    unit: str

    def best(self, run: str) -> tuple[int, float] | None:
        """Return (step, loss) of the lowest held-out loss of a run, None without any."""
        pairs = list(zip(*self.curves[run], strict=True))
        return min(pairs, key=lambda pair: pair[1], default=None)


def compare_runs(
    runs: Sequence[str], prompt: str | None = None, has_samples: bool = True
) -> Comparison:
    """Read runs and return what they have in common and what not.

    Args:
        prompt: of the samples; None takes each run's own.
        has_samples: False to load no model.

    Raises:
        ConfigError: a folder is not a run, has no measurements, or is named twice.
    """
    if len(set(map(os.path.realpath, runs))) < len(runs):
        raise ConfigError("a run is named twice: compare different ones.")
    known = {run: read_config(run) for run in runs}
    curves = {run: _read_curve(run) for run in runs}
    settings = {}
    for key in list_fields(configs.Config):
        values = tuple(get_setting(config, key) for config in known.values())
        if key not in PATHS and any(value != values[0] for value in values):
            settings[key] = values
    samples = {run: _sample(run, prompt) for run in runs} if has_samples else {}
    units = {config.objective.loss_unit for config in known.values()}
    unit = units.pop() if len(units) == 1 else "unit of each"
    return Comparison(tuple(runs), curves, settings, samples, unit)


def _read_curve(run: str) -> tuple[list[int], list[float]]:
    records = [r for r in read_metrics(run) if r.get("kind") == "eval" and "loss" in r]
    return [int(r["step"]) for r in records], [float(r["loss"]) for r in records]


def _sample(run: str, prompt: str | None) -> str:
    try:
        model = console.load_model(run, "best", [])
        return console.format_sample(
            model, model.config.sample.prompt if prompt is None else prompt
        )
    except ConfigError as error:
        return f"(no sample: {error})"


def _list_best(found: Comparison) -> list[tuple[str, str, str]]:
    rows = []
    for run in found.runs:
        best = found.best(run)
        rows.append((run, "-", "-") if best is None else (run, f"{best[1]:.4f}", f"{best[0]:,}"))
    return rows


def _format_value(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def format_comparison(found: Comparison) -> str:
    """Return the comparison as lines of text."""
    width = max(map(len, found.runs)) + 2
    lines = [f"{'':{width}}  best loss per {found.unit}   at step"]
    lines += [f"{run:{width}}  {loss:>20}  {step:>8}" for run, loss, step in _list_best(found)]
    lines += ["", "settings that differ:"]
    for key, values in found.settings.items():
        lines.append(f"  {key}")
        lines += [f"    {run:{width}}  {_format_value(value)}"
                  for run, value in zip(found.runs, values, strict=True)]  # fmt: skip
    if not found.settings:
        lines.append("  none")
    for run, text in found.samples.items():
        lines += ["", f"--- {run}", text]
    return "\n".join(lines)


def save(found: Comparison, path: str) -> None:
    """Write a page (.html) with all of it, or the figure alone.

    Raises:
        ConfigError: the file cannot be written, or matplotlib does not know its kind.
    """
    figure = draw_curves(found.curves, f"held-out loss per {found.unit}", "Runs side by side")
    if os.path.splitext(path)[1].lower() in (".html", ".htm"):
        make_page(found, figure).save(path)
        return
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {path}: {error}") from error


def make_page(found: Comparison, figure) -> Page:
    """Return one offline HTML page with the figure, the settings and the samples."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    source = base64.b64encode(picture.getvalue()).decode()
    head = "".join(f"<th scope=col>{html.escape(run)}</th>" for run in found.runs)
    best = "".join(f"<td>{loss} at step {step}</td>" for _, loss, step in _list_best(found))
    rows = "".join(
        f"<tr><th scope=row>{html.escape(key)}</th>"
        + "".join(f"<td>{html.escape(_format_value(v))}</td>" for v in values)
        + "</tr>"
        for key, values in found.settings.items()
    )
    samples = "".join(f"<td><pre>{html.escape(text)}</pre></td>" for text in found.samples.values())
    last = f"<tr><th scope=row>sample</th>{samples}</tr>" if found.samples else ""
    return Page(
        PAGE.format(source=source, head=head, best=best, rows=rows, last=last, unit=found.unit)
    )


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 1.5rem }}
img {{ max-width: 100%; background: #fff; border-radius: 6px }}
table {{ border-collapse: collapse }}
th, td {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left; vertical-align: top }}
th {{ font-weight: normal; font-family: ui-monospace, monospace; font-size: .85rem }}
pre {{ white-space: pre-wrap; margin: 0; font-size: .8rem }}
.scroll {{ overflow-x: auto }}
</style></head><body>
<h1>Runs side by side</h1>
<p><img alt="held-out loss of each run over the steps" src="data:image/png;base64,{source}"></p>
<div class="scroll"><table><thead><tr><th scope=col></th>{head}</tr></thead>
<tbody><tr><th scope=row>best loss per {unit}</th>{best}</tr>{rows}{last}</tbody></table></div>
</body></html>
"""
