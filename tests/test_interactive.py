"""An interactive session, with lines in place of a terminal."""

import dataclasses

import pytest
from test_language_model import make_model

from jaxgpt import interactive
from jaxgpt.settings import ConfigError


def run_lines(model, *lines):
    """Run a session; an exception among the lines is raised at the prompt."""
    left = [*lines, EOFError()]

    def read_line():
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    interactive.run_session(model, read_line)
    return len(left)


def test_a_line_is_answered_with_the_settings_changed_before_it(capsys):
    model = make_model()
    run_lines(model, "/tokens 5", "/temperature 0", "the", "/seed 9", "/temperature 1", "a", "a")
    shown = capsys.readouterr().out
    rules = dict(tokens=5, temperature=1)
    texts = ["the" + model.generate(["the"], tokens=5, temperature=0)[0].text]
    texts += ["a" + model.generate(["a"], seed=seed, **rules)[0].text for seed in (9, 10)]
    assert shown == "".join(f"{text}\n" for text in texts)


def test_mistakes_are_messages_and_the_session_goes_on(capsys):
    lines = ("/temprature 1", "/top_p 7", "/stop", "/help", "x" * 100, KeyboardInterrupt(), "/quit")
    assert run_lines(make_model(), *lines) == 1  # the end of the input was not reached
    shown = capsys.readouterr().err
    for text in ("Did you mean '/temperature'?", "top_p=7.0 must be", "/stop ", "/min_p VALUE",
                 "model.context", "/quit leaves"):  # fmt: skip
        assert text in shown


def test_ctrl_c_stops_a_generation_and_not_the_session(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(interactive, "answer", stop)
    assert run_lines(make_model(), "the", "/settings") == 0
    shown = capsys.readouterr().err
    assert "[stopped]" in shown
    assert "/slide false" in shown


def test_what_was_computed_of_the_parameters_is_kept():
    model = make_model()
    prepared = model.decode_params
    changed = interactive.apply_line(model, "/temperature 0.1")
    assert changed.config.sample.temperature == 0.1
    assert vars(changed)["decode_params"] is prepared


def test_an_encoder_answers_no_blank_line(capsys):
    model = make_model("classify", ("x", "y", "z"), classes=3)
    run_lines(model, "", "the cat")
    assert capsys.readouterr().out.startswith("the cat\n")


def test_every_setting_of_sampling_is_a_command():
    sample = make_model().config.sample
    for f in dataclasses.fields(sample):
        if f.name == "prompt":
            continue
        value = interactive.format_value(getattr(sample, f.name))
        if value:
            assert interactive.apply_command(sample, f"{f.name} {value}") == sample
    with pytest.raises(ConfigError):
        interactive.apply_command(sample, "prompt x")
