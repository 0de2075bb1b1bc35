"""Whole runs: their files, and that stopping and resuming a run changes nothing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_bits, has_drawing, restore_latest, run_config

from jaxgpt import config as configs
from jaxgpt.config import override
from jaxgpt.data import Loader, make_eval_batches, prepare
from jaxgpt.loading import load
from jaxgpt.model import Coords, build, compute_logits
from jaxgpt.saved_arrays import latest_step
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import DivergedError, evaluate, loop, read_config, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.trainer.step import make_eval_step

# Everything that resuming must restore: dropout, microbatches, the order of windows, evaluations.
# 12 steps of 16 windows are more than one epoch of this text.
SETTINGS = [
    "model.dropout=0.1",
    "train.accumulate=2",
    "train.steps=12",
    "train.eval_every=4",
    "train.save_every=5",
    "train.log_every=1",
    "seed=3",
]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def uninterrupted_run(folder):
    """A run that is never stopped."""
    cfg = run_config(folder, "name=straight", *SETTINGS)
    train(cfg, is_quiet=True)
    return cfg


@contextmanager
def call_at_step(number, action):
    """Call `action` when the metrics of a step are logged, which is one step later."""
    with pytest.MonkeyPatch.context() as patch:
        log_metrics = loop.log_metrics

        def log_and_act(run, step, metrics):
            log_metrics(run, step, metrics)
            if step == number:
                action()

        patch.setattr(loop, "log_metrics", log_and_act)
        yield


def raise_signal(number):
    return lambda: os.kill(os.getpid(), number)


def copy_run(cfg, name):
    """Copy a run under another name."""
    new = override(cfg, [f"name={name}"])
    shutil.copytree(cfg.run_folder, new.run_folder)
    path = os.path.join(new.run_folder, "config.json")
    with open(path, "w") as file:
        file.write(configs.to_json(new))
    return new


def read_records(cfg):
    """Return the records of metrics.jsonl, without times."""
    return [(r["kind"], r["step"], r["loss"], r["accuracy"]) for r in read_metrics(cfg.run_folder)]


def assert_same_run(a, b):
    (state_a, progress_a), (state_b, progress_b) = restore_latest(a), restore_latest(b)
    assert_same_bits(state_a, state_b)
    progress_a.seconds = progress_b.seconds = 0.0
    assert progress_a == progress_b
    assert sorted(read_records(a)) == sorted(read_records(b))


# --- the files of a run ---


def test_all_steps_but_the_first_have_a_speed(uninterrupted_run):
    records = [r for r in read_metrics(uninterrupted_run.run_folder) if r["kind"] == "train"]
    assert [r["step"] for r in records if "mfu" not in r] == [1]
    assert all(r["mfu"] > 0 and r["eta_seconds"] >= 0 for r in records[1:])


def test_a_run_writes_its_files(uninterrupted_run):
    folder = uninterrupted_run.run_folder
    assert sorted(os.listdir(folder)) == [
        "best", "checkpoints", "config.json", "metrics.jsonl", "plots", "samples", "tensorboard",
        "tokenizer.json",
    ]  # fmt: skip
    assert has_drawing(os.path.join(folder, "plots", "loss.png"))
    assert os.listdir(os.path.join(folder, "samples")) == ["step_000012.txt"]


def test_a_sample_begins_with_its_prompt(uninterrupted_run):
    path = os.path.join(uninterrupted_run.run_folder, "samples", "step_000012.txt")
    with open(path, encoding="utf-8", errors="replace") as file:
        assert file.read().startswith("the ")


def test_the_config_is_read_back(uninterrupted_run):
    assert read_config(uninterrupted_run.run_folder) == uninterrupted_run


def test_every_step_and_evaluation_is_recorded_once(uninterrupted_run):
    records = [(kind, step) for kind, step, *_ in read_records(uninterrupted_run)]
    assert sorted(records) == [("eval", s) for s in (0, 4, 8, 12)] + [
        ("train", s) for s in range(1, 13)
    ]


def test_the_model_learns(uninterrupted_run):
    losses = [loss for kind, _, loss, _ in read_records(uninterrupted_run) if kind == "train"]
    assert losses[0] == pytest.approx(math.log(260), abs=0.3)  # untrained
    assert losses[-1] < losses[0] - 1


def test_progress_counts_steps_and_tokens(uninterrupted_run):
    progress = restore_latest(uninterrupted_run)[1]
    assert (progress.step, progress.tokens) == (12, 12 * 16 * 16)
    assert progress.seconds > 0


def test_training_starts_with_the_first_batch_of_the_loader(uninterrupted_run, monkeypatch):
    # Each step is requested from the loader once, from the first step on.
    cfg = override(uninterrupted_run, ["name=asked", "train.steps=2"])
    requested_steps = []
    make_batch = Loader.make_batch
    monkeypatch.setattr(
        Loader,
        "make_batch",
        lambda self, step, rows: requested_steps.append(step) or make_batch(self, step, rows),
    )
    train(cfg, is_quiet=True)
    assert sorted(requested_steps)[:2] == [0, 1]  # threads may take them in another order


def test_evaluations_do_not_disturb_training(uninterrupted_run):
    cfg = override(uninterrupted_run, ["name=blind", "train.eval_every=12", "train.save_every=12"])
    train(cfg, is_quiet=True)
    assert_same_bits(restore_latest(cfg)[0], restore_latest(uninterrupted_run)[0])


def test_each_step_is_compiled_once_in_a_run_and_once_after_resuming(uninterrupted_run, caplog):
    cfg = override(uninterrupted_run, ["name=counted"])
    compiled = []
    for action in (raise_signal(signal.SIGTERM), lambda: None):
        caplog.clear()
        with call_at_step(5, action), jax.log_compiles():
            train(cfg, is_quiet=True)
        names = re.findall(r"Compiling jit\((\w+_step)\)", caplog.text)
        compiled.append(sorted(names))
    assert compiled == [["eval_step", "train_step"]] * 2


def test_the_loop_donates_its_old_state(uninterrupted_run):
    cfg = override(uninterrupted_run, ["name=given"])
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "log_sample", lambda run: None)
        patch.setattr(loop, "log_metrics", lambda run, step, metrics: states.append(run.state))
        train(cfg, is_quiet=True)
    old = jax.tree.leaves((states[0].params, states[0].opt_state))
    assert all(x.is_deleted() for x in old)


# --- stopping and resuming ---


@pytest.fixture(scope="module")
def stopped_run(uninterrupted_run):
    """(config of a run stopped by SIGTERM and then resumed, progress at the stop)."""
    cfg = override(uninterrupted_run, ["name=stopped"])
    with call_at_step(6, raise_signal(signal.SIGTERM)):
        progress = train(cfg, is_quiet=True)
    stopped_at = progress.step, latest_step(os.path.join(cfg.run_folder, "checkpoints"))
    train(cfg, is_quiet=True)
    return cfg, stopped_at


def test_sigterm_saves_the_current_step_and_ends(stopped_run):
    assert stopped_run[1] == (7, 7)


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(uninterrupted_run, stopped_run):
    assert_same_run(uninterrupted_run, stopped_run[0])


def test_ctrl_c_in_an_evaluation_saves_and_ends(uninterrupted_run, monkeypatch):
    cfg = override(uninterrupted_run, ["name=ctrl_c"])
    run_eval = loop.run_eval

    def interrupted(run):
        run_eval(run)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "run_eval", interrupted)
    assert train(cfg, is_quiet=True).step == 4
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) == 4


def test_a_second_ctrl_c_interrupts_at_once(uninterrupted_run, monkeypatch):
    cfg = override(uninterrupted_run, ["name=twice"])

    def twice(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "run_eval", twice)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, is_quiet=True)


def test_signal_handlers_are_restored_at_the_end_of_a_run(stopped_run):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


KILLED = """
import os, signal, sys
import test_loop
from jaxgpt.config import from_json
from jaxgpt.trainer import train
with test_loop.call_at_step(9, test_loop.raise_signal(signal.SIGKILL)):
    train(from_json(sys.stdin.read()), is_quiet=True)
"""


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(uninterrupted_run, compiled_once):
    # Saved every 2 steps, each begun when the one before is whole: 6 is on disk, 8 may be.
    cfg = override(uninterrupted_run, ["name=killed", "train.save_every=2"])
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(__file__)]),
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], input=configs.to_json(cfg), text=True, env=environment
    )
    assert killed.returncode == -signal.SIGKILL
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) in (6, 8)
    with open(os.path.join(cfg.run_folder, "metrics.jsonl"), "a") as file:
        file.write('{"kind": "train", "st')  # a line truncated by the kill
    train(cfg, is_quiet=True)
    assert_same_run(uninterrupted_run, cfg)


def test_a_complete_run_reports_that_and_changes_nothing(uninterrupted_run, capsys):
    before = read_records(uninterrupted_run)
    progress = train(uninterrupted_run)
    assert progress.step == 12
    out = capsys.readouterr().out
    assert (
        f"This run is complete. Sample from it:\n  jaxgpt sample {uninterrupted_run.run_folder}"
        in out
    )
    assert read_records(uninterrupted_run) == before


# --- errors ---


def test_other_settings_are_rejected_with_their_keys(uninterrupted_run):
    changed = override(
        uninterrupted_run, ["optimizer.lr=0.5", "model.width=64", "train.log_every=3"]
    )
    with pytest.raises(ConfigError) as error:
        train(changed, is_quiet=True)
    lines = str(error.value).splitlines()
    assert lines[1:-1] == ["  model.width: 32 -> 64", "  optimizer.lr: 0.01 -> 0.5"]
    assert "resume=force" in lines[-1]
    assert read_config(uninterrupted_run.run_folder) == uninterrupted_run


def test_other_settings_are_accepted_by_force(uninterrupted_run):
    cfg = copy_run(uninterrupted_run, "forced")
    longer = override(cfg, ["train.steps=14", "optimizer.lr=0.02", "resume=force"])
    assert train(longer, is_quiet=True).step == 14
    assert read_config(cfg.run_folder).optimizer.lr == 0.02


@pytest.mark.parametrize("setting", ["model.width=64", "optimizer.name=lion"])
def test_force_does_not_resume_with_arrays_of_other_shapes(uninterrupted_run, setting):
    changed = override(uninterrupted_run, ["resume=force", "train.steps=14", setting])
    with pytest.raises(ConfigError) as error:
        train(changed, is_quiet=True)
    text = str(error.value)
    key, value = setting.split("=")
    assert "checkpoints/12 is of another model or optimizer:" in text
    assert f"\n  {key}: " in text
    assert f"-> {value}" in text.replace("'", "")
    assert text.endswith("give the new run its own name=...")


def test_settings_without_effect_on_the_result_may_change(uninterrupted_run):
    cfg = copy_run(uninterrupted_run, "free")
    free = override(cfg, ["train.log_every=3", "train.keep=2", "mesh.data=4", "mesh.fsdp=2"])
    assert train(free, is_quiet=True).step == 12


@pytest.mark.parametrize("use", ["best", "latest", "resume"])
def test_the_tokenizer_of_another_run_is_rejected(uninterrupted_run, use):
    cfg = copy_run(uninterrupted_run, f"swapped_{use}")
    path = os.path.join(cfg.run_folder, "tokenizer.json")
    with open(path, encoding="utf-8") as file:
        spec = json.load(file)
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(spec, file)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not the tokenizer that .* trained"):
        train(cfg, is_quiet=True) if use == "resume" else load(cfg.run_folder, checkpoint=use)


def test_other_data_is_rejected(uninterrupted_run, tmp_path):
    cfg = override(run_config(tmp_path, *SETTINGS), ["name=moved"])
    shutil.copytree(uninterrupted_run.run_folder, cfg.run_folder)
    with open(os.path.join(cfg.run_folder, "config.json"), "w") as file:
        file.write(configs.to_json(cfg))
    (tmp_path / "text" / "00.txt").write_text("Something else, and long enough. " * 20)
    with pytest.raises(ConfigError, match=r"data.source=.* has changed since"):
        train(cfg, is_quiet=True)


def test_a_batch_that_the_devices_cannot_divide_is_rejected_before_anything_is_written(
    uninterrupted_run,
):
    cfg = override(uninterrupted_run, ["name=odd", "train.batch=12"])
    with pytest.raises(ConfigError, match=r"train.batch=12 .* use train.batch=16"):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


def test_too_little_text_is_rejected_before_anything_is_written(uninterrupted_run):
    cfg = override(uninterrupted_run, ["name=short", "model.context=100000"])
    with pytest.raises(ConfigError, match=r"data.source gives \d+ tokens .* model.context=100000"):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


def test_missing_data_is_rejected_before_anything_is_written(uninterrupted_run):
    cfg = override(uninterrupted_run, ["name=lost", "data.source=no/such/folder"])
    with pytest.raises(ConfigError, match=r"data.source|no/such/folder"):
        train(cfg, is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


# --- best checkpoint, early stopping ---

# The best resets the patience of 2, an equal one is not better, and 1.0 comes too late.
# Before them, the untrained model is evaluated.
SCRIPTED = [9.0, 3.0, 2.5, 2.6, 2.0, 2.0, 2.1, 1.0, *[3.0] * 5]


@pytest.fixture(scope="module")
def early_stopped_run(uninterrupted_run):
    """A run of which the held-out losses are known: (config, progress it returned)."""
    cfg = override(
        uninterrupted_run,
        [
            "name=patient",
            "train.patience=2",
            "train.keep=9",
            "train.eval_every=1",
            "train.save_every=1",
        ],
    )
    losses = iter(SCRIPTED)
    figures = dict(perplexity=1.0, bits_per_byte=1.0, accuracy=0.0, tokens=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: {"loss": next(losses), **figures})
        return cfg, train(cfg, is_quiet=True)


def test_a_run_without_progress_stops_early(early_stopped_run):
    assert early_stopped_run[1].step == 6
    assert early_stopped_run[1].stale == 2


def test_an_early_stopped_run_does_not_resume(early_stopped_run, capsys):
    assert train(early_stopped_run[0]).step == 6
    assert "This run is complete" in capsys.readouterr().out


def test_the_best_checkpoint_has_the_lowest_held_out_loss(early_stopped_run):
    cfg, progress = early_stopped_run
    step = load(cfg.run_folder).step
    assert (step, progress.best_step, progress.best_loss) == (4, 4, 2.0)


def test_the_best_checkpoint_has_the_parameters_of_its_step(early_stopped_run):
    cfg = copy_run(early_stopped_run[0], "rewound")
    folder = os.path.join(cfg.run_folder, "checkpoints")
    for step in (5, 6):
        shutil.rmtree(os.path.join(folder, str(step)))
    latest = load(cfg.run_folder, checkpoint="latest")
    assert_same_bits(load(cfg.run_folder).params, latest.params)
    assert latest.step == 4


def test_a_new_run_forgets_the_best_of_one_that_was_killed_before_its_first_checkpoint(
    uninterrupted_run,
):
    cfg = copy_run(uninterrupted_run, "reborn")
    shutil.rmtree(os.path.join(cfg.run_folder, "checkpoints"))
    best = os.path.join(cfg.run_folder, "best")
    assert latest_step(best) is not None
    run = loop.open_run(cfg, is_quiet=True)
    run.saver.wait()
    assert latest_step(best) is None
    run.saver.close()


# --- divergence ---


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_diverged_run_advises_a_remedy_and_saves_no_bad_state(uninterrupted_run, save_every):
    wild = ["optimizer.lr=1e30", "optimizer.clip=0", "train.eval_every=6"]
    name = f"name=diverged_{save_every}"
    cfg = override(uninterrupted_run, [name, f"train.save_every={save_every}", *wild])
    with pytest.raises(DivergedError, match=r"lower optimizer.lr=1e\+30.*set optimizer.clip=1"):
        train(cfg, is_quiet=True)
    for name in ("checkpoints", "best"):
        assert latest_step(os.path.join(cfg.run_folder, name)) is None


def test_a_run_that_diverges_later_keeps_its_last_good_checkpoint(uninterrupted_run, monkeypatch):
    cfg = override(uninterrupted_run, ["name=late"])
    log_metrics = loop.log_metrics

    def poison(run, step, metrics):
        loss = metrics["loss"] * (math.nan if step == 7 else 1)
        log_metrics(run, step, metrics | {"loss": loss})

    monkeypatch.setattr(loop, "log_metrics", poison)
    with pytest.raises(
        DivergedError, match=r"nan at step 7 \(the last good checkpoint is of step 5\)"
    ):
        train(cfg, is_quiet=True)
    state, progress = restore_latest(cfg)
    assert progress.step == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


# --- evaluation ---


@pytest.fixture(scope="module")
def held_out_scores(uninterrupted_run):
    """The held-out text of a trained model, scored token by token: (figures, nats, weights)."""
    corpus = prepare(uninterrupted_run.data, uninterrupted_run.model.vocab)
    params = load(uninterrupted_run.run_folder, checkpoint="latest").params
    model, T = build(uninterrupted_run.model), uninterrupted_run.model.context
    batches = list(make_eval_batches(corpus.held_out, 16, T, pad=corpus.tokenizer.pad))
    # Neither is part of the held-out loss.
    trained_with = override(uninterrupted_run, ["train.label_smoothing=0.3", "train.z_loss=0.1"])
    step = jax.jit(make_eval_step(trained_with, model))
    figures = evaluate(step, params, batches, corpus.tokenizer.lengths)

    @jax.jit
    def score(tokens, position, document):
        hidden, _ = model.apply({"params": params}, tokens, Coords(position, document))
        return compute_logits(uninterrupted_run.model, params, hidden)

    ids, starts = np.array(corpus.held_out.ids, np.int32), set(corpus.held_out.starts.tolist())
    nats = []
    for first in range(0, len(ids) - 1, T):
        places = np.arange(first, min(first + T, len(ids) - 1))
        document = np.searchsorted(corpus.held_out.starts, places, side="right")
        begin = np.maximum(corpus.held_out.starts[document - 1], first)
        rows = [np.zeros((1, T), np.int32) for _ in range(3)]
        for row, values in zip(rows, (ids[places], places - begin, document), strict=True):
            row[0, : len(places)] = values
        scores = np.array(score(*rows)[0], np.float64)  # [T V]
        log_z = np.log(np.exp(scores).sum(-1))
        for i, at in enumerate(places.tolist()):
            if at + 1 not in starts:  # the first token of a document is not predicted
                nats.append(log_z[i] - scores[i, ids[at + 1]])
    return figures, nats, corpus


def test_held_out_loss_is_the_mean_over_every_token(held_out_scores):
    figures, nats, corpus = held_out_scores
    assert figures["tokens"] == len(nats) == corpus.held_out.ids.size - corpus.held_out.documents
    assert figures["loss"] == pytest.approx(np.mean(nats), rel=1e-5)  # float32 scores
    assert figures["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)


def test_bits_per_byte_count_the_whole_held_out_text(held_out_scores):
    figures, nats, corpus = held_out_scores
    expected = np.sum(nats) / math.log(2) / corpus.held_out_bytes
    assert figures["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_run_records_the_held_out_loss_of_its_last_step(held_out_scores, uninterrupted_run):
    losses = [
        loss
        for kind, step, loss, _ in read_records(uninterrupted_run)
        if (kind, step) == ("eval", 12)
    ]
    assert losses == [pytest.approx(np.mean(held_out_scores[1]), rel=1e-5)]


# --- console output ---


def test_a_run_prints_a_header_and_a_summary(uninterrupted_run, capsys):
    cfg = override(uninterrupted_run, ["name=seen", "train.steps=4", "train.log_every=2"])
    train(cfg)
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [
        "reading",
        "jaxgpt",
        "run",
        "data",
        "model",
        "plan",
        "speed",
    ]
    assert "8 cpu device(s) (data 8)" in lines[1]
    assert re.search(
        r"^step 2/4  loss \d\.\d{3}  lr \S+  [\d,]+ tokens/s  MFU \d+%  ETA", out, re.M
    )
    assert re.search(
        r"^step 4  held-out loss \d\.\d{4} nats/token  perplexity .* bits/byte",
        out,
        re.M,
    )
    assert "--- sample at step 4 ---" in out
    assert lines[-5].startswith("Done: 4 steps, ")
    assert lines[-1] == f"  jaxgpt sample {cfg.run_folder}"


def test_a_stopped_run_prints_how_to_resume(uninterrupted_run, capsys):
    cfg = override(uninterrupted_run, ["name=told"])
    with call_at_step(1, raise_signal(signal.SIGTERM)):
        train(cfg)
    assert "Stopped by SIGTERM after 2 steps" in capsys.readouterr().out


def test_the_time_of_a_step_is_measured_between_the_metrics_of_two_steps(folder, capsys):
    sizes = ["train.steps=8", "train.eval_every=8", "train.save_every=8"]
    train(run_config(folder, "name=timed", *SETTINGS, *sizes))
    pattern = re.compile(r"compiled|step [156]/8|.* a step: about", re.M)
    found = pattern.findall(capsys.readouterr().out)
    order = ["compiled", "step 1/8", "step 5/8", " a step: about", "step 6/8"]
    assert [text.endswith(end) for text, end in zip(found, order, strict=True)] == [True] * 5
