"""Show where the time of a training step goes on an accelerator, kernel by kernel.

    python -m benchmarks.profile gpt2_124m model.unroll=12 --out DIR

The step is that of benchmarks/speed.py. A few steps are traced by JAX's profiler; the table has
every kernel's time per step, summed over launches of the same name, and the sum by kind. The
compiled program's text goes to DIR as step.hlo.gz, the whole table as profile.json.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
import sys
import tempfile

import jax

from benchmarks import jax_side
from benchmarks.speed import SHAPES, make_case
from jaxgpt import config as configs
from jaxgpt.planning.step import lower_step

STEPS = 3
KINDS = (
    ("attention", r"flash|fmha|sdpa|attention|cudnn_generated"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|sm90_xmma|splitK|dot"),
    ("copies", r"memcpy|memset|copy|transpose"),
    ("loops over numbers", r"fusion|loop|reduce|input_|wrapped"),
)


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS if re.search(words, name, re.IGNORECASE)), "other")


def device_events(trace: pathlib.Path):
    """Yield (kernel, HLO instruction, nanoseconds) of everything that ran on the device."""
    for path in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "/device:" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    stats = {k: v for k, v in event.stats if k}
                    yield event.name, str(stats.get("hlo_op", "")), event.duration_ns


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("settings", nargs="*", metavar="path=value")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/profile"))
    a = parser.parse_intermixed_args()
    a.out.mkdir(parents=True, exist_ok=True)
    case = make_case(a.shape, a.settings, "")
    made = jax_side.make_step(case)
    cfg = configs.override(jax_side.make_config(case), ())
    text = lower_step(cfg, jax.devices()[:1]).lowered.compile().as_text()
    (a.out / f"{a.shape}.hlo.gz").write_bytes(gzip.compress(text.encode()))
    jax.block_until_ready([made.run() for _ in range(3)])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([made.run() for _ in range(STEPS)])
        events = list(device_events(pathlib.Path(folder)))
    total = collections.Counter()
    count = collections.Counter()
    kinds = collections.Counter()
    for kernel, op, ns in events:
        name = f"{kernel[:60]} [{re.sub(r'[.]?[0-9]+$', '', op)[:40]}]"
        total[name] += ns / STEPS / 1e6
        count[name] += 1
        kinds[kind_of(kernel)] += ns / STEPS / 1e6
    print(f"{a.shape}: {sum(total.values()):.1f} ms of kernels a step")
    for kind, ms in kinds.most_common():
        print(f"  {kind:24} {ms:8.2f} ms")
    for name, ms in total.most_common(45):
        print(f"  {ms:8.3f} ms  {count[name] // STEPS:4} x  {name}")
    rows = [{"name": n, "ms": ms, "times": count[n] / STEPS} for n, ms in total.most_common()]
    (a.out / f"{a.shape}.profile.json").write_text(
        json.dumps({"kinds": kinds, "rows": rows}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
