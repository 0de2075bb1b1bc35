"""Whole runs of the objectives on conversations: they learn, resume bit for bit, and are saved."""

import dataclasses
import os
import shutil
from contextlib import closing

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_chat_mask import CONVERSATIONS, PAIRS, write
from tiny_runs import assert_same_bits, run_config

import jaxgpt
from jaxgpt.config import override, to_json
from jaxgpt.data import prepare
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.chat_templates import TEMPLATES
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.trainer.loop import train
from jaxgpt.trainer.online import Rollouts, normalize_groups
from jaxgpt.trainer.run import open_run

SETTINGS = ("data.chat_template=plain", "model.context=64", "train.batch=8", "data.holdout=0.3",
            "train.log_every=1", "data.tokenizer=bytes", "model.unroll=1")  # fmt: skip

pytestmark = pytest.mark.usefixtures("compiled_once")


def resume_a_copy(cfg, name, *assignments):
    """Train the last steps of a run again, in a copy of its folder without its last checkpoint."""
    copy = override(cfg, [f"name={name}", *assignments])
    shutil.copytree(cfg.run_folder, copy.run_folder)
    shutil.rmtree(os.path.join(copy.run_folder, "checkpoints", str(cfg.train.steps)))
    with open(os.path.join(copy.run_folder, "config.json"), "w") as file:
        file.write(to_json(copy))
    assert train(copy, is_quiet=True).step == cfg.train.steps
    return copy


def make_config(folder, name, records, *assignments):
    source = write(folder, f"{name}.jsonl", records)
    return run_config(folder, f"data.source={source}", f"name={name}", *SETTINGS, *assignments)


def read(cfg, kind):
    return [row for row in read_metrics(cfg.run_folder) if row["kind"] == kind]


def assert_same_params(one, other):
    pair = [
        flatten_dict(jaxgpt.load(c.run_folder, checkpoint="latest").params) for c in (one, other)
    ]
    for path, x in pair[0].items():
        np.testing.assert_array_equal(x, pair[1][path])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def chat_run(folder):
    cfg = make_config(folder, "chat", CONVERSATIONS, "train.objective=chat", "train.steps=40",
                      "data.packing=documents", "train.eval_every=20")  # fmt: skip
    train(cfg, is_quiet=True)
    return cfg


def test_a_chat_run_learns_and_saves_its_template(chat_run):
    first, *_, last = (row["loss"] for row in read(chat_run, "eval"))
    assert last < 0.8 * first  # of 5.5 nats, less than half is left; bytes are easy
    model = jaxgpt.load(chat_run.run_folder)
    assert model.tokenizer.chat_template == TEMPLATES["plain"]
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "a"}])
    assert ids[0] == model.tokenizer.bos  # bos_token is what it was in training


@pytest.fixture(scope="module")
def preference_run(folder, chat_run):
    cfg = make_config(
        folder, "preference", PAIRS, "train.objective=preference", "train.steps=12",
        f"train.start={chat_run.run_folder}", "train.eval_every=6", "optimizer.lr=3e-3",
        "train.save_every=10",
    )  # fmt: skip
    train(cfg, is_quiet=True)
    return cfg


def test_preferences_begin_at_log_2_and_are_learned(preference_run):
    first, last = (read(preference_run, kind)[n] for kind, n in (("train", 0), ("eval", -1)))
    assert abs(first["loss"] - np.log(2)) < 1e-5
    assert abs(first["margin"]) < 1e-4
    assert last["accuracy"] == 1.0
    assert last["margin"] > 0
    assert last["chosen_logprob"] < 0


def test_adapters_learn_preferences_from_log_2_on(preference_run):
    settings = ["name=adapted", "lora.rank=2", "train.steps=4", "train.eval_every=4"]
    cfg = override(preference_run, settings)
    train(cfg, is_quiet=True)
    first, last = (read(cfg, "train")[n] for n in (0, -1))
    assert abs(first["loss"] - np.log(2)) < 1e-5
    assert last["loss"] < first["loss"]


def test_a_preference_run_resumes_bit_for_bit_without_its_cache(preference_run, folder):
    elsewhere = folder / "elsewhere"
    again = resume_a_copy(preference_run, "again", f"data.cache={elsewhere}")
    assert os.path.exists(os.path.join(again.run_folder, "reference.npz"))
    assert not list(elsewhere.glob("reference*"))
    assert_same_params(preference_run, again)


def test_the_reference_is_computed_once_for_runs_that_begin_alike(preference_run, monkeypatch):
    from jaxgpt.trainer import frozen

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(frozen, "_compute", fail)
    other = override(preference_run, ["name=ipo", "preference.loss=ipo", "train.steps=3"])
    with (
        closing(open_run(other, is_quiet=True)) as run,
        closing(open_run(preference_run, is_quiet=True)) as first,
    ):
        for rows, expected in zip(run.task.all_rows, first.task.all_rows, strict=True):
            np.testing.assert_array_equal(rows.reference, expected.reference)
            assert (rows.reference < 0).all()
    for change in ("train.start=", "data.chat_template={{'x'}}" + TEMPLATES["plain"]):
        with pytest.raises(AssertionError, match="computed again"):
            open_run(override(other, ["name=other", change]), is_quiet=True)


REWARD = """def digits(record, answer):
    return sum(c in "0123456789" for c in answer) / max(len(answer), 1)
def letters(record, answer):
    return sum(c.isalpha() for c in answer) / max(len(answer), 1)
def wrong(record, answer):
    return float("nan")
"""


@pytest.fixture(scope="module")
def online_config(folder):
    path = folder / "toy_rewards.py"
    path.write_text(REWARD)
    records = [{"prompt": f"q{n}"} for n in range(20)]
    return make_config(
        folder, "online", records, "train.objective=online", f"online.reward={path}:digits",
        "online.answer_tokens=4", "train.steps=30", "train.eval_every=30", "optimizer.lr=1e-2",
        "model.layers=1", "online.kl=0.02", "train.save_every=28",
    )  # fmt: skip


@pytest.fixture(scope="module")
def online_run(online_config):
    train(online_config, is_quiet=True)
    return online_config


def test_an_online_run_raises_its_reward(online_run):
    rewards = [row["reward"] for row in read(online_run, "train")]
    # 10 of 260 tokens are digits: 0.04 by chance, and about 0.9 is reached.
    assert np.mean(rewards[:3]) < 0.2
    assert np.mean(rewards[-3:]) > 0.5, rewards
    final = read(online_run, "eval")[-1]
    assert final["loss"] == pytest.approx(-final["reward"])
    assert final["reward"] > 0.5


def test_an_online_run_resumes_bit_for_bit_and_is_tied_to_its_start(online_run):
    again = resume_a_copy(online_run, "again_online")
    assert_same_params(online_run, again)
    kl = [row["kl"] for row in read(online_run, "train")]
    assert abs(kl[0]) < 1e-6 < kl[-1]


def test_adapters_learn_from_rewards_beside_a_frozen_reference(online_run):
    cfg = override(online_run, [
        "name=adapted_online", f"train.start={online_run.run_folder}@latest", "lora.rank=4",
        "lora.targets=q,v,o,down,head", "train.steps=12",
        f"online.reward={online_run.online.reward.replace(':digits', ':letters')}",
    ])  # fmt: skip
    train(cfg, is_quiet=True)
    rows = read(cfg, "train")
    assert abs(rows[0]["kl"]) < 1e-6 < rows[-1]["kl"]  # the reference is the base alone
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    tuned, start = (jaxgpt.load(c.run_folder, checkpoint="latest") for c in (cfg, online_run))
    assert_same_bits(tuned.base, start.params)


def test_a_reward_that_is_missing_or_fails_is_named(online_config):
    failures = {":nothing": "has no function 'nothing'", ":wrong": "is nan"}
    for name, message in failures.items():
        reward = online_config.online.reward.replace(":digits", name)
        online = dataclasses.replace(online_config.online, reward=reward)
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(online_config, name=name[1:], online=online), is_quiet=True)


def test_a_student_learns_its_teacher_and_another_tokenizer_is_refused(chat_run, folder):
    cfg = make_config(
        folder, "student", CONVERSATIONS, "train.objective=chat", "train.steps=20",
        f"distill.teacher={chat_run.run_folder}", "distill.weight=1", "model.layers=1",
        "data.packing=documents", "train.eval_every=20",
    )  # fmt: skip
    train(cfg, is_quiet=True)
    divergences = [row["divergence"] for row in read(cfg, "train")]
    assert divergences[-1] < 0.7 * divergences[0]
    other = dataclasses.replace(
        cfg, name="refused", data=dataclasses.replace(cfg.data, tokenizer="train"),
        model=dataclasses.replace(cfg.model, vocab=300),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has another tokenizer"):
        train(other, is_quiet=True)


def test_the_advantages_of_a_group_have_mean_0_and_deviation_1():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    found = normalize_groups(rewards, 4)
    np.testing.assert_allclose(found, [1, -1, -1, 1, 0, 0, 0, 0], atol=1e-5)  # of its epsilon


def test_answers_are_drawn_anew_at_every_step(online_config, chat_run):
    model = jaxgpt.load(chat_run.run_folder)
    rules = dataclasses.replace(online_config.train, batch=2)
    cfg = dataclasses.replace(online_config, model=model.config.model, train=rules)
    encoder = cfg.objective.task.make_encoder(cfg)
    corpus = prepare(cfg.data, cfg.tokenizer_vocab, log=lambda line: None, encoder=encoder)
    task = cfg.objective.task(cfg, corpus)
    roll_out, prompts = Rollouts(cfg, task, corpus.tokenizer), task.make_batch(0)
    first, again, next_one = (roll_out(model.params, prompts, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != next_one.tokens).any()
    for row in range(len(first.tokens)):  # only what the model wrote counts, after the prompt
        written = first.targets[row][first.weights[row] > 0]
        prompt = task.read_prompts(prompts)[row // cfg.online.group][0]
        assert 1 <= written.size <= cfg.online.answer_tokens + 1
        assert first.tokens[row, : prompt.size].tolist() == prompt.tolist()
        assert not first.weights[row, : prompt.size - 1].any()
