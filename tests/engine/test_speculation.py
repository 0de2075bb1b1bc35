"""Speculation changes no token, and saves passes where its guesses are right."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from engine_cases import CFG, DRAWN, GREEDY, make_engine, make_row_request, prepare, run_all
from helpers import random_params, tiny

from jaxgpt.config import ConfigError, SampleConfig
from jaxgpt.engine import DraftModel, prepare_decode_params, programs
from jaxgpt.engine import engine as engine_module
from jaxgpt.engine.processors import count_occurrences, make_rules, pack_mask
from jaxgpt.engine.speculation import Acceptance, find_draft

PROMPTS = ["abcabcabcabc", "x" * 30, "hello"]


def count_passes(engine, sample, monkeypatch):
    """Run the prompts: their tokens, and how often the model ran over a draft."""
    calls = []

    def verify(*args, **kwargs):
        calls.append(args)
        return programs.verify(*args, **kwargs)

    monkeypatch.setattr(engine_module, "verify", verify)
    requests = [make_row_request(text, sample, n) for n, text in enumerate(PROMPTS)]
    logprobs = run_all(engine, requests)
    return [request.row.drawn for request in requests], logprobs, len(calls)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_lookup_draws_the_tokens_of_plain_decoding(sample, monkeypatch):
    sample = dataclasses.replace(sample, tokens=30, repetition_penalty=0.7)  # it repeats itself
    plain, logprobs, _ = count_passes(make_engine(), sample, monkeypatch)
    guessed, values, calls = count_passes(make_engine(speculate=3), sample, monkeypatch)
    assert guessed == plain
    for a, b in zip(values, logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert 0 < calls < 60


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("seed", [None, 9], ids=["equal", "other"])
def test_a_draft_model_draws_the_tokens_of_plain_decoding(sample, seed):
    sample = dataclasses.replace(sample, tokens=25)
    runs, cfg = [], CFG if seed is None else tiny(vocab=270, context=64, layers=1)
    for draft in (None, DraftModel(cfg, prepare(cfg, seed))):
        engine = make_engine(speculate=0 if draft is None else 3, draft=draft)
        requests = [make_row_request(text, sample, n) for n, text in enumerate(PROMPTS)]
        run_all(engine, requests)
        runs.append([request.row.drawn for request in requests])
        rates = [request.drafts.rate for request in requests]
    assert runs[0] == runs[1]
    assert (min(rates) > 0.7) == (seed is None)  # equal models agree, others do not


def test_two_tokens_of_a_pass_have_the_exact_distribution():
    cfg, n = tiny(vocab=9, context=32, layers=1), 8192
    params = prepare_decode_params(cfg, random_params(cfg, std=0.5))
    prompt = np.array([[1, 5, 2, 7] + [0] * 12], np.int32)
    sample = SampleConfig(temperature=1.3, top_p=1.0, tokens=8)
    state = programs.init_state(cfg, 1, 32, 16)
    args = np.int32(0), prompt, np.int32(4), np.int32(0), np.int32(0)
    state = programs.prefill(cfg, params, state, *args)
    rules = make_rules(sample, 9, jax.random.key(0))
    state = programs.insert(
        cfg, state, np.int32(0), count_occurrences(prompt[0, :4], [], 9), 8, 0, rules
    )
    rules = state.rules.replace(
        key_data=jax.random.key_data(jax.random.split(jax.random.key(5), n))
    )
    state = jax.tree.map(lambda x: np.repeat(x, n, 0), state.replace(rules=None))
    tile = lambda x: np.repeat(np.asarray(x), n, 0)  # noqa: E731
    rules = rules.replace(
        **{f.name: tile(getattr(rules, f.name)) for f in dataclasses.fields(rules)
           if f.name != "key_data"})  # fmt: skip
    state = jax.tree.map(jax.numpy.asarray, state.replace(rules=rules))
    mask, ends = np.tile(pack_mask(np.ones(9, bool)), (n, 1)), np.zeros(9, bool)
    keep, zeros = np.ones(n, bool), np.zeros(n, np.int32)
    first_scores = np.asarray(state.scores[0], np.float64)
    draft = [int(first_scores.argmax()), 4]
    drafts = np.tile(np.array(draft, np.int32), (n, 1))
    state, drawn = programs.verify(cfg, params, state, keep, mask, ends, drafts, zeros + 2, zeros)
    tokens, count = np.asarray(drawn.tokens), np.asarray(drawn.counts)
    p = np.exp(first_scores / 1.3)
    p /= p.sum()
    assert scipy.stats.chisquare(np.bincount(tokens[:, 0], minlength=9), n * p).pvalue > 1e-6
    accepted = tokens[:, 0] == draft[0]
    assert not (count[~accepted] - 1).any()
    assert 0 < (count == 2).sum() < accepted.sum()
    np.testing.assert_array_equal(np.asarray(state.cache.cursor), 4 + count)
    # The second token of rows whose first guess was right: of this pass, or of the next.
    state, more = programs.decode(cfg, params, state, keep, mask, ends, np.int32(1))
    second = np.where(count == 2, tokens[:, 1], np.asarray(more.tokens)[:, 0])
    padded = np.array([[1, 5, 2, 7, draft[0]] + [0] * 11], np.int32)
    one = programs.init_state(cfg, 1, 32, 16)
    args = np.int32(0), padded, np.int32(5), np.int32(0), np.int32(0)
    q = np.exp(np.asarray(programs.prefill(cfg, params, one, *args).scores[0], np.float64) / 1.3)
    counts = np.bincount(second[accepted], minlength=9)
    assert accepted.sum() > 1000
    assert scipy.stats.chisquare(counts, accepted.sum() * q / q.sum()).pvalue > 1e-6


def test_the_latest_place_like_the_end_is_looked_up():
    assert find_draft([1, 2, 3, 1, 2, 4, 1, 2], 2) == [4, 1]
    assert find_draft([1, 2, 3, 4], 2) == []
    assert find_draft([7], 2) == []


def test_guesses_that_are_wrong_pause():
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.record(4, 1)
        if acceptance.paused:
            break
    assert acceptance.paused == Acceptance.PAUSE_CALLS
    assert not acceptance.is_worthwhile
    good = Acceptance()
    for _ in range(30):
        good.record(4, 5)  # the first is not a guess
    assert good.is_worthwhile
    assert good.rate == 1


def test_a_draft_model_with_another_vocabulary_is_refused():
    other = tiny(vocab=99)
    with pytest.raises(ConfigError, match=r"model.vocab=99"):
        make_engine(draft=DraftModel(other, {}), speculate=2)
