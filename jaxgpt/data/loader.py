"""Batches of windows of a token stream, as pure functions of (seed, step).

The stream is a ring. A window is T + 1 neighbouring tokens: T inputs and, one further, T targets.
The windows of an epoch stand T apart, so that every token is a target once (but for fewer than T of
them, others in each epoch), and they come in an order drawn from (seed, epoch). What a step sees
depends on nothing else, so the place in the data is one integer.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxgpt.data.shards import Tokens
from jaxgpt.settings import ConfigError


class Source(NamedTuple):
    """What an encoder-decoder reads, int32 [B S] each: see `Batch`."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class Batch(NamedTuple):
    """What a step learns from, or is evaluated on.

    Args:
        tokens, targets: int32 [B T]; the target is the token after.
        positions: int32 [B T], counted from where the document begins inside the window.
        segments: int32 [B T], which document of the window it is, from 1; 0 = no token.
        weights: float32 [B T]; 1 where the target counts, 0 where it belongs to the next document
            or there is no token.
        prefix: int32 [B T], how many tokens of the document are given, or None.
        source: what is read before, or None.

    Of whole texts that are classified, targets and weights are [B].
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    weights: np.ndarray
    prefix: np.ndarray | None = None
    source: Source | None = None


class Epochs:
    """Endless numbers, epoch after epoch, each in an order that (seed, epoch) decides.

    Args:
        seed: of the orders.
        size: numbers of an epoch.
        draw: gives the numbers of an epoch in their order, [size].
    """

    def __init__(self, seed: int, size: int, draw: Callable[[np.random.Generator], np.ndarray]):
        self.seed, self.size, self.draw = seed, size, draw
        self._drawn: dict[int, np.ndarray] = {}

    def take(self, places: np.ndarray) -> np.ndarray:
        """The numbers at these places [B], counted over all epochs."""
        epochs, places = np.divmod(places, self.size)  # [B], [B]
        numbers = np.empty_like(places)  # [B]
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = self._order(epoch)[places[here]]
        return numbers

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._drawn:
            order = self.draw(np.random.default_rng([self.seed, epoch]))
            # At most this epoch and the one before: a batch may lie across the border.
            self._drawn = {e: o for e, o in self._drawn.items() if e == epoch - 1} | {epoch: order}
        return self._drawn[epoch]


class Loader:
    """Training batches; `batch(step)` is the same whenever and wherever it is asked for.

    Args:
        tokens: the stream.
        B: rows of a batch, over all hosts.
        T: tokens of a row.
        seed: of the order.
        mask_documents: tokens of other documents are neither seen nor predicted. Otherwise a window
            is one segment, and every target counts.

    Raises:
        ConfigError: the stream has fewer than T + 1 tokens.
    """

    def __init__(self, tokens: Tokens, B: int, T: int, seed: int, mask_documents: bool = True):
        if tokens.ids.size < T + 1:
            raise ConfigError(
                f"data.source gives {tokens.ids.size} tokens to train on, and one window of "
                f"model.context={T} needs {T + 1}: use more text, or model.context of at most "
                f"{tokens.ids.size - 1}."
            )
        self.B, self.T, self.seed = B, T, seed
        self.windows = tokens.ids.size // T  # of an epoch
        self._ring = _Ring(tokens, T, mask_documents)
        self._firsts = Epochs(seed, self.windows, self._draw)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, counted from 0.

        Args:
            step: which batch.
            rows: the rows of it that are wanted, all by default; a host asks for its own.

        Returns:
            Arrays of [B T], or of the rows only.
        """
        number = step * self.B + np.arange(self.B)[rows]  # [B] of windows, over all epochs
        return self._ring.cut(self._firsts.take(number))

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """The batches from `step` on, without end."""
        return map(self.batch, itertools.count(step))

    def epoch(self, step: int) -> float:
        """How many times the stream has been seen before `step`."""
        return step * self.B / self.windows

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """The first token of each window of an epoch, int64 [windows], in the order of training."""
        phase = rng.integers(self.T)
        return phase + self.T * rng.permutation(self.windows)


class _Ring:
    """Cuts windows out of a stream whose end is followed by its beginning."""

    def __init__(self, tokens: Tokens, T: int, mask_documents: bool):
        self.tokens, self.T = tokens, T
        begins = tokens.starts[:-1]  # [documents]
        again = begins[: np.searchsorted(begins, T, side="right")] + tokens.ids.size
        self.begins = np.concatenate([begins, again]) if mask_documents else begins[:0]
        self.offsets = np.arange(T + 1)

    def cut(self, firsts: np.ndarray) -> Batch:
        """The windows that begin at `firsts`, int64 [B] in [0, ring + T)."""
        B, T = firsts.size, self.T
        firsts = firsts % self.tokens.ids.size
        window = self.tokens.cut(firsts, T + 1)  # [B T+1]
        begins = self._begins(firsts)  # [B T+1]
        segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)  # [B T+1]
        latest = np.where(begins, self.offsets.astype(np.int32), 0)  # [B T+1]
        positions = self.offsets[:T] - np.maximum.accumulate(latest[:, :T], axis=1)
        return Batch(
            tokens=np.ascontiguousarray(window[:, :T]),
            targets=np.ascontiguousarray(window[:, 1:]),
            positions=positions.astype(np.int32).reshape(B, T),
            segments=np.ascontiguousarray(segments[:, :T]),
            weights=(~begins[:, 1:]).astype(np.float32),
        )

    def _begins(self, firsts: np.ndarray) -> np.ndarray:
        """Where a document begins inside a window, after its first token: bool [B T+1]."""
        low = np.searchsorted(self.begins, firsts, side="right")  # [B]
        high = np.searchsorted(self.begins, firsts + self.T, side="right")  # [B]
        counts = high - low  # [B]
        rows = np.repeat(np.arange(firsts.size), counts)  # [begins in all windows]
        nth = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self.begins[low[rows] + nth] - firsts[rows]
        begins = np.zeros((firsts.size, self.T + 1), bool)
        begins[rows, columns] = True
        return begins


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
        mask_documents: as for `Loader`.

    Returns:
        Batches of [B T].
    """
    ring = _Ring(tokens, T, mask_documents)
    targets = tokens.ids.size - 1
    for number in range(eval_size(tokens, B, T, limit)):
        firsts = (number * B + np.arange(B)) * T  # [B]
        batch = ring.cut(firsts)
        there = firsts[:, None] + np.arange(T) < targets  # [B T]
        parts: list[np.ndarray] = [*batch[:5]]
        empty = (pad, pad, 0, 0, 0)
        filled = zip(parts, empty, strict=True)
        made: Any = (np.where(there, x, x.dtype.type(e)) for x, e in filled)
        yield Batch(*made)


# --- reading ahead ---

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], size: int) -> Generator[Item]:
    """Gives the same items, made ahead of time by a thread.

    What the items raise is raised here, in its turn. `close()` (or leaving a for loop, once the
    iterator is collected) ends the thread.

    Args:
        items: made one by one; only the thread touches them.
        size: how many are made ahead; 0 = none, and no thread.
    """
    return _ahead(items, size) if size else (item for item in items)


def _ahead(items: Iterable[Item], size: int) -> Generator[Item]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room = threading.Semaphore(size)
    closed = threading.Event()

    def make():
        try:
            iterator = iter(items)
            while room.acquire() and not closed.is_set():
                ready.put((next(iterator), None))
        except BaseException as error:  # StopIteration among them; raised by who reads
            ready.put((None, error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        thread.join()
