"""Test the rows of each step: against a token-by-token reference, for any number of hosts."""

import collections
import itertools
import sys
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.data import (
    Batch,
    Loader,
    Tokens,
    Windows,
    count_eval_batches,
    make_eval_batches,
    prefetch_batches,
)
from jaxgpt.data.loader import Epochs, WeightedInterleave
from jaxgpt.settings import ConfigError

BOS, EOS, PAD = 1, 2, 0


def make_stream(lengths):
    """Return documents of these lengths, bos and eos included; all other tokens are distinct."""
    fresh = itertools.count(10)
    documents = [[BOS, *itertools.islice(fresh, n - 2), EOS] for n in lengths]
    starts = np.cumsum([0, *lengths])
    return Tokens(np.array([*itertools.chain(*documents)], np.uint16), starts.astype(np.int64))


def make_loader(tokens, B, T, seed, mask_documents=True):
    return Loader([(1.0, Windows(tokens, T, mask_documents))], B, seed)


lengths = st.lists(st.integers(2, 12), min_size=1, max_size=8)
sizes = st.integers(1, 9)


def draw_reference_windows(tokens, T, seed, epoch):
    """Return the first token of each window, in order."""
    rng = np.random.default_rng([seed, epoch])
    phase = int(rng.integers(T))
    return [phase + T * int(n) for n in rng.permutation(len(tokens.ids) // T)]


def make_reference_row(tokens, first, T, mask_documents):
    """Return one row of a batch, computed token by token."""
    N = len(tokens.ids)
    begins = {int(b) for b in tokens.starts[:-1]}
    row = {name: [] for name in Batch._fields}
    position, segment = -1, 1
    for at in range(first, first + T):
        is_begin = at % N in begins and at > first and mask_documents
        position = 0 if is_begin else position + 1
        segment += is_begin
        row["tokens"].append(int(tokens.ids[at % N]))
        row["targets"].append(int(tokens.ids[(at + 1) % N]))
        row["positions"].append(position)
        row["segment_ids"].append(segment)
        row["weights"].append(0.0 if mask_documents and (at + 1) % N in begins else 1.0)
    return row


def make_reference_batch(tokens, B, T, seed, mask_documents, step):
    count = len(tokens.ids) // T
    rows = []
    for number in range(step * B, step * B + B):
        epoch, place = divmod(number, count)
        first = draw_reference_windows(tokens, T, seed, epoch)[place]
        rows.append(make_reference_row(tokens, first, T, mask_documents))
    return Batch(*([row[name] for row in rows] for name in Batch._fields[:5]))


def assert_equal(one, other):
    for name, x, y in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


# --- training ---


@given(lengths, sizes, sizes, st.integers(0, 9), st.integers(0, 20), st.booleans())
def test_a_batch_equals_the_token_by_token_reference(lengths, B, T, seed, step, mask):
    tokens = make_stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    batch = make_loader(tokens, B, T, seed, mask).make_batch(step)
    assert_equal(batch, make_reference_batch(tokens, B, T, seed, mask, step))
    expected = [np.dtype(np.int32)] * 4 + [np.dtype(np.float32)]
    assert [x.dtype for x in batch[:5]] == expected
    assert {x.shape for x in batch[:5]} == {(B, T)}
    assert all(x.flags.c_contiguous for x in batch[:5])


@given(lengths, sizes, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_contains_every_window_once(lengths, T, seed, epoch):
    tokens = make_stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    loader = make_loader(tokens, 1, T, seed, mask_documents=False)
    steps = range(epoch * loader.rows[0].size, (epoch + 1) * loader.rows[0].size)
    seen = sorted(tuple(loader.make_batch(step).tokens[0]) for step in steps)
    firsts = draw_reference_windows(tokens, T, seed, epoch)
    expected = sorted(tuple(make_reference_row(tokens, f, T, False)["tokens"]) for f in firsts)
    assert seen == expected
    assert len(seen) == len(tokens.ids) // T
    phase = min(firsts)
    assert sorted(firsts) == [phase + T * n for n in range(len(firsts))]
    assert 0 <= phase < T


def test_every_token_is_a_target_once_an_epoch_if_windows_divide_the_stream():
    tokens = make_stream([10, 20, 10])
    loader = make_loader(tokens, 5, 8, 0)
    targets = loader.make_batch(0).targets
    assert sorted(targets.ravel()) == sorted(tokens.ids)


def test_the_order_differs_between_epochs_and_between_seeds():
    tokens = make_stream([1000])
    orders = [
        tuple(make_loader(tokens, 100, 8, seed).make_batch(step).tokens[:, 0])
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(orders)) == 9


def test_the_offset_of_windows_differs_between_epochs():
    tokens = make_stream([1000])
    place = {int(token): at for at, token in enumerate(tokens.ids)}
    loader = make_loader(tokens, 125, 8, 0)  # a batch is an epoch
    firsts = [{place[int(t)] for t in loader.make_batch(epoch).tokens[:, 0]} for epoch in range(30)]
    assert {min(places) for places in firsts} == set(range(8))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_a_batch_does_not_depend_on_earlier_requests(steps):
    tokens = make_stream([7, 9, 5])
    loader = make_loader(tokens, 3, 4, 5)
    for step in steps:
        assert_equal(loader.make_batch(step), make_loader(tokens, 3, 4, 5).make_batch(step))


@given(lengths, sizes, st.integers(0, 9))
def test_targets_of_other_documents_have_no_weight(lengths, T, step):
    tokens = make_stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    batch = make_loader(tokens, 4, T, 0).make_batch(step)
    np.testing.assert_array_equal(batch.weights == 0, batch.targets == BOS)
    assert batch.positions.max() < T
    assert batch.segment_ids.min() == 1


def test_without_masking_a_window_is_one_segment():
    batch = make_loader(make_stream([3, 4, 5]), 4, 6, 0, mask_documents=False).make_batch(0)
    assert (batch.segment_ids == 1).all()
    assert (batch.weights == 1).all()
    assert (batch.positions == np.arange(6)).all()


def test_a_stream_too_short_for_a_window_is_rejected():
    assert make_loader(make_stream([8]), 1, 7, 0).rows[0].size == 1
    with pytest.raises(ConfigError, match=r"data\.source gives 8 tokens.*model\.context=8 needs 9"):
        make_loader(make_stream([8]), 1, 8, 0)


def test_a_batch_is_a_pytree():
    batch = make_loader(make_stream([20]), 2, 4, 0).make_batch(0)
    doubled = jax.tree.map(lambda x: x * 2, batch)
    assert isinstance(doubled, Batch)
    np.testing.assert_array_equal(doubled.tokens, batch.tokens * 2)


# --- evaluation ---


@given(lengths, sizes, sizes, st.booleans())
def test_evaluation_counts_every_target_once(lengths, B, T, mask):
    tokens = make_stream(lengths)
    batches = list(make_eval_batches(tokens, B, T, pad=PAD, mask_documents=mask))
    assert {x.shape for batch in batches for x in batch[:5]} == {(B, T)}
    assert all(batch.segment_ids.any() for batch in batches)  # none is all padding
    flat = [np.concatenate([batch[n].ravel() for batch in batches]) for n in range(5)]
    is_there = flat[Batch._fields.index("segment_ids")] > 0
    inputs, targets, _, _, weights = (x[is_there] for x in flat)
    np.testing.assert_array_equal(inputs, tokens.ids[:-1])
    np.testing.assert_array_equal(targets, tokens.ids[1:])
    counted = len(tokens.ids) - 1 - (len(lengths) - 1 if mask else 0)
    assert weights.sum() == sum(batch.weights.sum() for batch in batches) == counted


@given(lengths, sizes, sizes, st.booleans())
def test_evaluation_equals_the_token_by_token_reference(lengths, B, T, mask):
    tokens = make_stream(lengths)
    rows = itertools.chain.from_iterable(
        zip(*batch[:5], strict=True)
        for batch in make_eval_batches(tokens, B, T, pad=PAD, mask_documents=mask)
    )
    for number, row in enumerate(rows):
        there = max(0, min(T, len(tokens.ids) - 1 - number * T))
        reference = make_reference_row(tokens, number * T, T, mask)
        for name, x in zip(Batch._fields[:5], row, strict=True):
            expected = reference[name][:there] + [0] * (T - there)  # PAD is 0 too
            np.testing.assert_array_equal(x, expected, err_msg=name)


@given(lengths, sizes, sizes, st.integers(0, 5))
def test_count_eval_batches_is_the_number_of_batches(lengths, B, T, limit):
    tokens = make_stream(lengths)
    batches = list(make_eval_batches(tokens, B, T, limit))
    assert count_eval_batches(tokens, B, T, limit) == len(batches)
    assert not limit or len(batches) <= limit


def test_the_last_batch_is_padded():
    (batch,) = make_eval_batches(make_stream([4]), 2, 4, pad=77)
    np.testing.assert_array_equal(batch.tokens[0, 3], 77)
    np.testing.assert_array_equal(batch.targets[1], [77] * 4)
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 0], [0, 0, 0, 0]])
    assert [x.dtype for x in batch[:5]] == [np.int32] * 4 + [np.float32]


# --- hosts ---


class NumberedRows:
    """Rows that contain the number of their stream and their own."""

    padding = 0.0

    def __init__(self, size, stream=0):
        self.size, self.stream = size, stream

    def draw_order(self, rng):
        return rng.permutation(self.size)

    def gather(self, rows):
        column = np.stack([np.full_like(rows, self.stream), rows], axis=1)
        return Batch(*[column] * 5)


@st.composite
def draw_row_owners(draw):
    """Draw, for each of some steps, which host owns each row of a batch of 8."""
    hosts = st.lists(st.integers(0, 3), min_size=8, max_size=8)
    return draw(st.lists(hosts, min_size=1, max_size=5))


@settings(deadline=None)
@given(draw_row_owners(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 9))
def test_any_division_of_the_rows_among_hosts_gives_the_same_batches(owners, sizes, seed):
    """Even a division that changes between steps, as when a run is resumed on other hosts."""
    streams = [(1.0 + n, NumberedRows(size, n)) for n, size in enumerate(sizes)]
    loader = Loader(streams, 8, seed)
    for step, owner in enumerate(np.array(owners)):
        whole = loader.make_batch(step).tokens
        for host in range(4):
            rows = np.flatnonzero(owner == host)
            if rows.size:
                fresh = Loader(streams, 8, seed)  # a host that has made no other rows
                np.testing.assert_array_equal(fresh.make_batch(step, rows).tokens, whole[rows])
        np.testing.assert_array_equal(loader.make_batch(step, slice(2, 5)).tokens, whole[2:5])


# --- several streams ---


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 7),
    st.integers(0, 9),
)
def test_each_stream_yields_each_row_once_in_each_of_its_epochs(sizes, weights, B, seed):
    pairs = zip(weights, sizes, strict=False)
    loader = Loader([(w, NumberedRows(size, n)) for n, (w, size) in enumerate(pairs)], B, seed)
    seen = np.concatenate([loader.make_batch(step).tokens for step in range(60)])  # [60 B 2]
    for stream, size in enumerate(sizes):
        shown = seen[seen[:, 0] == stream, 1]
        for epoch in range(-(-shown.size // size)):
            rows = shown[epoch * size : (epoch + 1) * size]
            assert len(set(rows)) == len(rows)  # none twice, so all of them in a whole epoch
            order = Epochs(NumberedRows(size), seed, stream).draw_order(epoch)
            np.testing.assert_array_equal(rows, order[: rows.size])


@settings(max_examples=40, deadline=None)  # an interleave of 10,000 rows takes some 0.1 s to make
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=7), st.integers(0, 10**12))
@example([1, 1, 1], 10**9)
@example([0.7, 0.2, 0.1], 0)
@example([1e-9, 1, 1], 0)
def test_at_any_time_each_stream_has_its_share_to_within_a_row(weights, first):
    interleave = WeightedInterleave(weights)
    streams, before = interleave.locate(first + np.arange(1000))
    assert (interleave.counts > 0).all()
    shares = interleave.counts / interleave.period
    # Weights are met exactly or to one part in 10,000, plus one per stream with a tiny weight.
    atol = 1e-4 * (1 + len(weights))
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), rtol=0, atol=atol)
    for stream, count in enumerate(interleave.counts.tolist()):
        rows = np.flatnonzero(streams == stream)
        np.testing.assert_array_equal(np.diff(before[rows]), 1)  # none lost or repeated
        # Just before and just after each row, in integers: floats would round at 10**12.
        for row, had in zip((first + rows).tolist(), before[rows].tolist(), strict=True):
            assert abs(row * count - had * interleave.period) < interleave.period
            assert abs((row + 1) * count - (had + 1) * interleave.period) < interleave.period


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([3], [1]),
        ([0.333, 0.667], [333, 667]),
    ],
)
def test_weights_that_are_small_fractions_are_met_exactly(weights, counts):
    assert WeightedInterleave(weights).counts.tolist() == counts


def test_streams_of_the_same_size_have_different_orders():
    loader = Loader([(1, NumberedRows(50, 0)), (1, NumberedRows(50, 1))], 100, 0)
    rows = loader.make_batch(0).tokens
    one, other = (rows[rows[:, 0] == stream, 1] for stream in (0, 1))
    assert sorted(one) == sorted(other) == list(range(50))
    assert one.tolist() != other.tolist()


def test_rows_of_several_streams_keep_all_their_arrays():
    streams = [make_stream([9, 7]), make_stream([30])]
    loader = Loader([(1, Windows(tokens, 4)) for tokens in streams], 6, 0)
    batch = loader.make_batch(1)
    which, nth = loader.interleave.locate(6 + np.arange(6))
    assert set(which) == {0, 1}
    for row in range(6):
        first = loader.epochs[which[row]].take(nth[row : row + 1])
        expected = loader.rows[which[row]].gather(first)
        assert_equal(Batch(*(x[row : row + 1] for x in batch[:5])), expected)


# --- prefetching ---


class StepTask:
    """A task whose batch is the step."""

    def __init__(self, failing_step=None):
        self.failing_step, self.requested = failing_step, collections.Counter()
        self.has_requested_four = threading.Event()

    def make_batch(self, step, rows=slice(None)):
        self.requested[step] += 1
        if len(self.requested) == 4:
            self.has_requested_four.set()
        if step == self.failing_step:
            raise ValueError("broken batch")
        return step, rows


def join_grain_threads():
    """Wait for the end of Grain's threads, which have been asked to stop."""
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(params=["grain", "no grain"])
def engine(request, monkeypatch):
    if request.param == "no grain":
        monkeypatch.setitem(sys.modules, "grain", None)  # its import fails
    else:
        pytest.importorskip("grain")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("size", [0, 1, 3])
def test_prefetching_yields_the_batches_from_a_step_on(size):
    rows = np.array([1, 3])
    with closing(prefetch_batches(StepTask(), 5, rows, size)) as batches:
        assert list(itertools.islice(batches, 20)) == [(step, rows) for step in range(5, 25)]
    join_grain_threads()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("size", [0, 1, 3])
def test_an_exception_from_making_a_batch_is_raised_when_the_batch_is_due(size):
    with closing(prefetch_batches(StepTask(failing_step=2), size=size)) as batches:
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        with pytest.raises(ValueError, match="broken batch"):
            next(batches)
    join_grain_threads()


def test_no_more_is_prefetched_than_requested():
    pytest.importorskip("grain")
    task = StepTask()
    with closing(prefetch_batches(task, size=3)) as batches:
        next(batches)
        assert task.has_requested_four.wait(10)  # 0 was taken, 1 to 3 are prefetched
    join_grain_threads()
    assert task.requested == {0: 1, 1: 1, 2: 1, 3: 1}


def test_grains_position_is_the_step():
    pytest.importorskip("grain")
    loader = make_loader(make_stream([70, 9, 5]), 4, 4, 0)
    with closing(prefetch_batches(loader, 3)) as batches:
        for _ in range(4):
            next(batches)
        state = batches.get_state()
    assert state == {"next_index": 7}
    with closing(prefetch_batches(loader)) as fresh:
        fresh.set_state(state)
        assert_equal(next(fresh), loader.make_batch(7))
    join_grain_threads()


def test_batches_made_by_concurrent_threads_are_the_same():
    pytest.importorskip("grain")
    tokens = [
        make_stream([7, 9, 5]),
        make_stream([6, 4]),
    ]  # an epoch is 2 rows of one, 1 of the other

    def fresh():
        return Loader([(1, Windows(t, 8)) for t in tokens], 3, 0)

    with closing(prefetch_batches(fresh(), size=8)) as batches:
        for step, batch in enumerate(itertools.islice(batches, 200)):
            assert_equal(batch, fresh().make_batch(step))
    join_grain_threads()
