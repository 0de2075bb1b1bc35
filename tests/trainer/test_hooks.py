"""Hooks, the profiler window, and metrics of a user's own objective."""

import dataclasses
import glob
import os

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import assert_same_bits, config, make_training, restore_latest, run_config

from jaxgpt import objectives
from jaxgpt.config import override
from jaxgpt.loading import read_config
from jaxgpt.objectives import OBJECTIVES, compute_own_means
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import Hook, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.checkpoint import Progress
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.trainer.report import format_complete

SETTINGS = ["train.steps=6", "train.eval_every=3", "train.save_every=2", "train.log_every=2"]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hooks")


class Recorder(Hook):
    def __init__(self):
        self.events = []

    def on_start(self, view):
        self.events.append(("start", view.step))

    def on_step(self, view):
        self.events.append(("step", view.step))

    def on_metrics(self, view, step, values):
        assert values["loss"] > 0
        self.events.append(("metrics", step))

    def on_eval(self, view, values):
        assert view.best == (values["loss"], view.step)
        self.events.append(("eval", view.step))

    def on_save(self, view):
        self.events.append(("save", view.step))

    def on_end(self, view):
        assert os.path.isdir(os.path.join(view.cfg.run_folder, "checkpoints", str(view.step)))
        self.events.append(("end", view.step))

    def close(self):
        self.events.append(("close", None))


@pytest.fixture(scope="module")
def recorded_run(folder):
    cfg, recorder = run_config(folder, "name=recorded", *SETTINGS), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        train(cfg, hooks=[recorder], is_quiet=True)
    return cfg, recorder.events


def test_hooks_are_called_in_the_order_of_the_run(recorded_run):
    assert recorded_run[1] == [
        ("start", 0),
        ("step", 1),
        ("step", 2), ("metrics", 2), ("save", 2),
        ("step", 3), ("eval", 3),
        ("step", 4), ("metrics", 4), ("save", 4),
        ("step", 5),
        ("step", 6), ("metrics", 6), ("eval", 6), ("save", 6),
        ("end", 6),
        ("close", None),
    ]  # fmt: skip


def test_metrics_are_fetched_one_step_late(folder):
    class Order(Recorder):
        def on_metrics(self, view, step, values):
            self.events.append((view.step, step))

        on_step = on_eval = on_save = on_end = on_start = Hook.on_step

    settings = ["train.steps=3", "train.log_every=1", "train.eval_every=3", "train.save_every=3"]
    order = Order()
    order.on_eval = lambda view, values: None
    train(run_config(folder, "name=late", *settings), hooks=[order], is_quiet=True)
    assert order.events[:-1] == [(2, 1), (3, 2), (3, 3)]


def test_a_hook_that_fails_ends_the_run_and_closes_the_others(folder):
    class Failing(Hook):
        def on_step(self, view):
            raise RuntimeError("a mistake in a hook")

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="a mistake in a hook"):
        train(
            run_config(folder, "name=failing", *SETTINGS),
            hooks=[recorder, Failing()],
            is_quiet=True,
        )
    assert recorder.events == [("start", 0), ("step", 1), ("close", None)]


class StopAt(Hook):
    def __init__(self, step, event):
        self.step = step
        setattr(self, event, self.act)

    def act(self, view, *_):
        if view.step >= self.step:
            view.stop("a reason of its own")


@pytest.mark.parametrize(
    ("event", "last"), [("on_step", 3), ("on_metrics", 4), ("on_eval", 3), ("on_save", 4)]
)
def test_a_hook_can_stop_the_run(folder, event, last, capsys):
    cfg = run_config(folder, f"name=stopped_{event}", *SETTINGS)
    assert train(cfg, hooks=[StopAt(3, event)]).step == last
    assert f"{last} steps, " in (out := capsys.readouterr().out)
    assert "stopped early: a reason of its own" in out
    assert restore_latest(cfg)[1].step == last
    assert train(cfg).step == last
    out = capsys.readouterr().out
    assert f"complete: it stopped early at step {last}: a reason of its own. " in out
    assert "Continue it by resume=force. " in out  # patience has nothing to do with it


def test_a_run_that_a_hook_stopped_continues_by_force(folder, recorded_run):
    cfg = run_config(folder, "name=continued", *SETTINGS)
    train(cfg, hooks=[StopAt(3, "on_step")], is_quiet=True)
    assert train(override(cfg, ["resume=force"]), is_quiet=True).step == 6
    assert read_config(cfg.run_folder).resume == "auto"  # of one start, not of the run
    assert_same_bits(restore_latest(cfg)[0], restore_latest(recorded_run[0])[0])


@pytest.mark.parametrize(
    ("patience", "stale", "is_named"), [(0, 0, False), (0, 3, False), (2, 1, False), (2, 2, True)]
)
def test_more_patience_is_advised_only_where_the_run_would_stop_again(patience, stale, is_named):
    progress = Progress(step=3, is_done=True, stop_reason="a hook", stale=stale)
    text = format_complete(config(f"train.patience={patience}"), progress)
    assert "stopped early at step 3" in text
    assert "resume=force" in text
    assert ("a larger train.patience" in text) == is_named


# --- the profiler ---


def test_a_window_of_steps_is_traced(folder, capsys):
    settings = ["train.steps=5", "train.profile=2:3", "train.eval_every=5", "train.save_every=5"]
    cfg = run_config(folder, "name=traced", *settings)
    train(cfg)
    assert "traced up to step 3: tensorboard --logdir" in capsys.readouterr().out
    (trace,) = glob.glob(os.path.join(cfg.run_folder, "plugins", "profile", "*", "*.xplane.pb"))
    with open(trace, "rb") as file:
        content = file.read()
    assert b"train" in content
    assert b"step_num" in content


@pytest.mark.parametrize("window", ["3", "5:4", "0:2", "a:b", "2:"])
def test_an_invalid_profiler_window_is_rejected(window):
    with pytest.raises(ConfigError, match=f"train.profile='{window}' must be the first and last"):
        config(f"train.profile={window}")


def test_a_profiler_window_after_the_end_is_rejected():
    with pytest.raises(ConfigError, match=r"train.profile='13:14' begins after the last step"):
        config("train.profile=13:14")


# --- metrics of an objective ---


@pytest.fixture
def own_objective(monkeypatch):
    """An objective that counts the targets below 100, and the rows of a batch per token."""

    def loss(model, params, batch, rngs, cfg):
        total, sums = objectives.next_token_loss(model, params, batch, rngs, cfg)
        low = jnp.sum(batch.weights * (batch.targets < 100))
        return total, sums | {"low_fraction": low}

    row = dataclasses.replace(OBJECTIVES["causal"], loss=loss)
    monkeypatch.setitem(OBJECTIVES, "own", row)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_metric_of_an_objective_is_recorded_by_its_name(
    own_objective, folder, accumulate, capsys
):
    settings = ["train.steps=2", "train.log_every=1", f"train.accumulate={accumulate}"]
    cfg = run_config(folder, f"name=own_{accumulate}", "train.objective=own", *settings)
    train(cfg)
    records = read_metrics(cfg.run_folder)
    batch = make_first_batch(cfg)
    expected = np.sum(batch.weights * (batch.targets < 100)) / np.sum(batch.weights)
    first = next(r for r in records if r["kind"] == "train")
    assert first["low_fraction"] == pytest.approx(expected, rel=1e-5)
    held_out = [r["low_fraction"] for r in records if r["kind"] == "eval"]
    assert len(held_out) == 2  # untrained, and at the end
    assert all(0 < x < 1 for x in held_out)
    assert f"low_fraction {held_out[-1]:.4g}" in capsys.readouterr().out


def make_first_batch(cfg):
    from jaxgpt.data import prepare

    corpus = prepare(cfg.data, cfg.model.vocab)
    return cfg.objective.task(cfg, corpus).make_batch(0)


def test_an_own_metric_does_not_change_training(own_objective):
    plain, _ = make_training(config()).run(2)
    own, _ = make_training(config("train.objective=own")).run(2)
    assert_same_bits(plain, own)


@pytest.mark.parametrize(("name", "shape"), [("lr", ()), ("histogram", (3,))])
def test_a_metric_with_a_taken_name_or_of_another_shape_is_rejected(name, shape):
    with pytest.raises(ValueError, match=f"the metric '{name}' of shape"):
        compute_own_means({"weight": jnp.ones(()), name: jnp.ones(shape)}, 1.0)


def test_what_is_no_hook_is_refused(folder):
    with pytest.raises(ConfigError, match="not an instance of a Hook's class"):
        train(run_config(folder, "name=wrong"), hooks=[Hook], is_quiet=True)
