"""The engine against plain recomputation, whatever joins, leaves and is cancelled beside a row."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from engine_cases import (
    ALLOWED,
    CFG,
    DRAWN,
    GREEDY,
    TOKENIZER,
    make_engine,
    make_row_request,
    recompute,
    run_all,
)
from helpers import random_params, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import ConfigError, MeshConfig, SampleConfig
from jaxgpt.engine import Engine, Size, prepare_decode_params, programs
from jaxgpt.engine.scheduler import round_up, split_prompt
from jaxgpt.model import abstract_params
from jaxgpt.sharding import make_mesh, make_shardings

POOL = [
    ("hello", GREEDY),
    ("", DRAWN),
    ("a text of thirty-seven characters, ok", DRAWN),
    ("x" * 50, GREEDY),
    ("hello", dataclasses.replace(DRAWN, seed=7, tokens=30)),
    ("ab", GREEDY, 0, 3),  # with alternatives
    ("", dataclasses.replace(DRAWN, regex="[a-z]{2}, forced, [a-z]{9}", tokens=25)),
]


@functools.cache
def get_engine(**more) -> Engine:
    return make_engine(**more)


@functools.cache
def run_alone(number: int) -> tuple[list[int], list[float]]:
    """Return the tokens and log-probabilities of a request of the pool in an empty engine."""
    request = make_row_request(*POOL[number])
    engine = get_engine()
    engine.drop_all()
    (logprobs,) = run_all(engine, [request])
    return request.row.drawn, logprobs


@pytest.mark.parametrize("number", range(len(POOL) - 2))
def test_a_row_alone_equals_plain_recomputation(number):
    tokens, logprobs = run_alone(number)
    assert tokens == recompute(*POOL[number])
    assert len(logprobs) == len(tokens) > 0


EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(POOL) - 1)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 3)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(EVENTS, min_size=5, max_size=20), st.booleans())
def test_neighbors_that_join_leave_and_are_cancelled_change_no_bit_of_a_row(events, is_interactive):
    engine = get_engine()
    engine.drop_all()
    engine.is_interactive = is_interactive
    requests, logprobs = [], {}

    def step():
        for request, piece in engine.step():
            logprobs[request] = logprobs.get(request, []) + list(piece.logprobs)

    for kind, value in events:
        if kind == "submit":
            requests.append((value, make_row_request(*POOL[value])))
            engine.submit(requests[-1][1])
        elif kind == "cancel" and value < len(requests):
            engine.cancel(requests[value][1])
        elif kind == "step":
            for _ in range(value):
                step()
    while not engine.is_idle:
        step()
    for number, request in requests:
        tokens, values = run_alone(number)
        if request.is_cancelled:
            assert request.row.drawn == tokens[: len(request.row.drawn)]
            assert logprobs.get(request, []) == values[: len(logprobs.get(request, []))]
        else:
            assert request.row.drawn == tokens
            assert logprobs[request] == values
    assert all(slot.request is None for slot in engine.scheduler.slots)


def test_a_prompt_in_chunks_has_the_scores_of_a_whole_one():
    scores = []
    for chunk in (16, 64):
        engine = make_engine(chunk=chunk)
        request = make_row_request("y" * 60, dataclasses.replace(GREEDY, tokens=1))
        engine.submit(request)
        engine._admit()
        engine._read_prompts()
        scores.append(np.asarray(engine.state.scores[0]))
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert np.abs(scores[0]).max() > 1


@settings(deadline=None)
@given(st.integers(1, 2000), st.sampled_from([16, 64, 256]))
def test_chunks_cover_a_prompt_in_few_sizes_with_little_padding(length, chunk):
    parts = list(split_prompt(length, 0, chunk))
    assert sum(tokens for tokens, _ in parts) == length
    assert all(size == round_up(size) <= chunk for _, size in parts)
    assert all(size - tokens <= 24 for tokens, size in parts)
    assert all(size - tokens < size / 4 for tokens, size in parts if tokens > 18)
    whole = length // chunk * chunk
    assert list(split_prompt(length, whole, chunk)) == parts[whole // chunk :]


# --- windows ---

WINDOW = 8
RING = tiny(vocab=270, context=128, pattern=("window", "full"), layers=3)
RING = dataclasses.replace(RING, sparse=dataclasses.replace(RING.sparse, window=WINDOW))


def test_a_ring_equals_a_full_cache_for_prompts_around_the_window():
    params = random_params(RING, std=0.3)
    engine = make_engine(RING, prepare_decode_params(RING, params), slots=128)
    sizes = [state["mixer"].k.shape[2] for state in engine.state.cache.states]
    assert sizes == [WINDOW + 16, 128, WINDOW + 16]
    sample = dataclasses.replace(GREEDY, tokens=30)
    lengths = [WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 70]
    prompts = [np.random.default_rng(n).integers(5, 200, n).tolist() for n in lengths]
    requests = [make_row_request(prompt, sample) for prompt in prompts]
    run_all(engine, requests)
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.row.drawn == recompute(prompt, sample, cfg=RING, params=params)


# --- reuse of prompts ---


def test_a_prompt_that_begins_alike_is_read_from_the_cache_without_changing_a_bit():
    engine = make_engine(has_reuse=True)
    plain = make_engine()
    start = list(range(5, 45))  # two whole chunks of 16, and 8 more
    prompts = [[*start, 60, 61], [*start, 70], [*start[:20], 9]]
    for n, prompt in enumerate(prompts):
        request = make_row_request(prompt, DRAWN)
        engine.submit(request)
        engine._admit()
        (slot,) = [slot for slot in engine.scheduler.slots if slot.request is request]
        assert slot.start == (0, 32, 16)[n]
        expected = make_row_request(prompt, DRAWN)
        run_all(plain, [expected])
        while not engine.is_idle:
            engine.step()
        assert request.row.drawn == expected.row.drawn
    # Both at once: the second copies the cache of the first, which still decodes.
    long = dataclasses.replace(DRAWN, tokens=20)
    first, second = (make_row_request([*start, n], long) for n in (80, 81))
    run_all(engine, [first, second])
    expected = [make_row_request([*start, n], long) for n in (80, 81)]
    run_all(plain, expected)
    assert [first.row.drawn, second.row.drawn] == [each.row.drawn for each in expected]


# --- what cannot be done ---


def test_speculation_with_a_recurrent_mixer_is_refused_by_name():
    cfg = tiny(vocab=270, mixers=("lstm",), position="none")
    with pytest.raises(ConfigError, match=r"speculation.*model.mixers=lstm"):
        Engine(cfg, {}, Size(1, 8, speculate=2), [1], np.ones(270, bool))


@pytest.mark.parametrize(
    ("size", "message"),
    [(Size(0, 8), "rows=0"), (Size(1, 1), "slots=1"), (Size(1, 8, chunk=20), "chunk=20")],
)
def test_a_shape_that_cannot_be_is_refused(size, message):
    with pytest.raises(ConfigError, match=message):
        size.check(CFG)


def test_a_bad_request_is_refused_and_leaves_the_engine_as_it_was():
    engine = get_engine()
    engine.drop_all()
    for prompt, sample, message in [
        ("x" * 70, GREEDY, "71 tokens"),
        ("a", dataclasses.replace(GREEDY, beams=3), "beams=3"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine.submit(make_row_request(prompt, sample))
    for token in (-1, 270):
        request = make_row_request("a")
        request.row.ids[0] = token
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            engine.submit(request)
    with pytest.raises(ConfigError, match="top=21"):
        engine.submit(make_row_request("a", top=21))
    assert engine.is_idle
    with pytest.raises(ConfigError, match="token 270"):
        make_row_request("a", bias={270: 1.0})


# --- programs ---

PROGRAMS = (programs.prefill, programs.insert, programs.copy_row, programs.decode, programs.verify)


def test_nothing_compiles_after_the_warm_up(count_compilations):
    for program in PROGRAMS:
        program.clear_cache()
    engine = make_engine(rows=2, slots=48, has_reuse=True, is_interactive=True)
    engine.warm_up()
    before = count_compilations(*PROGRAMS)
    rules = SampleConfig(temperature=0.7, top_p=0.5, min_p=0.1, presence_penalty=1.0, tokens=9)
    requests = [
        make_row_request("x" * 40, rules),
        make_row_request("x" * 40 + "yz", GREEDY),
        make_row_request("", dataclasses.replace(rules, stop=("e",), banned=("the",)), top=3),
        make_row_request("abc", dataclasses.replace(rules, slide=True, tokens=60)),
    ]
    run_all(engine, requests)
    assert count_compilations(*PROGRAMS) == before


def test_alternatives_are_the_likeliest_tokens_of_the_model():
    engine = make_engine()
    request = make_row_request("hello", dataclasses.replace(GREEDY, tokens=3), top=4)
    engine.submit(request)
    pieces = []
    while not engine.is_idle:
        pieces += [piece for _, piece in engine.step()]
    (places,) = [piece.alternatives for piece in pieces if piece.tokens]
    assert [len(place) for place in places] == [4, 4, 4]
    for place, token, logprob in zip(places, pieces[0].tokens, pieces[0].logprobs, strict=True):
        assert dict(place)[token] == pytest.approx(logprob, abs=1e-6)
        assert place == tuple(sorted(place, key=lambda each: -each[1]))


@pytest.mark.parametrize("devices", [2, 4])
def test_a_mesh_gives_the_same_tokens(devices):
    cfg = tiny(vocab=270, context=64, heads=4, kv_heads=4)
    params = random_params(cfg, std=0.3)
    found = []
    for count in (1, devices):
        mesh = make_mesh(MeshConfig(data=1, tensor=count), jax.devices()[:count])
        placed = jax.device_put(params, make_shardings(*abstract_params(cfg), mesh))
        with jax.set_mesh(mesh):
            decode_params = prepare_decode_params(cfg, placed)
        allowed = ALLOWED
        engine = Engine(cfg, decode_params, Size(2, 64, chunk=16), TOKENIZER.ends, allowed)
        requests = [make_row_request(text, DRAWN, n) for n, text in enumerate(["hello", "x" * 20])]
        run_all(engine, requests)
        found.append([request.row.drawn for request in requests])
    assert found[0] == found[1]
    keys = engine.state.cache.states[0]["mixer"].k
    assert keys.sharding.shard_shape(keys.shape)[1] == 4 // devices
    chex.assert_tree_all_finite(engine.state.scores)
