"""A study: in which order its parts run, that it goes on where it stopped, and its report."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_runs import run_config

from jaxgpt.cli import scaling as command
from jaxgpt.model import count_params
from jaxgpt.scaling import study, study_report, sweep
from jaxgpt.scaling.laws import Law
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.speed import flops_per_token

TRUE = Law(1.7, 60.0, 400.0, 0.4, 0.45)
PLAN = study.Plan(
    tuned=("8x1", "16x1", "32x1"), tune_tokens=512, sizes=("8x1", "16x1", "32x2"),
    budgets=(512, 1024, 4096), held_out="64x2", held_out_tokens=8192, settings=(), bootstrap=4,
)  # fmt: skip


class Trainer:
    """In place of training: the loss of a law, and a memory of what was trained."""

    def __init__(self, folder):
        self.folder, self.trained, self.left, self.seeds = folder, [], 1000, {}

    def __call__(self, config):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.trained.append(config.name)
        if config.seed:
            self.seeds[config.name] = config.seed
        count = count_params(config.model)
        tokens = config.train.steps * config.train.batch * config.model.context
        is_held_out = config.name.startswith("64x2")
        assert is_held_out == (self.folder / "prediction.json").exists()
        return {
            "name": config.name, "width": config.model.width, "layers": config.model.layers,
            "lr": config.optimizer.lr, "parameters": count["total"],
            "parameters_without_embeddings": sweep.COUNTS["no_embeddings"](count),
            "tokens": tokens, "flops": flops_per_token(config.model) * tokens,
            "loss": float(TRUE.predict(count["total"], tokens)) * (1 + 1e-5 * config.optimizer.lr),
            "seconds": 5.0,
        }  # fmt: skip


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    fake = Trainer(tmp_path / "study")
    monkeypatch.setattr(sweep, "train_to_end", fake)
    monkeypatch.setattr(study, "train_to_end", fake)
    return fake


@pytest.fixture
def quick(monkeypatch):
    """Fit and draw in no time: what is tested is the order of things."""
    law = dataclasses.replace(TRUE, samples=np.tile(TRUE.constants, (3, 1)), count=9)
    for module in (study, study_report):
        monkeypatch.setattr(module, "fit", lambda runs, bootstrap: law)
    monkeypatch.setattr(study_report, "plot_law", lambda *args: Figure())


def run(tmp_path, plan=PLAN, out=""):
    lines = []
    path = study.run_study(run_config(tmp_path), str(tmp_path / "study"), plan, out, lines.append)
    return path, lines


def test_a_study_predicts_the_larger_run_before_it_is_trained(tmp_path, trainer):
    path, lines = run(tmp_path)
    assert [name for name in trainer.trained if name.startswith("lr-")] == trainer.trained[:15]
    assert trainer.trained[-1] == "64x2-32"
    seeds = [f"8x1-{steps}-seed{n}" for steps in (2, 16) for n in (1, 2)]
    assert trainer.trained[15 + 9 : -1] == seeds
    assert trainer.seeds == dict(zip(seeds, (1, 2, 1, 2), strict=True))
    prediction = json.loads((tmp_path / "study/prediction.json").read_text())
    measured = json.loads((tmp_path / "study/held_out.json").read_text())
    assert prediction["parameters"] == measured["parameters"]
    assert prediction["loss"] == pytest.approx(measured["loss"], rel=0.02)
    text = pathlib.Path(path).read_text()
    assert f"| measured | {measured['loss']:.4f} |" in text
    assert f"| predicted | {prediction['loss']:.4f}, 95%" in text
    assert len(re.findall(r"^\| \d+x\d+-\d+ \|", text, re.M)) == 9 + 1
    assert "3 seeds of `8x1-16` end at" in text
    assert re.search(r"FLOPs in 1 min\.", text)
    size, budget, ratio = re.search(
        r"^\| [\d.e+]+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", text, re.M).groups()  # fmt: skip
    assert float(ratio) == pytest.approx(
        float(budget.replace(",", "")) / float(size.replace(",", "")), abs=0.06)  # fmt: skip
    alpha = float(re.search(r"\| alpha \| ([\d.]+)", text)[1])
    assert alpha == pytest.approx(TRUE.alpha, abs=0.1)
    assert (tmp_path / "study/scaling.png").read_bytes().startswith(b"\x89PNG")
    assert any("predicted" in line for line in lines)


@pytest.mark.parametrize("done", [3, 15, 19, 26, 28])
@pytest.mark.usefixtures("quick")
def test_a_study_goes_on_where_it_stopped_and_trains_nothing_twice(tmp_path, trainer, done):
    trainer.left = done
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    before = list(trainer.trained)
    trainer.left = 1000
    run(tmp_path)
    # Runs that measure rates are folders until all of them are there; here none is on disk.
    again = trainer.trained[len(before) :]
    twice = [name for name in before if name in again and not name.startswith("lr-")]
    assert not twice
    assert done < 15 or not any(name.startswith("lr-") for name in again)
    trainer.trained.clear()
    run(tmp_path)
    assert not trainer.trained


@pytest.mark.usefixtures("quick")
def test_a_study_of_another_plan_needs_another_folder(tmp_path, trainer):
    run(tmp_path)
    other = dataclasses.replace(PLAN, budgets=(512,))
    with pytest.raises(ConfigError, match="a study of another plan: budgets differ"):
        run(tmp_path, other)


@pytest.mark.usefixtures("quick")
def test_a_study_goes_on_by_settings_that_mean_the_same(tmp_path, trainer):
    """The plan of an older study has no seeds, and other values may be given over and over."""
    run(tmp_path, dataclasses.replace(PLAN, settings=("optimizer.lr=0.001", "optimizer.b2=0.9")))
    path = tmp_path / "study/plan.json"
    plan = json.loads(path.read_text())
    del plan["seeds"]
    path.write_text(json.dumps(plan))
    trainer.trained.clear()
    again = ("optimizer.lr=0.5", "optimizer.b2=0.9", "optimizer.lr=0.001")
    run(tmp_path, dataclasses.replace(PLAN, settings=again))
    assert not trainer.trained
    with pytest.raises(ConfigError, match="settings differ"):
        run(tmp_path, dataclasses.replace(PLAN, settings=again[:2]))


@pytest.mark.usefixtures("quick")
def test_a_run_that_began_before_its_prediction_is_refused(tmp_path, trainer):
    (tmp_path / "study/64x2-32").mkdir(parents=True)
    with pytest.raises(ConfigError, match="the run began before it was predicted"):
        run(tmp_path)


@pytest.mark.usefixtures("quick")
def test_the_report_is_a_page_of_the_docs_as_well(tmp_path, trainer):
    out = tmp_path / "docs/scaling_laws.md"
    out.parent.mkdir()
    path, _ = run(tmp_path, out=str(out))
    assert path == str(out)
    assert "(images/scaling_laws.png)" in out.read_text()
    assert (out.parent / "images/scaling_laws.png").exists()


def test_the_plan_that_ships_is_of_six_sizes_and_fits_two_cores(tmp_path):
    plan, base = study.Plan(), study.override(study.Config(), [])
    _shared, swept, held_out = study.make_plan(base, plan, str(tmp_path))
    assert len(plan.sizes) == 6
    base = study.override(base, ["train.eval_tasks=auto"])
    assert not study.make_plan(base, plan, str(tmp_path))[2].train.eval_tasks
    assert len(swept) == 24
    largest = max(count_params(config.model)["total"] for config in swept)
    assert count_params(held_out.model)["total"] > 2 * largest
    flops = study.count_flops(base, plan, str(tmp_path))
    assert flops < 7e14  # an hour and a half at 130 GFLOP/s


def test_the_command_passes_its_arguments_on(tmp_path, trainer, monkeypatch, capsys):
    seen = {}

    def keep(base, folder, plan, out):
        seen.update(base=base, plan=plan, folder=folder, out=out)
        return "report.md"

    monkeypatch.setattr(study, "run_study", keep)
    arguments = ["study", "s", "--sizes", "32x1,8x1,16x1,64x1", "--tokens", "1e3,2e3",
                 "--held-out", "96x1", "data.source=x"]  # fmt: skip
    assert command.main(arguments, "jaxgpt scaling") == 0
    assert seen["plan"].tuned == ("8x1", "16x1", "32x1")
    assert seen["plan"].budgets == (1000, 2000)
    assert seen["plan"].held_out == "96x1"
    assert seen["plan"].held_out_tokens == 4e6
    assert seen["plan"].settings == (*study.SETTINGS, "data.source=x")
    assert capsys.readouterr().out == "report.md\n"
    assert seen["folder"] == "s"
