"""Time whole training steps and decoding on one GPU, jaxgpt beside PyTorch, in a few minutes.

    python -m benchmarks.gpu_day --out DIR --seconds 400 --waves gpt2_124m decode

A wave is a group of contestants, each in a process of its own. They compile at the same time, which
is most of the work, and then run one after the other with the GPU to themselves: figures are
medians of turns. The figures go to gpu_day.json and gpu_day.md in DIR as they come.

MFU is model FLOPs (6 N P + 12 L H K T N, as in PaLM, appendix B) over the data sheet's peak.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

from benchmarks.speed import JAX, TORCH, count_decode_work, count_step_work, format_table, make_case
from benchmarks.worker import FailedError, Worker
from jaxgpt.trainer.speed import PEAK_FLOPS

TURNS = 5
LT, NO_TRITON = "--xla_gpu_enable_cublaslt=true", "--xla_gpu_enable_triton_gemm=false"
GPU_GB = 141  # of an H200


@dataclass(frozen=True)
class Entrant:
    """One process: what it runs, with which settings of jaxgpt and flags of XLA."""

    shape: str
    label: str
    row: str
    name: str
    gb: int  # of the GPU's memory that it may take
    settings: str = ""
    flags: str = ""

    @property
    def module(self) -> str:
        return TORCH if self.name.startswith("torch") else JAX


def ours(shape: str, label: str = "", settings: str = "", flags: str = "", gb: int = 22):
    """Return jaxgpt's step with some settings and flags."""
    return Entrant(shape, f"jaxgpt {label}".strip(), "step", "jaxgpt", gb, settings, flags)


def peer(shape: str, name: str, gb: int = 35):
    """Return PyTorch's step."""
    return Entrant(shape, name, "step", name, gb)


def decodes(shape: str):
    """Return decoding of one and of eight rows by both."""
    names = ("jaxgpt", "torch static cache", "torch dynamic cache")
    return [
        Entrant(shape, name, f"decode {rows}", name, 10)
        for rows in ("1 row", "8 rows")
        for name in names
    ]


# What compiles side by side has to fit the memory of the GPU together.
WAVES = {
    "gpt2_124m": [
        ours("gpt2_124m"),
        ours("gpt2_124m", "in a loop", "model.unroll=1"),
        peer("gpt2_124m", "torch compile"),
    ],
    "larger": [
        ours("llama3_1b", gb=50),
        ours("gpt2_1558m", gb=62),
    ],
    "torch": [peer("llama3_1b", "torch compile", 62), peer("gpt2_1558m", "torch compile", 60)],
    "decode": decodes("gpt2_124m"),
    "gpt2_1558m in a loop": [ours("gpt2_1558m", "in a loop", "model.unroll=1", gb=52)],
    "more": [
        ours("gpt2_124m", "fp8", "model.products=fp8"),
        ours("gpt2_124m", "remat=dots", "model.remat=dots"),
        ours("gpt2_124m", "remat=full", "model.remat=full"),
        ours("gpt2_124m", "separate documents", "model.documents=separate"),
        ours("gpt2_124m", "int8 moments", "optimizer.moments=int8"),
        peer("gpt2_124m", "torch eager"),
    ],
    "flags": [
        ours("gpt2_124m", "no Triton GEMM", flags=NO_TRITON),
        ours("gpt2_124m", "no command buffers", flags="--xla_gpu_enable_command_buffer="),
        ours("gpt2_124m", "loss_chunk=16384", "train.loss_chunk=16384", gb=28),
    ],
    "cuBLASLt": [
        ours("gpt2_124m", "cuBLASLt", flags=LT),
        ours("gpt2_124m", "cuBLASLt, no Triton GEMM", flags=f"{LT} {NO_TRITON}"),
        ours("gpt2_1558m", "cuBLASLt", flags=LT, gb=62),
    ],
    "rows": [
        ours("gpt2_124m", "batch 64", "train.batch=64", gb=40),
        ours("gpt2_1558m", "batch 16", "train.batch=16", gb=84),
    ],
    "llama3_1b fp8": [ours("llama3_1b", "fp8", "model.products=fp8", gb=60)],  # compiles 200 s
    "llama3_1b more": [
        ours("llama3_1b", "in a loop", "model.unroll=1", gb=50),
        ours("llama3_1b", "remat=dots", "model.remat=dots", gb=50),
    ],
}


class Day:
    """What was measured so far, and where it is written."""

    def __init__(self, out: pathlib.Path, seconds: float, scratch: str):
        self.out, self.scratch = out, scratch
        self.until = time.perf_counter() + seconds
        self.start = time.perf_counter()
        self.rows: list[dict] = []
        self.about: dict[str, str] = {}
        self.log = open(out / "gpu_day.log", "w")  # noqa: SIM115

    def left(self) -> float:
        return self.until - time.perf_counter()

    def worker(self, one: Entrant) -> Worker:
        """Return its process, with its share of the memory; compiled programs are kept."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} {one.flags}".strip()
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.join(self.scratch, "jax"))
        return Worker(one.module, self.log, {
            "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{one.gb / GPU_GB:.3f}",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(self.scratch, "torch"),
        })  # fmt: skip

    def wave(self, contestants: list[Entrant]) -> None:
        """Compile all at the same time, then time each alone."""
        workers = {one: self.worker(one) for one in contestants}
        try:
            items = [
                (one, worker, make_case(one.shape, one.settings.split(), self.scratch))
                for one, worker in workers.items()
            ]
            with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
                ready = dict(zip(workers, pool.map(self.prepare, items), strict=True))
            for one, made in ready.items():
                self.add(one, made, self.timed(one, workers[one], made))
                workers[one].close()  # its memory is needed
        finally:
            for worker in workers.values():
                worker.close()

    def prepare(self, item) -> dict:
        one, worker, case = item
        start = time.perf_counter()
        try:
            about = worker.ask(min(self.left(), 120), do="about")["about"]
            self.about |= {k: v for k, v in about.items() if k not in ("square", "copied")}
            made = worker.make(self.left(), one.row, one.name, case)
            peak = worker.run(self.left(), one.row, one.name)["peak"]
        except FailedError as error:
            return {"error": str(error)}
        return made | {
            "case": case,
            "first": time.perf_counter() - start,
            "peak": made["peak"] or peak,
        }

    def timed(self, one: Entrant, worker: Worker, made: dict) -> list[float]:
        if "error" in made:
            return []
        try:
            each = worker.run(self.left(), one.row, one.name)["seconds"]
            times = max(1, min(20, round(0.4 / each)))
            return [
                worker.run(self.left(), one.row, one.name, times)["seconds"] for _ in range(TURNS)
            ]
        except FailedError as error:
            made["error"] = str(error)
            return []

    def add(self, one: Entrant, made: dict, seconds: list[float]) -> None:
        row = {"shape": one.shape, "row": one.row, "name": one.label, "seconds": seconds,
               "settings": one.settings, "flags": one.flags}  # fmt: skip
        if seconds:
            case, median = made["case"], statistics.median(seconds)
            is_step = one.row == "step"
            work = (
                count_step_work(case)
                if is_step
                else count_decode_work(case, int(one.row.split()[1]))
            )
            peak = next((v for k, v in PEAK_FLOPS.items() if k in self.about.get("device", "")), 0)
            row |= {"median": median, "tokens_per_second": work.count / median,
                    "mfu": work.model_flops / median / peak if peak else 0,
                    "peak_bytes": made["peak"], "parameters": made["parameters"],
                    "first_seconds": made["first"]}  # fmt: skip
        else:
            row["error"] = made.get("error", "no figure")
        self.rows.append(row)
        print(f"[{time.perf_counter() - self.start:4.0f} s] {line(row)}", flush=True)
        self.write()

    def write(self) -> None:
        facts = self.about | {"taken": f"{time.perf_counter() - self.start:.0f} s"}
        whole = {"facts": facts, "rows": self.rows}
        (self.out / "gpu_day.json").write_text(json.dumps(whole, indent=1) + "\n")
        head = (
            "shape",
            "row",
            "contestant",
            "ms",
            "tokens/s",
            "MFU",
            "peak GB",
            "first s",
            "faster",
        )
        text = format_table([format_cells(row, self.rows) for row in self.rows], head)
        lines = "\n".join(f"- {k}: {v}" for k, v in facts.items())
        (self.out / "gpu_day.md").write_text(f"# One GPU\n\n{lines}\n\n{text}\n")


def line(row: dict) -> str:
    return (
        " | ".join(format_cells(row, []))
        if "median" in row
        else f"{row['shape']} {row['row']} {row['name']}: {row['error']}"
    )


def format_cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    """Return a line of the table; `faster` is beside torch compile, or its static cache."""
    if "median" not in row:
        return (row["shape"], row["row"], row["name"], row["error"], *[""] * 5)
    peers = [
        r["median"]
        for r in rows
        if (r["shape"], r["row"]) == (row["shape"], row["row"])
        and r["name"] in ("torch compile", "torch static cache")
        and "median" in r
    ]
    return (
        row["shape"], row["row"], row["name"], f"{1e3 * row['median']:.1f}",
        f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}" if row["row"] == "step" else "",
        f"{row['peak_bytes'] / 1e9:.1f}", f"{row['first_seconds']:.0f}",
        f"{peers[0] / row['median']:.2f}" if peers else "",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu_day"))
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--waves", nargs="+", choices=WAVES, default=list(WAVES)[:4])
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        day = Day(a.out, a.seconds, scratch)
        for name in a.waves:
            if day.left() > 20:
                day.wave(WAVES[name])
    print((a.out / "gpu_day.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
