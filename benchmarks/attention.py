"""Measure the speed and memory of the attention kernels, forward and backward.

    python -m benchmarks.attention --lengths 256 1024 4096 --json attention.json

The attention mask is causal (`full`), or causal with a window of 128 tokens (`window`), in rows of
one document. The floor is the time of the necessary products, 2 forward and 5 backward for each
pair of tokens that the mask allows, at the rate of large matrix products on this device.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model.kernels import ACCELERATED, ScoreMod, attend
from jaxgpt.model.layers import DTYPES
from jaxgpt.model.masks import Causal, Coords, SameSegment, Window

MASKS = {
    "full": SameSegment() & Causal(),
    "window": SameSegment() & (Causal() & Window(128)),
}


def time_calls(run, *inputs, repeats: int) -> list[float]:
    """Return the seconds of each call of a compiled function, after one warm-up call."""
    jax.block_until_ready(run(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        times.append(time.perf_counter() - start)
    return times


def measure_matmul_flops(dtype, repeats: int, size: int = 2048) -> float:
    """Return the FLOP/s of a product of square matrices."""
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / min(time_calls(jax.jit(jnp.matmul), x, x, repeats=repeats))


def measure(kernel: str, mask: str, T: int, a) -> dict[str, float]:
    """Measure a batch of `--tokens` tokens: median and floor in ms, temporary memory in MB."""
    rng = np.random.default_rng(0)
    B = max(1, a.tokens // T)
    shapes = [(B, T, heads, a.head_width) for heads in (a.heads, a.kv_heads, a.kv_heads)]
    qkv = [jnp.asarray(rng.normal(size=shape), DTYPES[a.dtype]) for shape in shapes]
    coords = Coords(jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), jnp.int32))
    score_mod = ScoreMod(MASKS[mask], is_self=True)

    def forward(q, k, v, coords):
        return attend(kernel, q, k, v, coords, coords, score_mod)

    def loss(*inputs):
        return jnp.sum(forward(*inputs).astype(jnp.float32) ** 2)

    pairs = T * (T + 1) / 2 if mask == "full" else sum(min(t + 1, 128) for t in range(T))
    product_seconds = 2 * B * a.heads * a.head_width * pairs / a.rate
    result: dict[str, float] = {}
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    for name, run, products in (("forward", forward, 2), ("gradient", gradient, 7)):
        compiled = jax.jit(run).lower(*qkv, coords).compile()
        times = time_calls(compiled, *qkv, coords, repeats=a.repeats)
        memory = compiled.memory_analysis()
        result |= {
            f"{name} ms": statistics.median(times) * 1e3,
            f"{name} slowest ms": max(times) * 1e3,
            f"{name} floor ms": product_seconds * products * 1e3,
            f"{name} MB": memory.temp_size_in_bytes / 1e6 if memory else float("nan"),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="T, tokens per row"
    )
    parser.add_argument(
        "--tokens", type=int, default=2048, help="B * T; longer rows are a batch of one"
    )
    parser.add_argument("--heads", type=int, default=6, help="H, query heads")
    parser.add_argument("--kv-heads", type=int, default=6, help="G, key/value heads")
    parser.add_argument("--head-width", type=int, default=64, help="K")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="runs; the median counts")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    a = parser.parse_args()
    a.rate = measure_matmul_flops(DTYPES[a.dtype], a.repeats)

    available = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(jax.default_backend(), [])
    kernels = ["dense", "blockwise", *(name for name in ACCELERATED if name in available)]
    command = f"python -m benchmarks.attention --lengths {' '.join(map(str, a.lengths))}"
    for key in ("tokens", "heads", "kv_heads", "head_width", "dtype", "repeats"):
        command += f" --{key.replace('_', '-')} {getattr(a, key)}"
    about = {
        "command": command,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "matmul GFLOP/s": round(a.rate / 1e9, 1),
    }
    for name, value in about.items():
        print(f"{name:16} {value}")

    rows = []
    print("\n  mask        T  kernel        forward ms (slowest)  floor      MB   "
          "gradient ms (slowest)  floor      MB")  # fmt: skip
    for mask in MASKS:
        for T in a.lengths:
            for kernel in kernels:
                row = measure(kernel, mask, T, a)
                rows.append({"mask": mask, "T": T, "kernel": kernel} | row)
                cells = (
                    f"{row[f'{part} ms']:14.1f} ({row[f'{part} slowest ms']:7.1f})"
                    f" {row[f'{part} floor ms']:8.1f} {row[f'{part} MB']:8.1f}"
                    for part in ("forward", "gradient")
                )
                print(f"  {mask:8} {T:5}  {kernel:10}", *cells, flush=True)
    if a.json:
        a.json.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
