"""Measures of distributions, vectors and texts, for lessons and users alike.

    measure.entropy([0.5, 0.25, 0.25], base=2)       1.5 bits
    measure.kl_divergence(p, q)                      nats
    measure.bleu(answers, references)                0 to 100

Distributions are arrays whose last axis sums to 1. All are pure functions of NumPy or JAX arrays.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxgpt.optional import require
from jaxgpt.settings import ConfigError


def _check_distribution(p, name: str) -> np.ndarray:
    """Return p as float64; its last axis must sum to 1 and have no negative number."""
    p = np.asarray(p, np.float64)
    if p.ndim == 0 or (p < 0).any() or not np.allclose(p.sum(-1), 1, atol=1e-4):
        raise ValueError(
            f"{name} must be probabilities that sum to 1 over the last axis, not {p!r:.80}."
        )
    return p


def _in_base(nats: np.ndarray, base: float) -> np.ndarray:
    if not base > 1:
        raise ValueError(f"base={base!r} must be above 1, such as 2 (bits) or math.e (nats).")
    return nats / math.log(base)


def _sum_times_log(weights: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return the sum of weights * log p over the last axis, with 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weights > 0, weights * np.log(p), 0.0).sum(-1)


def softmax(logits, temperature: float = 1.0) -> np.ndarray:
    """Return exp(logits / temperature), normalized over the last axis: float64 [... V]."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be above 0.")
    logits = np.asarray(logits, np.float64) / temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def entropy(p, base: float = math.e) -> np.ndarray:
    """Return -sum p log p over the last axis of p [... V]: [...], in nats or in units of `base`.

    Raises:
        ValueError: p is not a distribution.

    Source: Shannon 1948, section 6.
    """
    p = _check_distribution(p, "p")
    return _in_base(-_sum_times_log(p, p), base)


def cross_entropy(p, q, base: float = math.e) -> np.ndarray:
    """Return -sum p log q over the last axis of p, q [... V]: [...]; infinite where q misses p.

    Raises:
        ValueError: one of them is not a distribution.
    """
    p, q = _check_distribution(p, "p"), _check_distribution(q, "q")
    return _in_base(-_sum_times_log(p, np.broadcast_to(q, np.broadcast_shapes(p.shape, q.shape))),
                    base)  # fmt: skip


def kl_divergence(p, q, base: float = math.e) -> np.ndarray:
    """Return KL(p || q) = sum p log(p / q) over the last axis of p, q [... V]: [...].

    Raises:
        ValueError: one of them is not a distribution.

    Source: Kullback and Leibler 1951, equation 2.4.
    """
    return cross_entropy(p, q, base) - entropy(p, base)


def perplexity(loss: float, base: float = math.e) -> float:
    """Return base^loss: from how many equally likely tokens the model would choose.

    Args:
        loss: mean negative log-probability of a token, in nats or in units of `base`.
    """
    return float(base**loss)


def cosine_similarity(x, y) -> np.ndarray:
    """Return x·y / (|x| |y|) over the last axis of x, y [... D]: [...]; 0 for a zero vector."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    sizes = norm(x) * norm(y)
    return np.divide((x * y).sum(-1), sizes, out=np.zeros_like(sizes), where=sizes > 0)


def euclidean_distance(x, y) -> np.ndarray:
    """Return |x - y| over the last axis of x, y [... D]: [...]."""
    return norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))


def norm(x, order: float = 2) -> np.ndarray:
    """Return (sum |x|^order)^(1/order) over the last axis of x [... D].

    Args:
        order: 1 for the sum, 2 for the length, math.inf for the maximum.

    Raises:
        ValueError: the order is below 1.
    """
    if not order >= 1:
        raise ValueError(f"order={order!r} must be 1 (sum), 2 (length), ... or math.inf (maximum).")
    return np.linalg.norm(np.asarray(x, np.float64), ord=order, axis=-1)


def bleu(answers: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """Return the corpus BLEU of answers, 0 to 100, as sacrebleu computes it.

    Args:
        answers: texts of a system.
        references: one reference for each answer, or several for each.

    Raises:
        ConfigError: sacrebleu is not installed, or the numbers of texts differ.

    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    library = require("sacrebleu", "measure.bleu")
    return library.corpus_bleu(list(answers), _transpose(answers, references)).score


def chrf(answers: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]) -> float:
    """Return the corpus chrF of answers, 0 to 100, as sacrebleu computes it; arguments of `bleu`.

    Source: Popović 2015, W15-3049.
    """
    library = require("sacrebleu", "measure.chrf")
    return library.corpus_chrf(list(answers), _transpose(answers, references)).score


def _transpose(answers: Sequence[str], references) -> list[list[str]]:
    """Return the first reference of every answer, then the second, ..."""
    several = [[r] if isinstance(r, str) else list(r) for r in references]
    counts = {len(r) for r in several}
    if len(several) != len(answers) or len(counts) > 1 or counts == {0}:
        raise ConfigError(
            f"{len(answers)} answers have {len(several)} entries of references, of "
            f"{sorted(counts)} texts: give each answer the same number of references."
        )
    return [list(each) for each in zip(*several, strict=True)]
