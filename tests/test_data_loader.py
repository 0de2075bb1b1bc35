"""Which rows a step sees: against counting token by token, and whatever the number of hosts."""

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

from jaxgpt.data import Batch, Loader, Tokens, Windows, eval_batches, eval_size, read_ahead
from jaxgpt.data.loader import Epochs, Rhythm
from jaxgpt.settings import ConfigError

BOS, EOS, PAD = 1, 2, 0


def stream(lengths):
    """Documents of these lengths, bos and eos included; all tokens between them differ."""
    fresh = itertools.count(10)
    documents = [[BOS, *itertools.islice(fresh, n - 2), EOS] for n in lengths]
    starts = np.cumsum([0, *lengths])
    return Tokens(np.array([*itertools.chain(*documents)], np.uint16), starts.astype(np.int64))


def loader_of(tokens, B, T, seed, mask_documents=True):
    return Loader([(1.0, Windows(tokens, T, mask_documents))], B, seed)


lengths = st.lists(st.integers(2, 12), min_size=1, max_size=8)
sizes = st.integers(1, 9)


def windows_of_epoch(tokens, T, seed, epoch):
    """The first token of each window, in order."""
    rng = np.random.default_rng([seed, epoch])
    phase = int(rng.integers(T))
    return [phase + T * int(n) for n in rng.permutation(len(tokens.ids) // T)]


def twin_row(tokens, first, T, mask_documents):
    """One row of a batch, token by token."""
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
        row["segments"].append(segment)
        row["weights"].append(0.0 if mask_documents and (at + 1) % N in begins else 1.0)
    return row


def twin_batch(tokens, B, T, seed, mask_documents, step):
    count = len(tokens.ids) // T
    rows = []
    for number in range(step * B, step * B + B):
        epoch, place = divmod(number, count)
        first = windows_of_epoch(tokens, T, seed, epoch)[place]
        rows.append(twin_row(tokens, first, T, mask_documents))
    return Batch(*([row[name] for row in rows] for name in Batch._fields[:5]))


def assert_equal(one, other):
    for name, x, y in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


# --- training ---


@given(lengths, sizes, sizes, st.integers(0, 9), st.integers(0, 20), st.booleans())
def test_a_batch_is_what_counting_token_by_token_gives(lengths, B, T, seed, step, mask):
    tokens = stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    batch = loader_of(tokens, B, T, seed, mask).batch(step)
    assert_equal(batch, twin_batch(tokens, B, T, seed, mask, step))
    expected = [np.dtype(np.int32)] * 4 + [np.dtype(np.float32)]
    assert [x.dtype for x in batch[:5]] == expected
    assert {x.shape for x in batch[:5]} == {(B, T)}
    assert all(x.flags.c_contiguous for x in batch[:5])


@given(lengths, sizes, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_visits_every_window_once(lengths, T, seed, epoch):
    tokens = stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    loader = loader_of(tokens, 1, T, seed, mask_documents=False)
    steps = range(epoch * loader.rows[0].size, (epoch + 1) * loader.rows[0].size)
    seen = sorted(tuple(loader.batch(step).tokens[0]) for step in steps)
    firsts = windows_of_epoch(tokens, T, seed, epoch)
    expected = sorted(tuple(twin_row(tokens, f, T, False)["tokens"]) for f in firsts)
    assert seen == expected
    assert len(seen) == len(tokens.ids) // T
    phase = min(firsts)
    assert sorted(firsts) == [phase + T * n for n in range(len(firsts))]
    assert 0 <= phase < T


def test_every_token_is_a_target_once_an_epoch_if_windows_divide_the_stream():
    tokens = stream([10, 20, 10])
    loader = loader_of(tokens, 5, 8, 0)
    targets = loader.batch(0).targets
    assert sorted(targets.ravel()) == sorted(tokens.ids)


def test_the_order_differs_between_epochs_and_between_seeds():
    tokens = stream([1000])
    orders = [
        tuple(loader_of(tokens, 100, 8, seed).batch(step).tokens[:, 0])
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(orders)) == 9


def test_where_windows_begin_differs_between_epochs():
    tokens = stream([1000])
    place = {int(token): at for at, token in enumerate(tokens.ids)}
    loader = loader_of(tokens, 125, 8, 0)  # a batch is an epoch
    firsts = [{place[int(t)] for t in loader.batch(epoch).tokens[:, 0]} for epoch in range(30)]
    assert {min(places) for places in firsts} == set(range(8))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_a_batch_does_not_depend_on_what_was_asked_before(steps):
    tokens = stream([7, 9, 5])
    loader = loader_of(tokens, 3, 4, 5)
    for step in steps:
        assert_equal(loader.batch(step), loader_of(tokens, 3, 4, 5).batch(step))


@given(lengths, sizes, st.integers(0, 9))
def test_no_target_that_counts_is_of_another_document(lengths, T, step):
    tokens = stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    batch = loader_of(tokens, 4, T, 0).batch(step)
    np.testing.assert_array_equal(batch.weights == 0, batch.targets == BOS)
    assert batch.positions.max() < T
    assert batch.segments.min() == 1


def test_without_masking_a_window_is_one_segment():
    batch = loader_of(stream([3, 4, 5]), 4, 6, 0, mask_documents=False).batch(0)
    assert (batch.segments == 1).all()
    assert (batch.weights == 1).all()
    assert (batch.positions == np.arange(6)).all()


def test_a_stream_too_short_for_a_window_is_refused():
    assert loader_of(stream([8]), 1, 7, 0).rows[0].size == 1
    with pytest.raises(ConfigError, match=r"data\.source gives 8 tokens.*model\.context=8 needs 9"):
        loader_of(stream([8]), 1, 8, 0)


def test_a_batch_is_a_pytree():
    batch = loader_of(stream([20]), 2, 4, 0).batch(0)
    doubled = jax.tree.map(lambda x: x * 2, batch)
    assert isinstance(doubled, Batch)
    np.testing.assert_array_equal(doubled.tokens, batch.tokens * 2)


# --- evaluation ---


@given(lengths, sizes, sizes, st.booleans())
def test_evaluation_counts_every_target_once(lengths, B, T, mask):
    tokens = stream(lengths)
    batches = list(eval_batches(tokens, B, T, pad=PAD, mask_documents=mask))
    assert {x.shape for batch in batches for x in batch[:5]} == {(B, T)}
    assert all(batch.segments.any() for batch in batches)  # none is all padding
    flat = [np.concatenate([batch[n].ravel() for batch in batches]) for n in range(5)]
    is_there = flat[Batch._fields.index("segments")] > 0
    inputs, targets, _, _, weights = (x[is_there] for x in flat)
    np.testing.assert_array_equal(inputs, tokens.ids[:-1])
    np.testing.assert_array_equal(targets, tokens.ids[1:])
    counted = len(tokens.ids) - 1 - (len(lengths) - 1 if mask else 0)
    assert weights.sum() == sum(batch.weights.sum() for batch in batches) == counted


@given(lengths, sizes, sizes, st.booleans())
def test_evaluation_is_what_counting_token_by_token_gives(lengths, B, T, mask):
    tokens = stream(lengths)
    rows = itertools.chain.from_iterable(
        zip(*batch[:5], strict=True)
        for batch in eval_batches(tokens, B, T, pad=PAD, mask_documents=mask)
    )
    for number, row in enumerate(rows):
        there = max(0, min(T, len(tokens.ids) - 1 - number * T))
        twin = twin_row(tokens, number * T, T, mask)
        for name, x in zip(Batch._fields[:5], row, strict=True):
            expected = twin[name][:there] + [0] * (T - there)  # PAD is 0 too
            np.testing.assert_array_equal(x, expected, err_msg=name)


@given(lengths, sizes, sizes, st.integers(0, 5))
def test_eval_size_is_the_number_of_batches(lengths, B, T, limit):
    tokens = stream(lengths)
    batches = list(eval_batches(tokens, B, T, limit))
    assert eval_size(tokens, B, T, limit) == len(batches)
    assert not limit or len(batches) <= limit


def test_padding_of_the_last_batch_is_no_token():
    (batch,) = eval_batches(stream([4]), 2, 4, pad=77)
    np.testing.assert_array_equal(batch.tokens[0, 3], 77)
    np.testing.assert_array_equal(batch.targets[1], [77] * 4)
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 0], [0, 0, 0, 0]])
    assert [x.dtype for x in batch[:5]] == [np.int32] * 4 + [np.float32]


# --- hosts ---


class Numbers:
    """Rows that say which they are, and of which stream."""

    padding = 0.0

    def __init__(self, size, stream=0):
        self.size, self.stream = size, stream

    def draw(self, rng):
        return rng.permutation(self.size)

    def cut(self, rows):
        column = np.stack([np.full_like(rows, self.stream), rows], axis=1)
        return Batch(*[column] * 5)


@st.composite
def divisions(draw):
    """For each of some steps, the rows of a batch of 8 dealt to hosts, in any way."""
    hosts = st.lists(st.integers(0, 3), min_size=8, max_size=8)
    return draw(st.lists(hosts, min_size=1, max_size=5))


@settings(deadline=None)
@given(divisions(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 9))
def test_any_division_of_the_rows_among_hosts_gives_the_same_batches(owners, sizes, seed):
    """Even one that changes from step to step, as it does when a run goes on elsewhere."""
    streams = [(1.0 + n, Numbers(size, n)) for n, size in enumerate(sizes)]
    loader = Loader(streams, 8, seed)
    for step, owner in enumerate(np.array(owners)):
        whole = loader.batch(step).tokens
        for host in range(4):
            rows = np.flatnonzero(owner == host)
            if rows.size:
                fresh = Loader(streams, 8, seed)  # a host that has seen no other rows
                np.testing.assert_array_equal(fresh.batch(step, rows).tokens, whole[rows])
        np.testing.assert_array_equal(loader.batch(step, slice(2, 5)).tokens, whole[2:5])


# --- several streams ---


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 7),
    st.integers(0, 9),
)
def test_each_stream_shows_each_row_once_in_each_of_its_epochs(sizes, weights, B, seed):
    pairs = zip(weights, sizes, strict=False)
    loader = Loader([(w, Numbers(size, n)) for n, (w, size) in enumerate(pairs)], B, seed)
    seen = np.concatenate([loader.batch(step).tokens for step in range(60)])  # [60 B 2]
    for stream, size in enumerate(sizes):
        shown = seen[seen[:, 0] == stream, 1]
        for epoch in range(-(-shown.size // size)):
            rows = shown[epoch * size : (epoch + 1) * size]
            assert len(set(rows)) == len(rows)  # none twice, so all of them in a whole epoch
            order = Epochs(Numbers(size), seed, stream).order(epoch)
            np.testing.assert_array_equal(rows, order[: rows.size])


@settings(max_examples=40, deadline=None)  # a rhythm of 10,000 rows takes some 0.1 s to make
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=7), st.integers(0, 10**12))
@example([1, 1, 1], 10**9)
@example([0.7, 0.2, 0.1], 0)
@example([1e-9, 1, 1], 0)
def test_at_any_time_each_stream_has_its_share_but_for_less_than_a_row(weights, first):
    rhythm = Rhythm(weights)
    streams, before = rhythm.take(first + np.arange(1000))
    assert (rhythm.counts > 0).all()
    shares = rhythm.counts / rhythm.period
    # Weights are met exactly, or to a part in 10,000, and one for each stream with next to none.
    atol = 1e-4 * (1 + len(weights))
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), rtol=0, atol=atol)
    for stream, count in enumerate(rhythm.counts.tolist()):
        rows = np.flatnonzero(streams == stream)
        np.testing.assert_array_equal(np.diff(before[rows]), 1)  # none lost or repeated
        # Just before and just after each row, in whole numbers: floats would round at 10**12.
        for row, had in zip((first + rows).tolist(), before[rows].tolist(), strict=True):
            assert abs(row * count - had * rhythm.period) < rhythm.period
            assert abs((row + 1) * count - (had + 1) * rhythm.period) < rhythm.period


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([1, 1, 1], [1, 1, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([3], [1]),
        ([0.333, 0.667], [333, 667]),
    ],
)
def test_weights_in_whole_parts_are_met_exactly(weights, counts):
    assert Rhythm(weights).counts.tolist() == counts


def test_streams_of_the_same_size_have_orders_of_their_own():
    loader = Loader([(1, Numbers(50, 0)), (1, Numbers(50, 1))], 100, 0)
    rows = loader.batch(0).tokens
    one, other = (rows[rows[:, 0] == stream, 1] for stream in (0, 1))
    assert sorted(one) == sorted(other) == list(range(50))
    assert one.tolist() != other.tolist()


def test_rows_of_several_streams_keep_all_their_arrays():
    streams = [stream([9, 7]), stream([30])]
    loader = Loader([(1, Windows(tokens, 4)) for tokens in streams], 6, 0)
    batch = loader.batch(1)
    which, nth = loader.rhythm.take(6 + np.arange(6))
    assert set(which) == {0, 1}
    for row in range(6):
        first = loader.epochs[which[row]].take(nth[row : row + 1])
        alone = loader.rows[which[row]].cut(first)
        assert_equal(Batch(*(x[row : row + 1] for x in batch[:5])), alone)


# --- reading ahead ---


class Steps:
    """A task whose batch is the step."""

    def __init__(self, broken=None):
        self.broken, self.asked, self.enough = broken, collections.Counter(), threading.Event()

    def batch(self, step, rows=slice(None)):
        self.asked[step] += 1
        if len(self.asked) == 4:
            self.enough.set()
        if step == self.broken:
            raise ValueError("broken batch")
        return step, rows


def threads_end():
    """Waits for those of Grain that have been told to."""
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
def test_reading_ahead_gives_the_batches_from_a_step_on(size):
    rows = np.array([1, 3])
    with closing(read_ahead(Steps(), 5, rows, size)) as batches:
        assert list(itertools.islice(batches, 20)) == [(step, rows) for step in range(5, 25)]
    threads_end()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("size", [0, 1, 3])
def test_what_making_a_batch_raises_is_raised_in_its_turn(size):
    with closing(read_ahead(Steps(broken=2), size=size)) as batches:
        assert [next(batches)[0], next(batches)[0]] == [0, 1]
        with pytest.raises(ValueError, match="broken batch"):
            next(batches)
    threads_end()


def test_no_more_is_read_ahead_than_asked_for():
    pytest.importorskip("grain")
    task = Steps()
    with closing(read_ahead(task, size=3)) as batches:
        next(batches)
        assert task.enough.wait(10)  # 0 was taken, 1 to 3 are ahead
    threads_end()
    assert task.asked == {0: 1, 1: 1, 2: 1, 3: 1}


def test_grains_position_is_the_step():
    pytest.importorskip("grain")
    loader = loader_of(stream([70, 9, 5]), 4, 4, 0)
    with closing(read_ahead(loader, 3)) as batches:
        for _ in range(4):
            next(batches)
        state = batches.get_state()
    assert state == {"next_index": 7}
    with closing(read_ahead(loader)) as fresh:
        fresh.set_state(state)
        assert_equal(next(fresh), loader.batch(7))
    threads_end()


def test_threads_that_make_batches_at_once_make_the_same_ones():
    pytest.importorskip("grain")
    tokens = [stream([7, 9, 5]), stream([6, 4])]  # an epoch is 2 rows of one, 1 of the other

    def fresh():
        return Loader([(1, Windows(t, 8)) for t in tokens], 3, 0)

    with closing(read_ahead(fresh(), size=8)) as batches:
        for step, batch in enumerate(itertools.islice(batches, 200)):
            assert_equal(batch, fresh().batch(step))
    threads_end()
