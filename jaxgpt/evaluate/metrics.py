"""Estimates with their standard errors: means over questions, perplexities, calibration.

A benchmark is a sample of the questions that could have been asked. Every number here has the
standard deviation that it would have over other samples of the same size.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number with its standard error.

    Attributes:
        value: the estimate.
        error: its standard error; NaN if there is one question alone.
        chance: what a guess gives; None if there is no such value.
    """

    value: float
    error: float
    chance: float | None = None

    def is_at_chance(self, errors: float = 3.0) -> bool:
        """Return whether it is within so many standard errors of chance."""
        return self.chance is not None and abs(self.value - self.chance) <= errors * self.error

    def format(self, digits: int = 4) -> str:
        """Format as "0.6123 ± 0.0150"."""
        error = "?" if math.isnan(self.error) else f"{self.error:.{digits}f}"
        return f"{self.value:.{digits}f} ± {error}"


def estimate_mean(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    chance: float | None = None,
) -> Estimate:
    """Return the mean of a value over questions, or over the groups that they are sampled from.

    Without groups: mean x = sum_i x_i / n, and error = sqrt(sum_i (x_i - x)^2 / (n - 1) / n). With
    groups g of N_g questions each, of which n_g are asked (a stratified sample), and their shares
    w_g = N_g / sum N: mean = sum_g w_g x_g, and error = sqrt(sum_g w_g^2 s_g^2 / n_g), where s_g^2
    is the variance within the group; s^2 of all the others is pooled for groups with one question.

    Args:
        values: [n], one for each question.
        groups: [n], their groups.
        sizes: the questions of each group in the whole benchmark; None: those that are here.
        chance: the value of a guess.
    """
    x = np.asarray(values, np.float64)
    if x.size == 0:
        return Estimate(math.nan, math.nan, chance)
    members: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(x.tolist(), groups or [""] * x.size, strict=True):
        members[group].append(value)
    sizes = sizes or {group: len(found) for group, found in members.items()}
    total = sum(sizes[group] for group in members)
    weights = {group: sizes[group] / total for group in members}
    mean = sum(weights[group] * float(np.mean(found)) for group, found in members.items())
    several = [found for found in members.values() if len(found) > 1]
    if several:
        squares = sum(float(np.sum((np.array(v) - np.mean(v)) ** 2)) for v in several)
        pooled = squares / sum(len(v) - 1 for v in several)
    else:
        pooled = float(np.var(x, ddof=1)) if x.size > 1 else math.nan
    variance = sum(
        weights[group] ** 2
        * (float(np.var(found, ddof=1)) if len(found) > 1 else pooled)
        / len(found)
        for group, found in members.items()
    )
    return Estimate(mean, math.sqrt(variance), chance)


def estimate_perplexity(nats: Sequence[float], units: Sequence[float], total: float) -> Estimate:
    """Return the perplexity per unit, exp(-sum_i nats_i / total), of a text in pieces.

    The error is that of a ratio of sums (the delta method): with the rate r = nats / units,

        error(r) = sqrt(k / (k - 1) sum_i (nats_i - r units_i)^2) / sum_i units_i
        error(exp(-sum nats / total)) = perplexity * error(r) * sum_i units_i / total

    Args:
        nats: [k], the log-likelihood of each piece.
        units: [k], its size: tokens.
        total: the units of the perplexity in the whole text: tokens, bytes, or words.
    """
    x, n = np.asarray(nats, np.float64), np.asarray(units, np.float64)
    perplexity = math.exp(min(-x.sum() / total, 700.0))
    if x.size < 2:
        return Estimate(perplexity, math.nan)
    residuals = x - x.sum() / n.sum() * n
    error = math.sqrt(x.size / (x.size - 1) * float(np.sum(residuals**2))) / n.sum()
    return Estimate(perplexity, perplexity * error * n.sum() / total)


CALIBRATION_BINS = 10


def estimate_calibration(confidences: Sequence[float], is_correct: Sequence[float]) -> Estimate:
    """Return the expected calibration error: how far confidence is from accuracy.

    Answers are put into bins of equal width by confidence, and ECE = sum_b n_b / n |a_b - c_b|, of
    the accuracy a_b and the mean confidence c_b of each. The error is sqrt(sum_b n_b s_b^2) / n,
    with s_b^2 the variance of (correct - confidence) within a bin. Few answers in a bin raise the
    ECE: that of a calibrated model is above 0 by about the error.

    Args:
        confidences: [n], the probability of each answer that was chosen.
        is_correct: [n], 1 or 0.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    c, y = np.asarray(confidences, np.float64), np.asarray(is_correct, np.float64)
    bins = np.minimum((c * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gap = variance = 0.0
    for b in np.unique(bins):
        d = (y - c)[bins == b]
        gap += abs(d.sum())
        variance += d.size * float(np.var(d, ddof=1)) if d.size > 1 else 0.25
    return Estimate(float(gap) / c.size, math.sqrt(variance) / c.size)
