"""Loss spikes: what the step does with one, what the run does, and what is left to read."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reliability.spikes import (
    SETTINGS,
    KillAt,
    KilledError,
    assert_same_end,
    poison,
    spoil,
)
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

from jaxgpt.cli import autopsy as command
from jaxgpt.config import Config, ModelConfig, TrainConfig, override
from jaxgpt.data import prepare
from jaxgpt.data.tasks import CausalTask
from jaxgpt.hosts import place_batch
from jaxgpt.model import Coords, abstract_params, build
from jaxgpt.model.capture import capture, find_groups
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import DivergedError, loop, recovery, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.autopsy import FOLDER, list_autopsies, read_autopsy
from jaxgpt.trainer.checkpoint import Checkpoints, SaveError
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.trainer.norms import compute_layer_norms, list_layers
from jaxgpt.trainer.spikes import add_guard, guard_step
from jaxgpt.trainer.state import TrainState
from jaxgpt.trainer.step import compute_gradient

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spikes")


def guard_training(training):
    """Return what the loop builds from a config with a guard."""
    make_plain = training.make_state

    def make_state():
        return add_guard(make_plain(), {}, training.abstract.step.sharding)

    shardings = jax.tree.map(lambda x: x.sharding, make_state())
    step = jax.jit(training.step.__wrapped__, donate_argnums=0, out_shardings=(shardings, None))
    return training._replace(step=step, make_state=make_state)


class Twin:
    """A run in plain Python: the step is called with the batches that it is given, and no others.

    Args:
        is_guarded: False for the step of the default, the same up to the rounding of a program
            that is compiled otherwise.
    """

    def __init__(self, cfg, is_guarded=True):
        cfg = (
            cfg if is_guarded else override(cfg, ["train.on_spike=stop", "train.spike_threshold=0"])
        )
        self.training = make_training(cfg, jax.device_count())
        if is_guarded:
            self.training = guard_training(self.training)
        self.mesh = self.training.mesh
        corpus = prepare(cfg.data, cfg.model.vocab, log=lambda line: None)
        self.task, self.tokenizer = CausalTask(cfg, corpus), corpus.tokenizer

    def run(self, numbers, state=None):
        """Return the state after a step on each of these batches."""
        state = self.training.make_state() if state is None else state
        with jax.set_mesh(self.mesh):
            for number in numbers:
                batch = self.task.make_batch(number)
                state, metrics = self.training.step(state, place_batch(batch, self.mesh, B))
                assert not metrics.get("is_spike", False)
        return state

    def skip(self, state):
        """Leave out the update of a step."""
        guard = state.guard._replace(skipped=state.guard.skipped + 1)
        return state.replace(step=state.step + 1, guard=guard)


def assert_same_state(cfg, state):
    """Assert that the latest checkpoint of a run is this state."""
    assert_same_bits(restore_latest(cfg)[0], state.replace(guard=None))


def find_records(cfg, kind):
    return [r for r in read_metrics(cfg.run_folder) if r["kind"] == kind]


# --- the guard of the step ---


def call_guard(train, guard, loss, norm):
    """Return (guard, is_spike) after a step with these metrics."""
    old = TrainState(jnp.int32(0), {"w": jnp.zeros(1)}, {}, None, guard)
    new = old.replace(step=old.step + 1, params={"w": jnp.ones(1)})
    metrics = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}
    state, metrics = guard_step(train, old, new, metrics)
    is_spike = bool(metrics["is_spike"])
    assert (int(state.step), float(state.params["w"][0])) == (1 - is_spike,) * 2
    return state.guard, is_spike


def new_guard():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return add_guard(TrainState(jnp.int32(0), {}, {}, None), {}, sharding).guard


def test_the_means_of_the_guard_equal_their_definition():
    train = TrainConfig(on_spike="skip", spike_window=4, spike_threshold=0)
    guard, mean = new_guard(), 0.0
    for number, loss in enumerate([5.0, 3.0, 4.0, 2.0, 8.0, 1.0]):
        guard, is_spike = call_guard(train, guard, loss, 2 * loss)
        mean += (loss - mean) / min(number + 1, 4)
        assert not is_spike
        assert float(guard.mean_loss) == pytest.approx(mean, rel=1e-6)
        assert float(guard.mean_grad_norm) == pytest.approx(2 * mean, rel=1e-6)
    assert int(guard.steps) == 6


@pytest.mark.parametrize(
    ("loss", "norm", "is_spike"),
    [
        (2.0, 1.0, False), (6.1, 1.0, True), (5.9, 1.0, False), (2.0, 3.1, True), (2.0, 2.9, False),
        (math.nan, 1.0, True), (math.inf, 1.0, True), (2.0, math.inf, True), (2.0, math.nan, True),
    ],
)  # fmt: skip
def test_a_spike_is_beyond_the_threshold_or_not_finite(loss, norm, is_spike):
    train = TrainConfig(on_spike="skip", spike_window=3, spike_threshold=3)
    guard = new_guard()
    for _ in range(3):
        guard, found = call_guard(train, guard, 2.0, 1.0)
        assert not found
    after, found = call_guard(train, guard, loss, norm)
    assert found == is_spike
    if is_spike:  # the means are those before, and the step stays held whatever comes
        assert (float(after.mean_loss), int(after.steps)) == (2.0, 3)
        assert call_guard(train, after, 2.0, 1.0)[1]
        np.testing.assert_array_equal(after.loss, np.float32(loss))


def test_no_finite_value_is_a_spike_before_the_window_is_full():
    train = TrainConfig(on_spike="skip", spike_window=3)
    guard, _ = call_guard(train, new_guard(), 2.0, 1.0)
    assert not call_guard(train, guard, 1e9, 1e9)[1]
    assert call_guard(train, guard, math.nan, 1.0)[1]


def test_a_small_loss_must_also_rise_by_a_nat():
    train = TrainConfig(on_spike="skip", spike_window=1)
    guard, _ = call_guard(train, new_guard(), 0.01, 1.0)
    assert not call_guard(train, guard, 0.9, 1.0)[1]
    assert call_guard(train, guard, 1.1, 1.0)[1]


@pytest.mark.parametrize(
    ("settings", "multiple", "is_guarded"),
    [
        ([], 0.0, False), (["train.on_spike=skip"], 10.0, True),
        (["train.on_spike=rollback", "train.spike_threshold=0"], 0.0, True),
        (["train.spike_threshold=4"], 4.0, True),
    ],
)  # fmt: skip
def test_the_default_threshold_follows_from_the_answer(settings, multiple, is_guarded):
    train = override(Config(), settings).train
    assert (train.spike_multiple, train.is_guarded) == (multiple, is_guarded)


def test_a_threshold_of_the_mean_itself_is_refused():
    with pytest.raises(ConfigError, match=r"train.spike_threshold=0.5 is at most the mean"):
        TrainConfig(spike_threshold=0.5)


def test_the_default_step_is_the_program_without_guard_and_norms():
    """The step is written out here, with nothing in it about spikes."""
    cfg = config()
    model = build(cfg.model)
    optimizer, schedule = build_optimizer(
        cfg.optimizer, cfg.train.steps, abstract_params(cfg.model)[1]
    )

    def train_step(state, batch):
        grads, sums = compute_gradient(model, cfg.train, state.params, batch, None)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(
            loss=sums["loss"] / weight, nats=sums["nats"] / weight,
            accuracy=sums["correct"] / weight, tokens=sums["weight"],
            grad_norm=optax.tree.norm(grads), lr=jnp.asarray(schedule(state.step), jnp.float32),
        )  # fmt: skip
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    training = make_training(cfg)
    shardings = jax.tree.map(lambda x: x.sharding, training.abstract)
    twin = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    batch = random_batch()
    with jax.set_mesh(training.mesh):
        texts = [f.lower(training.abstract, batch).as_text() for f in (twin, training.step)]
    assert texts[0] == texts[1]


def test_a_spike_leaves_every_array_of_the_state_as_it_is():
    """In a pipeline, with sharded parameters, microbatches and quantized moments."""
    cfg = config(
        "mesh.pipe=2", "mesh.fsdp=2", "train.accumulate=2", "optimizer.moments=int8",
        "train.on_spike=skip",
    )  # fmt: skip
    training = guard_training(make_training(cfg, 4))
    state, _ = training.run(1)
    before = to_numpy(state.replace(guard=None))
    bad = random_batch()._replace(weights=np.full((B, 16), np.nan, np.float32))
    held, _ = training.run(1, state, lambda number: bad)
    assert_same_bits(held.replace(guard=None), before)
    assert bool(held.guard.is_tripped)
    assert {x.sharding for x in jax.tree.leaves(held.params)} == {
        x.sharding for x in jax.tree.leaves(training.abstract.params)
    }


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
    assert_same_state(cfg, state)
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


def test_a_run_that_is_killed_after_a_skipped_step_resumes_bit_for_bit(skipped, monkeypatch):
    cfg, _ = skipped
    poison(monkeypatch, 5)
    again = override(cfg, ["name=skip_killed"])
    with pytest.raises(KilledError):
        train(again, is_quiet=True, hooks=[KillAt(10)])
    train(again, is_quiet=True)
    assert_same_end(cfg, again)


def test_a_spike_of_the_last_step_is_skipped_and_what_is_due_is_done(folder, monkeypatch):
    cfg = run_config(folder, "name=last", "train.on_spike=skip", *SETTINGS)
    poison(monkeypatch, 11)
    assert train(cfg, is_quiet=True).step == 12
    assert [r["step"] for r in find_records(cfg, "eval")] == [0, 4, 8, 12]
    assert_same_bits(restore_latest(cfg)[0].params, Twin(cfg).run(range(11)).params)


# --- the autopsy ---


@pytest.fixture(scope="module")
def autopsy(skipped):
    [(step, path)] = list_autopsies(skipped[0].run_folder)
    assert step == 6
    assert path.endswith(os.path.join(FOLDER, "6", "batch_5.json"))
    return read_autopsy(path)


def test_an_autopsy_has_the_batch_and_the_state_before_it(skipped, autopsy):
    cfg, _ = skipped
    twin = Twin(cfg)
    batch = twin.task.make_batch(5)
    assert [row["text"] for row in autopsy["rows"]] == [
        twin.tokenizer.decode(row) for row in batch.tokens
    ]
    params = jax.device_get(twin.run(range(5)).params)
    found = {name: x["param_norm"] for name, x in autopsy["layers"].items() if "param_norm" in x}
    assert found == pytest.approx(norm_by_layer(params), rel=1e-5)
    assert autopsy["learning_rate"] == pytest.approx(find_records(cfg, "train")[0]["lr"], rel=0.5)
    assert [x["step"] for x in autopsy["last_losses"]] == [3]


def norm_by_layer(params):
    """Compute the norm of each layer of a model without a cycle of layers, one at a time."""
    stack = params["stack"]
    layers = {f"layers.{i}": jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(2)}
    parts = {"embedding": params["embed"], **layers, "final_norm": stack["norm"]}
    return {
        name: float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(part))))
        for name, part in parts.items()
    }


def test_the_figures_of_an_autopsy_equal_those_of_slow_twins(folder, monkeypatch):
    """A finite spike of the loss, so that there are figures to compare."""
    cfg = run_config(
        folder, "name=finite", "train.on_spike=skip", "train.spike_threshold=3",
        "train.spike_window=4", *SETTINGS, "model.dropout=0",
    )  # fmt: skip
    make_batch = CausalTask.make_batch

    def make(self, step, rows=slice(None)):
        """Make the last targets of row 3 weigh a lot in batch 6."""
        batch = make_batch(self, step, slice(None))
        if step == 6:
            weights = batch.weights.copy()
            weights[3] *= -1e3
            batch = batch._replace(weights=weights)
        return jax.tree.map(lambda x: x[rows], batch)

    monkeypatch.setattr(CausalTask, "make_batch", make)
    train(cfg, is_quiet=True)
    [record] = find_records(cfg, "spike")
    assert record["step"] == 7
    found = read_autopsy(list_autopsies(cfg.run_folder)[0][1])
    twin = Twin(cfg, is_guarded=False)
    state, batch = twin.run(range(6)), twin.task.make_batch(6)
    params = jax.device_get(state.params)
    model = build(cfg.model)
    grads, sums = compute_gradient(model, cfg.train, params, batch, None)
    grads = jax.tree.map(lambda g: np.asarray(g / max(float(sums["weight"]), 1.0)), grads)
    layers = found["layers"]
    assert {k: v["grad_norm"] for k, v in layers.items() if "grad_norm" in v} == pytest.approx(
        norm_by_layer(grads), rel=1e-3
    )
    assert found["loss"] == pytest.approx(
        float(sums["loss"]) / max(float(sums["weight"]), 1.0), rel=1e-4
    )
    new = twin.run([6], state)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(new.params), params)
    assert {k: v["update_norm"] for k, v in layers.items() if "update_norm" in v} == pytest.approx(
        norm_by_layer(change), rel=1e-2
    )
    row = jax.tree.map(lambda x: x[5:6], batch)
    _, one = cfg.objective.loss(model, params, row, {}, cfg.train)
    assert found["rows"][5]["loss"] == pytest.approx(float(one["nats"] / one["weight"]), rel=1e-4)
    coords = Coords(batch.positions, batch.segment_ids)
    _, inner = capture(cfg.model, params, batch.tokens, coords, ["layers.1.ffn.out", "embedding"])
    largest = layers["layers.1"]["largest_activations"]["ffn.out"]
    by_row = np.abs(inner["layers.1.ffn.out"]).max(axis=(1, 2))
    assert largest["value"] == pytest.approx(by_row.max(), rel=1e-4)
    assert largest["row"] == by_row.argmax()
    assert layers["embedding"]["largest_activations"]["out"]["value"] == pytest.approx(
        np.abs(inner["embedding"]).max(), rel=1e-4
    )


def test_the_command_shows_an_autopsy(skipped, capsys):
    folder = skipped[0].run_folder
    assert command.main([folder], "jaxgpt autopsy") == 0
    text = capsys.readouterr().out
    assert text.startswith("spike at step 6, batch 5: the loss is nan (skip)")
    assert "layers.1" in text
    assert "and 8 more" in text
    assert command.main([folder, "6", "--json"], "jaxgpt autopsy") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["loss"] == "nan"
    assert len(record["rows"]) == B
    with pytest.raises(ConfigError, match=r"no autopsy of step 7: there are those of 6"):
        command.main([folder, "7"], "jaxgpt autopsy")


def test_a_run_without_a_spike_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no autopsy: there was no loss spike"):
        list_autopsies(str(tmp_path))
    (tmp_path / "autopsy.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"autopsy.json cannot be read: it is not an autopsy"):
        read_autopsy(str(tmp_path / "autopsy.json"))


# --- rollback ---


@pytest.fixture(scope="module")
def rolled_back(folder):
    cfg = run_config(folder, "name=rollback", "train.on_spike=rollback", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        poison(patch, 5)
        return cfg, train(cfg, is_quiet=True)


def test_a_rollback_equals_a_run_from_that_checkpoint_with_the_batches_after(rolled_back):
    cfg, progress = rolled_back
    twin = Twin(cfg)
    state = twin.run(range(6, 14), twin.run(range(4)))
    assert_same_state(cfg, state)
    assert (progress.step, progress.passed, progress.spikes) == (12, 2, [5])
    [record] = find_records(cfg, "spike")
    assert (record["step"], record["action"]) == (6, "rollback")
    assert [r["step"] for r in find_records(cfg, "train")] == [3, 6, 9, 12]


@pytest.mark.parametrize(("step", "times"), [(5, 2), (10, 1)])
def test_a_run_that_is_killed_after_a_rollback_resumes_bit_for_bit(
    rolled_back, monkeypatch, step, times
):
    """Before the next checkpoint, so that the spike comes again; and after it."""
    poison(monkeypatch, 5)
    again = override(rolled_back[0], [f"name=rollback_killed_{step}"])
    with pytest.raises(KilledError):
        train(again, is_quiet=True, hooks=[KillAt(step, times)])
    train(again, is_quiet=True)
    assert_same_end(rolled_back[0], again)


def test_a_rollback_without_a_checkpoint_begins_anew_with_the_batches_after(folder, monkeypatch):
    cfg = run_config(folder, "name=anew", "train.on_spike=rollback", *SETTINGS)
    poison(monkeypatch, 1)
    assert train(cfg, is_quiet=True).passed == 2
    assert_same_state(cfg, Twin(cfg).run(range(2, 14)))


# --- limits, and stop ---


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_spikes_stop_the_run(folder, monkeypatch, action):
    cfg = run_config(
        folder, f"name=many_{action}", f"train.on_spike={action}", "train.max_spikes=2", *SETTINGS
    )
    poison(monkeypatch, 5, 6, 7)
    message = "spike number 3 within 1,000 batches, and train.max_spikes=2: the model"
    with pytest.raises(DivergedError, match=message):
        train(cfg, is_quiet=True)
    assert restore_latest(cfg)[1].step == 4
    assert len(list_autopsies(cfg.run_folder)) == 3


def test_spikes_long_ago_do_not_count(folder, monkeypatch):
    cfg = run_config(folder, "name=ago", "train.on_spike=skip", "train.max_spikes=1", *SETTINGS)
    monkeypatch.setattr(recovery, "SPIKE_BATCHES", 4)
    poison(monkeypatch, 2, 7)
    assert train(cfg, is_quiet=True).spikes == [7]


def test_nan_stops_the_default_run_and_the_first_bad_step_is_examined(folder, monkeypatch):
    """It is noticed at step 6, and was step 5."""
    cfg = run_config(folder, "name=stop", *SETTINGS)
    poison(monkeypatch, 4)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 6 .*jaxgpt autopsy .* 5`"):
        train(cfg, is_quiet=True)
    [(step, path)] = list_autopsies(cfg.run_folder)
    assert step == 5
    assert read_autopsy(path)["action"] == "stop"
    assert restore_latest(cfg)[1].step == 4


def test_a_stopped_run_goes_on_with_another_answer(folder, monkeypatch):
    cfg = run_config(folder, "name=stop_and_go", *SETTINGS)
    poison(monkeypatch, 5)
    with pytest.raises(DivergedError, match=r"train.on_spike=skip or rollback would go on"):
        train(cfg, is_quiet=True)
    assert train(override(cfg, ["train.on_spike=skip"]), is_quiet=True).step == 12


def test_an_exploding_update_is_rolled_back(folder, monkeypatch):
    """The parameters of step 8 are bad, which its evaluation shows: nothing can be skipped."""
    cfg = run_config(folder, "name=bomb", "train.on_spike=rollback", *SETTINGS)
    measure, calls = loop.measure, []

    def explode(run):
        calls.append(run.progress.step)
        return measure(run) | ({"loss": math.nan} if calls == [0, 4, 8] else {})

    monkeypatch.setattr(loop, "measure", explode)
    progress = train(cfg, is_quiet=True)
    assert (progress.step, progress.passed, calls) == (12, 4, [0, 4, 8, 8, 12])


def test_the_scenario_of_spikes_and_kills_finds_nothing(folder):
    outcome = spoil(folder, 2)
    assert outcome.failures == []
    assert all(outcome.facts.values())


def test_a_save_that_failed_before_a_spike_is_named(folder, monkeypatch, capsys):
    cfg = run_config(folder, "name=unsaved", "train.on_spike=rollback", *SETTINGS)
    poison(monkeypatch, 5)
    wait = Checkpoints.wait

    def fail(self):
        wait(self)
        monkeypatch.setattr(Checkpoints, "wait", wait)
        raise SaveError("the checkpoint 4 could not be saved (No space left on device)")

    def fail_at_the_spike(run, spike, stop, before=recovery.recover):
        monkeypatch.setattr(Checkpoints, "wait", fail)
        return before(run, spike, stop)

    monkeypatch.setattr(loop, "recover", fail_at_the_spike)
    assert train(cfg).passed == 2
    message = "warning: the checkpoint 4 could not be saved (No space left on device). Training"
    assert message in capsys.readouterr().out
    monkeypatch.setattr(loop, "recover", fail_at_the_spike)
    with pytest.raises(SaveError, match="No space left"):
        train(override(cfg, ["name=unsaved_stop", "train.on_save_error=stop"]))


# --- norms by layer ---


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(vocab=260, context=16, width=32, layers=3, heads=4, ffn=48,
                    pattern=("window", "full")),
        ModelConfig(family="encoder_decoder", vocab=260, context=16, width=32, layers=2, heads=4,
                    ffn=48),
    ],
    ids=["cycle and tail", "encoder_decoder"],
)  # fmt: skip
def test_norms_by_layer_equal_those_of_its_parameters(model):
    shapes, _ = abstract_params(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    squares = {}
    for path, x in jax.tree.leaves_with_path(params):
        stack, *keys = (key.key for key in path)
        prefix = "encoder." if stack == "encoder" else ""
        if stack == "embed":
            squares["embedding"] = squares.get("embedding", 0) + np.sum(x**2)
        elif keys[0] == "norm":
            squares[f"{prefix}final_norm"] = np.sum(x**2)
        else:  # a cycle of two layers; the tail is the last layer
            cycle = len(params[stack]["layers"])
            first = cycle * len(jax.tree.leaves(params[stack]["layers"])[0]) * (keys[0] == "tail")
            for repeat, layer in enumerate(x):
                name = f"{prefix}layers.{first + int(keys[1][6:]) + cycle * repeat}"
                squares[name] = squares.get(name, 0) + np.sum(layer**2)
    groups = find_groups(params)
    found = dict(zip(list_layers(params, groups), compute_layer_norms(params, groups), strict=True))
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {k: float(np.sqrt(v)) for k, v in squares.items()}, rel=1e-5
    )


def test_norms_are_logged_every_so_many_steps_and_plotted(folder):
    cfg = run_config(folder, "name=norms", *SETTINGS, "train.log_norms=5", "train.steps=7")
    train(cfg, is_quiet=True)
    records = find_records(cfg, "norms")
    assert [r["step"] for r in records] == [5, 7]
    names = ["embedding", "layers.0", "layers.1", "final_norm"]
    expected = [f"{kind}_norm/{name}" for kind in ("grad", "param") for name in names]
    assert list(records[0])[2:] == expected
    last = find_records(cfg, "train")[-1]
    total = math.sqrt(sum(records[-1][name] ** 2 for name in expected[:4]))
    assert total == pytest.approx(last["grad_norm"], rel=1e-4)
    assert has_drawing(os.path.join(cfg.run_folder, "plots", "norms.png"))
