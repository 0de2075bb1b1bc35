"""Loss by position, against one forward pass for each token; and contexts that are extended."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from helpers import random_params, single_document_coords, tiny
from tiny_runs import run_config

import jaxgpt
from jaxgpt import inspect
from jaxgpt.cli import context as context_cli
from jaxgpt.config import Config, TrainConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import build, compute_logits
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer
from jaxgpt.trainer.start import find_start, match_start


def make_model(objective="causal", **changes) -> LanguageModel:
    cfg = tiny(vocab=300, context=8, **changes)
    config = Config(model=cfg, train=TrainConfig(objective=objective))
    return LanguageModel(config, random_params(cfg, std=0.3), make_byte_tokenizer())


def test_the_loss_at_a_position_is_that_of_the_tokens_before_it_alone():
    model, rows = make_model(), np.random.default_rng(0).integers(0, 300, (3, 21))
    found = inspect.loss_by_position(model, rows)
    cfg = model.config.model
    for t in (0, 8, 19):
        tokens = jnp.asarray(rows[:, : t + 1])
        hidden, _ = build(cfg).apply(
            {"params": model.params}, tokens, single_document_coords(tokens)
        )
        logits = np.asarray(compute_logits(cfg, model.params, hidden[:, -1]), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -logits[np.arange(3), rows[:, t + 1]]
        np.testing.assert_allclose(found.losses[:, t], expected, atol=2e-4)
    assert found.context == 8
    assert found.mean.shape == (20,)


def test_bins_double_and_cover_every_position_once():
    losses = np.random.default_rng(0).random((5, 100)).astype(np.float32)
    bins = inspect.LossByPosition(losses, 16).bins
    assert [(x.first, x.end) for x in bins] == [(0, 16), (16, 32), (32, 64), (64, 100)]
    means = losses[:, 32:64].astype(np.float64).mean(1)
    assert bins[2].loss == pytest.approx(means.mean())
    assert bins[2].error == pytest.approx(np.sqrt(((means - means.mean()) ** 2).sum() / 4 / 5))
    assert np.isnan(inspect.LossByPosition(losses[:1], 16).bins[0].error)


def test_positions_that_a_model_does_not_have_are_refused():
    rows = np.zeros((1, 10), np.int32)
    with pytest.raises(ConfigError, match=r"--length 9: .* each of model.context=8 positions"):
        inspect.loss_by_position(make_model(position="learned"), rows)
    assert inspect.loss_by_position(make_model(position="learned"), rows[:, :9]).losses.size == 8
    with pytest.raises(ConfigError, match=r"is of a decoder.* model.family='encoder'"):
        inspect.loss_by_position(make_model("masked", family="encoder"), rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and one of four times its context that started from it, with what it printed."""
    folder = tmp_path_factory.mktemp("context")
    steps = ["train.steps=3", "train.eval_every=3", "train.batch=8", "data.holdout=0.4"]
    short = run_config(folder, "name=short", *steps)
    jaxgpt.train(short, is_quiet=True)
    changes = ["model.context=64", "model.rope.scaling=yarn", "model.rope.factor=4"]
    long = run_config(folder, "name=long", *steps, *changes, f"train.start={short.run_folder}")
    jaxgpt.train(long, is_quiet=True)
    return short, long


def test_a_run_goes_on_at_four_times_its_context_and_tells_what_changed(runs):
    _short, long = runs
    told = "\n".join(match_of(long).differences)
    for key in ("model.context", "model.rope.scaling", "model.rope.factor"):
        assert key in told
    assert "not taken" not in told
    old, new = (jaxgpt.load(run.run_folder) for run in runs)
    assert jax.tree.map(jnp.shape, old.params) == jax.tree.map(jnp.shape, new.params)
    text = "the cat " * 7  # longer than 16 tokens
    assert len(new.score([text])[0].tokens) > 32
    with pytest.raises(ConfigError, match="context"):
        old.score([text])


def test_rows_lie_in_one_document_each(runs):
    model = jaxgpt.load(runs[0].run_folder)
    rows = inspect.read_long_rows(model, 40, 1000)
    assert len(rows) > 3
    assert not (rows[:, 1:] == model.tokenizer.bos).any()  # it begins a document
    assert not (rows[:, :-1] == model.tokenizer.eos).any()
    few = inspect.read_long_rows(model, 40, 3)
    np.testing.assert_array_equal(few, rows[[0, (len(rows) - 1) // 2, -1]])


def match_of(cfg):
    """Return what a run takes from its start."""
    start = find_start(cfg.train.start)
    return match_start(start, cfg, start.tokenizer)


def test_theta_is_raised_by_one_setting(runs):
    short, long = runs
    model = dataclasses.replace(long.model, rope=dataclasses.replace(short.model.rope, theta=1e5))
    told = match_of(dataclasses.replace(long, model=model)).differences
    assert any("model.rope.theta" in line and "100000" in line for line in told)


def test_the_command_compares_runs_on_the_same_rows_and_draws_them(runs, tmp_path, capsys):
    short, long = (run.run_folder for run in runs)
    figure = tmp_path / "context.png"
    arguments = [short, long, "--length", "64", "--rows", "3", "--out", str(figure)]
    assert context_cli.main(arguments, "jaxgpt context") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^(\d+-\d+)", shown, re.M) == ["0-15", "16-31", "32-63"]
    assert matplotlib.image.imread(figure).shape[2] == 4
    assert context_cli.main([short, "--length", "64", "--rows", "3", "--json"], "c") == 0
    found = json.loads(capsys.readouterr().out)
    model = jaxgpt.load(short)
    rows = inspect.read_long_rows(model, 64, 3)
    assert rows.shape == (3, 65)
    expected = inspect.loss_by_position(model, rows).bins
    assert [x["loss"] for x in found["bins"][short]] == [x.loss for x in expected]
    assert f"{expected[2].loss:.4f}" in shown


def test_scaling_without_training_is_a_setting_of_the_command(runs, capsys):
    short = runs[0].run_folder
    scaled = ["model.context=64", "model.rope.scaling=yarn", "model.rope.factor=4"]
    assert context_cli.main([short, *scaled, "--rows", "2", "--json"], "c") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["length"] == 64
    context_cli.main([short, "--length", "64", "--rows", "2", "--json"], "c")
    plain = json.loads(capsys.readouterr().out)
    assert [x["loss"] for x in found["bins"][short]] != [x["loss"] for x in plain["bins"][short]]
    with pytest.raises(
        ConfigError, match=r"model.width does not fit: settings of context are data"
    ):
        context_cli.main([short, "model.width=8"], "c")
    with pytest.raises(ConfigError, match=r"set model.rope.scaling"):
        context_cli.main([short, "model.context=64"], "c")
    with pytest.raises(ConfigError, match=r"no document of .* has 90001 tokens; the longest has"):
        context_cli.main([short, "--length", "90000"], "c")
