"""The commands that look inside: look, next, tokenize, neighbours, positions, compare."""

import dataclasses
import json

import pytest
from inspected import TEXT, make_model
from tiny_runs import run_config

import jaxgpt
from jaxgpt import inspect
from jaxgpt.cli import compare, look, neighbours, positions, tokenize
from jaxgpt.cli import next as next_command
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import train


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    jaxgpt.save(model, folder)
    return str(folder)


def test_look_writes_a_page(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert look.main([run, "--text", TEXT, "--out", str(out)], "jaxgpt look") == 0
    assert capsys.readouterr().out.startswith(f"{out}: 0.")
    assert "<!DOCTYPE html>" in out.read_text()[:20]
    assert look.main([run], "jaxgpt look") == 2
    with pytest.raises(ConfigError, match=r"page\.html"):
        look.main([run, "--text", TEXT, "--out", str(tmp_path / "no" / "page.html")], "jaxgpt look")


def test_next_prints_the_likeliest_tokens(run, model, capsys):
    assert next_command.main([run, TEXT, "--count", "3", "--json"], "jaxgpt next") == 0
    found = json.loads(capsys.readouterr().out)
    expected = [dataclasses.asdict(each) for each in inspect.next_tokens(model, TEXT, 3)]
    assert [each["token"] for each in found] == [each["token"] for each in expected]
    assert found[0]["probability"] == pytest.approx(expected[0]["probability"], rel=1e-4)
    assert next_command.main([run, TEXT, "--count", "3"], "jaxgpt next") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_tokenize_prints_tokens_and_merges(run, tmp_path, capsys):
    assert tokenize.main([run, "né", "--json"], "jaxgpt tokenize") == 0
    found = json.loads(capsys.readouterr().out)
    assert [token["bytes"] for token in found] == [[110], [0xC3], [0xA9]]
    path = tmp_path / "tokenizer.json"
    jaxgpt.tokenizer.train(["abab abab " * 9], 262).save(path)
    assert tokenize.main([str(path), "abab abab", "--merges"], "jaxgpt tokenize") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokens, 9 bytes" in "".join(lines)
    assert "'abab'" in lines
    assert any(line.endswith("merge 0: a + b") for line in lines)


def test_neighbours_and_analogies(run, model, capsys):
    assert neighbours.main([run, "a", "--count", "2", "--json"], "jaxgpt neighbours") == 0
    found = json.loads(capsys.readouterr().out)
    expected = inspect.neighbours(model, "a", 2)
    assert [each["piece"] for each in found] == [piece for piece, _ in expected]
    arguments = [run, "a", "--minus", "b", "--plus", "c", "--count", "4"]
    assert neighbours.main(arguments, "jaxgpt neighbours") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(ConfigError, match="go together"):
        neighbours.main([run, "a", "--minus", "b"], "jaxgpt neighbours")
    with pytest.raises(ConfigError, match="no single token"):
        neighbours.main([run, "word"], "jaxgpt neighbours")


def test_positions_draws_an_encoding(run, tmp_path, capsys):
    out = tmp_path / "pe.png"
    assert positions.main(["rope", "--out", str(out), "--length", "9"], "jaxgpt positions") == 0
    assert capsys.readouterr().out == f"{out}: rope, 9 positions\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert positions.main(["--run", run, "--out", str(out)], "jaxgpt positions") == 0
    assert capsys.readouterr().out.startswith(f"{out}: rope, 64")
    with pytest.raises(ConfigError, match="Did you mean 'rope'"):
        positions.main(["roep", "--out", str(out)], "jaxgpt positions")
    with pytest.raises(ConfigError, match=r"train\.steps"):
        positions.main(["rope", "train.steps=3", "--out", str(out)], "jaxgpt positions")


def test_compare_shows_what_differs(tmp_path, capsys):
    for lr in ("0.01", "0.02"):
        train(run_config(tmp_path, "train.steps=4", "train.eval_every=2", f"optimizer.lr={lr}",
                         f"name=lr{lr}"))  # fmt: skip
    capsys.readouterr()
    runs = sorted(str(path.parent) for path in tmp_path.rglob("metrics.jsonl"))
    assert len(runs) == 2
    out = tmp_path / "compare.html"
    assert compare.main([*runs, "--out", str(out), "--prompt", "the "], "jaxgpt compare") == 0
    text = capsys.readouterr().out
    assert "  optimizer.lr\n" in text
    assert "train.steps" not in text
    assert "name" not in text.split("settings that differ:")[1].split("---")[0]
    assert text.count("--- ") == 2
    page = out.read_text()
    assert all(word in page for word in ("data:image/png;base64,", "optimizer.lr", "0.02"))
    figure = tmp_path / "loss.png"
    assert compare.main([*runs, "--out", str(figure), "--no-samples"], "jaxgpt compare") == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="named twice"):
        compare.main([runs[0], runs[0], "--out", str(out)], "jaxgpt compare")
    with pytest.raises(ConfigError, match="two runs"):
        compare.main(runs[:1], "jaxgpt compare")
