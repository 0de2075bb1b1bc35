"""Training speed: model FLOPs, peak FLOP/s and model FLOPs utilization (MFU).

    MFU = tokens/s * FLOPs per token / peak FLOP/s of all devices
    FLOPs per token = 6 * (parameters in matrix products) + 12 * L * H * K * T

Every weight of a matrix costs a multiplication and an addition, once forward and twice backward:
for the gradient of the activations, and for its own, which a weight that is not trained lacks;
attention adds two products of [T K] by [K T] per head, counted without the causal mask so that
figures compare with the literature. Only the experts to which a token is routed count; in an
encoder-decoder a token passes through one of the two stacks.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import functools
import re
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Config, ModelConfig
from jaxgpt.model import abstract_params, count_expert_params, count_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.selection import select, select_letters

# Dense bfloat16 FLOP/s of a chip, from the vendors' data sheets, by a word of its device_kind.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 123e12,
    "v2": 45e12,
}


def count_step_flops(cfg: Config) -> float:
    """Return the FLOPs of a training step per token, without those of adapters, which are few."""
    is_frozen = cfg.lora.rank and not cfg.optimizer.train
    return flops_per_token(cfg.model, None if is_frozen else cfg.optimizer.train)


@functools.cache  # it traces the model to count, and is called for every line of the log
def flops_per_token(cfg: ModelConfig, trained: Sequence[str] | None = ()) -> float:
    """Return the FLOPs of one training step per token, forward and backward.

    Args:
        trained: patterns of the parameters that are trained (`optimizer.train`); () = all, None =
            none.
    """
    count = count_params(cfg)
    stacks = 2 if cfg.family == "encoder_decoder" else 1
    vocabulary = 0 if cfg.classes else cfg.vocab * cfg.width  # logits of every token, tied or not
    idle_fraction = 1 - cfg.moe.active / cfg.moe.experts
    feedforward = count["feedforward"] - idle_fraction * count_expert_params(cfg)
    matmul_params = (count["attention"] + feedforward + vocabulary) / stacks
    specs = cfg.list_layers(cfg.layers)
    attention_layers = sum("pattern" in MIXERS[spec.mixer].USES for spec in specs)
    heads = cfg.sizes["H"] * cfg.sizes["K"]
    passes = 4 if trained is None else 4 + 2 * compute_trained_fraction(cfg, trained)
    return passes * matmul_params + 12 * attention_layers * heads * cfg.context


def compute_trained_fraction(cfg: ModelConfig, trained: Sequence[str]) -> float:
    """Return the fraction of the parameters in matrices that is trained."""
    shapes, letters = abstract_params(cfg)

    def count(names) -> int:
        pairs = jax.tree.map(lambda x, d: x.size if ">" in d else 0, select(shapes, names), names)
        return sum(jax.tree.leaves(pairs))

    return count(select_letters(letters, trained)) / count(letters)


def peak_flops(devices) -> tuple[float, str]:
    """Return the total peak FLOP/s of these devices, and the source of the number.

    A chip that is not in the table (most often a CPU) is measured with a product of two matrices;
    virtual devices share one CPU, so it is counted once.
    """
    kind = devices[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", kind):
            return peak * len(devices), f"{len(devices)} x {kind}, data sheet, bfloat16"
    device_count = 1 if devices[0].platform == "cpu" else len(devices)
    peak = measure_matmul_flops(devices[0]) * device_count
    return peak, f"{kind}, measured float32 matrix product"


def measure_matmul_flops(device, size: int = 2048, repeats: int = 4) -> float:
    """Measure the best FLOP/s of a [size size] float32 product over a few repeats."""
    numbers = np.random.default_rng(0).standard_normal((size, size), np.float32)
    x = jax.device_put(numbers, device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Clock:
    """Training time, without the time of evaluation, sampling and saving."""

    def __init__(self):
        self._start_time = self._mark_time = time.perf_counter()
        self._mark_step = 0

    def start(self, step: int) -> float:
        """Start counting, with `step` steps done; return the seconds since the last reading."""
        seconds = self.pause()
        self._mark_time, self._mark_step = self._start_time, step
        return seconds

    def pause(self) -> float:
        """Return the seconds since the last reading."""
        now = time.perf_counter()
        seconds, self._start_time = now - self._start_time, now
        return seconds

    def seconds_per_step(self, step: int) -> float | None:
        """Return the mean since the last call or the start, or None if no step was counted."""
        now, steps = time.perf_counter(), step - self._mark_step
        seconds = now - self._mark_time
        self._mark_time, self._mark_step = now, step
        return max(seconds / steps, 1e-9) if steps else None
