"""Log-likelihoods: batched, bucketed, with shared prefixes: those of one row at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import compute_logits, single_document_coords
from tiny_decoders import make_model

from jaxgpt.evaluate import likelihood
from jaxgpt.evaluate.likelihood import (
    Batch,
    Group,
    Pair,
    choose_batch_rows,
    compute_likelihoods,
    encode_pair,
    merge_buckets,
    merge_pairs,
    plan_groups,
    round_up,
    score_pairs,
    share_shapes,
)
from jaxgpt.evaluate.prefixes import MIN_PREFIX, count_common, find_shared_prefixes
from jaxgpt.sections import SparseConfig
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer

# float32 sums of up to 20 terms of about 5 nats, in another order.
TOLERANCE = dict(rtol=1e-5, atol=2e-4)


def score_plainly(model, pair: Pair) -> tuple[np.ndarray, bool]:
    """Return the logprobs of one pair from the whole logits of its row alone."""
    cfg = model.config.model
    inputs = np.array([pair.context + pair.continuation], np.int32)[:, -cfg.context - 1 : -1]
    logits = compute_logits(cfg, model.params, inputs, single_document_coords(inputs))
    logits = np.asarray(logits, np.float64)[0, -len(pair.continuation) :]
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = np.array(pair.continuation)
    found = logprobs[np.arange(len(targets)), targets]
    return found, bool((logits.argmax(axis=-1) == targets).all())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Return pairs that share rows, share prefixes, stand alone, and are too long."""
    rng = np.random.default_rng(0)

    def draw(n):
        return tuple(rng.integers(4, 260, n).tolist())

    shots, question, other = draw(50), draw(12), draw(9)
    found = [Pair(shots + question, (letter,)) for letter in (70, 71, 72, 73)]
    found += [Pair(shots + other, draw(n)) for n in (3, 5, 2)]
    found += [Pair(shots + draw(n), draw(2)) for n in (2, 3, 6, 8)]
    found += [Pair(draw(n), draw(m)) for n, m in ((1, 4), (7, 9), (30, 2), (1, 1))]
    found += [Pair(draw(140), draw(3))]  # its beginning is cut
    return found


WINDOWED = dict(
    layers=4, position="learned", pattern=("window", "full"), sparse=SparseConfig(window=20)
)


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["rope", "windows"])
def test_batched_and_shared_equal_one_at_a_time(pairs, changes):
    model = make_model(**changes)
    plain = [score_plainly(model, pair) for pair in pairs]
    for shares in (True, False):
        found = score_pairs(model.config.model, model.params, pairs, 256, shares)
        for (logprobs, is_greedy), x, pair in zip(plain, found, pairs, strict=True):
            np.testing.assert_allclose(x.logprobs, logprobs, **TOLERANCE)
            assert x.is_greedy == is_greedy
            assert x.tokens == len(pair.continuation)
            assert x.total == pytest.approx(float(logprobs.sum()), rel=1e-5, abs=1e-3)
    assert [x.is_cut for x in found] == [False] * (len(pairs) - 1) + [True]


def test_the_likeliest_continuation_is_greedy():
    model = make_model()
    inputs = np.array([[2, 50, 60]], np.int32)
    at = single_document_coords(inputs)
    logits = compute_logits(model.config.model, model.params, inputs, at)
    best = int(np.argmax(np.asarray(logits)[0, -1]))
    pairs = [Pair((2, 50, 60), (best,)), Pair((2, 50, 60), ((best + 1) % 260,))]
    found = score_pairs(model.config.model, model.params, pairs)
    assert [x.is_greedy for x in found] == [True, False]


def test_choices_with_the_same_input_are_one_row(pairs):
    rows, _ = merge_pairs(pairs, 128)
    assert len(rows) == len(pairs) - 3
    assert rows[0].pairs == [0, 1, 2, 3]


def test_a_shared_prefix_is_computed_once(pairs):
    """The rows after five worked examples hold what comes after them alone."""
    rows, _ = merge_pairs(pairs, 128)
    groups = list(plan_groups(make_model().config.model, rows, 2048, True))
    assert [len(group.prefix) for group in groups] == [0, 50]
    assert sum(len(batch.rows) for batch in groups[1].batches) == 8
    assert all(batch.shape[1] < MIN_PREFIX for batch in groups[1].batches)


def test_prefixes_are_shared_where_that_is_cheapest():
    """A header that all have is less than long questions that only their choices have."""
    header = tuple(range(40))
    long = [header + (n,) * 200 for n in (50, 51)]
    rows = [(*question, choice, choice) for question in long for choice in (1, 2, 3)]
    found = find_shared_prefixes(rows, [240] * 6)
    assert sorted(found) == [(240, [0, 1, 2]), (240, [3, 4, 5])]
    short = [(*header, n) for n in range(6)]
    assert find_shared_prefixes(short, [40] * 6) == [(40, list(range(6)))]
    # A prefix is to save more than it costs, here 5 times 40 tokens.
    assert find_shared_prefixes(short, [40] * 6, cost=199) == [(40, list(range(6)))]
    assert find_shared_prefixes(short, [40] * 6, cost=201) == [(0, list(range(6)))]
    # A prefix never takes what is scored, and equal rows are no trie.
    assert find_shared_prefixes(short, [3] * 6) == [(0, list(range(6)))]
    assert find_shared_prefixes([header] * 3, [39] * 3) == [(0, [0, 1, 2])]
    assert count_common((1, 2, 3), (1, 2)) == 2


def test_one_program_is_compiled_for_a_bucket(count_compilations):
    model = make_model(seed=1)
    before = count_compilations(likelihood.score_rows)
    for n in range(6, 9):  # rows of 9 to 11 inputs: one bucket
        pairs = [Pair((2, *[5 + n] * n, 30 + k), (40, 41)) for k in range(4)]
        score_pairs(model.config.model, model.params, pairs)
    assert count_compilations(likelihood.score_rows) == before + 1


def test_buckets_are_powers_of_two_and_three_quarters_of_them():
    assert [round_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 100)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 128,
    ]  # fmt: skip


def test_batches_have_little_padding():
    """On a CPU, where a row costs its tokens; the rows of an accelerator go together."""
    rows = {count: choose_batch_rows(count, 8, 256)[1] for count in (1, 5, 96, 132, 600)}
    assert rows == {1: 1, 5: 6, 96: 96, 132: 48, 600: 128}
    assert choose_batch_rows(10, 1024, 2)[1] == 2
    assert choose_batch_rows(3, 4096, 1) == (3 * (4096 + 128), 1)


def test_buckets_of_few_rows_are_merged(pairs):
    """One row of 12 tokens costs less in the batch of 16 than in one of its own."""
    row = merge_pairs(pairs, 128)[0][0]
    few = merge_buckets({16: [row] * 3, 12: [row]}, lambda T: 2048 // T)
    assert [(T, R, len(rows)) for T, R, rows in few] == [(16, 4, 4)]
    many = merge_buckets({64: [row] * 30, 8: [row] * 30}, lambda T: 2048 // T)
    assert [(T, len(rows)) for T, _, rows in many] == [(8, 30), (64, 30)]


def test_rare_shapes_take_a_larger_one(pairs):
    """A program is not compiled for one batch, and rows are not padded at any price."""
    rows = merge_pairs(pairs, 128)[0]

    def plan(*shapes, slots=0):
        return Group((), slots, [Batch(rows[:1], shape) for shape in shapes])

    rare = share_shapes([plan((4, 64, 16, 4), (3, 48, 16, 4)), plan((3, 48, 16, 4), slots=128)])
    assert [b.shape for g in rare for b in g.batches] == [(4, 64, 16, 4)] * 2 + [(3, 48, 16, 4)]
    common = share_shapes([plan((4, 64, 16, 4), *[(2, 32, 16, 4)] * 6)])
    assert {b.shape for b in common[0].batches} == {(4, 64, 16, 4), (2, 32, 16, 4)}
    longer = share_shapes([plan((4, 64, 1, 4), (3, 48, 16, 4))])
    assert [b.shape for b in longer[0].batches] == [(4, 64, 1, 4), (3, 48, 16, 4)]


def test_a_continuation_is_spelled_as_in_its_text():
    tokenizer = make_byte_tokenizer()
    pair = encode_pair(tokenizer, "ab ", "cd")  # the space belongs to the continuation
    assert tokenizer.decode(pair.context) == "ab"
    assert pair.context[0] == tokenizer.bos
    assert tokenizer.decode(pair.continuation) == " cd"
    assert encode_pair(tokenizer, "", "cd").context == (tokenizer.bos,)
    with pytest.raises(ConfigError, match="no token to score"):
        encode_pair(tokenizer, "ab", "")


def test_a_continuation_longer_than_the_context_is_refused():
    model = make_model()
    with pytest.raises(ConfigError, match=r"model\.context=128"):
        score_pairs(model.config.model, model.params, [Pair((2,), (5,) * 129)])


def test_bfloat16_models_are_scored_in_float32():
    model = make_model()
    cfg = dataclasses.replace(model.config.model, dtype="bfloat16")
    pairs = [Pair((2, 50, 60, 70), (80, 81))]
    exact = score_pairs(model.config.model, model.params, pairs)[0]
    found = score_pairs(cfg, model.params, pairs)[0]
    assert found.logprobs.dtype == np.float32
    assert found.logprobs != pytest.approx(exact.logprobs, abs=1e-7)
    assert found.logprobs == pytest.approx(exact.logprobs, abs=0.1)
    # bfloat16 has 8 bits: scores in it would be multiples of 1/32 between 4 and 8.
    assert any(x * 32 != round(x * 32) for x in found.logprobs.tolist())


def test_other_models_compute_whole_rows():
    """A prefix language model reads its context both ways; a recurrent one has no such cache."""
    requests = [("a" * 40 + end, " b") for end in "cd"]
    prefix = {"objective": "prefix", "pattern": ("prefix",)}
    for changes in (prefix, {"mixers": ("mamba",), "position": "none"}):
        model = make_model(**changes)
        assert not likelihood.can_share_prefixes(model.config.model)
        found = compute_likelihoods(model.config, model.params, model.tokenizer, requests)
        whole = model.score([" b"] * 2, [context for context, _ in requests])
        assert [x.total for x in found] == pytest.approx([x.total for x in whole], abs=1e-3)


def test_an_encoder_decoder_reads_the_context_as_its_source():
    model = make_model(objective="pairs", family="encoder_decoder", encoder_layers=1)
    requests = [("where is it", " here"), ("where", " not there")]
    found = compute_likelihoods(model.config, model.params, model.tokenizer, requests)
    whole = model.score([x for _, x in requests], [x for x, _ in requests], eos=False)
    assert [x.total for x in found] == pytest.approx([x.total for x in whole])


def test_parameters_on_a_mesh_give_the_same(pairs):
    from jaxgpt.config import MeshConfig
    from jaxgpt.sharding import make_mesh

    model = make_model()
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(model.params, replicated)
    expected = [x.total for x in score_pairs(model.config.model, model.params, pairs[:4])]
    found = [x.total for x in score_pairs(model.config.model, params, pairs[:4])]
    assert found == pytest.approx(expected, abs=1e-3)
