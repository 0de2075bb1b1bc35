"""Loss spikes: what the step does with one, what the run does, and what is left to read."""

import dataclasses
import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    B,
    assert_same_bits,
    config,
    has_drawing,
    make_training,
    random_batch,
    restore_latest,
    run_config,
    to_numpy,
)

from jaxgpt import cli
from jaxgpt.cli import autopsy as command
from jaxgpt.config import Config, TrainConfig, override
from jaxgpt.data.tasks import CausalTask
from jaxgpt.hosts import place_batch
from jaxgpt.model import abstract_params, build, init_params
from jaxgpt.model.capture import find_groups
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import DivergedError, Hook, loop, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.autopsy import FOLDER, list_autopsies, read_autopsy
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.trainer.norms import compute_layer_norms, list_layers
from jaxgpt.trainer.spikes import SpikeGuard, add_guard, count_updates, guard_step, read_guard
from jaxgpt.trainer.state import TrainState
from jaxgpt.trainer.step import compute_gradient

SETTINGS = [
    *("train.steps=12", "train.eval_every=4", "train.save_every=4", "train.log_every=3"),
    *("model.dropout=0.1", "seed=3"),
]


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spikes")


def poison(monkeypatch, *numbers, value=math.nan):
    """Multiply the weights of these batches, counted from 0, and with them the loss."""
    make_batch = CausalTask.make_batch

    def make(self, step, rows=slice(None)):
        batch = make_batch(self, step, rows)
        return batch._replace(weights=batch.weights * value) if step in numbers else batch

    monkeypatch.setattr(CausalTask, "make_batch", make)


class Twin:
    """A run in plain Python: the step without a guard, called with the batches that it is given."""

    def __init__(self, cfg, devices=8):
        self.cfg = override(cfg, ["train.on_spike=stop"])
        self.training = make_training(self.cfg, devices)
        run = run_module.open_run(override(cfg, [f"name={cfg.name}_twin"]), is_quiet=True)
        self.task, self.mesh = run.task, run.mesh
        run.close()

    def run(self, numbers, state=None):
        """Return the state after a step on each of these batches."""
        state = self.training.make_state() if state is None else state
        with jax.set_mesh(self.mesh):
            for number in numbers:
                batch = self.task.make_batch(number)
                state, _ = self.training.step(state, place_batch(batch, self.mesh, B))
        return state

    def skip(self, state):
        return state.replace(step=state.step + 1)


def find_records(cfg, kind):
    return [r for r in read_metrics(cfg.run_folder) if r["kind"] == kind]


def restore_plain(cfg):
    """Return the state of the latest checkpoint, without a guard, and its progress."""
    return restore_latest(cfg)


# --- skip ---


@pytest.fixture(scope="module")
def skipped(folder):
    """A run with a batch of NaN at step 6, and its progress."""
    cfg = run_config(folder, "name=skip", "train.on_spike=skip", "train.keep=9", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        poison(patch, 5)
        return cfg, train(cfg, is_quiet=True)


def test_a_skipped_step_equals_a_run_that_leaves_its_update_out(skipped):
    cfg, progress = skipped
    twin = Twin(cfg)
    state = twin.skip(twin.run(range(5)))
    state = twin.run(range(6, 12), state)
    assert_same_bits(restore_latest(cfg)[0], state)
    assert (progress.step, progress.passed, progress.spikes) == (12, 0, [5])
    assert progress.tokens == 11 * twin.task.tokens_per_batch


def test_the_metrics_tell_what_was_skipped(skipped):
    cfg, _ = skipped
    [record] = find_records(cfg, "spike")
    assert record == {
        "kind": "spike", "step": 6, "batch": 5, "action": "skip", "reason": "the loss is nan",
        "recent": 1, "autopsy": 6,
    }  # fmt: skip
    records = find_records(cfg, "train")
    assert [(r["step"], r["skipped"]) for r in records] == [(3, 0), (9, 1), (12, 1)]
    assert [r["step"] for r in find_records(cfg, "eval")] == [0, 4, 8, 12]
