"""How fast training could be, and how fast it is.

    MFU = tokens/s * FLOPs per token / peak FLOP/s of all devices
    FLOPs per token = 6 * (parameters that multiply) + 12 * L * H * K * T

Every weight of a matrix costs a multiplication and an addition, once forward and twice backward;
attention adds two products of [T K] by [K T] per head, counted as if it were not causal, so that
figures compare with the literature. Of experts only those count that a token goes to; in an
encoder-decoder a token passes one of the two stacks.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model import count_params
from jaxgpt.model.mixers import MIXERS

# Dense bfloat16 FLOP/s of a chip, from the vendors' data sheets, by words of its device_kind.
PEAK = {
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


@functools.cache  # it traces the model to count, and every line of the log asks
def flops_per_token(cfg: ModelConfig) -> float:
    """FLOPs of one training step per token, forward and backward."""
    count = count_params(cfg)
    stacks = 2 if cfg.family == "encoder_decoder" else 1
    vocabulary = 0 if cfg.classes else cfg.vocab * cfg.width  # scores every token, tied or not
    share = cfg.moe.active / cfg.moe.experts if cfg.has_experts else 1
    multiply = (count["attention"] + share * count["feedforward"] + vocabulary) / stacks
    looks = sum("pattern" in MIXERS[name].USES for name, _ in cfg.unit) / len(cfg.unit)
    heads = cfg.sizes["H"] * cfg.sizes["K"]
    return 6 * multiply + 12 * looks * cfg.layers * heads * cfg.context


def peak_flops(devices) -> tuple[float, str]:
    """Peak FLOP/s of all devices together, and where the number comes from.

    A chip that is not in the table (a CPU, most often) is measured with a product of two
    matrices; virtual devices share one CPU, so it is counted once.
    """
    kind = devices[0].device_kind
    for name, peak in PEAK.items():
        if re.search(rf"\b{name}\b", kind):
            return peak * len(devices), f"{len(devices)} x {kind}, data sheet, bfloat16"
    real = 1 if devices[0].platform == "cpu" else len(devices)
    return matmul_rate(devices[0]) * real, f"{kind}, measured float32 matrix product"


def matmul_rate(device, size: int = 2048, repeats: int = 4) -> float:
    """The best FLOP/s of a [size size] float32 product, over a few tries."""
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
    """Seconds of training: evaluation, samples and saving stop it."""

    def __init__(self):
        self._since = self._mark_time = time.perf_counter()
        self._mark_step = 0

    def start(self, step: int) -> float:
        """Counts from now, with `step` steps done. Returns the seconds since the last count."""
        seconds = self.pause()
        self._mark_time, self._mark_step = self._since, step
        return seconds

    def pause(self) -> float:
        """Seconds not asked for before."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds

    def seconds_per_step(self, step: int) -> float | None:
        """The mean since this was last asked, or since the start; None if no step was counted."""
        now, steps = time.perf_counter(), step - self._mark_step
        seconds = now - self._mark_time
        self._mark_time, self._mark_step = now, step
        return max(seconds / steps, 1e-9) if steps else None
