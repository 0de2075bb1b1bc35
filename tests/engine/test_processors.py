"""Score processors against those of transformers, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from engine_cases import GREEDY, TOKENIZER, make_engine, make_row_request, run_all
from transformers.generation import logits_process as hf

from jaxgpt.config import ConfigError, SampleConfig
from jaxgpt.engine import processors as p
from jaxgpt.generate import spell_word

V, EOS = 30, 3
ENDS = np.arange(V) == EOS


def process(process_scores, scores, ids, drawn, bias=None, banned=(), **settings):
    """Apply a processor to the scores [V] of a row with tokens `ids`, of which `drawn` are new."""
    sample = SampleConfig(**settings)
    rules = p.make_rules(sample, V, jax.random.key(0), bias, banned)
    row = p.count_occurrences(ids, drawn, V), rules
    history, rules = jax.tree.map(lambda x: jnp.asarray(x)[None], row)
    return np.asarray(process_scores(jnp.asarray(scores)[None], history, rules, ENDS)[0])


@pytest.fixture
def scores():
    return np.random.default_rng(0).normal(size=V).astype(np.float32)


def test_banned_sequences_are_those_of_transformers(scores):
    banned = [[5], [7, 8], [1, 2, 9], [4, 8]]
    for ids in ([1, 2], [7], [9, 7], [2, 4], [7, 1, 2], [3]):
        expected = hf.NoBadWordsLogitsProcessor(banned, eos_token_id=None)(
            torch.tensor([ids]), torch.tensor(scores)[None]
        )
        actual = process(p.exclude_banned, scores, ids, [], banned=banned)
        np.testing.assert_array_equal(actual, expected[0].numpy())


def test_a_text_does_not_end_before_its_minimum_as_in_transformers(scores):
    for drawn in range(6):
        ids = list(range(10, 14 + drawn))
        expected = hf.MinNewTokensLengthLogitsProcessor(4, 3, EOS)(
            torch.tensor([ids]), torch.tensor(scores)[None]
        )
        actual = process(p.keep_min_tokens, scores, ids, ids[4:], min_tokens=3)
        np.testing.assert_array_equal(actual, expected[0].numpy())


def test_penalties_count_generated_tokens_only(scores):
    actual = process(
        p.penalize_generated, scores, [1, 5, 5, 6], [5, 5, 6],
        presence_penalty=0.5, frequency_penalty=0.25,
    )  # fmt: skip
    expected = scores.copy()
    expected[5] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_bias_is_added(scores):
    actual = process(p.add_bias, scores, [1], [], bias={4: 2.5, 9: -100.0})
    np.testing.assert_allclose(actual - scores, np.where(np.arange(V) == 4, 2.5, 0)
                               - 100.0 * (np.arange(V) == 9), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_a_mask_survives_packing(size):
    mask = np.random.default_rng(size).random(size) < 0.5
    bits = p.pack_mask(mask)
    assert bits.dtype == np.uint32
    np.testing.assert_array_equal(p.unpack_mask(bits[None], len(mask))[0], mask)


def test_what_does_not_fit_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match="65 banned sequences"):
        p.make_rules(SampleConfig(), V, key, banned=[[1]] * 65)
    with pytest.raises(ConfigError, match="1 to 8 tokens, not 9"):
        p.make_rules(SampleConfig(), V, key, banned=[[1] * 9])
    with pytest.raises(ConfigError, match=r"sample.banned.*empty"):
        SampleConfig(banned=("",))


def test_a_banned_word_is_never_generated_and_a_minimum_is_kept():
    plain = make_row_request("hello", dataclasses.replace(GREEDY, tokens=30))
    run_all(make_engine(), [plain])
    word = next(c for c in TOKENIZER.decode(plain.row.drawn)[2:] if c.isascii() and c.isalnum())
    sample = dataclasses.replace(GREEDY, tokens=30, banned=(word,), min_tokens=30)
    request = make_row_request("hello", sample)
    run_all(make_engine(), [request])
    banned = spell_word(TOKENIZER, word)[0]
    drawn = request.row.drawn
    assert len(drawn) == 30
    assert all(drawn[i : i + len(banned)] != banned for i in range(30))
    assert drawn != plain.row.drawn
