"""Samplers against distributions and transformers, decoding against an uncached loop."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from helpers import compute_logits, random_params, single_document_coords, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from jaxgpt import generate as g
from jaxgpt.config import ConfigError, ModelConfig, SampleConfig
from jaxgpt.generate import (
    Row,
    SamplingParams,
    draw,
    generate,
    generate_rows,
    round_up_to_bucket,
    sampleable_tokens,
    warp_scores,
)
from jaxgpt.model import Coords, abstract_params, build, init_cache, unstack_layers
from jaxgpt.tokenizer import StreamDecoder, make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
CFG = tiny(vocab=270, context=64)  # ten more rows than the tokenizer has tokens
PARAMS = random_params(CFG, std=0.3)
GREEDY = SampleConfig(temperature=0, tokens=20)
DRAWN = SampleConfig(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.1, tokens=20)


def make_sampling_params(allowed=True, **settings) -> SamplingParams:
    return SamplingParams.from_config(SampleConfig(**{"temperature": 1.0} | settings), allowed)


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


def test_temperature_zero_takes_the_most_likely_token_for_every_key():
    x = draw_scores(50, 97)
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 50)
        tokens = draw(x, draw_seen(50, 97), make_sampling_params(temperature=0), keys)
        np.testing.assert_array_equal(tokens, x.argmax(-1))


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


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_generation_never_draws_a_row_beyond_the_tokenizer(sample):
    table = np.array(PARAMS["embed"]["table"])
    forbidden = np.r_[[TOKENIZER.pad, TOKENIZER.unk, TOKENIZER.bos], 260:270]
    # Scaled by both signs, so that for any hidden state some of these logits are the largest.
    table[forbidden] *= np.where(np.arange(len(forbidden)) % 2, 30, -30)[:, None]
    params = PARAMS | {"embed": {"table": jnp.asarray(table)}}
    rows, _ = generate_all(["abc", ""], sample, params=params)
    drawn = [token for row in rows for token in row.drawn]
    assert len(drawn) > 20  # of at most 40; a row may end earlier
    assert all(4 <= token < 260 for token in drawn)


# --- decoding ---


def generate_all(prompts, sample, cfg=CFG, params=PARAMS, tokenizer=TOKENIZER):
    """Run a whole generation: (rows, texts)."""
    texts, rows = [""] * len(prompts), []
    for rows, pieces in generate_rows(cfg, params, tokenizer, prompts, sample):  # noqa: B007
        texts = [a + b for a, b in zip(texts, pieces, strict=True)]
    return rows, texts


@functools.partial(jax.jit, static_argnames="cfg")
def compute_last_logits(cfg, params, tokens, n, prefix):
    """Compute the logits of the uncached model after the first n of tokens [1 context]."""
    coords = single_document_coords(tokens)
    if "prefix" in cfg.pattern:
        coords = coords._replace(prefix=jnp.full_like(tokens, prefix))
    logits = compute_logits(cfg, params, tokens, coords)
    return jax.lax.dynamic_index_in_dim(logits, n - 1, 1, False)


def generate_uncached(prompt, sample, index=0, cfg=CFG, params=PARAMS):
    """Generate tokens after a prompt, with a whole forward pass for each."""
    ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt).tolist()]
    settings = SamplingParams.from_config(sample, sampleable_tokens(TOKENIZER, cfg.vocab))
    key = jax.random.fold_in(jax.random.key(sample.seed), index)
    out = []
    while len(out) < sample.tokens:
        if len(ids) >= cfg.context:
            if not sample.slide:
                break
            ids = ids[-(cfg.context // 2) :]
        padded = np.zeros((1, cfg.context), np.int32)
        padded[0, : len(ids)] = ids
        was_seen = np.isin(np.arange(cfg.vocab), ids)[None]
        prefix = max(len(ids) - len(out), 0)  # what is left of the prompt
        x = compute_last_logits(cfg, params, padded, len(ids), prefix)
        token = int(jit_draw(x, was_seen, settings, jax.random.fold_in(key, len(out))[None])[0])
        if token == TOKENIZER.eos:
            break
        ids.append(token)
        out.append(token)
    return out


jit_draw = jax.jit(draw)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_cached_generation_equals_the_uncached_loop_for_prompts_of_any_length(sample, position):
    cfg = dataclasses.replace(CFG, position=position)
    params = random_params(cfg, seed=2, std=0.3)
    prompts = ["", "a", "hello there", "x" * 40]
    rows, _ = generate_all(prompts, sample, cfg, params)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert row.drawn == generate_uncached(prompt, sample, index, cfg, params)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_the_other_rows(sample):
    rows = [generate_all([other, "hello"], sample)[0][1] for other in ("", "x" * 50)]
    assert rows[0].drawn == rows[1].drawn
    if sample is GREEDY:
        assert generate_all(["hello"], sample)[0][0].drawn == rows[0].drawn


def test_the_same_seed_repeats_and_another_differs():
    a, repeated, b = (
        generate_all(["hello"], dataclasses.replace(DRAWN, seed=seed))[1] for seed in (1, 1, 2)
    )
    assert a == repeated
    assert a != b


def test_equal_prompts_in_two_rows_get_different_texts():
    _, (a, b) = generate_all(["hello", "hello"], DRAWN)
    assert a != b


def test_nothing_recompiles_when_prompts_and_settings_change(count_compilations):
    generate_all(["hello"], DRAWN)
    before = count_compilations(g.prefill, g.decode)
    for sample in (DRAWN, GREEDY, SampleConfig(tokens=25, top_p=0.3, min_p=0.1, seed=5)):
        for prompt in ("", "a", "some more text"):
            generate_all([prompt], sample)
    assert count_compilations(g.prefill, g.decode) == before


@given(st.integers(1, 10_000))
def test_a_bucket_is_the_smallest_that_holds_the_length(length):
    sizes = [g.MIN_BUCKET_TOKENS * 2**n for n in range(12)]
    assert round_up_to_bucket(length) == next(size for size in sizes if size >= length)


def test_unstacked_layers_keep_their_order_beyond_ten():
    cfg = tiny(layers=12)
    params = random_params(cfg, std=0.3)
    token, coords = jnp.ones((1, 1), jnp.int32), Coords(*jnp.ones((2, 1, 1), jnp.int32))
    (unstacked, cache), (scanned, _) = (
        build(cfg).apply({"params": p}, token, coords, *args)
        for p, args in ((unstack_layers(params), [init_cache(cfg, 1, 1)]), (params, []))
    )
    assert len(cache.states) == 12
    np.testing.assert_allclose(unstacked, scanned, rtol=1e-4)


def list_new_arrays(cfg: ModelConfig, rows: int, slots: int) -> list[tuple[int, str]]:
    """Return (elements, line) of every new array in the decode loop, without in-place updates."""
    params, _ = abstract_params(cfg)
    n = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
    state = jax.eval_shape(lambda *of: g.prefill(cfg, *of, slots), params, prompts, n, n)
    settings = SamplingParams.from_config(DRAWN, np.ones(cfg.vocab, bool))
    keys = jax.random.split(jax.random.key(0), rows)
    unstacked = jax.eval_shape(unstack_layers, params)
    text = g.decode.lower(cfg, unstacked, settings, keys, state, 4).compile().as_text()
    loop = max(re.findall(r" = \((.*)\) while\(.* body=%?([\w.-]+)", text), key=lambda x: len(x[0]))
    body = text.split(f"\n%{loop[1]} (")[1].split("\n}")[0].splitlines()[1:]
    reused = r"(get-tuple-element|parameter|bitcast|tuple|while)\(|dynamic-update-slice"
    new_arrays = [line.strip() for line in body if not re.search(reused, line.split("metadata")[0])]
    shapes = [re.search(r"= \w+\[([\d,]*)\]", line) for line in new_arrays]
    return [
        (math.prod(map(int, filter(None, shape[1].split(",")))), line)
        for shape, line in zip(shapes, new_arrays, strict=True)
        if shape
    ]


@pytest.mark.parametrize("kv_heads", [2, 4])  # with a single one, XLA copies the keys on CPUs
def test_a_token_is_drawn_without_a_copy_of_weights_or_cache(kv_heads):
    shape = dict(vocab=40, width=64, heads=4, head_width=16, ffn=80, layers=3)
    cfg = tiny(**shape, kv_heads=kv_heads, context=256)
    rows, slots = 2, 128
    new_arrays = list_new_arrays(cfg, rows, slots)
    assert len(new_arrays) > 20
    # The smallest matrix has 2048 elements, the keys of a layer 8192 or more; attention weights,
    # one per row, head and slot, 1024.
    assert [line for numbers, line in new_arrays if numbers > rows * 4 * slots] == []


# --- end of generation ---


def make_reciting_model(text):
    """Make the config and parameters of a model that generates a text from positions only.

    The embedding of position t is one-hot, and so is the head row of the token that comes next.
    """
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text).tolist(), TOKENIZER.eos]
    shape = dict(vocab=260, context=64, width=64, layers=1, heads=1, kv_heads=1)
    cfg = tiny(**shape, position="learned", tie=False)
    params = jax.tree.map(jnp.zeros_like, random_params(cfg))
    params["stack"]["norm"]["scale"] = jnp.ones(64)
    params["stack"]["position"]["table"] = jnp.eye(64)
    head = np.zeros((260, 64), np.float32)
    for position, token in enumerate(ids[1:]):
        head[token, position] = 1
    params["head"]["table"] = jnp.asarray(head)
    return cfg, params


def run_reciting_model(text, **settings):
    """Run a model that generates the text and ends: (row, text, pieces)."""
    cfg, params = make_reciting_model(text)
    sample = SampleConfig(temperature=0, **{"tokens": 200} | settings)
    pieces = [p[0] for p in generate(cfg, params, TOKENIZER, [""], sample)]
    rows, texts = generate_all([""], sample, cfg, params)
    assert "".join(pieces) == texts[0]
    return rows[0], texts[0], pieces


def test_eos_ends_a_row_and_is_not_part_of_it():
    row, text, _ = run_reciting_model("the cat sat")
    assert (text, row.ending, len(row.drawn)) == ("the cat sat", "eos", 11)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_no_more_tokens_are_drawn_than_requested(tokens):
    full_text = "the quick brown fox jumps over the lazy dog"
    row, text, _ = run_reciting_model(full_text, tokens=tokens)
    assert (text, row.ending, len(row.drawn)) == (full_text[:tokens], "tokens", tokens)


@pytest.mark.parametrize(
    ("stop", "kept_text"),
    [
        (("fox",), "the quick brown "),  # ends inside the second chunk of 16
        (("n fo",), "the quick brow"),  # across the end of the first
        (("the",), ""),
        (("zebra",), "the quick brown fox jumps"),
        (("quiz", "k b"), "the quic"),
        (("fox", "quick"), "the "),
        (("jumps", "jumps over"), "the quick brown fox "),
        (("jumps over",), "the quick brown fox jumps"),  # started, but never completed
    ],
    ids=str,
)
def test_a_stop_string_ends_the_text_before_it(stop, kept_text):
    row, text, pieces = run_reciting_model("the quick brown fox jumps", stop=stop)
    assert text == kept_text
    assert row.ending == ("eos" if kept_text.endswith("jumps") else "stop")
    assert len(pieces) <= 2


class MergedTokens:
    """A decoder of tokens of several characters."""

    def push(self, ids):
        return "".join({5: "a, b, c", 6: "d"}[i] for i in ids)

    def flush(self):
        return ""


@pytest.mark.parametrize(("stops", "kept_text"), [((", ",), "da"), (("c", "b"), "da, ")], ids=str)
def test_the_first_of_several_stop_strings_in_a_token_ends_the_text(stops, kept_text):
    row = Row([], [0], 9, MergedTokens(), stops=stops)
    assert row.push(6, eos=1) + row.push(5, eos=1) == kept_text
    assert row.ending == "stop"


def test_text_is_streamed_as_soon_as_it_cannot_be_part_of_a_stop_string():
    _, _, pieces = run_reciting_model("the quick brown fox jumps", stop=("wn!",))
    assert pieces == ["the quick brown ", "fox jumps"]
    _, _, pieces = run_reciting_model("the quick brown fox jumps", stop=("n fig",))
    assert pieces == ["the quick brow", "n fox jumps"]


def test_an_incomplete_character_is_held_back_until_it_is_complete():
    full_text = "0123456789abcde\u00e9fg"  # the bytes of é are the 16th and 17th token
    _, text, pieces = run_reciting_model(full_text)
    assert text == full_text
    assert pieces == [full_text[:15], full_text[15:]]


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character():
    _, text, _ = run_reciting_model("ab\u00e9", tokens=3)
    assert text == "ab\ufffd"


def test_each_row_has_its_own_ending():
    cfg, params = make_reciting_model("the quick brown fox jumps")
    rows, texts = generate_all(
        ["", "the quick"], SampleConfig(temperature=0, tokens=20), cfg, params
    )
    assert [(t, r.ending) for t, r in zip(texts, rows, strict=True)] == [
        ("the quick brown fox ", "tokens"),
        (" brown fox jumps", "eos"),
    ]


NO_EOS = dataclasses.replace(DRAWN, tokens=200, seed=3)
# A row of zeros has logit 0, which is never among the 40 largest of 256.
PARAMS_WITHOUT_EOS = PARAMS | {
    "embed": {"table": PARAMS["embed"]["table"].at[TOKENIZER.eos].set(0)}
}


def test_a_full_context_ends_a_row_without_slide():
    rows, texts = generate_all(["hello", "x" * 60], NO_EOS, params=PARAMS_WITHOUT_EOS)
    assert [row.ending for row in rows] == ["context", "context"]
    assert [len(row.drawn) for row in rows] == [64 - 6, 64 - 61]
    for row, text in zip(rows, texts, strict=True):
        assert text == TOKENIZER.decode(row.drawn)


def test_with_slide_generation_past_the_context_equals_the_uncached_loop():
    sample = dataclasses.replace(NO_EOS, slide=True, tokens=150)
    prompts = ["hello", "x" * 50]
    rows, _ = generate_all(prompts, sample, params=PARAMS_WITHOUT_EOS)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert (row.ending, len(row.drawn)) == ("tokens", 150)
        assert row.drawn == generate_uncached(prompt, sample, index, params=PARAMS_WITHOUT_EOS)


def test_a_prefix_is_the_prompt_and_never_takes_in_what_is_drawn():
    cfg = dataclasses.replace(CFG, pattern=("prefix",))
    sample = dataclasses.replace(NO_EOS, slide=True, tokens=80)
    prompts = ["hello", "x" * 50]  # of the second, half is left after the first slide
    rows, _ = generate_all(prompts, sample, cfg, PARAMS_WITHOUT_EOS)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert row.drawn == generate_uncached(prompt, sample, index, cfg, PARAMS_WITHOUT_EOS)


# --- prompts ---


@pytest.mark.parametrize("letters", [63, 64, 500])
def test_a_prompt_that_fills_the_context_is_rejected_with_both_lengths(letters):
    with pytest.raises(ConfigError, match=rf"{letters + 1} tokens.*model\.context=64.*slide=true"):
        generate_all(["x" * letters], GREEDY)


def test_the_longest_prompt_that_fits_gets_one_token():
    rows, _ = generate_all(["x" * 62], GREEDY)
    assert (len(rows[0].drawn), rows[0].ending) == (1, "context")


def test_with_slide_a_long_prompt_keeps_its_end():
    sample = dataclasses.replace(GREEDY, slide=True)
    rows, _ = generate_all(["y" * 500 + "x" * 32], sample)
    assert rows[0].drawn == generate_uncached("y" * 100 + "x" * 32, sample)


def test_an_empty_prompt_starts_a_document():
    rows, _ = generate_all([""], GREEDY)
    assert rows[0].ids[0] == TOKENIZER.bos
    assert rows[0].ids[1:] == rows[0].drawn


@pytest.mark.parametrize("prompt", ["\udcff\udc80", "\ud800", "a\x00b", "\U0001f642", "<eos><bos>"])
def test_a_prompt_may_be_any_string(prompt):
    rows, _ = generate_all([prompt], GREEDY)
    ids = rows[0].ids[1 : len(rows[0].ids) - len(rows[0].drawn)]
    assert TOKENIZER.decode_bytes(ids) == TOKENIZER.decode_bytes(TOKENIZER.encode(prompt))
    assert len(ids) > 0
    assert TOKENIZER.eos not in ids


def test_no_prompts_give_no_text():
    assert generate_all([], GREEDY) == ([], [])


@given(st.lists(st.integers(0, 259)), st.data())
def test_pieces_of_a_stream_join_to_the_decoding_of_the_whole(ids, data):
    stream, text, rest = StreamDecoder(TOKENIZER), "", ids
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        text, rest = text + stream.push(rest[:n]), rest[n:]
    assert text + stream.flush() == TOKENIZER.decode(ids)
