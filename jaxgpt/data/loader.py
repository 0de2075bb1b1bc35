"""Batches as pure functions of (seed, step).

Every stream yields rows, epoch after epoch, in an order drawn from (seed, epoch, stream); the rows
of several streams are interleaved in a fixed pattern that honors their weights. The batch of a step
depends on nothing else, so the position in the data is one integer, and it means the same on any
number of hosts.
"""

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxgpt.data.packing import Batch, Rows, Windows
from jaxgpt.data.shards import Tokens

# Rows of the longest interleaving period, so weights are met to one part in this many.
MAX_PERIOD_ROWS = 10_000


class Epochs:
    """Endless rows, epoch after epoch, each in an order drawn from (seed, epoch, stream).

    Args:
        rows: draws the order of the rows of an epoch.
        seed: of the orders.
        stream: number of the stream: two of the same size have different orders.
    """

    def __init__(self, rows: Rows, seed: int, stream: int = 0):
        self.rows, self.size = rows, rows.size
        self.seed, self.stream = seed, stream
        # A batch may span the border of two epochs.
        self.draw_order = functools.lru_cache(maxsize=2)(self._draw_order)

    def take(self, indexes: np.ndarray) -> np.ndarray:
        """Return the rows at these indexes [B], counted over all epochs."""
        epochs, indexes = np.divmod(indexes, self.size)  # [B], [B]
        rows = np.empty_like(indexes)  # [B]
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            rows[in_epoch] = self.draw_order(epoch)[indexes[in_epoch]]
        return rows

    def _draw_order(self, epoch: int) -> np.ndarray:
        # NumPy pads its seeds with zeros: a single stream has the orders of [seed, epoch].
        return self.rows.draw_order(np.random.default_rng([self.seed, epoch, self.stream]))


class WeightedInterleave:
    """Assign each row to a stream; at any time each stream has had its share, to within one row.

    Args:
        weights: of the streams, above 0. They are met exactly if they are multiples of one part in
            up to `MAX_PERIOD_ROWS`; otherwise they are rounded to that, but each stream has some
            rows.

    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32.
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = _round_weights(np.array(weights, np.float64))  # [streams] rows of a period
        self.period = int(self.counts.sum())
        self.streams = np.array(_schedule_rows(self.counts.tolist()))  # [period]
        self.ranks = np.empty_like(self.streams)  # [period], earlier rows of the same stream
        for stream, count in enumerate(self.counts):
            self.ranks[self.streams == stream] = np.arange(count)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stream of each of these rows [B], and how many rows of it came before."""
        periods, offsets = np.divmod(numbers, self.period)
        streams = self.streams[offsets]
        return streams, periods * self.counts[streams] + self.ranks[offsets]


def _round_weights(weights: np.ndarray) -> np.ndarray:
    """Return the least integers in proportion to the weights, or nearly: sum <= MAX_PERIOD_ROWS."""
    shares = weights / weights.sum()  # [streams]
    ideal = np.arange(1, MAX_PERIOD_ROWS + 1)[:, None] * shares  # [MAX_PERIOD_ROWS streams]
    is_whole = (np.abs(ideal - np.rint(ideal)) < 1e-9) & (ideal > 0.5)
    exact = np.flatnonzero(is_whole.all(axis=1))
    if exact.size:
        return np.rint(ideal[exact[0]]).astype(np.int64)
    counts = np.maximum(np.floor(ideal[-1]), 1)
    missing = MAX_PERIOD_ROWS - int(counts.sum())
    counts[np.argsort(counts - ideal[-1])[: max(0, missing)]] += 1
    return counts.astype(np.int64)


def _schedule_rows(counts: list[int]) -> list[int]:
    """Return the stream of each row of a period, by Tijdeman's rule."""
    if len(counts) == 1:
        return [0]
    period, slack = sum(counts), 2 * len(counts) - 2
    assigned = [0] * len(counts)
    schedule = []
    for row in range(1, period + 1):
        # Of the streams eligible for this row, the one with the earliest deadline.
        owed = [row * count - period * n for count, n in zip(counts, assigned, strict=True)]
        eligible = (i for i, x in enumerate(owed) if slack * x >= period)
        stream = min(eligible, key=lambda i: ((slack - 1) * period - slack * owed[i]) / counts[i])
        schedule.append(stream)
        assigned[stream] += 1
    return schedule


class Loader:
    """Training batches; `make_batch(step)` is the same at any time and on any host.

    Args:
        streams: the rows of each stream, and its weight.
        B: rows of a batch, over all hosts.
        seed: of the order.
    """

    def __init__(self, streams: Sequence[tuple[float, Rows]], B: int, seed: int):
        weights, self.rows = zip(*streams, strict=True)
        self.B = B
        self.interleave = WeightedInterleave(weights)
        self.epochs = [Epochs(rows, seed, stream) for stream, rows in enumerate(self.rows)]

    def make_batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Return the batch of a step, counted from 0.

        Args:
            step: which batch.
            rows: the rows of it to return, all by default; a host asks for its own.

        Returns:
            Arrays [B T], or only these rows.
        """
        streams, ranks = self.interleave.locate(self.number_rows(step, rows))
        parts = [
            self.rows[stream].gather(self.epochs[stream].take(ranks[streams == stream]))
            for stream in np.unique(streams).tolist()
        ]
        return parts[0] if len(parts) == 1 else _merge(parts, np.argsort(streams, kind="stable"))

    def number_rows(self, step: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return the numbers of these rows of a batch since the start of training: int64 [B]."""
        return step * self.B + np.arange(self.B)[rows]

    @property
    def padding(self) -> float:
        """The fraction of all positions that hold no token."""
        shares = self.interleave.counts / self.interleave.period
        return float(sum(s * rows.padding for s, rows in zip(shares, self.rows, strict=True)))


def _merge(parts: Sequence[Any], places: np.ndarray) -> Any:
    """Merge batches, or arrays, into one: the rows of all of them go to these places [B]."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return type(parts[0])(*(_merge(fields, places) for fields in zip(*parts, strict=True)))
    merged = np.empty((places.size, *parts[0].shape[1:]), parts[0].dtype)
    merged[places] = np.concatenate(parts)
    return merged


# --- evaluation ---


def count_eval_batches(tokens: Tokens, B: int, T: int, limit: int = 0) -> int:
    """Return how many batches `make_eval_batches` yields."""
    batches = -(-(tokens.ids.size - 1) // (B * T))
    return min(batches, limit) if limit else batches


def make_eval_batches(
    tokens: Tokens,
    B: int,
    T: int,
    limit: int = 0,
    *,
    pad: int = 0,
    mask_documents: bool = True,
) -> Iterator[Batch]:
    """Yield the whole stream in order, in windows that do not overlap: every target once.

    Args:
        tokens: the stream.
        B, T: the shape of every batch; the last one is padded.
        limit: stop after this many batches, 0 = never.
        pad: the padding token; segment ids and weights are 0 there.
        mask_documents: as for `Windows`.

    Yields:
        Batches of [B T].
    """
    windows = Windows(tokens, T, mask_documents)
    num_targets = tokens.ids.size - 1
    for number in range(count_eval_batches(tokens, B, T, limit)):
        firsts = (number * B + np.arange(B)) * T  # [B]
        batch = windows.gather(firsts)
        is_token = firsts[:, None] + np.arange(T) < num_targets  # [B T]
        arrays: list[np.ndarray] = [*batch[:5]]
        fills = (pad, pad, 0, 0, 0)
        padded: Any = (
            np.where(is_token, x, x.dtype.type(fill)) for x, fill in zip(arrays, fills, strict=True)
        )
        yield Batch(*padded)


# --- prefetching ---


class BatchSource(Protocol):
    """Makes a batch for each step: a loader, or a task."""

    def make_batch(self, step: int, rows: slice | np.ndarray) -> Batch:
        """Return the batch of a step, or some rows of it."""


class BatchIterator(Iterator[Batch], Protocol):
    """Batches one after another."""

    def close(self) -> None:
        """End the threads that make the batches."""


def prefetch_batches(
    task: BatchSource, step: int = 0, rows: slice | np.ndarray = slice(None), size: int = 2
) -> BatchIterator:
    """Return an endless iterator over the batches from `step` on, prefetched by Grain's threads.

    An exception raised while making a batch is raised here, when that batch is due. Grain's
    position in the data, `get_state()`, is the step. Its elements are batches and not rows: a
    position counted in the rows of one host would be meaningless on another number of hosts, and
    Python would run for every row. Where Grain is not installed, batches are made on demand.

    Args:
        task: makes the batches, in any order and several at once.
        step: the first one.
        rows: which rows of each batch to make.
        size: how many batches to prefetch; 0 = none.
    """
    try:
        import grain  # takes half a second, which only training needs to spend
    except ImportError:
        size = 0
    if not size:
        return _iterate_batches(task, step, rows)
    batches = grain.MapDataset.range(2**62).map(lambda number: task.make_batch(number, rows))
    threads = min(size, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=size)
    prefetched = iter(batches.to_iter_dataset(options))
    prefetched.set_state({"next_index": step})
    return prefetched


def _iterate_batches(task: BatchSource, step: int, rows: slice | np.ndarray) -> Any:
    for number in itertools.count(step):
        yield task.make_batch(number, rows)
