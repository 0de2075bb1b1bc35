"""Test packing whole documents into rows, against packing piece by piece, token by token."""

import collections
import glob
import os
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import Loader, PackedDocuments, Tokens
from jaxgpt.data.packing import MAX_OPEN_ROWS, RowIndex, pack_best_fit, pack_first_fit, pack_rows

PAD = 0


def make_stream(lengths):
    """Return documents of these lengths; all tokens are distinct."""
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    return Tokens(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=25)
widths = st.integers(1, 12)


def pack_piece_by_piece(sizes, capacity):
    """Return the room left in each row by best fit decreasing, sorted."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else capacity) - size)
    return sorted(rooms)


@given(st.data(), st.integers(1, 40))
def test_best_fit_leaves_the_same_rooms_as_packing_piece_by_piece(data, capacity):
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    rows = pack_best_fit(np.array(sizes), capacity)
    used = np.bincount(rows, sizes)
    assert used.min() > 0  # numbered without gaps
    assert sorted(capacity - used) == pack_piece_by_piece(sizes, capacity)


@given(st.data(), st.integers(1, 40))
def test_first_fit_keeps_both_sizes_within_rows_and_opens_none_needlessly(data, capacity):
    size = st.integers(1, capacity)
    sizes = np.array(data.draw(st.lists(st.tuples(size, size), min_size=1, max_size=MAX_OPEN_ROWS)))
    rows = pack_first_fit(sizes, capacity)
    used = np.zeros((rows.max() + 1, 2), int)
    for row, pair in zip(rows, sizes, strict=True):  # no more than MAX_OPEN_ROWS
        is_new = not used[row].any()
        fits = [n for n in range(len(used)) if used[n].any() and (used[n] + pair <= capacity).all()]
        assert not (is_new and fits)
        used[row] += pair
    assert used.max() <= capacity
    assert used.min() > 0


def test_translations_fill_more_than_ninety_percent_of_their_rows():
    rng = np.random.default_rng(0)
    source = rng.lognormal(3.3, 0.6, 3000)
    sizes = np.clip(
        np.stack([source, source * np.exp(0.2 * rng.normal(size=3000))], axis=1), 2, 256
    )
    sizes = sizes.astype(np.int64)
    rows = pack_first_fit(sizes, 256).max() + 1
    assert sizes.sum() / (2 * rows * 256) > 0.9


def measure_stdlib_lengths():
    """Return the lengths of the standard library's modules, at about 4 bytes a token."""
    files = glob.glob(os.path.join(sysconfig.get_path("stdlib"), "**", "*.py"), recursive=True)
    own = (file for file in sorted(files) if "site-packages" not in file)
    return np.array([2 + os.path.getsize(file) // 4 for file in own])


def draw_web_lengths():
    return np.maximum(3, np.random.default_rng(0).lognormal(5.7, 1.1, 20_000)).astype(np.int64)


@pytest.mark.parametrize("lengths", [measure_stdlib_lengths, draw_web_lengths])
@pytest.mark.parametrize("T", [128, 1024, 4096])
def test_less_than_one_percent_of_real_text_is_padding(lengths, T):
    lengths = lengths()
    rows = PackedDocuments(Tokens(np.zeros(lengths.sum(), np.uint8), np.cumsum([0, *lengths])), T)
    assert rows.padding == 1 - lengths.sum() / (rows.size * T)
    assert 0 <= rows.padding < 0.01


def list_reference_pieces(tokens, T):
    """Return (tokens, targets, weights) of each piece of a document, by its first token."""
    pieces = {}
    for begin, end in zip(tokens.starts[:-1].tolist(), tokens.starts[1:].tolist(), strict=True):
        for first in range(begin, end, T):
            last = min(first + T, end)
            targets = [int(tokens.ids[at % tokens.ids.size]) for at in range(first + 1, last + 1)]
            weights = [float(at < end) for at in range(first + 1, last + 1)]
            pieces[int(tokens.ids[first])] = (tokens.ids[first:last].tolist(), targets, weights)
    return pieces


@given(lengths, widths)
def test_an_epoch_contains_every_piece_of_every_document_once_and_whole(lengths, T):
    tokens = make_stream(lengths)
    rows = PackedDocuments(tokens, T, pad=PAD)
    batch = rows.gather(np.arange(rows.size))
    pieces = list_reference_pieces(tokens, T)
    for row in range(rows.size):
        at, segment = 0, 0
        while at < T and batch.segment_ids[row, at]:
            segment += 1
            inputs, targets, weights = pieces.pop(int(batch.tokens[row, at]))
            here = slice(at, at + len(inputs))
            assert batch.tokens[row, here].tolist() == inputs
            assert batch.targets[row, here].tolist() == targets
            assert batch.weights[row, here].tolist() == weights
            assert batch.positions[row, here].tolist() == list(range(len(inputs)))
            assert batch.segment_ids[row, here].tolist() == [segment] * len(inputs)
            at += len(inputs)
        for x, empty in zip(batch[:5], (PAD, PAD, 0, 0, 0), strict=True):
            assert (x[row, at:] == empty).all()
    assert not pieces


@given(lengths, widths)
def test_every_token_that_a_document_predicts_is_a_target_once_an_epoch(lengths, T):
    tokens = make_stream(lengths)
    batch = PackedDocuments(tokens, T).gather(np.arange(PackedDocuments(tokens, T).size))
    counted = collections.Counter(batch.targets[batch.weights > 0].tolist())
    begins = tokens.ids[tokens.starts[:-1]]
    assert counted == collections.Counter(set(tokens.ids.tolist()) - set(begins.tolist()))


@given(lengths, widths)
def test_a_document_that_fits_a_row_is_not_cut(lengths, T):
    tokens = make_stream(lengths)
    rows = PackedDocuments(tokens, T)
    fits = [begin for begin, n in zip(tokens.starts, lengths, strict=False) if n <= T]
    assert set(fits) <= set(rows.firsts[rows.is_last & (rows.sizes <= T)])
    assert len(rows.sizes) == sum(-(-n // T) for n in lengths)


@settings(deadline=None)
@given(lengths, widths, st.integers(1, 5), st.integers(0, 9))
def test_epochs_have_the_same_rows_in_other_orders(lengths, T, B, seed):
    tokens = make_stream(lengths)
    loader = Loader([(1.0, PackedDocuments(tokens, T))], B, seed)
    size = loader.rows[0].size
    steps = range(-(-2 * size // B))
    firsts = np.concatenate([loader.make_batch(step).tokens[:, 0] for step in steps])
    expected = sorted(loader.rows[0].gather(np.arange(size)).tokens[:, 0])
    assert sorted(firsts[:size]) == sorted(firsts[size : 2 * size]) == expected


def test_arrays_have_the_dtypes_and_shapes_of_windows():
    batch = PackedDocuments(make_stream([3, 9, 4]), 5).gather(np.array([1, 0]))
    assert [x.dtype for x in batch[:5]] == [np.int32] * 4 + [np.float32]
    assert {x.shape for x in batch[:5]} == {(2, 5)}
    assert all(x.flags.c_contiguous for x in batch[:5])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.data())
def test_the_row_index_finds_the_pieces_of_a_row_and_none_beyond_the_last(rows, data):
    _, rows = np.unique(rows, return_inverse=True)  # without gaps
    row_index = RowIndex(rows)
    wanted = data.draw(st.lists(st.integers(0, row_index.size + 2), min_size=1, max_size=9))
    places, pieces = row_index.find_pieces(np.array(wanted))
    got = [pieces[places == place].tolist() for place in range(len(wanted))]
    assert got == [np.flatnonzero(rows == row).tolist() for row in wanted]


def test_empty_rows_are_padding():
    packed = pack_rows(make_stream([4]), np.array([1]), np.array([2]), np.array([1]), (3, 3), pad=7)
    assert packed.tokens.tolist() == [[7, 7, 7], [2, 3, 7], [7, 7, 7]]
    assert packed.targets.tolist() == [[7, 7, 7], [3, 4, 7], [7, 7, 7]]
    assert packed.segment_ids.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
