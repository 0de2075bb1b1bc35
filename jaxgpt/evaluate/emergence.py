"""Emergence: an ability that appears at once is often a smooth change behind a sharp measure.

A model either generates the next K tokens of a text exactly or it does not, and K tokens are right
with a probability of about p^K if each is with p. So the exact match stays near 0 while p rises,
and then jumps, though the log-likelihood of the same tokens has grown smoothly with size.

Source: Schaeffer et al. 2023, "Are Emergent Abilities of Large Language Models a Mirage?",
arXiv:2304.15004; the abilities are those of Wei et al. 2022, arXiv:2206.07682.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt.evaluate.likelihood import Pair, score_pairs
from jaxgpt.evaluate.metrics import Estimate, estimate_mean
from jaxgpt.language_model import LanguageModel
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

LENGTHS = (1, 2, 4, 8)  # K, tokens that are matched exactly
PLACES = 512  # of the text where a model is asked to go on
CONTEXT_TOKENS = 64


class SizePoint(NamedTuple):
    """What a model of one size makes of a text.

    Attributes:
        name: of the model.
        parameters: its size.
        log_likelihood: of a token, nats.
        matches: by K: the next K tokens are all the likeliest ones.
    """

    name: str
    parameters: int
    log_likelihood: Estimate
    matches: dict[int, Estimate]


def make_point(
    name: str, parameters: int, logprobs: np.ndarray, is_best: np.ndarray,
    lengths: Sequence[int] = LENGTHS,
) -> SizePoint:  # fmt: skip
    """Return the measures of a model.

    Args:
        name, parameters: of the model.
        logprobs: float [n K] of the next tokens at n places.
        is_best: bool [n K], the token is the likeliest one.
        lengths: numbers of tokens that are matched, at most K.
    """
    matches = {k: estimate_mean(is_best[:, :k].all(axis=1).astype(float).tolist()) for k in lengths}
    return SizePoint(name, parameters, estimate_mean(logprobs.mean(axis=1).tolist()), matches)


def measure_emergence(
    models: Mapping[str, LanguageModel],
    texts: Sequence[str],
    lengths: Sequence[int] = LENGTHS,
    places: int = PLACES,
) -> list[SizePoint]:
    """Measure models of several sizes on the same text, smallest first.

    Args:
        models: by name.
        texts: to go on with, which no model was trained on.
        lengths: K, tokens that are matched exactly.
        places: in the text.

    Raises:
        ConfigError: a model generates no text, or a text is too short.
    """
    points = []
    for name, model in models.items():
        if "score" not in model.abilities or model.config.model.family != "decoder":
            raise ConfigError(f"{name} does not continue text: emergence is measured on decoders.")
        model.check_finite()
        cfg, longest = model.config.model, max(lengths)
        ids = [int(x) for text in texts for x in model.tokenizer.encode(text)]
        before = min(CONTEXT_TOKENS, cfg.context - longest)
        starts = np.unique(np.linspace(before, len(ids) - longest, places).astype(int))
        if before < 1 or starts[0] < before:
            raise ConfigError(
                f"{name}: a text of {len(ids)} tokens, or model.context={cfg.context}, is too "
                f"short for {longest} tokens after a context."
            )
        pairs = [
            Pair(tuple(ids[i - before : i]), tuple(ids[i : i + longest])) for i in starts.tolist()
        ]
        found = score_pairs(cfg, model.params, pairs)
        size = sum(x.size for x in jax.tree.leaves(model.params))
        logprobs, is_best = (np.stack(x) for x in zip(*[x[:2] for x in found], strict=True))
        points.append(make_point(name, size, logprobs, is_best, lengths))
    return sorted(points, key=lambda point: point.parameters)


def find_largest_step(values: Sequence[float]) -> float:
    """Return the share of the whole change that comes in one step from a size to the next.

    1 / (n - 1) is the least of n sizes, of a straight line; 1 is a jump. NaN if nothing changes.
    """
    steps = np.diff(np.asarray(values, np.float64))
    change = abs(float(steps.sum()))
    return float(np.max(np.abs(steps))) / change if change > 1e-12 else math.nan


def format_points(points: Sequence[SizePoint]) -> str:
    """Format the measures as a table, and how suddenly each changes."""
    lengths = list(points[0].matches)
    head = [
        f"{'parameters':>12}  {'nats per token':>18}",
        *(f"{f'{k} exact':>18}" for k in lengths),
    ]
    lines = ["  ".join([*head, "model"])]
    for point in points:
        cells = [point.log_likelihood, *point.matches.values()]
        text = "  ".join(f"{cell.format():>18}" for cell in cells)
        lines.append(f"{point.parameters:>12,}  {text}  {point.name}")
    if len(points) > 2:
        columns = [[p.log_likelihood.value for p in points]]
        columns += [[p.matches[k].value for p in points] for k in lengths]
        shares = [find_largest_step(column) for column in columns]
        steps = "  ".join(f"{'-' if math.isnan(x) else f'{x:.0%}':>18}" for x in shares)
        lines.append(f"{'largest step':>12}  {steps}  of the whole change")
    return "\n".join(lines)


def plot_emergence(points: Sequence[SizePoint], path: str) -> None:
    """Draw log-likelihood and exact match over size, side by side, and write the figure.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require("matplotlib", f"--out {path}")
    from matplotlib.figure import Figure

    sizes = [point.parameters for point in points]
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    nats = [point.log_likelihood for point in points]
    left.errorbar(sizes, [x.value for x in nats], [x.error for x in nats], marker="o", capsize=2)
    left.set(xscale="log", xlabel="parameters", ylabel="log-likelihood (nats per token)",
             title="what the model has learned")  # fmt: skip
    for length in points[0].matches:
        values = [point.matches[length] for point in points]
        label = f"{length} token{'s' if length > 1 else ''}"
        right.errorbar(sizes, [x.value for x in values], [x.error for x in values],
                       marker="o", capsize=2, label=label)  # fmt: skip
    right.set(xscale="log", xlabel="parameters", ylabel="exact match", title="how it is graded")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:.2g}".replace("e+0", "e") for size in sizes], rotation=40)
    figure.savefig(path)
