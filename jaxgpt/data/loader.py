"""Batches as pure functions of (seed, step).

Every stream gives rows, epoch after epoch, in an order drawn from (seed, epoch, stream); the rows
of several streams follow each other in a fixed rhythm that honours their weights. What a step sees
depends on nothing else, so the place in the data is one integer, and means the same on any number
of hosts.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxgpt.data.packing import Batch, Rows, Windows
from jaxgpt.data.shards import Tokens

LONGEST = 10_000  # rows of the longest rhythm: weights are met to one in so many


class Epochs:
    """Endless rows, epoch after epoch, each in an order that (seed, epoch, stream) decides.

    Args:
        rows: gives the rows of an epoch in their order.
        seed: of the orders.
        stream: number of the stream: two of the same size have different orders.
    """

    def __init__(self, rows: Rows, seed: int, stream: int = 0):
        self.rows, self.size = rows, rows.size
        self.seed, self.stream = seed, stream
        # A batch may lie across the border of two epochs.
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places [B], counted over all epochs."""
        epochs, places = np.divmod(places, self.size)  # [B], [B]
        rows = np.empty_like(places)  # [B]
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self.order(epoch)[places[here]]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        # NumPy ends its seeds with zeros: a single stream has the orders of [seed, epoch].
        return self.rows.draw(np.random.default_rng([self.seed, epoch, self.stream]))


class Rhythm:
    """Which stream each row is of: at any time each stream has had its share of the rows, give or
    take less than one.

    Args:
        weights: of the streams, above 0. They are met exactly if multiples of one part in up to
            `LONGEST` are; otherwise they are rounded to that, but each stream has some rows.

    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32.
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = _whole(np.array(weights, np.float64))  # [streams] rows of a period
        self.period = int(self.counts.sum())
        self.streams = np.array(_turns(self.counts.tolist()))  # [period]
        self.ranks = np.empty_like(self.streams)  # [period], how many of its stream came before
        for stream, count in enumerate(self.counts):
            self.ranks[self.streams == stream] = np.arange(count)

    def take(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of these rows [B]: its stream, and how many rows of that came before."""
        periods, places = np.divmod(numbers, self.period)
        streams = self.streams[places]
        return streams, periods * self.counts[streams] + self.ranks[places]


def _whole(weights: np.ndarray) -> np.ndarray:
    """The least whole numbers in proportion to the weights, or nearly: int64, sum <= LONGEST."""
    shares = weights / weights.sum()  # [streams]
    wanted = np.arange(1, LONGEST + 1)[:, None] * shares  # [LONGEST streams]
    is_whole = (np.abs(wanted - np.rint(wanted)) < 1e-9) & (wanted > 0.5)
    exact = np.flatnonzero(is_whole.all(axis=1))
    if exact.size:
        return np.rint(wanted[exact[0]]).astype(np.int64)
    counts = np.maximum(np.floor(wanted[-1]), 1)
    missing = LONGEST - int(counts.sum())
    counts[np.argsort(counts - wanted[-1])[: max(0, missing)]] += 1
    return counts.astype(np.int64)


def _turns(counts: list[int]) -> list[int]:
    """A period of the rhythm, by Tijdeman's rule."""
    if len(counts) == 1:
        return [0]
    period, slack = sum(counts), 2 * len(counts) - 2
    had = [0] * len(counts)
    turns = []
    for row in range(1, period + 1):
        # Of the streams that may have this row, the one that can wait for the shortest time.
        owed = [row * count - period * n for count, n in zip(counts, had, strict=True)]
        may = (i for i, x in enumerate(owed) if slack * x >= period)
        turn = min(may, key=lambda i: ((slack - 1) * period - slack * owed[i]) / counts[i])
        turns.append(turn)
        had[turn] += 1
    return turns


class Loader:
    """Training batches; `batch(step)` is the same whenever and wherever it is asked for.

    Args:
        streams: the rows of each stream, and its weight.
        B: rows of a batch, over all hosts.
        seed: of the order.
    """

    def __init__(self, streams: Sequence[tuple[float, Rows]], B: int, seed: int):
        weights, self.rows = zip(*streams, strict=True)
        self.B = B
        self.rhythm = Rhythm(weights)
        self.epochs = [Epochs(rows, seed, stream) for stream, rows in enumerate(self.rows)]

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """The batch of a step, counted from 0.

        Args:
            step: which batch.
            rows: the rows of it that are wanted, all by default; a host asks for its own.

        Returns:
            Arrays of [B T], or of the rows only.
        """
        streams, nth = self.rhythm.take(self.numbers(step, rows))
        there = np.unique(streams).tolist()
        parts = [
            self.rows[stream].cut(self.epochs[stream].take(nth[streams == stream]))
            for stream in there
        ]
        return parts[0] if len(parts) == 1 else _join(parts, np.argsort(streams, kind="stable"))

    def numbers(self, step: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """These rows of a batch, counted from the first row of training: int64 [B]."""
        return step * self.B + np.arange(self.B)[rows]

    @property
    def padding(self) -> float:
        """The share of all that is shown that is no token."""
        shares = self.rhythm.counts / self.rhythm.period
        return float(sum(s * rows.padding for s, rows in zip(shares, self.rows, strict=True)))


def _join(parts: Sequence[Any], places: np.ndarray) -> Any:
    """One batch of several, or one array: the rows of all of them go to these places [B]."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return type(parts[0])(*(_join(fields, places) for fields in zip(*parts, strict=True)))
    joined = np.empty((places.size, *parts[0].shape[1:]), parts[0].dtype)
    joined[places] = np.concatenate(parts)
    return joined


# --- evaluation ---


def eval_size(tokens: Tokens, B: int, T: int, limit: int = 0) -> int:
    """How many batches `eval_batches` gives."""
    batches = -(-(tokens.ids.size - 1) // (B * T))
    return min(batches, limit) if limit else batches


def eval_batches(
    tokens: Tokens,
    B: int,
    T: int,
    limit: int = 0,
    *,
    pad: int = 0,
    mask_documents: bool = True,
) -> Iterator[Batch]:
    """The whole stream in order, in windows that do not overlap: every target once.

    Args:
        tokens: the stream.
        B, T: the shape of every batch; the last one is padded.
        limit: stop after so many batches, 0 = never.
        pad: the token where there is none; segments and weights are 0 there.
        mask_documents: as for `Windows`.

    Returns:
        Batches of [B T].
    """
    windows = Windows(tokens, T, mask_documents)
    targets = tokens.ids.size - 1
    for number in range(eval_size(tokens, B, T, limit)):
        firsts = (number * B + np.arange(B)) * T  # [B]
        batch = windows.cut(firsts)
        there = firsts[:, None] + np.arange(T) < targets  # [B T]
        parts: list[np.ndarray] = [*batch[:5]]
        empty = (pad, pad, 0, 0, 0)
        filled = zip(parts, empty, strict=True)
        made: Any = (np.where(there, x, x.dtype.type(e)) for x, e in filled)
        yield Batch(*made)


# --- reading ahead ---


class Made(Protocol):
    """Something that gives a batch for each step: a loader, or a task."""

    def batch(self, step: int, rows: slice | np.ndarray) -> Batch:
        """The batch of a step, or some rows of it."""


class Batches(Iterator[Batch], Protocol):
    """Batches one after the other. `close` ends the threads that make them."""

    def close(self) -> None: ...


def read_ahead(
    task: Made, step: int = 0, rows: slice | np.ndarray = slice(None), size: int = 2
) -> Batches:
    """The batches from `step` on, without end, made ahead of time by the threads of Grain.

    What making a batch raises is raised here, in its turn. Grain's position in the data,
    `get_state()`, is the step. Its elements are batches and not rows: a position counted in the
    rows of one host would mean nothing on another number of hosts, and Python would be at work for
    every row. Where Grain is not installed, batches are made when they are asked for.

    Args:
        task: makes the batches, in any order and several at once.
        step: the first one.
        rows: which rows of each batch are wanted.
        size: how many are made ahead; 0 = none.
    """
    try:
        import grain  # half a second, which only training needs to spend
    except ImportError:
        size = 0
    if not size:
        return _in_turn(task, step, rows)
    batches = grain.MapDataset.range(2**62).map(lambda number: task.batch(number, rows))
    threads = min(size, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=size)
    ahead = iter(batches.to_iter_dataset(options))
    ahead.set_state({"next_index": step})
    return ahead


def _in_turn(task: Made, step: int, rows: slice | np.ndarray) -> Any:
    for number in itertools.count(step):
        yield task.batch(number, rows)
