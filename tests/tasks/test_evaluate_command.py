"""`jaxgpt evaluate --tasks`, and benchmarks during training."""

import json
import os

import matplotlib.image
import numpy as np
import pytest
from benchmark_files import write_benchmarks
from tiny_runs import run_config

from jaxgpt import load
from jaxgpt.cli import evaluate as command
from jaxgpt.evaluate import run as runs
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import Hook, train
from jaxgpt.trainer.logging import read_metrics

SETTINGS = (
    "model.context=24", "train.eval_tasks=blimp", "train.eval_tasks_every=4", "train.steps=10",
    "train.eval_tasks_limit=3", "train.save_every=4", "train.eval_every=5",
)  # fmt: skip


class StepCompilations(Hook):
    """Counts the programs of the training step when the run ends."""

    def on_end(self, view):
        self.count = view._run.train_step._cache_size()


class StopAt(Hook):
    """Ends a run as a kill would, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, view):
        if view.step == self.step:
            raise KeyboardInterrupt


def list_settings(folder) -> list[str]:
    return [*SETTINGS, f"data.benchmarks={folder / 'benchmarks'}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    write_benchmarks(folder / "benchmarks")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Return the config of a finished run with benchmarks, and its programs of a step."""
    cfg = run_config(folder, "name=whole", *list_settings(folder))
    counted = StepCompilations()
    train(cfg, hooks=[counted], is_quiet=True)
    return cfg, counted.count


def list_tasks(cfg) -> list[dict]:
    return [r for r in read_metrics(cfg.run_folder) if r["kind"] == "task"]


def test_benchmarks_are_evaluated_every_so_many_steps(run, folder):
    cfg, _ = run
    found = list_tasks(cfg)
    assert [r["step"] for r in found] == [0, 4, 8, 10]
    assert all(r["task"] == "blimp" for r in found)
    last = runs.evaluate_task(
        load(cfg.run_folder, checkpoint="latest"), "blimp", folder=cfg.data.benchmarks, limit=3
    )
    expected = runs.list_scalars(last)
    assert {"blimp/accuracy", "blimp/accuracy/error", "blimp/accuracy/islands"} <= expected.keys()
    for name, value in expected.items():
        assert found[-1][name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    plot = os.path.join(cfg.run_folder, "plots", "blimp.png")
    assert np.ptp(matplotlib.image.imread(plot)) > 0


def test_benchmarks_leave_the_training_step_alone(run, folder):
    """The step is compiled as often as without benchmarks, and the losses are the same."""
    cfg, count = run
    counted = StepCompilations()
    plain = run_config(folder, "name=plain", *list_settings(folder), "train.eval_tasks=")
    train(plain, hooks=[counted], is_quiet=True)
    assert count == counted.count
    kinds = ("train", "eval")
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(x.run_folder) if r["kind"] in kinds]
        for x in (cfg, plain)
    ]
    assert losses[0] == losses[1]
    assert not list_tasks(plain)


def test_a_resumed_run_has_each_result_once(run, folder):
    cfg = run_config(folder, "name=resumed", *list_settings(folder))
    with pytest.raises(KeyboardInterrupt):
        train(cfg, hooks=[StopAt(9)], is_quiet=True)
    train(cfg, is_quiet=True)
    whole, _ = run
    assert list_tasks(cfg) == list_tasks(whole)


def test_the_console_has_a_line_for_each_result(folder, capsys):
    changes = ("train.steps=1", "train.eval_tasks=auto")
    cfg = run_config(folder, "name=shown", *list_settings(folder), *changes)
    train(cfg)
    shown = capsys.readouterr().out
    assert "step 0  blimp accuracy 0." in shown
    assert "step 1  blimp accuracy 0." in shown
    assert "(chance 0.5)" in shown


def test_missing_files_end_a_run_before_it_starts(folder):
    cfg = run_config(folder, "name=none", "train.eval_tasks=wic", "data.benchmarks=/nowhere")
    with pytest.raises(ConfigError, match=r"data\.benchmarks"):
        train(cfg, is_quiet=True)
    with pytest.raises(ConfigError, match=r"train\.eval_tasks"):
        run_config(folder, "train.eval_tasks=blmp")
    encoder = ("model.family=encoder", "train.objective=masked", "model.vocab=261")
    with pytest.raises(ConfigError, match="answers no questions"):
        train(run_config(folder, "name=encoder", *list_settings(folder), *encoder), is_quiet=True)


# --- the command -----------------------------------------------------------------------------


def test_the_command_prints_and_writes_results(run, folder, tmp_path, capsys):
    cfg, _ = run
    out = tmp_path / "results.json"
    data = f"--data={folder / 'benchmarks'}"
    arguments = [cfg.run_folder, "--tasks", "blimp,wic", "--limit", "2", data, f"--out={out}"]
    assert command.main([*arguments, "--checkpoint", "latest"], "x") == 0
    shown = capsys.readouterr().out
    assert "blimp: first 2 of each of 2 groups (4 of 12)" in shown
    assert "wic: first 2 (2 of 6)" in shown
    content = json.loads(out.read_text())
    assert content["step"] == 10
    assert content["tasks"].keys() == {"blimp", "wic"}
    answers = content["tasks"]["blimp"]["answers"]
    assert len(answers) == 4
    assert {"id", "group", "accuracy", "logprobs", "tokens"} <= answers[0].keys()
    mean = np.mean([x["accuracy"] for x in answers])
    assert content["tasks"]["blimp"]["metrics"]["accuracy"]["value"] == pytest.approx(mean)


def test_the_command_quantizes_the_model(run, folder, tmp_path, capsys):
    cfg, _ = run
    out, data = tmp_path / "results.json", f"--data={folder / 'benchmarks'}"
    arguments = [cfg.run_folder, "--tasks", "wic", data, f"--out={out}", "--quantize", "int8"]
    assert command.main(arguments, "x") == 0
    assert "int8" in capsys.readouterr().err
    found = json.loads(out.read_text())["tasks"]["wic"]["answers"]
    quantized, plain = (
        runs.evaluate_task(model, "wic", folder=str(folder / "benchmarks")).answers
        for model in (load(cfg.run_folder, quantize="int8"), load(cfg.run_folder))
    )
    assert [x["logprobs"] for x in found] == [x["logprobs"] for x in quantized]
    assert [x["logprobs"] for x in found] != [x["logprobs"] for x in plain]


def test_the_command_measures_perplexity_and_contamination(run, folder, tmp_path, capsys):
    cfg, _ = run
    text = next((folder / "text").glob("*.txt"))
    data = f"data.benchmarks={folder / 'benchmarks'}"
    arguments = [cfg.run_folder, "--tasks", "wic", "--contamination", f"--text={text}", data]
    assert command.main([*arguments, "--ngram", "2", "--json"], "x") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tasks"]["wic"]["contamination"]["words"] == 2
    assert content["tasks"]["wic"]["contamination"]["questions"] == 6
    # "a cat" is of the training text.
    assert content["tasks"]["wic"]["contamination"]["contaminated"] == 6
    found = content["tasks"]["perplexity"]["metrics"]
    assert found["byte_perplexity"]["value"] > 1
    assert found["perplexity"]["error"] > 0


def test_the_command_compares_sizes(run, folder, tmp_path, capsys):
    cfg, _ = run
    text = next((folder / "text").glob("*.txt"))
    out = tmp_path / "emergence.png"
    arguments = [cfg.run_folder, cfg.run_folder + "/best", "--emergence", f"--text={text}"]
    assert command.main([*arguments, f"--out={out}"], "x") == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert np.ptp(matplotlib.image.imread(out)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "blmp"], "Did you mean 'blimp'"),
        (["--tasks", "blimp", "--limit", "-1"], "at least 0"),
        (["--tasks", "perplexity"], "--tasks needs --text"),
        (["--contamination"], "--contamination needs --tasks"),
        (["--emergence"], "--emergence needs --text"),
        (["--out", "x.json"], "--out needs --tasks"),
        (["--tasks", "blimp", "--data", "/nowhere"], "Get the files of"),
        (["--tasks", "blimp", "train.steps=3"], "belongs to the run"),
    ],
)
def test_arguments_that_are_no_use_are_refused(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        command.main([run[0].run_folder, *arguments], "x")


def test_several_runs_are_evaluated_one_at_a_time(run):
    with pytest.raises(ConfigError, match="2 runs are given"):
        command.main([run[0].run_folder] * 2, "x")


def test_a_model_of_elsewhere_names_its_training_text(folder, tmp_path):
    from tiny_decoders import make_model

    from jaxgpt.interop import convert, huggingface

    huggingface.write_folder(convert.to_archive(make_model()), str(tmp_path / "model"))
    arguments = [str(tmp_path / "model"), "--tasks", "wic", "--contamination"]
    with pytest.raises(ConfigError, match="was not trained here"):
        command.main([*arguments, "--data", str(folder / "benchmarks")], "x")
