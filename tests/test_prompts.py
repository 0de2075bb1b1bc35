"""Prompts of files, and answers as JSON lines."""

import json
import os

import pytest

from jaxgpt import prompts
from jaxgpt.settings import ConfigError


def test_only_line_feeds_end_lines_and_blank_ones_keep_their_place():
    content = "a\u0085b\u2028c\fd\ve\r\n\n  \nlast".encode()
    assert prompts.split_lines(content) == ["a\u0085b\u2028c\fd\ve", None, None, "last"]
    assert prompts.split_lines(b"\xef\xbb\xbfone\n") == ["one"]
    assert prompts.split_lines(b"\xff\n") == ["\udcff"]
    assert prompts.split_lines(b"a\rb\n\n") == ["a\rb", None]


def test_a_file_without_a_prompt_is_refused(tmp_path):
    (tmp_path / "blank").write_text("\n \n")
    with pytest.raises(ConfigError, match="has no prompt"):
        prompts.read_prompts(str(tmp_path / "blank"))


def test_answers_are_one_json_object_a_line_whatever_the_text(tmp_path):
    path = str(tmp_path / "answers.jsonl")
    answers = [{"text": "é\n\u2028\udcff"}, {"text": "x"}]
    prompts.write_answers(path, answers)
    with open(path, "rb") as file:
        assert [json.loads(line) for line in file] == answers
    assert os.listdir(tmp_path) == ["answers.jsonl"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "answers.jsonl"):
        with pytest.raises(ConfigError, match="--out"):
            prompts.check_output(str(path))
    prompts.check_output(str(tmp_path / "answers.jsonl"))
