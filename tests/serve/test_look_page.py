"""The look-inside page of a conversation that a server was sent."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from inspected import make_model

from jaxgpt import inspect
from jaxgpt.adapters import Adapter
from jaxgpt.config import LoraConfig
from jaxgpt.lora import describe_adapters
from jaxgpt.serve.look import count_max_tokens, make_look_page
from jaxgpt.settings import ConfigError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def read_data(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def read_text(page: str) -> str:
    return "".join(read_data(page)["pieces"])


@pytest.fixture(scope="module")
def model():
    model = make_model(context=128)
    tokenizer = model.tokenizer.with_chat_template("plain")
    return dataclasses.replace(model, tokenizer=tokenizer)


def test_the_page_has_the_conversation_as_the_model_reads_it(model):
    data = read_data(make_look_page(model, messages=CHAT))
    ids = model.tokenizer.encode_chat(CHAT)
    assert data["ids"] == ids.tolist()
    assert data["pieces"][0] == "<bos>"
    assert data["note"] == ""
    text = inspect.EncodedText(ids, inspect.spell_tokens(model, ids))
    losses = -inspect.logit_lens(model, text).target_logprobs[-1]
    np.testing.assert_allclose(data["surprisal"][1:], losses, atol=1e-4)


def test_a_question_ends_where_the_answer_begins(model):
    data = read_data(make_look_page(model, messages=CHAT[:2]))
    ids = model.tokenizer.encode_chat(CHAT[:2], add_generation_prompt=True)
    assert data["ids"] == ids.tolist()


def test_a_prompt_is_a_text(model):
    assert read_text(make_look_page(model, prompt="a cat")) == "<bos>a cat"
    evil = make_look_page(model, prompt="</script><script>")
    assert read_text(evil) == "<bos></script><script>"


def test_whole_turns_leave_and_the_page_tells_it(model, monkeypatch):
    limit = len(model.tokenizer.encode_chat([CHAT[0], *CHAT[3:]]))
    monkeypatch.setattr("jaxgpt.serve.look.count_max_tokens", lambda model: limit)
    page = make_look_page(model, messages=CHAT)
    text, note = read_text(page), read_data(page)["note"]
    assert "Be brief." in text
    assert "three" in text
    assert "one" not in text
    assert "first 2 messages after the system prompt are left out" in note


def test_the_last_tokens_of_a_long_text_are_shown_and_the_page_tells_it(model, monkeypatch):
    monkeypatch.setattr("jaxgpt.serve.look.count_max_tokens", lambda model: 9)
    page = make_look_page(model, prompt="x" * 50 + "12345678")
    assert read_text(page) == "<bos>12345678"
    assert read_data(page)["note"].startswith("Of 58 tokens the last 8 are shown")
    page = make_look_page(model, messages=[{"role": "user", "content": "y" * 40}])
    assert len(read_data(page)["ids"]) == 9
    assert "tokens the last 9 are shown" in read_data(page)["note"]


def test_the_weights_of_all_heads_limit_the_tokens():
    assert count_max_tokens(make_model(context=128)) == 128  # the context
    assert count_max_tokens(make_model(context=4096)) == 512  # what a page has
    many = make_model(context=4096, heads=64, kv_heads=64, width=128, layers=32)
    assert count_max_tokens(many) == 64  # 32 * 64 * 64**2 = 8 MB
    assert count_max_tokens(make_model(context=4096, mixers=("gru",), position="none")) == 512


def test_adapters_are_part_of_what_is_shown(model):
    lora, rng = LoraConfig(rank=2), np.random.default_rng(0)
    shapes, _ = describe_adapters(model.config.model, lora)
    arrays = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    adapted = model.with_adapters({"a": Adapter(arrays, lora)}).switch("a")
    found = read_data(make_look_page(adapted, prompt="a cat"))["attribution"]["logits"]
    expected = inspect.capture(adapted, "a cat", []).logits.max(-1)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert abs(expected - inspect.capture(model, "a cat", []).logits.max(-1)).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {}, "either messages or a prompt"),
        ({}, {"messages": CHAT, "prompt": "a"}, "either messages or a prompt"),
        ({}, {"messages": []}, "list of messages"),
        ({}, {"messages": CHAT}, "no chat template"),
        (dict(objective="masked", family="encoder", head="mlm"), {"messages": CHAT},
         "no conversations: give a prompt"),
        (dict(objective="pairs", family="encoder_decoder", encoder_layers=1), {"prompt": "a"},
         "jaxgpt look RUN --source"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_into_is_refused(settings, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_look_page(make_model(**settings), **arguments)


def test_parameters_that_are_not_finite_are_refused(model):
    params = jax.tree.map(lambda x: x * np.nan, model.params)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        make_look_page(dataclasses.replace(model, params=params), prompt="a")
