"""`jaxgpt evaluate` and `jaxgpt sample` on tiny runs: numbers of training, answers by line."""

import dataclasses
import json
import os
import shutil

import pytest
from tiny_runs import run_config

from jaxgpt import console, evaluation, load
from jaxgpt.cli import evaluate as command
from jaxgpt.cli import sample
from jaxgpt.config import override
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer
from jaxgpt.trainer import train
from jaxgpt.trainer.logging import read_metrics

SETTINGS = {
    "causal": [],
    "classify": [
        "model.family=encoder", "model.classes=2", "data.source={pairs}", "data.target_key=kind"
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=SETTINGS)
def run(request, tmp_path_factory):
    """Return the config of a finished run whose best checkpoint is its only one."""
    folder = tmp_path_factory.mktemp("evaluation")
    kinds = {"cat": "animal", "oak": "tree"}.items()
    rows = [
        {"text": f"{n % 7} {word} {n}", "kind": kind} for n in range(30) for word, kind in kinds
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [text.format(pairs=folder / "pairs.jsonl") for text in SETTINGS[request.param]]
    cfg = run_config(folder, f"train.objective={request.param}", "train.steps=10", *given)
    train(cfg, is_quiet=True)
    return cfg


def last_evaluation(cfg):
    return [r for r in read_metrics(cfg.run_folder) if r["kind"] == "eval"][-1]


def test_the_held_out_text_has_the_loss_of_training(run):
    found = evaluation.measure(load(run.run_folder))
    expected = last_evaluation(run)
    for name in expected.keys() & found.values.keys():
        value = found.values[name]
        value = float(f"{value:.9g}") if isinstance(value, float) else value  # as it is recorded
        assert value == expected[name], name
    assert {"loss", "perplexity", "accuracy", "tokens"} <= expected.keys() & found.values.keys()


def test_any_text_is_measured_whole(run, capsys):
    """With data.source, all of it: the held-out part and the rest."""
    source = run.data.source
    assert command.main([run.run_folder, f"data.source={source}", "--json"], "x") == 0
    found = json.loads(capsys.readouterr().out)
    whole = load(run.run_folder)
    held = evaluation.measure(whole).values
    assert found["tokens"] > held["tokens"]
    assert found["text"].startswith(f"data.source={source}")
    assert found["step"] == 10
    if run.train.objective == "causal":
        # Of each of the files, every target once: its bytes and eos.
        sizes = [os.path.getsize(os.path.join(source, name)) for name in os.listdir(source)]
        assert found["tokens"] == pytest.approx(sum(sizes) + len(sizes), abs=len(sizes) + 1)
    else:
        assert found["tokens"] == 60
        assert sum(map(sum, found["confusion"])) == 60
        assert found["labels"] == ["animal", "tree"]
    assert command.main([run.run_folder, f"data.test={source}"], "x") == 0
    shown = capsys.readouterr().out
    assert f"loss           {found['loss']:.4f} nats/" in shown


def test_a_text_with_nothing_to_predict_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError):
        command.main([run.run_folder, f"data.source={tmp_path}/empty.txt"], "x")


def test_answers_align_with_the_lines_of_the_file(run, tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes("1 cat\u20282\r\n\n3 oak\x0c4\n".encode())
    out = tmp_path / "out.jsonl"
    assert (
        sample.main([run.run_folder, "--file", f"{tmp_path}/in.txt", "--out", str(out)], "x") == 0
    )
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [1, 2, 3]
    assert [answer["prompt"] for answer in answers] == ["1 cat\u20282", None, "3 oak\x0c4"]
    model = load(run.run_folder)
    texts = ["1 cat\u20282", "3 oak\x0c4"]
    if run.train.objective == "causal":
        found = model.generate(texts)
        assert [answers[i]["text"] for i in (0, 2)] == [row.text for row in found]
        assert answers[2]["logprobs"] == pytest.approx(found[1].logprobs)
        assert "[3]" in capsys.readouterr().err  # the number of the line
    else:
        found = model.classify(texts)
        assert [answers[i]["label"] for i in (0, 2)] == [row.label for row in found]
        assert answers[2]["probabilities"] == pytest.approx(found[1].probabilities)


def test_a_long_line_is_named_or_cut_as_in_training(run, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("1 cat\n\n" + "long " * 20 + "\n")
    arguments = [run.run_folder, "--file", f"{tmp_path}/in.txt"]
    if run.train.objective == "causal":
        with pytest.raises(
            ConfigError, match=rf"line 3 of {tmp_path}/in.txt \('long long .*context"
        ):
            sample.main(arguments, "x")
    else:
        out = str(tmp_path / "out.jsonl")
        sample.main([*arguments, "--out", out], "x")
        assert "1 of 2 texts are longer than model.context=16 and cut" in capsys.readouterr().err
        with open(out) as file:
            assert [json.loads(line).get("is_cut") for line in file] == [False, None, True]


def test_a_sample_shows_its_text(run, capsys):
    sample.main([run.run_folder], "x")
    shown = capsys.readouterr()
    assert shown.out.startswith("the ")
    if run.train.objective == "causal":
        assert "4 tokens in " in shown.err


def test_a_foreign_tokenizer_is_refused(run, tmp_path):
    folder = shutil.copytree(run.run_folder, tmp_path / "copy")
    content = make_byte_tokenizer().content
    spec = json.loads(content)
    vocab = spec["model"]["vocab"]
    a, b = [key for key in vocab if len(key) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="is not the tokenizer that"):
        sample.main([str(folder)], "x")
    with pytest.raises(ConfigError, match="is not the tokenizer that"):
        command.main([str(folder)], "x")


def test_parameters_that_are_not_finite_are_refused_with_their_checkpoint(run, tmp_path, capsys):
    import jax

    import jaxgpt

    model = load(run.run_folder)
    params = jax.tree.map(lambda x: x * float("nan"), model.params)
    jaxgpt.save(dataclasses.replace(model, params=params), tmp_path / "nan")
    for main in (sample.main, command.main):
        with pytest.raises(ConfigError, match=rf"{tmp_path}/nan/best/10 has parameters with NaN"):
            main([str(tmp_path / "nan")], "x")
    assert capsys.readouterr().out == ""


def test_texts_that_the_output_cannot_show_are_answered(run, capfdbinary, monkeypatch):
    import io
    import sys

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    sample.main([run.run_folder, "--prompt", "é 猫"], "x")
    assert raw.getvalue().startswith(b"? ?")


def test_old_settings_of_a_run_are_kept(run):
    config = override(run, ["sample.temperature=0.8", "sample.top_p=1.0"])
    assert config.sample.temperature == 0.8
    assert console.load_model(run.run_folder, "best", []).config.sample.temperature == 0.5
