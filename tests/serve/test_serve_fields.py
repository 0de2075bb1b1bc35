"""Bodies and command lines as values: what is read, and what is refused by which name."""

import argparse
import dataclasses
import json
import pathlib

import jax
import pytest
from serving import TOKENIZER, make_model, piece

import jaxgpt
from jaxgpt.cli import serve
from jaxgpt.config import SampleConfig
from jaxgpt.engine import Row
from jaxgpt.serve import fields, http, results, schema, served
from jaxgpt.serve.errors import RequestError
from jaxgpt.serve.jobs import COPIED, Job
from jaxgpt.serve.served import name_model
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import StreamDecoder

TABLES = {name: getattr(schema, name) for name in ("COMPLETION", "CHAT", "EMBEDDING", "LOOK")}


def read(table, **body):
    return fields.read_object(table, body)


@pytest.mark.parametrize("table", TABLES)
def test_a_field_that_is_not_known_is_refused_with_the_nearest(table):
    needed = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a"}
    body = {name: value for name, value in needed.items() if name in TABLES[table]}
    with pytest.raises(RequestError, match="Did you mean 'model'") as error:
        fields.read_object(TABLES[table], body | {"modle": "x"})
    assert (error.value.status, error.value.code, error.value.param) == (
        400,
        "unknown_field",
        "modle",
    )
    assert fields.read_object(TABLES[table], body | {"model": None})["model"] is None


VALUES = [
    (fields.number(0, 2), [0, 2, 1.5, -0.0], [-0.1, 2.1, True, "1", [], 10**400]),
    (fields.integer(1, 5), [1, 5, 2.0], [0, 6, 1.5, False, "1", float("inf"), {}]),
    (fields.integer(0), [0, 10**30], [-1, 0.5]),
    (fields.boolean, [True, False], [1, 0, "true"]),
    (fields.text, ["", "a"], [1, ["a"]]),
    (fields.one_of("a", "b"), ["a"], ["c", 1, ["a"]]),
    (fields.texts(2), ["a", ["a", "b"], []], ["", [""], ["a"] * 3, [1], 1, {}]),
    (fields.prompts, ["", "a", ["a", "b"], [1, 2], [[1], [2]]], [[], [[]], 1, [1, "a"], [True]]),
    (fields.biases, [{}, {"5": 1}, {"5": -100}], [[], {"x": 1}, {"5": 101}, {"-5": 1}, {"5": "1"},
                                                  {"²": 1}, {"9" * 30: 1}]),
    (schema.read_messages, [[{"role": "user", "content": "a"}]], [[], "a", [1], [{"role": "user"}],
                            [{"role": "tool", "content": "a"}], [{"role": "user", "content": 1}]]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_a_reader_takes_what_is_right_and_names_what_is_not(number):
    reader, right, wrong = VALUES[number]
    for value in right:
        reader(value, "x")
    for value in wrong:
        with pytest.raises(RequestError, match="x") as error:
            reader(value, "x")
        assert error.value.status == 400
        assert error.value.param.startswith("x")
        assert len(error.value.message) < 300


def test_messages_are_read_as_templates_take_them():
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": x} for x in "ab"]},
        {"role": "assistant", "content": "c", "tool_calls": None, "refusal": None, "name": "n"},
    ]  # fmt: skip
    assert read(schema.CHAT, messages=messages)["messages"] == [
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "c", "name": "n"},
    ]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]"):
        read(schema.CHAT, messages=image)
    call = [{"role": "assistant", "content": "", "tool_calls": [1]}]
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls is not supported"):
        read(schema.CHAT, messages=call)


def test_a_response_format_is_a_schema():
    def find(value):
        return schema.read_response_format(value, "response_format")

    assert find({"type": "text"}) == ""
    assert json.loads(find({"type": "json_object"})) == {"type": "object"}
    wanted = {"name": "s", "schema": {"type": "integer"}, "strict": True}
    assert json.loads(find({"type": "json_schema", "json_schema": wanted})) == {"type": "integer"}
    for wrong in ({"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": wanted},
                  {"type": "json_schema", "json_schema": {"name": "s"}}, "json", {}):  # fmt: skip
        with pytest.raises(RequestError, match="response_format"):
            find(wrong)


def test_every_field_of_sampling_is_a_rule_of_the_engine_or_read_by_name():
    others = {"model", "user", "logit_bias", "seed", "n", "stream", "stream_options"}
    assert {*schema.SAMPLING} == {*COPIED} | others


def test_json_is_bytes_whatever_the_text():
    assert http.format_json({"a": "é🎉\ud800\n\n"}) == '{"a":"é🎉?\\n\\n"}'.encode()
    assert http.parse_json(http.format_json({"a": "data: é"})) == {"a": "data: é"}


# --- tokens and the text that they stand for ---


def make_answer(text, stop=""):
    """Return an answer whose tokens come one by one, as from the engine, and their places."""
    tokens = TOKENIZER.encode(text).tolist()
    sample = SampleConfig(tokens=len(tokens), stop=(stop,) if stop else ())
    row = Row(sample, [], [1], StreamDecoder(TOKENIZER))
    job = Job(row, sample, 0, {}, 0, 0, StreamDecoder(TOKENIZER), 0)
    answer, found = results.Answer(TOKENIZER, job), []
    for token in tokens:
        final = row.push(token, ())
        one = dataclasses.replace(piece(final, row.ending), tokens=(token,), logprobs=(-1.0,))
        found += answer.push(one)
        if row.ending:
            break
    return answer, found


@pytest.mark.parametrize("text", ["plain", "né 🎉 世界", "\ufffd", "a" * 30])
def test_every_token_has_its_place_in_the_text(text):
    answer, found = make_answer(text)
    assert answer.text == text
    assert answer.places == found
    assert [place.token for place in found] == TOKENIZER.encode(text).tolist()
    for place in found:
        assert place.start <= place.end
        data = results.name_token(TOKENIZER, place.token)[1]
        assert data in text[place.start : max(place.end, place.start + 1)].encode()


@pytest.mark.parametrize("stop", ["n", "🎉", "世界", " 🎉 ", "界!", "zz"])
def test_the_tokens_of_a_stop_string_are_not_in_an_answer(stop):
    text = "né 🎉 世界! end"
    answer, found = make_answer(text, stop)
    expected = text.partition(stop)[0]
    assert answer.text == expected
    data = b"".join(results.name_token(TOKENIZER, place.token)[1] for place in found)
    assert data == expected.encode()


# --- the command line ---


def test_adapters_and_meshes_are_read_from_the_command_line():
    assert serve.parse_pairs(["a=runs/a", "b=x=y"], "--adapter") == {"a": "runs/a", "b": "x=y"}
    for wrong, message in (
        ("a", "expected NAME=VALUE"),
        ("a=1", "given twice"),
        ("=x", "expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            serve.parse_pairs(["a=0", wrong], "--adapter")
    assert serve.parse_mesh("tensor=2,fsdp=4") == {"tensor": 2, "fsdp": 4}
    assert serve.parse_mesh("") == {}
    for wrong, message in (("tenser=2", "Did you mean tensor"), ("tensor=x", "whole number")):
        with pytest.raises(ConfigError, match=message):
            serve.parse_mesh(wrong)


def make_arguments(**changes):
    parser = argparse.ArgumentParser()
    serve.add_options(parser)
    args = parser.parse_args([])
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@pytest.mark.parametrize(
    "changes", [dict(rows=0), dict(queue=0), dict(slots=1), dict(port=70000), dict(speculate=-1)]
)
def test_options_out_of_range_are_refused(changes):
    serve.check_sizes(make_arguments())
    with pytest.raises(ConfigError, match=f"--{next(iter(changes))}"):
        serve.check_sizes(make_arguments(**changes))


def test_the_options_reach_the_model_and_its_engine(tmp_path, monkeypatch):
    jaxgpt.save(make_model("", kv_heads=4), tmp_path / "run")
    calls = {}
    monkeypatch.setattr(
        served,
        "serve_model",
        lambda model, name, **more: calls.update(more, model=model, name=name),
    )
    run = str(tmp_path / "run")
    args = make_arguments(run=run, checkpoint="best", quantize=None, group=None, draft=run,
                          dtype="bfloat16", rows=3, template="plain")  # fmt: skip
    serve.load(args, [], {"temperature": 0.5}, {}, {"tensor": 2})
    leaves = [x for x in jax.tree.leaves(calls["model"].params) if len(x.sharding.device_set) == 2]
    assert leaves
    assert any(not x.sharding.is_fully_replicated for x in leaves)
    assert {str(x.dtype) for x in jax.tree.leaves(calls["model"].params)} == {"bfloat16"}
    assert (calls["name"], calls["rows"], calls["template"]) == ("run", 3, "plain")
    assert calls["speculate"] == serve.DRAFT_TOKENS
    assert calls["draft"].config.model == calls["model"].config.model
    assert calls["rules"] == {"temperature": 0.5}


def test_a_model_has_the_name_of_its_folder_or_file():
    assert name_model("/x/SmolLM2.Q4_1.gguf") == "SmolLM2.Q4_1"
    assert name_model("runs/mine") == "mine"


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    run = pathlib.Path(__file__).parent.parent / "data" / "old_run"

    def require(module, user):
        raise ConfigError(f"{user} needs {module}")

    monkeypatch.setattr(serve, "require", require)
    with pytest.raises(ConfigError, match="jaxgpt serve needs starlette"):
        serve.main([str(run)], "jaxgpt serve")
