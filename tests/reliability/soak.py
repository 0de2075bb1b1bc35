"""Many steps in one process: memory, open files and threads."""

import gc
import os
import pathlib
import threading
import time

import jax
from tiny_runs import run_config

from jaxgpt.trainer import Hook, train

from . import Outcome


def read_resident_mb() -> float:
    """Return the memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Meter(Hook):
    """Measures the process every so many steps, and ends the run after some minutes."""

    def __init__(self, minutes: float, every: int):
        self._end, self._every = time.monotonic() + 60 * minutes, every
        self.rows: list[tuple[int, float, int, int]] = []  # step, MB, open files, threads

    def on_step(self, view):
        if view.step % self._every:
            return
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        self.rows.append((view.step, read_resident_mb(), files, threading.active_count()))
        if time.monotonic() > self._end:
            view.stop("the time is over")


def soak(folder: pathlib.Path, minutes: float, every: int = 500) -> Outcome:
    """Train, evaluate, save and sample for some minutes, and look for what grows.

    Open files and threads of the second half may be no more than those of the first. Memory is
    reported.
    """
    cfg = run_config(
        folder, "name=soak", "train.steps=100000000", "train.save_every=50", "train.eval_every=50",
        "train.sample_every=500", "train.log_every=10", "optimizer.warmup=2",
    )  # fmt: skip
    meter = Meter(minutes, every)
    with jax.log_compiles(False):
        train(cfg, hooks=[meter], is_quiet=True)
    half = len(meter.rows) // 2
    first, second = meter.rows[:half], meter.rows[half:]
    failures = [
        f"{name} grow from {max(r[i] for r in first)} to {max(r[i] for r in second)}"
        for i, name in ((2, "open files"), (3, "threads"))
        if first and max(r[i] for r in second) > max(r[i] for r in first) + 2
    ]
    start, end = (second or meter.rows)[0], meter.rows[-1]
    thousands = max(end[0] - start[0], 1) / 1000
    return Outcome(
        "soak", end[0], failures,
        {
            "minutes": minutes, "MB at the end": round(end[1]), "open files": end[2],
            "threads": end[3],
            "MB per 1,000 steps in the second half": round((end[1] - start[1]) / thousands, 2),
        },
    )  # fmt: skip
