"""Batches that spoil the loss, in runs that are also killed: skipped, or rolled back."""

import math
import pathlib
import random
from contextlib import suppress

import pytest
from tiny_runs import assert_same_bits, restore_latest, run_config

from jaxgpt.config import Config, override
from jaxgpt.data.tasks import CausalTask
from jaxgpt.trainer import Hook, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.autopsy import list_autopsies
from jaxgpt.trainer.logging import read_metrics

from . import Outcome

SETTINGS = [
    *("train.steps=12", "train.eval_every=4", "train.save_every=4", "train.log_every=3"),
    *("model.dropout=0.1", "seed=3"),
]


def poison(patch: pytest.MonkeyPatch, *numbers: int, value: float = math.nan):
    """Multiply the weights of these batches, counted from 0, and with them the loss."""
    make_batch = CausalTask.make_batch

    def make(self, step, rows=slice(None)):
        batch = make_batch(self, step, rows)
        return batch._replace(weights=batch.weights * value) if step in numbers else batch

    patch.setattr(CausalTask, "make_batch", make)


class KilledError(Exception):
    """Stands for the end of the process."""


class KillAt(Hook):
    """End the process when a step is dispatched for the n-th time."""

    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def on_step(self, view):
        self.times -= view.step == self.step
        if not self.times:
            raise KilledError


def assert_same_end(a: Config, b: Config):
    """Assert that two runs have the same state, progress and records."""
    (state_a, progress_a), (state_b, progress_b) = restore_latest(a), restore_latest(b)
    assert_same_bits(state_a, state_b)
    progress_a.seconds = progress_b.seconds = 0.0
    assert progress_a == progress_b, f"{progress_a} and {progress_b}"
    timed = ("tokens_per_second", "mfu", "eta_seconds")
    records = [
        [{k: v for k, v in r.items() if k not in timed} for r in read_metrics(cfg.run_folder)]
        for cfg in (a, b)
    ]
    other = [r for r in records[1] if r not in records[0]] or len(records[1]) - len(records[0])
    assert sorted(records[0], key=str) == sorted(records[1], key=str), f"other records: {other}"


def spoil(folder: pathlib.Path, times: int, seed: int = 2) -> Outcome:
    """Train with two bad batches, and again with a kill: the same bits, and an autopsy of each."""
    dice, failures = random.Random(seed), []
    counts = {"skipped": 0, "rolled back": 0}
    for number in range(times):
        action = ("skip", "rollback")[number % 2]
        bad, kill_at = dice.sample(range(1, 10), 2), dice.randint(2, 12)
        cfg = run_config(folder, f"name=spike{number}", f"train.on_spike={action}", *SETTINGS)
        again = override(cfg, [f"name=spike{number}_killed"])
        what = f"{action}, batches {bad}, killed at step {kill_at}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
            poison(patch, *bad, value=dice.choice([math.nan, math.inf]))
            progress = train(cfg, is_quiet=True)
            with suppress(KilledError):
                train(again, hooks=[KillAt(kill_at)], is_quiet=True)
            train(again, is_quiet=True)
        counts["skipped" if action == "skip" else "rolled back"] += len(progress.spikes)
        # A rollback may pass over a bad batch that was not met yet.
        if not progress.spikes or not set(progress.spikes) <= set(bad):
            failures.append(f"{what}: spikes of the batches {progress.spikes}")
        if len(list_autopsies(cfg.run_folder)) != len(progress.spikes):
            failures.append(f"{what}: {len(list_autopsies(cfg.run_folder))} autopsies")
        try:
            assert_same_end(cfg, again)
        except AssertionError as error:
            failures.append(f"{what}: other bits: {str(error).splitlines()[:1]}")
    return Outcome("loss spikes, and a kill", times, failures, counts)
