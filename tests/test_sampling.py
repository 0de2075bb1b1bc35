"""Sampling rules against distributions and against the processors of transformers."""

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process as hf

from jaxgpt.config import SampleConfig
from jaxgpt.sampling import (
    SAMPLERS,
    SamplingParams,
    draw,
    find_best,
    make_row_keys,
    sampleable_tokens,
    warp_scores,
)
from jaxgpt.tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


def make_sampling_params(allowed=True, **settings) -> SamplingParams:
    return SamplingParams.from_configs(
        [SampleConfig(**{"temperature": 1.0, "top_p": 1.0} | settings)], allowed
    )


def draw_scores(B, V, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=(B, V))).astype(np.float32)


def draw_seen(B, V, seed=1):
    return np.random.default_rng(seed).random((B, V)) < 0.4


# --- samplers ---

SETTINGS = [
    {},
    dict(temperature=0.5),
    dict(temperature=1.7),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.1),
    dict(top_p=0.8),
    dict(top_p=0.999),
    dict(min_p=0.02),
    dict(min_p=1.0),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.6),
    dict(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    dict(temperature=1.5, top_k=8, top_p=0.7),
    dict(temperature=1.3, top_k=30, min_p=0.01),
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def warp_with_transformers(x, was_seen, settings):
    """Apply the processors of transformers in the order of its `generate`."""
    x = torch.tensor(x)
    if "repetition_penalty" in settings:
        ids = [np.flatnonzero(row) for row in was_seen]
        process = hf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])
        x = torch.cat(
            [process(torch.tensor(i)[None], row[None]) for i, row in zip(ids, x, strict=True)]
        )
    table = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    for name, warper in table.items():
        if name in settings:
            x = warper(settings[name])(None, x)
    return x.numpy()


@every_setting
def test_warped_scores_equal_those_of_transformers(settings):
    x, was_seen = draw_scores(50, 97), draw_seen(50, 97)
    actual = np.asarray(jax.jit(warp_scores)(x, was_seen, make_sampling_params(**settings)))
    expected = warp_with_transformers(x, was_seen, settings)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)  # one rounding per division


def compute_probabilities(row, was_seen, settings):
    """Compute the distribution of one row in float64, from the definitions."""
    x = row.astype(np.float64)
    penalty = settings.get("repetition_penalty", 1.0)
    x = np.where(was_seen, np.where(x > 0, x / penalty, x * penalty), x)
    x = x / settings.get("temperature", 1.0)
    order = np.argsort(-x)
    p = np.exp(x - x.max())
    keep = np.zeros(len(x), bool)
    keep[order[: settings.get("top_k") or len(x)]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= settings.get("top_p", 1.0)]] = 0
    p[p < settings.get("min_p", 0.0) * p.max()] = 0
    return p / p.sum()


@every_setting
def test_draws_have_the_frequencies_of_the_distribution(settings):
    n, V = 40_000, 12
    row, was_seen = draw_scores(1, V, seed=3)[0] / 2, draw_seen(1, V)[0]
    p = compute_probabilities(row, was_seen, settings)
    keys = jax.random.split(jax.random.key(0), n)
    tile = lambda x: np.broadcast_to(x, (n, V))  # noqa: E731
    tokens = jax.jit(draw)(tile(row), tile(was_seen), make_sampling_params(**settings), keys)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    # The seed is fixed; one in a million seeds would fail by chance.
    if (p > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-6


def test_a_threshold_is_the_score_that_sorting_finds():
    x = draw_scores(6, 3000)
    x[3:] = x[3:].round(1)  # ties
    x[:, ::7] = -np.inf
    ranked = -np.sort(-x, axis=-1)
    for k in (1, 2, 40, 1500, 2999, 5000):
        threshold = np.asarray(SAMPLERS["top_k"](x, np.full((6, 1), k)))
        np.testing.assert_array_equal(threshold[:, 0], ranked[:, min(k, 3000) - 1])
    p = np.exp(ranked.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    before = np.cumsum(p, axis=-1) - p
    for share in (1e-9, 0.1, 0.5, 0.9, 0.99):
        threshold = np.asarray(SAMPLERS["top_p"](x, np.full((6, 1), share, np.float32)))[:, 0]
        for row, least in enumerate(threshold):
            found = np.flatnonzero(ranked[row] == least)
            assert before[row, found[0]] < share + 1e-5
            assert before[row, found[-1] + 1] >= share - 1e-5


def test_greedy_rows_are_not_truncated():
    x = draw_scores(3, 97)
    sampling = make_sampling_params(temperature=0, top_k=3, top_p=0.5, min_p=0.5)
    np.testing.assert_array_equal(warp_scores(x, np.zeros_like(x, bool), sampling), x)


def test_temperature_zero_takes_the_most_likely_token_for_every_key():
    x = draw_scores(50, 97)
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 50)
        tokens = draw(x, draw_seen(50, 97), make_sampling_params(temperature=0), keys)
        np.testing.assert_array_equal(tokens, x.argmax(-1))


def test_of_equal_scores_the_first_token_is_the_best():
    x = draw_scores(50, 97).round()
    np.testing.assert_array_equal(find_best(x), x.argmax(-1))
    assert ((x == x.max(-1, keepdims=True)).sum(-1) > 1).any()


def test_temperature_zero_takes_the_most_likely_token_after_the_penalty():
    x, was_seen = draw_scores(50, 97), draw_seen(50, 97)
    settings = dict(temperature=0, repetition_penalty=3.0)
    tokens = draw(
        x, was_seen, make_sampling_params(**settings), jax.random.split(jax.random.key(0), 50)
    )
    most_likely = warp_with_transformers(x, was_seen, dict(repetition_penalty=3.0)).argmax(-1)
    np.testing.assert_array_equal(tokens, most_likely)
    assert (most_likely != x.argmax(-1)).any()


def test_a_top_p_of_one_keeps_every_token_together_with_another_sampler():
    # 1 + 1e-9 is 1 in float32: the cumulative sum reaches 1 before the last token.
    x = np.array([[20.0, 0.0, -1.0, -2.0, -30.0]], np.float32)
    actual = warp_scores(x, np.zeros_like(x, bool), make_sampling_params(top_k=4, top_p=1.0))
    np.testing.assert_array_equal(np.isfinite(actual), [[True, True, True, True, False]])


@every_setting
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_not_sampleable_is_never_drawn(settings, temperature):
    x = draw_scores(300, 20)
    x[:, 15:] += 20  # by far the most likely
    allowed = np.arange(20) < 15
    keys = jax.random.split(jax.random.key(0), 300)
    settings = {"temperature": temperature} | settings
    assert (
        jax.jit(draw)(x, draw_seen(300, 20), make_sampling_params(allowed, **settings), keys).max()
        < 15
    )


# --- sampleable tokens ---


def test_text_and_eos_are_sampleable_but_no_other_special_token_nor_rows_beyond_the_tokenizer():
    allowed = sampleable_tokens(TOKENIZER, 270)
    assert allowed.shape == (270,)
    t = TOKENIZER
    assert set(np.flatnonzero(~allowed)) == {t.pad, t.unk, t.bos, *range(260, 270)}


def test_an_eos_that_is_also_bos_pad_and_unk_is_sampleable():
    gpt2 = make_byte_tokenizer()
    gpt2.bos = gpt2.pad = gpt2.unk = gpt2.eos
    assert sampleable_tokens(gpt2, 260)[gpt2.eos]


# --- rules of each row ---

ROW_SETTINGS = [dict(temperature=0.0, top_k=3, repetition_penalty=2.0), *SETTINGS]


def make_row_params(settings) -> SamplingParams:
    samples = [SampleConfig(**{"temperature": 1.0, "top_p": 1.0} | row) for row in settings]
    return SamplingParams.from_configs(samples, True)


def test_every_row_is_warped_by_its_own_rules():
    x, was_seen = draw_scores(len(ROW_SETTINGS), 97), draw_seen(len(ROW_SETTINGS), 97)
    warp = jax.jit(warp_scores)
    actual = np.asarray(warp(x, was_seen, make_row_params(ROW_SETTINGS)))
    for i, settings in enumerate(ROW_SETTINGS):
        single = warp(x[i : i + 1], was_seen[i : i + 1], make_row_params([settings]))
        np.testing.assert_array_equal(actual[i], single[0])


def test_the_token_of_a_row_depends_on_its_own_rules_only():
    x, was_seen = draw_scores(len(ROW_SETTINGS), 97), draw_seen(len(ROW_SETTINGS), 97)
    keys = jax.random.split(jax.random.key(3), len(ROW_SETTINGS))
    draw_rows = jax.jit(draw)
    actual = draw_rows(x, was_seen, make_row_params(ROW_SETTINGS), keys)
    for i, settings in enumerate(ROW_SETTINGS):
        row, rules = slice(i, i + 1), make_row_params([settings])
        assert actual[i] == draw_rows(x[row], was_seen[row], rules, keys[row])[0]


def test_the_key_of_a_row_comes_from_its_seed_and_its_index():
    keys = make_row_keys([SampleConfig(seed=seed) for seed in (7, 7, 2**31 + 1)])
    for i, seed in enumerate((7, 7, 2**31 + 1)):
        expected = jax.random.fold_in(jax.random.key(seed), i)
        np.testing.assert_array_equal(jax.random.key_data(keys[i]), jax.random.key_data(expected))
