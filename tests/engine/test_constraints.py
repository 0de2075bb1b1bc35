"""Constraints: what is drawn follows a schema, an expression or a grammar."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import schemas
from engine_cases import CFG, DRAWN, GREEDY, TOKENIZER, make_engine, make_row_request, run_all

from jaxgpt.config import ConfigError, SampleConfig
from jaxgpt.engine.constraints import make_constraint

FREE = SampleConfig(temperature=1.0, top_p=1.0, tokens=40)


def test_every_finished_text_is_what_its_schema_allows():
    assert schemas.run(10, seed=1) >= 6


def test_json_has_no_free_whitespace():
    sample = SampleConfig(json_schema='{"type": "array", "items": {"type": "boolean"}}')
    found = []
    for text in ("[true,false]", "[true, false]", "[true,  false]", "[ true", " ["):
        matcher = make_constraint(TOKENIZER, CFG.vocab, sample).matcher
        ids = TOKENIZER.encode(text).tolist()
        found.append(matcher.try_consume_tokens(ids) == len(ids))
    assert sum(found[:2]) == 1  # one way to write a list
    assert not any(found[2:])


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (dict(regex="[a-c]{3}-[0-9]+!"), "[a-c]{3}-[0-9]+!"),
        (dict(grammar='start: ("ab" | "cd")+ "."'), r"(ab|cd)+\."),
    ],
    ids=["regex", "grammar"],
)
def test_a_text_matches_its_expression_beside_a_row_without_one(rule, pattern):
    engine = make_engine()
    free = make_row_request("hello", DRAWN)
    bound = [make_row_request("", dataclasses.replace(FREE, **rule), n) for n in range(4)]
    run_all(engine, [free, *bound])
    alone = make_row_request("hello", DRAWN)
    run_all(make_engine(), [alone])
    assert free.row.drawn == alone.row.drawn
    texts = [TOKENIZER.decode(each.row.drawn) for each in bound if each.row.ending == "eos"]
    assert len(texts) >= 2
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_forced_text_is_read_in_few_passes_and_has_the_log_probabilities_of_the_model():
    text = '{"a long name that is forced":'
    rule = dict(regex=re.escape(text) + "[0-9]")
    engine = make_engine()
    request = make_row_request("", dataclasses.replace(FREE, **rule))
    engine.submit(request)
    steps, logprobs = 0, []
    while not engine.is_idle:
        for _, piece in engine.step():
            logprobs += piece.logprobs
        steps += 1
    assert TOKENIZER.decode(request.row.drawn)[:-1] == text
    assert steps < len(text) / 2
    # The same tokens, one by one.
    plain = make_engine()
    other = make_row_request("", dataclasses.replace(FREE, **rule))
    other.constraint.list_forced = list
    (expected,) = run_all(plain, [other])
    assert other.row.drawn[:-1] == request.row.drawn[:-1]
    np.testing.assert_allclose(logprobs[:-1], expected[:-1], atol=1e-4)


def test_speculation_beside_a_constraint_keeps_both():
    engine = make_engine(speculate=3)
    bound = make_row_request("", dataclasses.replace(FREE, regex="(ab)*c"))
    free = make_row_request("abcabcabc", dataclasses.replace(GREEDY, tokens=20))
    run_all(engine, [bound, free])
    alone = make_row_request("abcabcabc", dataclasses.replace(GREEDY, tokens=20))
    run_all(make_engine(), [alone])
    assert free.row.drawn == alone.row.drawn
    assert re.fullmatch("(ab)*c?", TOKENIZER.decode(bound.row.drawn).rstrip("a") or "")


def test_entries_of_the_vocabulary_without_a_token_are_not_allowed():
    sample = SampleConfig(regex="[a-c]{3}")
    exact = make_constraint(TOKENIZER, CFG.vocab, sample).compute_mask()
    padded = make_constraint(TOKENIZER, CFG.vocab + 1000, sample).compute_mask()
    assert len(padded) == -(-(CFG.vocab + 1000) // 32)
    np.testing.assert_array_equal(padded[: len(exact)], exact)
    assert exact.any()
    assert not padded[len(exact) :].any()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (dict(json_schema="{"), "sample.json_schema is not JSON"),
        (dict(json_schema='{"type": "nothing"}'), "sample.json_schema"),
        (dict(regex="("), "sample.regex"),
        (dict(grammar="start: ["), "sample.grammar"),
    ],
    ids=str,
)
def test_a_rule_that_is_not_valid_is_refused_by_name(rule, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_constraint(TOKENIZER, CFG.vocab, SampleConfig(**rule))


def test_two_rules_at_once_are_refused():
    with pytest.raises(ConfigError, match=r"sample.json_schema and sample.regex"):
        SampleConfig(json_schema="{}", regex="a")


def test_without_llguidance_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"sample.regex needs llguidance.*\[constraints\]"):
        make_constraint(TOKENIZER, CFG.vocab, SampleConfig(regex="a"))
