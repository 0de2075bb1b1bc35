"""Cached decoding against an uncached loop; endings, prompts and rules of rows."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compute_logits, random_params, single_document_coords, tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_kinds import make_content

from jaxgpt import generate as g
from jaxgpt.config import Config, ConfigError, ModelConfig, SampleConfig, TrainConfig
from jaxgpt.engine import programs
from jaxgpt.generate import generate, round_up_to_bucket, stream
from jaxgpt.model import Coords, abstract_params, build, init_cache, unstack_layers
from jaxgpt.sampling import SamplingParams, draw, sampleable_tokens
from jaxgpt.tokenizer import StreamDecoder, Tokenizer, make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
CFG = tiny(vocab=270, context=64)  # ten more rows than the tokenizer has tokens
PARAMS = random_params(CFG, std=0.3)
PROGRAMS = (programs.prefill, programs.insert, programs.decode, g.prepare_decode_params)
GREEDY = SampleConfig(temperature=0, tokens=20)
DRAWN = SampleConfig(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.1, tokens=20)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_generation_never_draws_a_row_beyond_the_tokenizer(sample):
    table = np.array(PARAMS["embed"]["table"])
    forbidden = np.r_[[TOKENIZER.pad, TOKENIZER.unk, TOKENIZER.bos], 260:270]
    # Scaled by both signs, so that for any hidden state some of these logits are the largest.
    table[forbidden] *= np.where(np.arange(len(forbidden)) % 2, 30, -30)[:, None]
    params = PARAMS | {"embed": {"table": jnp.asarray(table)}}
    sample = dataclasses.replace(sample, min_tokens=20)  # no draw ends a row
    drawn = [t for row in generate_all(["abc", ""], sample, params=params) for t in row.tokens]
    assert len(drawn) == 40
    assert all(4 <= token < 260 for token in drawn)


# --- decoding ---


def generate_all(prompts, sample, cfg=CFG, params=PARAMS, tokenizer=TOKENIZER):
    """Generate from prompts by the same rules."""
    samples = [sample] * len(prompts)
    train = TrainConfig(objective="prefix" if "prefix" in cfg.pattern else "causal")
    return generate(Config(model=cfg, train=train), params, tokenizer, prompts, samples)


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
    settings = SamplingParams.from_configs([sample], sampleable_tokens(TOKENIZER, cfg.vocab))
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
    rows = generate_all(prompts, sample, cfg, params)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert list(row.tokens) == generate_uncached(prompt, sample, index, cfg, params)


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_the_other_rows(sample):
    rows = [generate_all([other, "hello"], sample)[1] for other in ("", "x" * 50)]
    assert rows[0].tokens == rows[1].tokens
    if sample is GREEDY:
        assert generate_all(["hello"], sample)[0].tokens == rows[0].tokens


def test_the_same_seed_repeats_and_another_differs():
    a, repeated, b = (
        generate_all(["hello"], dataclasses.replace(DRAWN, seed=seed)) for seed in (1, 1, 2)
    )
    assert a == repeated
    assert a != b


def test_equal_prompts_in_two_rows_get_different_texts():
    a, b = generate_all(["hello", "hello"], DRAWN)
    assert a.text != b.text


def test_nothing_recompiles_when_prompts_and_settings_change(count_compilations):
    generate_all(["hello"], DRAWN)
    before = count_compilations(*PROGRAMS)
    for sample in (DRAWN, GREEDY, SampleConfig(tokens=25, top_p=0.3, min_p=0.1, seed=5)):
        for prompt in ("", "a", "some more text"):
            generate_all([prompt], sample)
    assert count_compilations(*PROGRAMS) == before


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
    params = jax.eval_shape(unstack_layers, abstract_params(cfg)[0])
    state = jax.eval_shape(lambda: programs.init_state(cfg, rows, slots, 16))
    masks = [jax.ShapeDtypeStruct((rows,), bool), jax.ShapeDtypeStruct((rows, 2), np.uint32)]
    rest = [*masks, jax.ShapeDtypeStruct((cfg.vocab,), bool), jax.ShapeDtypeStruct((), np.int32)]
    text = programs.decode.lower(cfg, params, state, *rest).compile().as_text()
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
    config = Config(model=cfg)
    pieces = [row for (row,) in stream(config, params, TOKENIZER, [""], [sample])]
    row = generate(config, params, TOKENIZER, [""], [sample])[0]
    assert row == g.join_pieces(pieces)
    return row, row.text, [piece.text for piece in pieces]


def test_eos_ends_a_row_and_is_not_part_of_it():
    row, text, _ = run_reciting_model("the cat sat")
    assert (text, row.ending, len(row.tokens)) == ("the cat sat", "eos", 11)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_no_more_tokens_are_drawn_than_requested(tokens):
    full_text = "the quick brown fox jumps over the lazy dog"
    row, text, _ = run_reciting_model(full_text, tokens=tokens)
    assert (text, row.ending, len(row.tokens)) == (full_text[:tokens], "tokens", tokens)


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
    row = g.Row(SampleConfig(stop=stops), [], [0], MergedTokens())
    assert row.push(6, eos=(1,)) + row.push(5, eos=(1,)) == kept_text
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
    sample = SampleConfig(temperature=0, tokens=20)
    rows = generate_all(["", "the quick"], sample, cfg, params)
    assert [(row.text, row.ending) for row in rows] == [
        ("the quick brown fox ", "tokens"),
        (" brown fox jumps", "eos"),
    ]


NO_EOS = dataclasses.replace(DRAWN, tokens=200, seed=3)
# A row of zeros has logit 0, which is never among the 40 largest of 256.
PARAMS_WITHOUT_EOS = PARAMS | {
    "embed": {"table": PARAMS["embed"]["table"].at[TOKENIZER.eos].set(0)}
}


def test_a_full_context_ends_a_row_without_slide():
    rows = generate_all(["hello", "x" * 60], NO_EOS, params=PARAMS_WITHOUT_EOS)
    assert [row.ending for row in rows] == ["context", "context"]
    assert [len(row.tokens) for row in rows] == [64 - 6, 64 - 61]
    for row in rows:
        assert row.text == TOKENIZER.decode(list(row.tokens))


def test_with_slide_generation_past_the_context_equals_the_uncached_loop():
    sample = dataclasses.replace(NO_EOS, slide=True, tokens=150)
    prompts = ["hello", "x" * 50]
    rows = generate_all(prompts, sample, params=PARAMS_WITHOUT_EOS)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert (row.ending, len(row.tokens)) == ("tokens", 150)
        assert list(row.tokens) == generate_uncached(
            prompt, sample, index, params=PARAMS_WITHOUT_EOS
        )


def test_a_prefix_is_the_prompt_and_never_takes_in_what_is_drawn():
    cfg = dataclasses.replace(CFG, pattern=("prefix",))
    sample = dataclasses.replace(NO_EOS, slide=True, tokens=80)
    prompts = ["hello", "x" * 50]  # of the second, half is left after the first slide
    rows = generate_all(prompts, sample, cfg, PARAMS_WITHOUT_EOS)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        wanted = generate_uncached(prompt, sample, index, cfg, PARAMS_WITHOUT_EOS)
        assert list(row.tokens) == wanted


# --- prompts ---


@pytest.mark.parametrize("letters", [63, 64, 500])
def test_a_prompt_that_fills_the_context_is_rejected_with_both_lengths(letters):
    with pytest.raises(ConfigError, match=rf"{letters + 1} tokens.*model\.context=64.*slide=true"):
        generate_all(["x" * letters], GREEDY)


def test_the_longest_prompt_that_fits_gets_one_token():
    rows = generate_all(["x" * 62], GREEDY)
    assert (len(rows[0].tokens), rows[0].ending) == (1, "context")


def test_with_slide_a_long_prompt_keeps_its_end():
    sample = dataclasses.replace(GREEDY, slide=True)
    rows = generate_all(["y" * 500 + "x" * 32], sample)
    assert list(rows[0].tokens) == generate_uncached("y" * 100 + "x" * 32, sample)


def encode_prompt(prompt):
    (row,) = g.encode_prompts(Config(model=CFG), TOKENIZER, [prompt], [GREEDY])
    return row.ids


def test_an_empty_prompt_starts_a_document():
    assert encode_prompt("") == [TOKENIZER.bos]
    assert len(generate_all([""], GREEDY)[0].tokens) > 0


@pytest.mark.parametrize("prompt", ["\udcff\udc80", "\ud800", "a\x00b", "\U0001f642", "<eos><bos>"])
def test_a_prompt_may_be_any_string(prompt):
    bos, *ids = encode_prompt(prompt)
    assert bos == TOKENIZER.bos
    assert TOKENIZER.decode_bytes(ids) == TOKENIZER.decode_bytes(TOKENIZER.encode(prompt))
    assert len(ids) > 0
    assert TOKENIZER.eos not in ids
    assert generate_all([prompt], GREEDY)[0].ending


def test_no_prompts_give_no_text():
    assert generate_all([], GREEDY) == []


# --- rules of each row ---

MIXED = [
    dataclasses.replace(DRAWN, seed=8),
    GREEDY,
    SampleConfig(temperature=2.0, min_p=0.05, tokens=40, seed=3),
    SampleConfig(temperature=0.9, tokens=70, slide=True, repetition_penalty=1.5),
    SampleConfig(temperature=0, tokens=30, stop=("e",)),
]


def test_every_row_follows_its_own_rules_whatever_the_other_rows_do():
    prompts = ["hello", "", "x" * 30, "a", "hello there"]
    config = Config(model=CFG)
    mixed = generate(config, PARAMS, TOKENIZER, prompts, MIXED)
    for index, (prompt, sample) in enumerate(zip(prompts, MIXED, strict=True)):
        uniform = generate(
            config, PARAMS, TOKENIZER, [prompt] * (index + 1), [sample] * (index + 1)
        )
        np.testing.assert_allclose(mixed[index].logprobs, uniform[index].logprobs, atol=1e-4)
        assert mixed[index].tokens == uniform[index].tokens
        assert (mixed[index].text, mixed[index].ending) == (
            uniform[index].text,
            uniform[index].ending,
        )


def test_other_rules_for_the_rows_do_not_recompile(count_compilations):
    config, prompts = Config(model=CFG), ["hello", "a"]
    rules = [MIXED[0], MIXED[1]], [MIXED[1], MIXED[0]], [GREEDY, GREEDY]
    generate(config, PARAMS, TOKENIZER, prompts, [DRAWN, DRAWN])
    before = count_compilations(
        programs.prefill, programs.insert, programs.decode, g.prepare_decode_params
    )
    for samples in rules:
        generate(config, PARAMS, TOKENIZER, prompts, samples)
    assert (
        count_compilations(
            programs.prefill, programs.insert, programs.decode, g.prepare_decode_params
        )
        == before
    )


@pytest.mark.parametrize("sample", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_logprobs_are_those_of_the_model_before_the_sampling_rules(sample):
    row = generate_all(["hello"], sample)[0]
    ids = encode_prompt("hello")
    start = len(ids)
    ids = [*ids, *row.tokens]
    padded = jnp.zeros((1, CFG.context), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    logits = compute_logits(CFG, PARAMS, padded, single_document_coords(padded))
    expected = jax.nn.log_softmax(logits[0])[np.arange(start, len(ids)) - 1, ids[start:]]
    assert len(row.logprobs) == len(row.tokens) > 10
    np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)  # float32, cached


# --- decoding of bytes ---


@given(st.lists(st.integers(0, 259)), st.data())
def test_pieces_of_a_stream_join_to_the_decoding_of_the_whole(ids, data):
    stream, text, rest = StreamDecoder(TOKENIZER), "", ids
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        text, rest = text + stream.push(rest[:n]), rest[n:]
    assert text + stream.flush() == TOKENIZER.decode(ids)


def test_any_of_the_tokenizers_ends_ends_a_row_and_is_not_shown():
    unended = generate_all(["hello"], NO_EOS, params=PARAMS_WITHOUT_EOS)[0]
    end = unended.tokens[20]
    place = unended.tokens.index(end)
    tokenizer = Tokenizer(TOKENIZER.content, ends=[TOKENIZER.eos, end])
    rows = generate_all(["hello"], NO_EOS, params=PARAMS_WITHOUT_EOS, tokenizer=tokenizer)
    assert (rows[0].tokens, rows[0].ending) == (unended.tokens[:place], "eos")
    assert rows[0].text == TOKENIZER.decode(list(rows[0].tokens))


def test_a_prompt_begins_with_bos_only_if_the_tokenizer_adds_it():
    tokenizer = Tokenizer(TOKENIZER.content, settings={"add_bos_token": False})
    config = Config(model=CFG)
    for prompt, ids in (("ab", [101, 102]), ("", [TOKENIZER.bos])):
        (row,) = g.encode_prompts(config, tokenizer, [prompt], [GREEDY])
        assert row.ids == ids


def test_the_first_space_of_a_continuation_is_kept_and_that_of_a_text_is_not():
    tokenizer = Tokenizer(make_content("llama2"))
    word = tokenizer.encode("the").tolist()
    config = Config(model=dataclasses.replace(CFG, vocab=tokenizer.vocab_size))
    for prompt, text in (("a", " the"), ("", "the")):
        (row,) = g.encode_prompts(config, tokenizer, [prompt], [GREEDY])
        assert "".join(row.push(token, tokenizer.ends) for token in word) == text
