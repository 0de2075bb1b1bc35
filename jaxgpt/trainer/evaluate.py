"""Evaluation: the metrics of a model over held-out batches."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxgpt import hosts
from jaxgpt.data import Batch
from jaxgpt.objectives import Sums, compute_own_means


def evaluate(
    eval_step: Callable[[Any, Batch], Sums],
    params,
    batches: Iterable[Batch],
    lengths: np.ndarray | None = None,
    place_batch: Callable[[Batch], Batch] = jax.device_put,
) -> dict[str, Any]:
    """Compute the metrics of a model over held-out batches [B T].

    Args:
        lengths: int32 [V], bytes of each token, for bits per byte; None if targets are not text.
        place_batch: puts a batch on the devices.

    Returns:
        loss (nats per token or text; NaN if nothing in the batches counts), perplexity,
        bits_per_byte (with lengths), accuracy, tokens (or texts), the objective's own metrics, and
        confusion (for classification: one row per true class).
    """
    batch_sums, total_bytes = [], 0
    for batch in batches:
        batch_sums.append(eval_step(params, place_batch(batch)))
        if lengths is not None:
            total_bytes += int(lengths[batch.targets][batch.weights > 0].sum())
    # In float64: float32 cannot count beyond 2**24 tokens.
    sums = jax.tree.map(
        lambda *x: np.sum(np.array(x, np.float64), axis=0), *hosts.fetch(batch_sums)
    )
    weight = max(float(sums["weight"]), 1.0)
    nats = float(sums["nats"]) / weight if sums["weight"] else math.nan
    values = {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "accuracy": float(sums["correct"]) / weight,
        "tokens": int(sums["weight"]),
    }
    if lengths is not None:
        values["bits_per_byte"] = float(sums["nats"]) / math.log(2) / max(total_bytes, 1)
    values |= {name: float(x) for name, x in compute_own_means(sums, weight).items()}
    if "confusion" in sums:
        values["confusion"] = sums["confusion"].astype(int).tolist()
    return values
