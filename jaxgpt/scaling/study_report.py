"""The report of a scaling study: constants, figure, prediction, and what they are worth.

    study/report.md  scaling.png

Every number is computed from the files of the study, so that the report can be written again.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt.config import Config
from jaxgpt.scaling.figures import plot_law
from jaxgpt.scaling.laws import FLOPS_PER_PARAMETER, PUBLISHED, Law, Run, fit
from jaxgpt.scaling.sweep import LEARNING_RATES, read_rows, read_runs
from jaxgpt.trainer.logging import write_text_atomically

REPORT, FIGURE = "report.md", "scaling.png"
NAMES = ("E", "A", "B", "alpha", "beta")
CHINCHILLA = "besiroglu"  # its constants stand beside those found


def write_report(
    folder: str,
    shared: Config,
    law: Law,
    prediction: Mapping[str, Any],
    measured: Mapping[str, Any],
    seeds: Sequence[Mapping[str, Any]],
    out: str = "",
) -> str:
    """Write the report of a study and its figure.

    Args:
        folder: of the study.
        shared: the config of its runs.
        law: the fit to them, with bootstrap samples.
        prediction: of the held-out run.
        measured: the line of the held-out run.
        seeds: the lines of the runs with other seeds.
        out: where the report goes as well, with its figure beside it in images/.

    Returns:
        The path of the report.
    """
    held_out = [
        Run(measured["parameters"], measured["tokens"], measured["loss"], name=measured["name"])
    ]
    plot_law(law, read_runs(folder), held_out).savefig(os.path.join(folder, FIGURE))
    text = format_report(folder, shared, law, prediction, measured, seeds)
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
    shared: Config,
    law: Law,
    prediction: Mapping[str, Any],
    measured: Mapping[str, Any],
    seeds: Sequence[Mapping[str, Any]],
) -> str:
    """Return the report as Markdown; see `write_report`."""
    rows, runs = read_rows(folder), read_runs(folder)
    sections = (
        _introduce(shared, rows, measured, seeds),
        _format_law(law),
        f"![loss over compute, and predicted over measured loss]({FIGURE})",
        _format_prediction(prediction, measured, rows),
        _format_optima(law, runs),
        _format_trust(folder, law, runs, rows, seeds),
        _format_rates(folder),
        _format_runs(law, [*rows, dict(measured)]),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def make_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _introduce(shared: Config, rows, measured, seeds) -> str:
    sizes = {row["parameters"] for row in rows}
    budgets = {row["tokens"] for row in rows}
    everything = [*rows, measured, *seeds]
    times = [row.get("seconds") for row in everything]
    time = f" in {sum(times) / 60:.0f} min" if all(times) else ""
    flops = sum(row["flops"] for row in everything)
    return f"""# Scaling laws, measured

Made by `jaxgpt scaling study`: {len(rows)} runs of {len(sizes)} sizes, {min(sizes):,.0f} to
{max(sizes):,.0f} parameters, on {len(budgets)} budgets, {min(budgets) / 1e6:.2g} to
{max(budgets) / 1e6:.2g} million tokens, and a larger run that was predicted before it was trained.
Together they took {flops:.2g} FLOPs{time}. They share their text
(`data.source={shared.data.source}`, {shared.model.vocab:,} tokens in the vocabulary), a context of
{shared.model.context} tokens, batches of {shared.train.batch} rows, and the optimizer
`{shared.optimizer.name}`. N counts all parameters, D the tokens trained on; the loss is nats per
token of held-out text."""


def _format_law(law: Law) -> str:
    other = PUBLISHED[CHINCHILLA].constants
    rows = [
        (name, f"{value:.4g}", f"{error:.2g}", f"{theirs:.4g}")
        for name, value, error, theirs in zip(NAMES, law.constants, law.errors, other, strict=True)
    ]
    table = make_table(("constant", "value", "standard error", "Chinchilla's runs"), rows)
    return f"""## The law

    L(N, D) = E + A / N^alpha + B / D^beta

{table}

The last column is a fit to the runs of another text, tokenizer and range of sizes (Besiroglu et al.
2024): exponents may be compared with it, E, A and B may not. Standard errors are of
{0 if law.samples is None else len(law.samples)} fits to resampled runs."""


def _format_prediction(prediction, measured, rows) -> str:
    loss, (low, high) = prediction["loss"], prediction["interval"]
    table = make_table(
        ("", "loss"),
        [
            ("predicted", f"{loss:.4f}, 95%: {low:.4f} to {high:.4f}"),
            ("measured", f"{measured['loss']:.4f}"),
        ],
    )
    inside = "inside" if low <= measured["loss"] <= high else "outside of"
    factor = measured["parameters"] / max(row["parameters"] for row in rows)
    work = measured["flops"] / max(row["flops"] for row in rows)
    return f"""## A larger run, predicted before it was trained

`{measured["name"]}`: {measured["parameters"]:,.0f} parameters, {measured["tokens"]:,.0f} tokens:
{factor:.1f} times the parameters and {work:.1f} times the FLOPs of the largest run of the fit.

{table}

The prediction is {loss / measured["loss"] - 1:+.2%} off; the measurement is {inside} its interval,
which is that of the fit alone: the spread of seeds, a learning rate that was transferred, and a law
that does not hold come on top."""


# --- the best use of a budget ----------------------------------------------------------------


def find_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the middle 95% of values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _format_optima(law: Law, runs: Sequence[Run]) -> str:
    samples = [Law(*row) for row in ([] if law.samples is None else law.samples.tolist())]
    largest, lines = max(run.compute for run in runs), []
    for factor in (0.1, 1, 10):
        size, tokens = law.optimum(factor * largest)
        ratios = [d / n for n, d in (sample.optimum(factor * largest) for sample in samples)]
        low, high = find_interval(ratios or [tokens / size])
        lines.append(
            (f"{factor * largest:.2g}", f"{size:,.0f}", f"{tokens:,.0f}", f"{tokens / size:.1f}",
             f"{low:.1f} to {high:.1f}", f"{float(law.predict(size, tokens)):.3f}")
        )  # fmt: skip
    head = ("FLOPs", "parameters", "tokens", "tokens a parameter", "95%", "loss")
    exponent = law.beta / (law.alpha + law.beta)
    low, high = find_interval([x.beta / (x.alpha + x.beta) for x in samples] or [exponent])
    return f"""## Compute-optimal size

The lowest loss for C = {FLOPS_PER_PARAMETER} N D FLOPs has N ~ C^a and D ~ C^(1 - a) with
a = beta / (alpha + beta) = {exponent:.2f} (95%: {low:.2f} to {high:.2f}). At 0.5, both grow alike.
Chinchilla's rule of 20 tokens a parameter is for models of 10^8 to 10^11 parameters.

{make_table(head, lines)}

The last line is beyond what was trained."""


# --- how far to trust it ---------------------------------------------------------------------


def _format_trust(folder: str, law: Law, runs: Sequence[Run], rows, seeds) -> str:
    gaps = np.array([float(law.predict(r.parameters, r.tokens)) / r.loss - 1 for r in runs])
    worst = runs[int(np.argmax(np.abs(gaps)))].name
    places = [(run.parameters, run.tokens) for run in runs]
    wide, long = (max(x) / min(x) for x in zip(*places, strict=True))
    bare = fit(read_runs(folder, "no_embeddings"), bootstrap=0)
    exponent = bare.beta / (bare.alpha + bare.beta)
    tables = [1 - row["parameters_without_embeddings"] / row["parameters"] for row in rows]
    return f"""## How far to trust it

- The law is {np.sqrt(np.mean(gaps**2)):.2%} off its own runs (root mean square), and
  {np.abs(gaps).max():.2%} off `{worst}`, the worst of them.
{_format_seeds(rows, seeds)}- N spans a factor of {wide:.0f}, and D of {long:.0f}.
  Beyond a few times the largest run, E and the exponents stand in for each other: small runs do not
  distinguish a higher E from smaller exponents.
- Embeddings are {min(tables):.0%} to {max(tables):.0%} of the parameters. Without them in N, alpha
  is {bare.alpha:.2f} in place of {law.alpha:.2f}, and a is {exponent:.2f}.
- All runs have one batch size, a schedule that ends with the run, and depth that grows with
  width."""


def _format_seeds(rows, seeds) -> str:
    lines = []
    for name in dict.fromkeys(row["name"].rpartition("-seed")[0] for row in seeds):
        own = [r["loss"] for r in [*rows, *seeds] if r["name"].rpartition("-seed")[0] == name
               or r["name"] == name]  # fmt: skip
        lines.append(
            f"- {len(own)} seeds of `{name}` end at {min(own):.3f} to {max(own):.3f}: a standard "
            f"deviation of\n  {np.std(own, ddof=1) / np.mean(own):.2%}.\n"
        )
    return "".join(lines)


def _format_rates(folder: str) -> str:
    path = os.path.join(folder, LEARNING_RATES)
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    rows = []
    for width, best in found["best"].items():
        own = [row for row in found["runs"] if str(row["width"]) == width]
        ends = [own[0]["lr"], own[-1]["lr"]]
        note = ", an end of the range" if np.isclose(best, ends).any() else ""
        tried = ", ".join(f"{row['lr']:.2g}: {row['loss']:.3f}" for row in own)
        rows.append((width, tried, f"{best:.2g}{note}"))
    return f"""## Learning rates

Sizes are compared at their own best rate. It was measured at {len(rows)} widths, as the minimum of
a parabola through the three rates around the lowest loss, and follows
{found["coefficient"]:.2g} * width^{found["exponent"]:.2f}:

{make_table(("width", "rate: loss", "best"), rows)}"""


def _format_runs(law: Law, rows) -> str:
    lines = [
        (row["name"], f"{row['parameters']:,.0f}", f"{row['tokens']:,.0f}", f"{row['lr']:.2g}",
         f"{row['loss']:.4f}", f"{float(law.predict(row['parameters'], row['tokens'])):.4f}")
        for row in sorted(rows, key=lambda r: (r["parameters"], r["tokens"]))
    ]  # fmt: skip
    head = ("run", "parameters", "tokens", "learning rate", "loss", "law")
    return f"## The runs\n\nThe last one was not fitted.\n\n{make_table(head, lines)}"
