import itertools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.data import Batch, Loader, Tokens, eval_batches, eval_size, prefetch
from jaxgpt.settings import ConfigError

BOS, EOS, PAD = 1, 2, 0


def stream(lengths):
    """Documents of these lengths, bos and eos included; all tokens between them differ."""
    fresh = itertools.count(10)
    documents = [[BOS, *itertools.islice(fresh, n - 2), EOS] for n in lengths]
    starts = np.cumsum([0, *lengths])
    return Tokens(np.array([*itertools.chain(*documents)], np.uint16), starts.astype(np.int64))


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
    batch = Loader(tokens, B, T, seed, mask).batch(step)
    assert_equal(batch, twin_batch(tokens, B, T, seed, mask, step))
    expected = [np.dtype(np.int32)] * 4 + [np.dtype(np.float32)]
    assert [x.dtype for x in batch[:5]] == expected
    assert {x.shape for x in batch[:5]} == {(B, T)}
    assert all(x.flags.c_contiguous for x in batch[:5])


@given(lengths, sizes, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_visits_every_window_once(lengths, T, seed, epoch):
    tokens = stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    loader = Loader(tokens, 1, T, seed, mask_documents=False)
    steps = range(epoch * loader.windows, (epoch + 1) * loader.windows)
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
    loader = Loader(tokens, 5, 8, 0)
    targets = loader.batch(0).targets
    assert sorted(targets.ravel()) == sorted(tokens.ids)


def test_the_order_differs_between_epochs_and_between_seeds():
    tokens = stream([1000])
    orders = [
        tuple(Loader(tokens, 100, 8, seed).batch(step).tokens[:, 0])
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(orders)) == 9


def test_where_windows_begin_differs_between_epochs():
    tokens = stream([1000])
    place = {int(token): at for at, token in enumerate(tokens.ids)}
    loader = Loader(tokens, 125, 8, 0)  # a batch is an epoch
    firsts = [{place[int(t)] for t in loader.batch(epoch).tokens[:, 0]} for epoch in range(30)]
    assert {min(places) for places in firsts} == set(range(8))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_a_batch_does_not_depend_on_what_was_asked_before(steps):
    tokens = stream([7, 9, 5])
    loader = Loader(tokens, 3, 4, 5)
    for step in steps:
        assert_equal(loader.batch(step), Loader(tokens, 3, 4, 5).batch(step))


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 9))
def test_a_host_gets_its_rows_of_the_batch(low, high, step):
    loader = Loader(stream([7, 9, 5]), 8, 4, 0)
    rows = slice(low, high)
    assert_equal(loader.batch(step, rows), Batch(*(x[rows] for x in loader.batch(step)[:5])))


def test_batches_go_on_from_any_step():
    loader = Loader(stream([7, 9, 5]), 2, 4, 0)
    for step, batch in zip(range(5, 9), loader.batches(5), strict=False):
        assert_equal(batch, loader.batch(step))


@given(lengths, sizes, st.integers(0, 9))
def test_no_target_that_counts_is_of_another_document(lengths, T, step):
    tokens = stream(lengths)
    T = min(T, len(tokens.ids) - 1)
    batch = Loader(tokens, 4, T, 0).batch(step)
    np.testing.assert_array_equal(batch.weights == 0, batch.targets == BOS)
    assert batch.positions.max() < T
    assert batch.segments.min() == 1


def test_without_masking_a_window_is_one_segment():
    batch = Loader(stream([3, 4, 5]), 4, 6, 0, mask_documents=False).batch(0)
    assert (batch.segments == 1).all()
    assert (batch.weights == 1).all()
    assert (batch.positions == np.arange(6)).all()


def test_epoch_tells_how_often_the_stream_was_seen():
    loader = Loader(stream([40]), 2, 8, 0)
    assert [loader.epoch(step) for step in (0, 5)] == [0, 2]


def test_a_stream_too_short_for_a_window_is_refused():
    assert Loader(stream([8]), 1, 7, 0).windows == 1
    with pytest.raises(ConfigError, match=r"data\.source gives 8 tokens.*model\.context=8 needs 9"):
        Loader(stream([8]), 1, 8, 0)


def test_a_batch_is_a_pytree():
    batch = Loader(stream([20]), 2, 4, 0).batch(0)
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


# --- prefetch ---


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@given(st.lists(st.integers()), st.integers(0, 4))
def test_prefetch_gives_the_same_items(items, size):
    assert list(prefetch(items, size)) == items
    assert not threads()


@pytest.mark.parametrize("size", [0, 1, 3])
def test_prefetch_raises_what_the_items_raise_in_its_turn(size):
    def items():
        yield 1
        yield 2
        raise ValueError("broken batch")

    ahead = prefetch(items(), size)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="broken batch"):
        next(ahead)
    assert not threads()


@pytest.mark.parametrize("size", [0, 1, 3])
def test_prefetch_can_be_closed_before_its_end(size):
    ahead = prefetch(itertools.count(), size)
    assert next(ahead) == 0
    ahead.close()
    assert not threads()


def test_prefetch_makes_no_more_than_its_size_ahead():
    made = []
    enough = threading.Event()

    def items():
        for n in itertools.count():
            made.append(n)
            if n == 3:
                enough.set()
            yield n

    ahead = prefetch(items(), 3)
    next(ahead)
    assert enough.wait(10)  # 0 was taken, 1 to 3 are ahead
    ahead.close()
    assert made == [0, 1, 2, 3]


def test_prefetch_of_zero_needs_no_thread():
    ahead = prefetch(itertools.count(), 0)
    next(ahead)
    assert not threads()
