"""The page of a report: facts as HTML, with inline charts and figures.

Every text is escaped, and the page's policy allows no script and no request, so that nothing in a
run's name, settings or samples can do anything.
"""

import base64
import html
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxgpt import console, inspect, visualize
from jaxgpt.inspect.attention import list_attention_layers
from jaxgpt.interop.formats import find_format
from jaxgpt.language_model import LanguageModel
from jaxgpt.optional import is_installed
from jaxgpt.report.curves import draw_chart
from jaxgpt.report.facts import Facts, format_setting, read_facts, to_json
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.logging import format_mfu
from jaxgpt.visualize import Page

MAX_INSIDE_TOKENS = 14  # of the text whose inside is shown
Section = tuple[str, str, str]  # id, heading, HTML


def write(
    run: str, *, text: str | None = None, results: Sequence[str] = (), checkpoint: str = "best"
) -> Page:
    """Return the report of a run.

    Args:
        run: its folder.
        text: whose inside is shown; None takes the beginning of a sample.
        results: files of results of benchmarks; see `facts.read_facts`.
        checkpoint: whose inside is shown: "best" or "latest".

    Raises:
        ConfigError: the folder is not a run, or a file of results is none.
    """
    if find_format(run):
        raise ConfigError(
            f"{run} is a model of another library: a report is of a run, whose training it tells."
        )
    facts = read_facts(run, results)
    try:
        model = console.load_model(run, checkpoint, [])
        figures = draw_inside(model, choose_text(facts, model) if text is None else text)
    except ConfigError as error:
        figures = {"": str(error)}
    return make_page(facts, figures)


def make_page(facts: Facts, figures: Mapping[str, str]) -> Page:
    """Return the page.

    Args:
        figures: of the inside of the model, as `draw_inside` returns them.
    """
    sections = [part(facts) for part in PARTS]
    sections.insert(INSIDE_AFTER, make_inside(figures))
    links = "".join(
        f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections
    )
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{content}</section>'
        for name, title, content in sections
    )
    title = facts.config.name or os.path.basename(os.path.normpath(facts.run))
    return Page(TEMPLATE.format(title=escape(title), about=describe(facts), links=links, body=body))


# --- pieces of HTML --------------------------------------------------------------------------


def escape(value: Any) -> str:
    """Return a value as text of HTML, also inside an attribute."""
    return html.escape(str(value), quote=True)


def make_table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), caption: str = "") -> str:
    """Return a table whose first column names its rows, and whose numbers are aligned."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{_align(value)}>{escape(value)}</td>" for value in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    head_row = f"<thead><tr>{top}</tr></thead>" if head else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or "table")}">'
        f"<table>{title}{head_row}<tbody>{lines}</tbody></table></div>"
    )


def _align(value: Any) -> str:
    return ' class="number"' if re.match(r"-?\d", str(value)) else ""


def make_code(text: str) -> str:
    """Return a block of text as it stands."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def describe(facts: Facts) -> str:
    """Return one line about the run."""
    cfg = facts.config.model
    return escape(
        f"{cfg.family} with {facts.parts['total']:,} parameters: {cfg.layers} layers of width "
        f"{cfg.width}, {cfg.heads} heads, a context of {cfg.context} tokens; objective "
        f"{facts.config.train.objective}, {facts.steps:,} of {facts.config.train.steps:,} steps"
    )


# --- sections --------------------------------------------------------------------------------


def make_results(facts: Facts) -> Section:
    """Return the section of held-out measurements and benchmarks."""
    unit, parts = facts.config.objective.loss_unit, []
    if facts.best is not None:
        last = facts.evaluations[-1]
        names = [key for key in last if key not in ("kind", "step", "confusion")]
        rows = [
            (name.replace("_", " "), *(_format_number(x.get(name)) for x in (facts.best, last)))
            for name in names
        ]
        steps = [f"{x['step']:,}" for x in (facts.best, last)]
        head = ("metric", f"best (step {steps[0]})", f"last (step {steps[1]})")
        parts.append(make_table(rows, head, f"Held-out text; the loss is nats per {unit}"))
    else:
        parts.append("<p>This run has no evaluation yet.</p>")
    for task, numbers in facts.tasks.items():
        rows = [(name.replace("_", " "), _format_number(x)) for name, x in numbers.items()]
        parts.append(make_table(rows, ("metric", "value"), f"Benchmark {task}"))
    return "results", "Results", "".join(parts)


def _format_number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)


def make_curves(facts: Facts) -> Section:
    """Return the section of curves over the steps."""
    pairs = {
        "Loss": ("nats", {"training": "train loss", "held-out": "eval loss"}),
        "Accuracy": ("share", {"training": "train accuracy", "held-out": "eval accuracy"}),
        "Learning rate": ("rate", {"learning rate": "train lr"}),
        "Norm of the gradient": ("norm", {"gradient": "train grad_norm"}),
        "Speed": ("tokens/s", {"training": "train tokens_per_second"}),
    }
    charts = []
    for title, (unit, lines) in pairs.items():
        found = {name: facts.curves.get(key, []) for name, key in lines.items()}
        charts.append(draw_chart(found, title, unit))
    content = "".join(charts) or "<p>This run has no measurements yet.</p>"
    return "curves", "Curves", f'<div class="charts">{content}</div>'


def make_samples(facts: Facts) -> Section:
    """Return the section of texts that the model has generated while it was trained."""
    parts = [f"<h3>{escape(name)}</h3>{make_code(text)}" for name, text in facts.samples.items()]
    note = f"<p>Sampling rules: {escape(_describe_sample(facts))}.</p>"
    content = "".join(parts) or "<p>This run has written no samples.</p>"
    return "samples", "Samples", note + content


def _describe_sample(facts: Facts) -> str:
    sample = facts.config.sample
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return ", ".join(f"{name} {format_setting(getattr(sample, name))}" for name in names)


def make_params(facts: Facts) -> Section:
    """Return the section of parameters by part."""
    total = facts.parts["total"]
    rows = [(name, f"{n:,}", f"{n / total:.1%}") for name, n in facts.parts.items() if n]
    return (
        "parameters", "Parameters", make_table(rows, ("part", "parameters", "share"), "By part")
    )  # fmt: skip


def make_speed(facts: Facts) -> Section:
    """Return the section of computation and speed."""
    flops = facts.flops_per_token
    rows = [
        ("FLOPs per token, forward and backward", f"{flops / 1e6:,.1f} million"),
        ("tokens trained on", f"{facts.tokens:,}"),
        ("FLOPs of training", f"{flops * facts.tokens:.3g}"),
    ]
    if "tokens_per_second" in facts.speed:
        rows.append(("tokens per second, median", f"{facts.speed['tokens_per_second']:,.0f}"))
    if "mfu" in facts.speed:
        rows.append(
            (
                "model FLOPs utilization (MFU), median",
                format_mfu(facts.speed["mfu"]).removeprefix("MFU "),
            )
        )
    note = (
        "<p>FLOPs are those of the model's products, an addition and a multiplication each, "
        "without what is recomputed. MFU is their share of the peak of the devices on which the "
        "run was trained; on a CPU the peak is a measured product of matrices.</p>"
    )
    return "speed", "Computation", note + make_table(rows, ("what", "how much"), "Computation")


def make_data(facts: Facts) -> Section:
    """Return the section of the text."""
    data, model = facts.config.data, facts.config.model
    rows: list[tuple[str, Any]] = [
        ("source", format_setting(data.source)),
        ("tokenizer", format_setting(data.tokenizer)),
        ("vocabulary", f"{model.vocab:,}"),
        ("held out", data.validation or f"{data.holdout:.2%} of the source"),
        ("rows of a batch", f"{facts.config.train.batch:,}"),
        ("tokens of a row", f"{model.context:,}"),
    ]
    return "data", "Data", make_table(rows, ("what", "value"), "Text and batches")


def make_config(facts: Facts) -> Section:
    """Return the section of settings."""
    rows = [
        (key, format_setting(value), format_setting(default))
        for key, (value, default) in facts.changed.items()
    ]
    table = make_table(rows, ("setting", "value", "default"), "Settings that differ")
    whole = make_code(to_json(facts.config))
    return (
        "config", "Config", f"{table}<details><summary>All settings</summary>{whole}</details>"
    )  # fmt: skip


def make_repeat(facts: Facts) -> Section:
    """Return the section that tells how to repeat the run."""
    if facts.command:
        how = f"<p>This command trains the same model again:</p>{make_code(facts.command)}"
    else:
        how = "<p>No single command has exactly these settings; all of them are above.</p>"
    note = (
        f"<p>With the same text, version and devices the run is the same bit for bit: its seed is "
        f"{facts.config.seed}. Paths are as the run had them.</p>"
    )
    table = make_table(
        facts.environment.items(), ("what", "value"), "The machine that wrote this report"
    )
    return "repeat", "How to repeat it", how + note + table


PARTS: tuple[Callable[[Facts], Section], ...] = (
    make_results,
    make_curves,
    make_samples,
    make_params,
    make_speed,
    make_data,
    make_config,
    make_repeat,
)
INSIDE_AFTER = 5  # sections


# --- the inside of the model -----------------------------------------------------------------


def choose_text(facts: Facts, model: LanguageModel) -> str:
    """Return the beginning of the last sample, or of the prompt, for the inside of the model."""
    last = [*facts.samples.values()][-1:] or [facts.config.sample.prompt]
    ids = model.tokenizer.encode(last[0])[: min(MAX_INSIDE_TOKENS, model.config.model.context - 2)]
    return model.tokenizer.decode(ids.tolist()).replace("\ufffd", "") or "the"


def draw_inside(model: LanguageModel, text: str) -> dict[str, str]:
    """Return figures of what a model does with a text: {what it shows: <img>, or a note}.

    What a model does not have (attention, scores of next tokens) is left out.
    """
    if not is_installed("matplotlib"):
        return {"": "The figures need matplotlib, which is not installed."}
    if "generate" not in model.abilities:
        return {"": "The figures are of models that predict the next token."}
    source = text if model.config.model.family == "encoder_decoder" else None
    encoded = inspect.encode(model, text, source)
    drawings: dict[str, Callable[[], Any]] = {
        "Loss of each token, the first of which has none before it": lambda: visualize.draw_losses(
            inspect.token_losses(model, encoded), encoded.pieces
        ),
        "Likeliest next token after each layer": lambda: visualize.draw_lens(
            inspect.logit_lens(model, encoded)
        ),
    }
    if layers := list_attention_layers(model):
        weights = inspect.attention(model, encoded)
        for place in sorted({0, len(layers) - 1}):
            name = f"Attention of layer {layers[place]}: each token (row) to those before it"
            drawings[name] = partial(visualize.draw_attention, weights[place], encoded.pieces)
    found = {}
    for name, draw in drawings.items():
        try:
            found[name] = make_image(draw(), f"{name}; of the text {text!r}")
        except ConfigError:  # this model has no such thing
            continue
    return found


def make_image(figure, alt: str) -> str:
    """Return a figure as an image inside the page."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def make_inside(figures: Mapping[str, str]) -> Section:
    """Return the section of the inside of the model."""
    parts = [
        f"<figure>{content}<figcaption>{escape(name)}</figcaption></figure>"
        if name
        else f"<p>{escape(content)}</p>"
        for name, content in figures.items()
    ]
    return "inside", "A look inside", "".join(parts) or "<p>There is nothing to show.</p>"


TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}: report of a run</title>
<style>
:root {{ color-scheme: light dark; --ink: #1d2330; --soft: #566072; --paper: #fff;
  --panel: #f4f5f8; --line: #d5d9e2; --focus: #0b57d0;
  --c0: #1f5fbf; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7eaf1; --soft: #a9b3c4; --paper: #14171e;
  --panel: #1e232d; --line: #39404e; --focus: #8ab4ff;
  --c0: #7aa6ff; --c1: #ff9466; --c2: #6ee7a0; --c3: #d8b4fe }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; margin: 0 }} h3 {{ font-size: 1rem; margin: 1rem 0 .3rem }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line) }}
p {{ margin: .4rem 0 .8rem; max-width: 46rem }} header p, figcaption {{ color: var(--soft) }}
a {{ color: var(--focus) }}
:focus-visible {{ outline: 3px solid var(--focus); outline-offset: 1px }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none }}
.scroll {{ overflow-x: auto; margin: .8rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem }}
caption {{ text-align: left; color: var(--soft); padding-bottom: .3rem }}
th, td {{ border: 1px solid var(--line); padding: .3rem .7rem; text-align: left;
  vertical-align: top; overflow-wrap: anywhere }}
thead th {{ background: var(--panel) }} tbody th {{ font-weight: normal }}
.number {{ text-align: right; font-variant-numeric: tabular-nums }}
pre {{ background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem 1rem; white-space: pre-wrap; font: .85rem/1.45 ui-monospace, monospace }}
figure {{ margin: 1rem 0 }} figcaption {{ font-size: .9rem }}
img {{ max-width: 100%; background: #fff; border-radius: 6px }}
.charts {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }}
.charts figure {{ margin: 0; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem }}
figure > svg {{ width: 100%; height: auto; display: block }}
svg text {{ fill: var(--soft); font: 12px system-ui, sans-serif }}
svg .grid {{ stroke: var(--line) }} polyline {{ fill: none; stroke-width: 1.8 }}
.line0 {{ stroke: var(--c0) }} .line1 {{ stroke: var(--c1); stroke-dasharray: 6 3 }}
.line2 {{ stroke: var(--c2) }} .line3 {{ stroke: var(--c3) }} circle {{ fill: var(--paper) }}
circle.line1 {{ stroke-dasharray: none }}
.key {{ white-space: normal; margin-right: .8rem }} .key svg {{ width: 20px; height: 8px }}
.key line {{ stroke-width: 2 }}
@media print {{
  :root {{ color-scheme: light; --ink: #000; --soft: #333; --paper: #fff; --panel: #f6f6f6;
    --line: #bbb; --focus: #000; --c0: #1f5fbf; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce }}
  body {{ max-width: none; padding: 0; font-size: 11pt }} nav, details {{ display: none }}
  figure, tr, img, pre {{ break-inside: avoid }} h2, h3, caption {{ break-after: avoid }}
  .scroll {{ overflow: visible }} pre {{ white-space: pre-wrap }}
  .charts {{ grid-template-columns: 1fr 1fr }}
  @page {{ margin: 18mm }}
}}
</style></head><body>
<header><h1>{title}</h1><p>{about}</p></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>{body}</main>
</body></html>
"""
