"""A step of LoRA beside torch + peft on the same work, and beside a step of the whole model.

    python -m benchmarks.lora                              both shapes, in about ten minutes
    python -m benchmarks.lora --shapes gpt_mini --turns 9

Every contestant is a process of its own; they take turns (A B C C B A ...), so that noise hits all
alike. The shapes have the same batch, dtype (float32), rank and targets on both sides, and no
padding. Memory is the peak of the whole process (resident), less what it held before the model was
made: for JAX that includes the compiler.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass

from benchmarks.worker import Case, FailedError, Worker, count_cores

JAX, TORCH = "benchmarks.jax_side", "benchmarks.torch_peer"
LORA = "lora.rank=8 lora.alpha=16 lora.targets=q,k,v,o,gate,up,down"
SMOLLM2 = (
    "model.vocab=49152 model.context=256 model.width=576 model.layers=30 model.heads=9 "
    "model.kv_heads=3 model.ffn=1536 train.batch=4"
)
SHAPES = {"gpt_mini": ("gpt_mini", "train.batch=8"), "smollm2_135m": ("gpt_mini", SMOLLM2)}
LIMIT = 300  # seconds that a contestant may take to be made, or to run once


@dataclass(frozen=True)
class Entry:
    """One contestant: its side, row and name there, and its settings."""

    title: str
    module: str
    row: str
    name: str
    settings: str


ENTRIES = (
    Entry("jaxgpt LoRA", JAX, "lora step", "jaxgpt", LORA),
    Entry("torch + peft LoRA", TORCH, "lora step", "peft", LORA),
    Entry("jaxgpt, whole model", JAX, "step", "jaxgpt", ""),
)


def make_case(shape: str, settings: str) -> Case:
    """Return the case of a shape."""
    from jaxgpt import config as configs

    config, own = SHAPES[shape]
    given = ["train.accumulate=0", "model.documents=joined", *own.split(), *settings.split()]
    cfg = configs.load(config, given)
    m, s = cfg.model, cfg.model.sizes
    return Case(
        shape, B=cfg.train.batch, T=m.context, L=m.layers, D=s["D"], H=s["H"], G=s["G"], K=s["K"],
        F=s["F"], V=s["V"], dtype=m.dtype, is_llama=True, config=json.loads(configs.to_json(cfg)),
    )  # fmt: skip


def read_peak(worker: Worker) -> int:
    """Return the peak of the resident memory of a worker's process, in bytes; 0 if not known."""
    process = worker._process
    try:
        with open(f"/proc/{process.pid if process else 0}/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def measure(shape: str, turns: int, log) -> dict[str, dict[str, float]]:
    """Return seconds a step, peak memory and trained parameters by contestant."""
    environment = {"OMP_NUM_THREADS": str(count_cores()), "TOKENIZERS_PARALLELISM": "true"}
    workers, before, found = {}, {}, {}
    seconds: dict[str, list[float]] = {}
    try:
        for entry in ENTRIES:
            worker = Worker(entry.module, log, environment)
            worker.ask(LIMIT, do="about")
            before[entry.title] = read_peak(worker)
            try:
                made = worker.make(LIMIT, entry.row, entry.name, make_case(shape, entry.settings))
                worker.run(LIMIT, entry.row, entry.name)  # warm
            except FailedError as error:
                print(f"{shape}: {entry.title} is left out: {error}", file=sys.stderr)
                worker.close()
                continue
            workers[entry.title] = worker
            found[entry.title] = {"parameters": made["parameters"]}
        order = [entry for entry in ENTRIES if entry.title in workers]
        for turn in range(turns):
            for entry in order if turn % 2 == 0 else order[::-1]:
                answer = workers[entry.title].run(LIMIT, entry.row, entry.name)
                seconds.setdefault(entry.title, []).append(answer["seconds"])
        for title, worker in workers.items():
            times = seconds[title]
            found[title] |= {
                "seconds": statistics.median(times),
                "fastest": min(times),
                "slowest": max(times),
                "peak": max(read_peak(worker) - before[title], 0),
            }
    finally:
        for worker in workers.values():
            worker.close()
    return found


def format_table(shape: str, found: dict[str, dict[str, float]]) -> str:
    """Format the figures of a shape, and what they are beside each other."""
    lines = [f"{shape}", f"  {'':22}{'s a step':>10}{'spread':>16}{'peak GB':>9}{'trained':>14}"]
    for title, x in found.items():
        spread = f"{x['fastest']:.3f}..{x['slowest']:.3f}"
        lines.append(
            f"  {title:22}{x['seconds']:10.3f}{spread:>16}{x['peak'] / 1e9:9.2f}"
            f"{x['parameters']:14,}"
        )
    ours, peer, full = (found.get(entry.title) for entry in ENTRIES)
    if ours and peer:
        lines.append(
            f"  LoRA: {ours['seconds'] / peer['seconds']:.2f}x the time of torch + peft, "
            f"{ours['peak'] / max(peer['peak'], 1):.2f}x its memory"
        )
    if ours and full:
        lines.append(f"  LoRA is {full['seconds'] / ours['seconds']:.2f}x as fast as a whole step")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=7, help="measured steps of each contestant")
    parser.add_argument("--json", help="a file for the figures")
    arguments = parser.parse_args()
    print(f"{count_cores()} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    results = {}
    with tempfile.TemporaryFile("w+") as log:
        for shape in arguments.shapes:
            results[shape] = measure(shape, arguments.turns, log)
            print(format_table(shape, results[shape]), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
