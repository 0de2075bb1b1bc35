"""Check attention kernels on this device against the dense reference in float32.

    python -m benchmarks.kernel_check --out kernels.json

For each case, the output and the gradients of q, k and v are compared by ||x - ref|| / ||ref||,
where ref is `dense` in float32 with full-precision products. A kernel in bfloat16 may be as wrong
as `dense` in bfloat16 is, and half as much again. The exit code is 1 if one is worse.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model import Coords, fp8
from jaxgpt.model.kernels import ACCELERATED, KERNELS, ScoreMod
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.model.positions import compute_alibi_bias, compute_alibi_slopes

# Rounding to e4m3 is wrong by 2.6% in the mean square, to e5m2 by 5.3%; a product has two factors.
FP8_ERROR = 0.075
SLACK = 1.5  # times the error of `dense` in bfloat16
CASES = {
    "causal": {},
    "causal, one document a row": {"documents": "joined"},
    "window": {"pattern": ("window",)},
    "grouped heads": {"kv_heads": 2},
    "head width 128": {"head_width": 128},
    "ALiBi": {"position": "alibi"},
}  # fmt: skip
B, T, H = 2, 1024, 8


def relative_error(x, ref) -> float:
    """Return ||x - ref|| / ||ref|| in float64."""
    x, ref = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, ref))
    return float(np.linalg.norm(x - ref) / np.linalg.norm(ref))


def coords_of(cfg: ModelConfig) -> Coords:
    """Return coordinates [B T]: rows of four documents, or of one."""
    length = T if cfg.documents == "joined" else T // 4
    place = np.arange(T)
    rows = [
        np.tile(x[None], (B, 1)).astype(np.int32) for x in (place % length, place // length + 1)
    ]
    return Coords(*map(jnp.asarray, rows))


def errors(settings: dict) -> dict[str, list[float]]:
    """Return, by kernel, the errors of the output and of the gradients of q, k and v."""
    given = {"width": H * 64, "heads": H, "context": T, "dtype": "bfloat16", "position": "none"}
    cfg = ModelConfig(**(given | settings))
    sizes = cfg.sizes
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (sizes["H"], sizes["G"], sizes["G"], sizes["H"])
    exact = [
        jax.random.normal(key, (B, T, n, sizes["K"])) for key, n in zip(keys, heads, strict=True)
    ]
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    exact = [x.astype(jnp.float32) for x in rounded]
    coords = coords_of(cfg)
    bias = None
    if cfg.position == "alibi":
        bias = jax.tree_util.Partial(compute_alibi_bias, jnp.asarray(compute_alibi_slopes(H)))
    score = ScoreMod(
        make_layer_mask(cfg, cfg.pattern[0], "causal"), bias, sizes["K"] ** -0.5, is_self=True
    )

    def run(kernel, q, k, v, d_out):
        def out(q, k, v):
            return KERNELS[kernel](q, k, v, coords, coords, score)

        value, pull = jax.vjp(out, q, k, v)
        return value, *pull(d_out)

    with jax.default_matmul_precision("highest"):
        ref = jax.jit(run, static_argnums=0)("dense", *exact)
    found = {}
    for kernel in ("dense", "blockwise", "strips", *ACCELERATED):
        if kernel in ACCELERATED and ACCELERATED[kernel][1](*rounded[:2], score) is not None:
            continue
        got = jax.jit(run, static_argnums=0)(kernel, *rounded)
        found[kernel] = [relative_error(x, r) for x, r in zip(got, ref, strict=True)]
    return found


def fp8_errors() -> list[float]:
    """Return the errors of an fp8 product and of its gradients, against float32."""
    keys = jax.random.split(jax.random.key(1), 3)
    x, w, d = (
        jax.random.normal(k, s)
        for k, s in zip(keys, ((4096, 2048), (2048, 4096), (4096, 4096)), strict=True)
    )

    def run(product, x, w, d):
        y, pull = jax.vjp(lambda x, w: product(x, w), x, w)
        return y, *pull(d)

    with jax.default_matmul_precision("highest"):
        ref = jax.jit(lambda *a: run(jnp.matmul, *a))(x, w, d)
    got = jax.jit(lambda *a: run(lambda x, w: fp8.matmul(x, w, 1), *a))(
        *(a.astype(jnp.bfloat16) for a in (x, w, d))
    )
    return [relative_error(g, r) for g, r in zip(got, ref, strict=True)]


def format_errors(found: list[float], is_ok: bool) -> str:
    return f"{' '.join(f'{x:.1e}' for x in found)}  {'ok' if is_ok else 'WRONG'}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path)
    a = parser.parse_args()
    rows, is_right = [], True
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: errors of out, dq, dk, dv")
    for name, settings in CASES.items():
        try:
            found = errors(settings)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            rows.append({"case": name, "error": str(error)[:300]})
            is_right = False
            continue
        for kernel, got in found.items():
            is_ok = all(g <= SLACK * max(d, 1e-3) for g, d in zip(got, found["dense"], strict=True))
            is_right &= is_ok
            rows.append({"case": name, "kernel": kernel, "errors": got, "is_ok": is_ok})
            print(
                f"{name:28} {kernel:10} {format_errors(got, is_ok)}",
                flush=True,
            )
    try:
        got = fp8_errors()
        is_ok = max(got) < FP8_ERROR
        print(
            f"{'fp8 product':28} {'':10} {format_errors(got, is_ok)}",
            flush=True,
        )
        rows.append({"case": "fp8 product", "errors": got, "is_ok": is_ok})
        is_right &= is_ok
    except Exception as error:
        print(f"fp8: {type(error).__name__}: {str(error)[:300]}")
        rows.append({"case": "fp8 product", "error": str(error)[:300]})
        is_right = False
    if a.out:
        a.out.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1) + "\n"
        )
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
