"""Runs with adapters: what is trained, saved, resumed and loaded."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import assert_same_bits, run_config

from jaxgpt.config import override
from jaxgpt.loading import load
from jaxgpt.trainer import Hook, train
from jaxgpt.trainer import run as run_module

SETTINGS = ["train.steps=4", "train.eval_every=2", "train.save_every=2", "train.keep=2"]
LORA = ["lora.rank=2", "lora.targets=q,v,down"]


@pytest.fixture(scope="module", autouse=True)
def known_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


class Record(Hook):
    """Keeps the parameters before the first step, and the losses."""

    def __init__(self):
        self.first, self.losses, self.evals = None, [], []

    def on_start(self, view):
        self.first = jax.tree.map(np.array, view.params)

    def on_metrics(self, view, step, values):
        self.losses.append(values["loss"])

    def on_eval(self, view, values):
        self.evals.append(values["loss"])

    def on_untrained(self, view, values):
        self.evals.append(values["loss"])


@pytest.fixture(scope="module")
def base(folder):
    """Return the config of a run that is the base."""
    cfg = run_config(folder, "name=base", *SETTINGS, "train.log_every=1")
    train(cfg, is_quiet=True)
    return cfg


@pytest.fixture(scope="module")
def tuned(base):
    """Return the config of a run with adapters on it, and what it has recorded."""
    cfg = override(base, ["name=tuned", f"train.start={base.run_folder}", *LORA])
    record = Record()
    train(cfg, hooks=[record], is_quiet=True)
    return cfg, record


def test_a_run_trains_adapters_alone_on_the_base(base, tuned):
    cfg, record = tuned
    model, start = load(cfg.run_folder), load(base.run_folder)
    assert_same_bits(model.base, start.params)
    trained = flatten_dict(model.adapters["tuned"].trained, sep=".")
    assert {path.rpartition(".lora.")[0].rpartition(".")[2] for path in trained} == {
        "q",
        "v",
        "down",
    }
    assert all(np.any(x) for x in trained.values())
    assert record.evals[-1] < record.evals[0]
