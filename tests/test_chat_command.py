"""`jaxgpt chat`: a conversation with lines in place of a terminal, and through a pipe and a pty."""

import dataclasses
import io
import json
import os
import pty
import subprocess
import sys

import pytest
from test_language_model import make_model

import jaxgpt
from jaxgpt import interactive
from jaxgpt.chat import Chat
from jaxgpt.cli import chat as chat_command
from jaxgpt.interop import exporting
from jaxgpt.settings import ConfigError


@pytest.fixture(scope="module")
def model():
    return make_model(context=64)


def make_chat(model, system="", **sample):
    chat = Chat(model, system, "plain")
    rules = dict(tokens=4, temperature=0.0) | sample
    chat.set_sample(dataclasses.replace(chat.model.config.sample, **rules))
    return chat


def run_lines(chat, *lines):
    left = [*lines, EOFError()]

    def read_line():
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    interactive.run_lines(read_line, chat.apply_line)
    return len(left)


def test_an_answer_is_what_the_model_generates_from_the_whole_conversation(model, capsys):
    chat = make_chat(model)
    run_lines(chat, "a", "b")
    first = [{"role": "user", "content": "a"}]
    one = chat.model.chat(first).text
    second = [*first, {"role": "assistant", "content": one}, {"role": "user", "content": "b"}]
    two = chat.model.chat(second).text
    assert chat.transcript == [*second, {"role": "assistant", "content": two}]
    assert capsys.readouterr().out == f"{one}\n{two}\n"


def test_reset_forgets_and_save_writes_a_record_to_train_on(model, tmp_path, capsys):
    chat, path = make_chat(model, "s"), tmp_path / "chat.jsonl"
    run_lines(chat, "a", "/reset", "b", f"/save {path}", "c", f"/save {path}", "/save")
    saved = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved[1::2]] == ["b", "c"]
    shown = capsys.readouterr().err
    assert "/save needs the name of a file" in shown
    before = path.read_bytes()
    run_lines(make_chat(model), "x", f"/save {path}")  # another conversation
    assert path.read_bytes() == before
    assert "exists: save under another name" in capsys.readouterr().err


def test_a_full_context_drops_whole_turns_and_says_so(model, capsys):
    chat = make_chat(model, "s")
    run_lines(chat, "one", "two", "three", "four")
    shown = capsys.readouterr().err
    assert "messages are forgotten]" in shown
    assert chat.messages[0] == {"role": "system", "content": "s"}
    assert chat.messages[1]["role"] == "user"
    assert chat.messages[-2]["content"] == "four"
    assert len(chat.messages) < len(chat.transcript) == 9
    with pytest.raises(ConfigError, match="shorten it"):
        chat.apply_line("x" * 70)
    assert chat.transcript[-1]["role"] == "assistant"


def test_ctrl_c_stops_an_answer_and_keeps_what_came(model, capsys, monkeypatch):
    chat = make_chat(model)

    def stream(*_):
        yield [jaxgpt.generate.Generation("some", (1,), (0.0,), "")]
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "stream", stream)
    assert run_lines(chat, "a", "/settings", KeyboardInterrupt(), "/exit") == 1
    assert chat.transcript[-1] == {"role": "assistant", "content": "some"}
    shown = capsys.readouterr().err
    assert "[stopped]" in shown
    assert "/temperature 0.0" in shown


def test_mistakes_are_messages_and_settings_are_commands(model, capsys):
    chat = make_chat(model)
    run_lines(chat, "/resett", "/tokens 2", "/help", "/system be brief", "//slash", "/quit")
    shown = capsys.readouterr().err
    for text in (
        "Did you mean '/reset'?",
        "/save FILE",
        "/top_k VALUE",
        "[system prompt: be brief]",
    ):
        assert text in shown
    assert chat.model.config.sample.tokens == 2
    assert [m["content"] for m in chat.transcript[:2]] == ["be brief", "/slash"]


def test_a_model_without_a_template_is_refused_with_the_names_of_templates(model):
    with pytest.raises(ConfigError, match="no chat template: name one, of chatml"):
        Chat(model)


def test_a_model_that_writes_nothing_is_refused():
    classifier = make_model("classify", ("x", "y", "z"), classes=3)
    with pytest.raises(ConfigError, match="writes no answers"):
        Chat(classifier, "", "plain")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    jaxgpt.save(model, folder)
    return str(folder)


def make_command(saved, *arguments):
    options = ("--template", "plain", "tokens=3", "temperature=0", *arguments)
    return [sys.executable, "-m", "jaxgpt", "chat", saved, *options]


def test_the_command_answers_a_pipe_and_a_terminal(saved, model, tmp_path):
    expected = make_chat(model, tokens=3).answer("hello")
    piped = subprocess.run(
        make_command(saved), input="hello\n/bad\n/exit\nnever\n", capture_output=True, text=True
    )
    assert (piped.returncode, piped.stdout) == (0, f"{expected}\n")
    assert "/bad" in piped.stderr
    parent, child = pty.openpty()
    process = subprocess.Popen(
        make_command(saved), stdin=child, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    os.write(parent, b"hello\n/exit\n")
    shown, _ = process.communicate()
    os.close(parent)
    os.close(child)
    assert process.returncode == 0
    assert f"{expected}\n" in shown.decode("utf-8", "replace")
    assert "> " in shown.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_exported_models_answer_by_the_template_in_their_files(
    model, tmp_path, monkeypatch, capsys, kind
):
    if kind == "gguf":
        pytest.importorskip("gguf")
    path = str(tmp_path / ("model.gguf" if kind == "gguf" else "model"))
    chatty = dataclasses.replace(model, tokenizer=model.tokenizer.with_chat_template("plain"))
    exporting.export(chatty, path, kind, log=lambda line: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand you?\n"))
    assert chat_command.main([path, "tokens=4", "temperature=0"], "jaxgpt chat") == 0
    answers = capsys.readouterr().out.splitlines()
    loaded = Chat(jaxgpt.load(path))  # without a template of ours
    loaded.set_sample(dataclasses.replace(loaded.model.config.sample, tokens=4, temperature=0.0))
    run_lines(loaded, "hello", "and you?")
    assert answers == capsys.readouterr().out.splitlines() != []
    expected = model.tokenizer.with_chat_template("plain").encode_chat(loaded.transcript)
    assert loaded.encode(loaded.transcript).tolist()[: expected.size] == expected.tolist()
