"""The time of a training step on this machine, from a few measured products instead of a run.

Measured are the products of a layer and of the vocabulary at the sizes of one microbatch, the two
products of attention with the softmax between them, and how fast an array is read and written. A
step is three times its forward products (one more where `model.remat` repeats them), and what the
optimizer and the activations move through memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config
from jaxgpt.model import abstract_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.planning.footprint import Footprint, Target

MAX_TOKENS = 2048  # of a measured product: larger ones run at the same rate
MAX_SIDE = 4096  # of a measured matrix
MAX_HEADS, MAX_ROW = 8, 1024  # of measured attention
REPEATS = 3
COPY_NUMBERS = 2**24  # of the array that measures the bandwidth
OPTIMIZER_PASSES = 12  # float32 numbers moved per parameter: clipping, moments, update
MICROBATCH_PASSES = 3  # added to the gradients: read twice, written once
ACTIVATION_PASSES = 4  # each saved activation: written and read, forward and backward
ORTHOGONALIZATION_STEPS = 5  # of muon, three products each


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one step, by what takes them."""

    products: float
    attention: float
    vocabulary: float
    memory: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.products + self.attention + self.vocabulary + self.memory + self.optimizer


def measure_seconds(f: Callable, *args: jax.Array) -> float:
    """Return the best time of a few calls of a jitted function, after one that compiles."""
    run = jax.jit(f)
    jax.block_until_ready(run(*args))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        best = min(best, time.perf_counter() - start)
    return best


def make_array(dtype, *shape: int) -> jax.Array:
    """Return an array of random numbers."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def measure_product(dtype, n: int, rows: int, columns: int) -> float:
    """Return the seconds of [n rows] x [rows columns], of large ones from those of a part."""
    few_rows, few_columns = min(rows, MAX_SIDE), min(columns, MAX_SIDE)
    x, w = make_array(dtype, n, few_rows), make_array(dtype, few_rows, few_columns)
    return measure_seconds(jnp.matmul, x, w) * (rows / few_rows) * (columns / few_columns)


def measure_bandwidth() -> float:
    """Return the bytes per second that an elementwise function reads and writes."""
    x = make_array(jnp.float32, COPY_NUMBERS)
    return 2 * x.nbytes / measure_seconds(lambda x: x * 2 + 1, x)


def measure_attention(dtype, T: int, H: int, K: int) -> float:
    """Return the seconds of both products of attention over one row, with their softmax."""
    few, short = min(H, MAX_HEADS), min(T, MAX_ROW)

    def attend(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2), axis=-1).astype(dtype) @ v

    x = make_array(dtype, few, short, K)
    return measure_seconds(attend, x, x, x) * (H / few) * (T / short) ** 2


def predict_step_seconds(cfg: Config, target: Target, footprint: Footprint) -> StepTime:
    """Predict the time of one step of a config on the devices of this machine.

    Args:
        footprint: of its step.
    """
    model, d, dtype = cfg.model, cfg.model.sizes, DTYPES[cfg.model.dtype]
    devices = 1 if target.platform == "cpu" else target.count  # virtual devices share a CPU
    tokens = cfg.train.batch * model.context / devices
    n = int(min(tokens / footprint.microbatches, MAX_TOKENS))
    layers = model.layers + (model.encoder_layers or model.layers) * (
        model.family == "encoder_decoder"
    )
    is_gated = any(spec.feedforward.endswith("gated") for spec in model.layer_cycle)
    hidden = d["F"] * (model.moe.active if model.has_experts else 1)
    shapes: dict[tuple[int, int], int] = {}
    for shape, count in (
        ((d["D"], d["H"] * d["K"]), 1),
        ((d["D"], d["G"] * d["K"]), 2),
        ((d["H"] * d["K"], d["D"]), 1),
        ((d["D"], hidden), 1 + is_gated),
        ((hidden, d["D"]), 1),
    ):
        shapes[shape] = shapes.get(shape, 0) + count
    forward = sum(measure_product(dtype, n, *shape) * m for shape, m in shapes.items())
    runs = 4 if model.remat == "full" else 3
    products = runs * layers * forward * tokens / n
    rows = tokens / model.context
    one_row = measure_attention(dtype, model.context, d["H"], d["K"])
    attention = (runs - 0.5) * layers * rows * one_row * _CAUSAL_SHARE
    scores = 0.0 if model.classes else measure_product(dtype, n, d["D"], d["V"])
    vocabulary = 3 * scores * tokens / n
    leaves = jax.tree.leaves(abstract_params(model)[0])
    parameters = sum(x.size for x in leaves)
    bandwidth = measure_bandwidth()
    passes = OPTIMIZER_PASSES + MICROBATCH_PASSES * footprint.microbatches
    optimizer = 4 * parameters * passes / bandwidth
    if cfg.optimizer.name == "muon":
        optimizer += _measure_orthogonalization(leaves)
    saved = layers * tokens * (4 * d["D"] + 4 * d["H"] * d["K"] + 3 * hidden) * dtype.dtype.itemsize
    memory = ACTIVATION_PASSES * saved / bandwidth
    return StepTime(products, attention, vocabulary, memory, optimizer)


_CAUSAL_SHARE = 0.75  # of the square of scores, that strips or blocks of a causal mask compute


def _measure_orthogonalization(leaves) -> float:
    """Return the seconds of muon's products, of parameters [L rows columns ...]."""
    seconds = 0.0
    shapes: dict[tuple[int, int], int] = {}
    for x in leaves:
        if x.ndim >= 3:
            rows, columns = x.shape[1], int(np.prod(x.shape[2:]))
            small, large = min(rows, columns), max(rows, columns)
            shapes[small, large] = shapes.get((small, large), 0) + x.shape[0]
    for (small, large), count in shapes.items():
        wide = measure_product(jnp.float32, small, large, small)
        square = measure_product(jnp.float32, small, small, small)
        seconds += count * ORTHOGONALIZATION_STEPS * (2 * wide + square)
    return seconds
