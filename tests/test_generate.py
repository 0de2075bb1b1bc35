"""Samplers against their distributions and transformers, decoding against a slow loop."""

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
from helpers import logits, random_params, tiny, whole
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from jaxgpt import generate as g
from jaxgpt.config import ConfigError, ModelConfig, SampleConfig
from jaxgpt.generate import Rules, bucket, draw, drawable, generate, generate_rows, warp
from jaxgpt.model import Coords, abstract_params, build, init_cache, layer_by_layer
from jaxgpt.tokenizer import StreamDecoder, from_bytes

TOKENIZER = from_bytes()
CFG = tiny(vocab=270, context=64)  # ten rows more than the tokenizer has tokens
PARAMS = random_params(CFG, std=0.3)
GREEDY = SampleConfig(temperature=0, tokens=20)
DRAWN = SampleConfig(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.1, tokens=20)


def rules(allowed=True, **knobs) -> Rules:
    return Rules.of(SampleConfig(**{"temperature": 1.0} | knobs), allowed)


def scores(B, V, seed=0):
    return (3 * np.random.default_rng(seed).normal(size=(B, V))).astype(np.float32)


def seen(B, V, seed=1):
    return np.random.default_rng(seed).random((B, V)) < 0.4


# --- samplers ---

KNOBS = [
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
every_knob = pytest.mark.parametrize("knobs", KNOBS, ids=str)


def warped_by_transformers(x, was_seen, knobs):
    """Its processors in the order of its `generate`."""
    x = torch.tensor(x)
    if "repetition_penalty" in knobs:
        ids = [np.flatnonzero(row) for row in was_seen]
        process = theirs.RepetitionPenaltyLogitsProcessor(knobs["repetition_penalty"])
        x = torch.cat(
            [process(torch.tensor(i)[None], row[None]) for i, row in zip(ids, x, strict=True)]
        )
    table = {
        "temperature": theirs.TemperatureLogitsWarper,
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }
    for name, warper in table.items():
        if name in knobs:
            x = warper(knobs[name])(None, x)
    return x.numpy()


@every_knob
def test_warped_scores_equal_those_of_transformers(knobs):
    x, was_seen = scores(50, 97), seen(50, 97)
    ours = np.asarray(jax.jit(warp)(x, was_seen, rules(**knobs)))
    wanted = warped_by_transformers(x, was_seen, knobs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(wanted))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)  # one rounding per division


def probabilities(row, was_seen, knobs):
    """The distribution of one row in float64, from the definitions."""
    x = row.astype(np.float64)
    penalty = knobs.get("repetition_penalty", 1.0)
    x = np.where(was_seen, np.where(x > 0, x / penalty, x * penalty), x)
    x = x / knobs.get("temperature", 1.0)
    order = np.argsort(-x)
    p = np.exp(x - x.max())
    keep = np.zeros(len(x), bool)
    keep[order[: knobs.get("top_k") or len(x)]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= knobs.get("top_p", 1.0)]] = 0
    p[p < knobs.get("min_p", 0.0) * p.max()] = 0
    return p / p.sum()


@every_knob
def test_draws_have_the_frequencies_of_the_distribution(knobs):
    n, V = 40_000, 12
    row, was_seen = scores(1, V, seed=3)[0] / 2, seen(1, V)[0]
    p = probabilities(row, was_seen, knobs)
    keys = jax.random.split(jax.random.key(0), n)
    tile = lambda x: np.broadcast_to(x, (n, V))  # noqa: E731
    tokens = jax.jit(draw)(tile(row), tile(was_seen), rules(**knobs), keys)
    counts = np.bincount(tokens, minlength=V)
    assert not counts[p == 0].any()
    # The seed is fixed; of other seeds one in a million would fail by chance.
    if (p > 0).sum() > 1:
        assert scipy.stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-6


def test_temperature_zero_takes_the_likeliest_whatever_the_key():
    x = scores(50, 97)
    for seed in range(3):
        tokens = draw(
            x, seen(50, 97), rules(temperature=0), jax.random.split(jax.random.key(seed), 50)
        )
        np.testing.assert_array_equal(tokens, x.argmax(-1))


def test_temperature_zero_takes_the_likeliest_after_the_penalty():
    x, was_seen = scores(50, 97), seen(50, 97)
    knobs = dict(temperature=0, repetition_penalty=3.0)
    tokens = draw(x, was_seen, rules(**knobs), jax.random.split(jax.random.key(0), 50))
    likeliest = warped_by_transformers(x, was_seen, dict(repetition_penalty=3.0)).argmax(-1)
    np.testing.assert_array_equal(tokens, likeliest)
    assert (likeliest != x.argmax(-1)).any()


def test_a_top_p_of_one_keeps_every_token_beside_another_sampler():
    # 1 + 1e-9 is 1 in float32: the sum reaches all before it has passed all.
    x = np.array([[20.0, 0.0, -1.0, -2.0, -30.0]], np.float32)
    found = warp(x, np.zeros_like(x, bool), rules(top_k=4, top_p=1.0))
    np.testing.assert_array_equal(np.isfinite(found), [[True, True, True, True, False]])


@every_knob
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_may_not_be_drawn_never_is(knobs, temperature):
    x = scores(300, 20)
    x[:, 15:] += 20  # by far the likeliest
    allowed = np.arange(20) < 15
    keys = jax.random.split(jax.random.key(0), 300)
    knobs = {"temperature": temperature} | knobs
    assert jax.jit(draw)(x, seen(300, 20), rules(allowed, **knobs), keys).max() < 15


# --- which tokens may be drawn ---


def test_text_and_eos_may_be_drawn_but_no_other_special_and_no_row_beyond_the_tokenizer():
    allowed = drawable(TOKENIZER, 270)
    assert allowed.shape == (270,)
    t = TOKENIZER
    assert set(np.flatnonzero(~allowed)) == {t.pad, t.unk, t.bos, *range(260, 270)}


def test_an_eos_that_also_is_bos_pad_and_unk_may_be_drawn():
    gpt2 = from_bytes()
    gpt2.bos = gpt2.pad = gpt2.unk = gpt2.eos
    assert drawable(gpt2, 260)[gpt2.eos]


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_generation_never_draws_a_row_beyond_the_tokenizer(sample):
    table = np.array(PARAMS["embed"]["table"])
    hot = np.r_[[TOKENIZER.pad, TOKENIZER.unk, TOKENIZER.bos], 260:270]
    # Both a row and its negative, so that either sign of the hidden state likes one of them best.
    table[hot] *= np.where(np.arange(len(hot)) % 2, 30, -30)[:, None]
    params = PARAMS | {"embed": {"table": jnp.asarray(table)}}
    rows, _ = finish(["abc", ""], sample, params=params)
    drawn = [token for row in rows for token in row.drawn]
    assert len(drawn) > 20  # of at most 40; a row may end
    assert all(4 <= token < 260 for token in drawn)


# --- decoding ---


def finish(prompts, sample, cfg=CFG, params=PARAMS, tokenizer=TOKENIZER):
    """(rows, texts) of a whole generation."""
    texts, rows = [""] * len(prompts), []
    for rows, pieces in generate_rows(cfg, params, tokenizer, prompts, sample):  # noqa: B007
        texts = [a + b for a, b in zip(texts, pieces, strict=True)]
    return rows, texts


@functools.partial(jax.jit, static_argnames="cfg")
def last_scores(cfg, params, tokens, n):
    """Of the uncached model, for tokens [1 context] of which n are real."""
    return jax.lax.dynamic_index_in_dim(logits(cfg, params, tokens, whole(tokens)), n - 1, 1, False)


def slowly(prompt, sample, index=0, cfg=CFG, params=PARAMS):
    """The tokens that come after a prompt, by a whole forward pass for each."""
    ids = [TOKENIZER.bos, *TOKENIZER.encode(prompt).tolist()]
    knobs = Rules.of(sample, drawable(TOKENIZER, cfg.vocab))
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
        x = last_scores(cfg, params, padded, len(ids))
        token = int(_draw(x, was_seen, knobs, jax.random.fold_in(key, len(out))[None])[0])
        if token == TOKENIZER.eos:
            break
        ids.append(token)
        out.append(token)
    return out


_draw = jax.jit(draw)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_cached_generation_equals_the_slow_loop_for_prompts_of_any_length(sample, position):
    cfg = dataclasses.replace(CFG, position=position)
    params = random_params(cfg, seed=2, std=0.3)
    prompts = ["", "a", "hello there", "x" * 40]
    rows, _ = finish(prompts, sample, cfg, params)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert row.drawn == slowly(prompt, sample, index, cfg, params)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_its_neighbours(sample):
    rows = [finish([other, "hello"], sample)[0][1] for other in ("", "x" * 50)]
    assert rows[0].drawn == rows[1].drawn
    if sample is GREEDY:
        assert finish(["hello"], sample)[0][0].drawn == rows[0].drawn


def test_the_same_seed_repeats_and_another_differs():
    a, again, b = (
        finish(["hello"], dataclasses.replace(DRAWN, seed=seed))[1] for seed in (1, 1, 2)
    )
    assert a == again
    assert a != b


def test_equal_prompts_at_two_places_get_different_texts():
    _, (a, b) = finish(["hello", "hello"], DRAWN)
    assert a != b


def test_nothing_recompiles_when_prompts_and_settings_change(compilations):
    finish(["hello"], DRAWN)
    before = compilations(g.prefill, g.decode)
    for sample in (DRAWN, GREEDY, SampleConfig(tokens=25, top_p=0.3, min_p=0.1, seed=5)):
        for prompt in ("", "a", "some more text"):
            finish([prompt], sample)
    assert compilations(g.prefill, g.decode) == before


@given(st.integers(1, 10_000))
def test_a_bucket_is_the_smallest_that_holds_the_length(length):
    sizes = [g.SMALLEST * 2**n for n in range(12)]
    assert bucket(length) == next(size for size in sizes if size >= length)


def test_layers_that_lie_apart_keep_their_order_beyond_ten():
    cfg = tiny(layers=12)
    params = random_params(cfg, std=0.3)
    token, at = jnp.ones((1, 1), jnp.int32), Coords(*jnp.ones((2, 1, 1), jnp.int32))
    (apart, cache), (scanned, _) = (
        build(cfg).apply({"params": p}, token, at, *more)
        for p, more in ((layer_by_layer(params), [init_cache(cfg, 1, 1)]), (params, []))
    )
    assert len(cache.states) == 12
    np.testing.assert_allclose(apart, scanned, rtol=1e-4)


def made_for_a_token(cfg: ModelConfig, rows: int, slots: int) -> list[tuple[int, str]]:
    """(numbers, line) of every array that the loop over tokens makes, but for those it changes."""
    params, _ = abstract_params(cfg)
    n = jax.ShapeDtypeStruct((rows,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
    state = jax.eval_shape(lambda *of: g.prefill(cfg, *of, slots), params, prompts, n, n)
    knobs = Rules.of(DRAWN, np.ones(cfg.vocab, bool))
    keys = jax.random.split(jax.random.key(0), rows)
    apart = jax.eval_shape(layer_by_layer, params)
    text = g.decode.lower(cfg, apart, knobs, keys, state, 4).compile().as_text()
    loop = max(re.findall(r" = \((.*)\) while\(.* body=%?([\w.-]+)", text), key=lambda x: len(x[0]))
    body = text.split(f"\n%{loop[1]} (")[1].split("\n}")[0].splitlines()[1:]
    kept = r"(get-tuple-element|parameter|bitcast|tuple|while)\(|dynamic-update-slice"
    made = [line.strip() for line in body if not re.search(kept, line.split("metadata")[0])]
    shapes = [re.search(r"= \w+\[([\d,]*)\]", line) for line in made]
    return [
        (math.prod(map(int, filter(None, shape[1].split(",")))), line)
        for shape, line in zip(shapes, made, strict=True)
        if shape
    ]


@pytest.mark.parametrize("kv_heads", [2, 4])  # of a single one, XLA copies the keys on CPUs
def test_a_token_is_drawn_without_a_copy_of_weights_or_cache(kv_heads):
    shape = dict(vocab=40, width=64, heads=4, head_width=16, ffn=80, layers=3)
    cfg = tiny(**shape, kv_heads=kv_heads, context=256)
    rows, slots = 2, 128
    made = made_for_a_token(cfg, rows, slots)
    assert len(made) > 20
    # The smallest matrix has 2048 numbers, the keys of a layer 8192 or more; attention's weights,
    # one for each row, head and slot, 1024.
    assert [line for numbers, line in made if numbers > rows * 4 * slots] == []


# --- endings ---


def forced(text):
    """A tokenizer, a config and parameters of a model that recites a text by position alone.

    Position t has a one-hot row, which meets the one-hot row of the token that comes next.
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


def recite(text, **knobs):
    """(row, text, pieces) of a model that says the text and ends."""
    cfg, params = forced(text)
    sample = SampleConfig(temperature=0, **{"tokens": 200} | knobs)
    pieces = [p[0] for p in generate(cfg, params, TOKENIZER, [""], sample)]
    rows, texts = finish([""], sample, cfg, params)
    assert "".join(pieces) == texts[0]
    return rows[0], texts[0], pieces


def test_eos_ends_a_row_and_is_no_part_of_it():
    row, text, _ = recite("the cat sat")
    assert (text, row.ending, len(row.drawn)) == ("the cat sat", "eos", 11)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_no_more_tokens_are_drawn_than_asked_for(tokens):
    said = "the quick brown fox jumps over the lazy dog"
    row, text, _ = recite(said, tokens=tokens)
    assert (text, row.ending, len(row.drawn)) == (said[:tokens], "tokens", tokens)


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (("fox",), "the quick brown "),  # ends inside the second chunk of 16
        (("n fo",), "the quick brow"),  # across the end of the first
        (("the",), ""),
        (("zebra",), "the quick brown fox jumps"),
        (("quiz", "k b"), "the quic"),
        (("fox", "quick"), "the "),
        (("jumps", "jumps over"), "the quick brown fox "),
        (("jumps over",), "the quick brown fox jumps"),  # begun, but never completed
    ],
    ids=str,
)
def test_a_stop_string_ends_the_text_before_it(stop, kept):
    row, text, pieces = recite("the quick brown fox jumps", stop=stop)
    assert text == kept
    assert row.ending == ("eos" if kept.endswith("jumps") else "stop")
    assert len(pieces) <= 2


def test_a_text_is_streamed_as_soon_as_it_is_certain():
    _, _, pieces = recite("the quick brown fox jumps", stop=("wn!",))
    assert pieces == ["the quick brown ", "fox jumps"]
    _, _, pieces = recite("the quick brown fox jumps", stop=("n fig",))
    assert pieces == ["the quick brow", "n fox jumps"]


def test_half_a_character_is_held_back_until_the_other_half_comes():
    said = "0123456789abcde\u00e9fg"  # the bytes of é are the 16th and 17th token
    _, text, pieces = recite(said)
    assert text == said
    assert pieces == [said[:15], said[15:]]


def test_half_a_character_at_the_end_becomes_a_replacement():
    _, text, _ = recite("ab\u00e9", tokens=3)
    assert text == "ab\ufffd"


def test_rows_end_each_for_its_own_reason():
    cfg, params = forced("the quick brown fox jumps")
    rows, texts = finish(["", "the quick"], SampleConfig(temperature=0, tokens=20), cfg, params)
    assert [(t, r.ending) for t, r in zip(texts, rows, strict=True)] == [
        ("the quick brown fox ", "tokens"),
        (" brown fox jumps", "eos"),
    ]


NO_EOS = dataclasses.replace(DRAWN, tokens=200, seed=3)
# A row of zeros scores 0, which is never among the 40 best of 256.
MUTE = PARAMS | {"embed": {"table": PARAMS["embed"]["table"].at[TOKENIZER.eos].set(0)}}


def test_a_full_context_ends_a_row_without_slide():
    rows, texts = finish(["hello", "x" * 60], NO_EOS, params=MUTE)
    assert [row.ending for row in rows] == ["context", "context"]
    assert [len(row.drawn) for row in rows] == [64 - 6, 64 - 61]
    for row, text in zip(rows, texts, strict=True):
        assert text == TOKENIZER.decode(row.drawn)


def test_with_slide_generation_goes_on_past_the_context_as_the_slow_loop_does():
    sample = dataclasses.replace(NO_EOS, slide=True, tokens=150)
    prompts = ["hello", "x" * 50]
    rows, _ = finish(prompts, sample, params=MUTE)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert (row.ending, len(row.drawn)) == ("tokens", 150)
        assert row.drawn == slowly(prompt, sample, index, params=MUTE)


# --- prompts ---


@pytest.mark.parametrize("letters", [63, 64, 500])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(letters):
    with pytest.raises(ConfigError, match=rf"{letters + 1} tokens.*model\.context=64.*slide=true"):
        finish(["x" * letters], GREEDY)


def test_the_longest_prompt_that_fits_gets_one_token():
    rows, _ = finish(["x" * 62], GREEDY)
    assert (len(rows[0].drawn), rows[0].ending) == (1, "context")


def test_with_slide_a_long_prompt_keeps_its_end():
    sample = dataclasses.replace(GREEDY, slide=True)
    rows, _ = finish(["y" * 500 + "x" * 32], sample)
    assert rows[0].drawn == slowly("y" * 100 + "x" * 32, sample)


def test_an_empty_prompt_starts_a_document():
    rows, _ = finish([""], GREEDY)
    assert rows[0].ids[0] == TOKENIZER.bos
    assert rows[0].ids[1:] == rows[0].drawn


@pytest.mark.parametrize("prompt", ["\udcff\udc80", "\ud800", "a\x00b", "\U0001f642", "<eos><bos>"])
def test_a_prompt_may_be_any_string(prompt):
    rows, _ = finish([prompt], GREEDY)
    ids = rows[0].ids[1 : len(rows[0].ids) - len(rows[0].drawn)]
    assert TOKENIZER.decode_bytes(ids) == TOKENIZER.decode_bytes(TOKENIZER.encode(prompt))
    assert len(ids) > 0
    assert TOKENIZER.eos not in ids


def test_no_prompts_give_no_text():
    assert finish([], GREEDY) == ([], [])


@given(st.lists(st.integers(0, 259)), st.data())
def test_pieces_of_a_stream_join_to_the_decoding_of_the_whole(ids, data):
    stream, text, rest = StreamDecoder(TOKENIZER), "", ids
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        text, rest = text + stream.push(rest[:n]), rest[n:]
    assert text + stream.flush() == TOKENIZER.decode(ids)
