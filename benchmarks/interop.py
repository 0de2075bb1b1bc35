"""Measure how long a model takes to be imported, and how much memory, against reading its file.

    python -m benchmarks.interop --json interop.json
    python -m benchmarks.interop --config llama3_1b --dtype bfloat16

Random parameters of the shape of a config are written as a folder of transformers. Then processes
of their own read the file, and load the model; each reports its time and its peak resident memory.
The first reading of the file is not counted, so that all are from the page cache.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

READ = """
import glob, sys, time
start, cpu = time.perf_counter(), time.process_time()
held = []
for path in glob.glob(sys.argv[1] + "/*.safetensors"):
    with open(path, "rb") as file:
        held.append(file.read())
print(time.perf_counter() - start, time.process_time() - cpu)
"""
# What is imported and traced before costs the same for every model; it is measured apart.
LOAD = """
import sys, time
import jax
from jaxgpt.interop import convert, huggingface
def read_status(name):
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith(name))
archive = huggingface.open_folder(sys.argv[1])
start = time.perf_counter()
convert.plan_import(archive)
planned = time.perf_counter() - start
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = read_status("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
model = convert.to_model(archive)
jax.block_until_ready(model.params)
loaded, cpu = time.perf_counter() - start, time.process_time() - cpu
leaves = jax.tree.leaves(model.params)
result = sum(x.nbytes for x in leaves)
print(planned, loaded, cpu, read_status("VmHWM") - before, result, max(x.nbytes for x in leaves))
"""


def write_model(config: str, dtype: str, folder: str):
    """Write random parameters of the shape of a config as a folder of transformers."""
    import jax
    import ml_dtypes
    import numpy as np

    from jaxgpt.config import load
    from jaxgpt.interop import convert, huggingface
    from jaxgpt.language_model import LanguageModel
    from jaxgpt.model import abstract_params
    from jaxgpt.tokenizer import make_byte_tokenizer

    cfg, rng = load(config), np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32

    def draw(x):
        return rng.standard_normal(x.shape, np.float32).astype(kind)

    params = jax.tree.map(draw, abstract_params(cfg.model)[0])
    model = LanguageModel(cfg, params, make_byte_tokenizer())
    huggingface.write_folder(convert.to_archive(model), folder)


def run(code: str, folder: str) -> list[float]:
    """Run code in a process of its own; return the numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    return [float(word) for word in done.stdout.split()]


def measure(config: str, dtype: str, repeats: int) -> dict:
    """Return times in seconds and sizes in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(config, dtype, folder)
        size = sum(x.stat().st_size for x in pathlib.Path(folder).glob("*.safetensors"))
        run(READ, folder)
        reads, loads = [], []
        for _ in range(repeats):  # in turns, so that both see the same machine
            reads.append(run(READ, folder))
            loads.append(run(LOAD, folder))
    planned, times, cpu, peaks, results, largest = zip(*loads, strict=True)
    read, read_cpu = (statistics.median(x) for x in zip(*reads, strict=True))
    load, load_cpu = statistics.median(times), statistics.median(cpu)
    result, peak = results[0], statistics.median(peaks)
    return {
        "config": config, "dtype": dtype, "file_bytes": size,
        "read_seconds": read, "read_cpu_seconds": read_cpu,
        "plan_seconds": statistics.median(planned),
        "load_seconds": load, "load_cpu_seconds": load_cpu,
        "load_over_read": load / read, "cpu_load_over_read": load_cpu / read_cpu,
        "result_bytes": result, "largest_bytes": largest[0], "peak_bytes": peak,
        "peak_over_result": peak / result, "bound_over_result": 1.3 + largest[0] / result,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="gpt2_124m", help="whose shapes the model has")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="a file for the numbers")
    args = parser.parse_args()
    found = measure(args.config, args.dtype, args.repeats)
    found["device"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    lines = {
        "file": f"{found['file_bytes'] / 1e6:.0f} MB, read in {found['read_seconds']:.2f} s",
        "plan": f"{found['plan_seconds']:.2f} s for config, names and shapes",
        "import": f"{found['load_seconds']:.2f} s, {found['load_over_read']:.2f} times the "
        f"reading; of the processor {found['cpu_load_over_read']:.2f} times",
        "peak": f"{found['peak_bytes'] / 1e6:.0f} MB, {found['peak_over_result']:.2f} times the "
        f"parameters; the bound is {found['bound_over_result']:.2f}",
    }
    for name, text in lines.items():
        print(f"{name:8} {text}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
