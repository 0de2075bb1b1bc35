"""Every objective in the training loop: it learns, resumes after a stop, and predicts."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny_runs import (
    assert_same_bits,
    has_drawing,
    restore_latest,
    run_config,
    single_device_env,
)

from jaxgpt import trainer
from jaxgpt.config import override
from jaxgpt.console import format_predictions
from jaxgpt.loading import load, read_labels
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import loop, train
from jaxgpt.trainer.logging import read_metrics

ROOT = os.path.dirname(os.path.dirname(trainer.__file__)) + "/.."
WORDS = {"cat": "animal", "dog": "animal", "cow": "animal", "oak": "tree", "elm": "tree"}

SETTINGS = {
    "prefix": ["model.pattern=prefix"],
    "masked": ["model.family=encoder", "sample.prompt=the <mask>"],
    "span": ["model.family=encoder_decoder", "model.position=t5", "model.encoder_layers=1"],
    "pairs": ["model.family=encoder_decoder", "data.source={pairs}", "data.target_key=kind"],
    "classify": ["model.family=encoder", "model.classes=2", "data.source={pairs}",
                 "data.target_key=kind"],
}  # fmt: skip
every_objective = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    rows = [{"text": f"{n % 7} {word} {n}", "kind": kind}
            for n in range(24) for word, kind in WORDS.items()]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_config(folder, name, *more):
    given = [s.format(pairs=folder / "pairs.jsonl") for s in SETTINGS[name]]
    return run_config(
        folder, f"name={name}", f"train.objective={name}", "model.vocab=300", "train.steps=60",
        "train.eval_every=20", "train.save_every=20", "train.log_every=1", *given, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder):
    """Return a function that trains an objective once."""
    done = {}

    def run(name):
        if name not in done:
            cfg = make_config(folder, name)
            train(cfg, is_quiet=True)
            done[name] = cfg
        return done[name]

    return run


@every_objective
def test_an_objective_is_learned(trained, name):
    cfg = trained(name)
    records = read_metrics(cfg.run_folder)
    held = [r["loss"] for r in records if r["kind"] == "eval"]
    first = next(r["nats"] for r in records if r["kind"] == "train")
    assert len(held) == 4  # one of the untrained model
    # Starts near the logarithm of the vocabulary, or of two classes.
    assert held[-1] < 0.75 * first


@pytest.mark.parametrize("name", ["masked", "pairs"])  # one of windows, one of pairs
def test_a_stopped_run_resumes_bit_for_bit(trained, folder, name, monkeypatch):
    whole = trained(name)
    cfg = override(whole, [f"name={name}_resumed"])
    save = trainer.loop.save

    def stop_at_40(run):
        save(run)
        if run.progress.step == 40:
            run.saver.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "save", stop_at_40)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, is_quiet=True)
    monkeypatch.setattr(trainer.loop, "save", save)
    train(cfg, is_quiet=True)
    assert_same_bits(restore_latest(cfg)[0], restore_latest(whole)[0])


def predict_answers(cfg, prompts, *more):
    model = load(cfg.run_folder)
    config = override(model.config, [f"sample.{s}" for s in more])
    model = dataclasses.replace(model, config=config)
    if "generate" in model.abilities:
        return [row.text for row in model.generate(prompts)]
    return format_predictions(model, prompts)


def test_a_classifier_predicts_classes_and_writes_its_confusion_matrix(trained):
    cfg = trained("classify")
    outputs = predict_answers(cfg, ["3 cat 9", "1 elm 4"])
    assert [s.split()[0] for s in outputs] == ["animal", "tree"]
    assert read_labels(cfg.run_folder) == ["animal", "tree"]
    with open(os.path.join(cfg.run_folder, "confusion.json")) as file:
        confusion = json.load(file)
    last = [r for r in read_metrics(cfg.run_folder) if r["kind"] == "eval"][-1]
    rows = np.array(confusion["rows"])
    assert rows.sum() == last["tokens"] > 0
    np.testing.assert_allclose(np.trace(rows) / rows.sum(), last["accuracy"], rtol=1e-5)
    for name in ("loss", "accuracy", "confusion"):
        assert has_drawing(os.path.join(cfg.run_folder, "plots", f"{name}.png"))


def test_targets_of_pairs_are_predicted(trained):
    outputs = predict_answers(
        trained("pairs"), ["2 dog 11", "5 oak 1"], "tokens=8", "temperature=0"
    )
    assert outputs == ["animal", "tree"]


def test_masks_are_filled_with_probabilities(trained):
    (outputs,) = predict_answers(trained("masked"), ["the c<mask>t<mask>"], "top_k=3")
    lines = outputs.split("\n")
    assert len(lines) == 2
    for line in lines:
        odds = [float(x.rstrip("%")) for x in line.split() if x.endswith("%")]
        assert len(odds) == 3
        assert odds == sorted(odds, reverse=True)
        assert 0 < sum(odds) <= 100.1


def test_a_prompt_without_a_mask_is_rejected(trained):
    with pytest.raises(ConfigError, match="has no <mask> to fill"):
        predict_answers(trained("masked"), ["nothing hidden"])


@pytest.mark.parametrize("name", ["masked", "span"])
def test_a_prompt_longer_than_the_context_is_rejected(trained, name):
    with pytest.raises(ConfigError, match=r"prompt has \d+ tokens.*model.context=16"):
        predict_answers(trained(name), ["<mask>" + "a long question " * 3])


def test_spans_are_generated_mask_by_mask(trained):
    (outputs,) = predict_answers(trained("span"), ["the c<mask> sat"], "tokens=12", "temperature=0")
    assert outputs.startswith("<0>")


def test_more_masks_than_the_model_has_are_rejected(trained):
    cfg = trained("span")
    known = cfg.objective.task.count_mask_tokens(cfg)
    with pytest.raises(ConfigError, match=f"masks; the model has {known}"):
        predict_answers(cfg, ["<mask>" * (known + 1)])


@pytest.mark.parametrize("name", ["masked", "span"])
def test_the_vocabulary_has_room_for_masks_beside_the_tokens(folder, name):
    cfg = make_config(folder, name, f"name=room_{name}", "data.tokenizer=train", "model.vocab=275")
    run = loop.open_run(cfg, is_quiet=True)
    masks = cfg.objective.task.count_mask_tokens(cfg)
    assert masks > 0
    assert run.corpus.tokenizer.vocab_size == 275 - masks  # as many as fit are trained
    run.saver.close()


def test_an_invalid_prompt_is_rejected_before_training(folder):
    with pytest.raises(ConfigError, match="has no <mask> to fill"):
        train(make_config(folder, "masked", "sample.prompt=the", "name=never"), is_quiet=True)
    assert not os.path.exists(folder / "runs" / "never" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [("classify", "3 cat 9", "3 cat 9\nanimal"), ("pairs", "3 cat 9", "3 cat 9\nanimal"),
     ("masked", "the <mask>at", "the <mask>at\n<mask>  '")],
)  # fmt: skip
def test_sample_py_prints_the_output_of_the_objective(trained, name, prompt, expected):
    command = [sys.executable, "sample.py", trained(name).run_folder, "--prompt", prompt,
               "temperature=0", "tokens=9"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=single_device_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected)
