"""How a stream of tokens becomes rows of T tokens.

`Windows` takes T neighbouring tokens, whatever the documents in them: nothing is padded, and
documents are cut where windows end. `Documents` keeps documents whole: only those longer than a row
are cut, and what there is then is put together so that little of a row stays empty. Both know how
many rows an epoch has (`size`), draw their order (`draw`) and make any of them (`cut`), which is
all that a loader asks for.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from jaxgpt.data.shards import Tokens
from jaxgpt.settings import ConfigError

OPEN = 64  # rows that pairs choose from


class Source(NamedTuple):
    """What an encoder-decoder reads, int32 [B S] each: see `Batch`."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


class Batch(NamedTuple):
    """What a step learns from, or is evaluated on.

    Args:
        tokens, targets: int32 [B T]; the target is the token after.
        positions: int32 [B T], counted from where the document begins inside the row.
        segments: int32 [B T], which document of the row it is, from 1; 0 = no token.
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


class Rows(Protocol):
    """What a stream gives to learn from, epoch after epoch."""

    @property
    def size(self) -> int:
        """Rows of an epoch."""

    @property
    def padding(self) -> float:
        """The share of them that is no token."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of an epoch in the order of training, int64 [size], as `cut` wants them."""

    def cut(self, rows: np.ndarray) -> Batch:
        """These rows [B]: arrays of [B T]."""


# --- windows ---------------------------------------------------------------------------------


class Windows:
    """T neighbouring tokens a row. The stream is a ring: its end is followed by its beginning.

    The windows of an epoch stand T apart, so that every token is a target once (but for fewer than
    T of them, others in each epoch).

    Args:
        tokens: the stream.
        T: tokens of a row.
        mask_documents: tokens of other documents are neither seen nor predicted. Otherwise a window
            is one segment, and every target counts.
        pad: not used, as there is a token everywhere.
    """

    padding = 0.0

    def __init__(self, tokens: Tokens, T: int, mask_documents: bool = True, pad: int = 0):
        self.tokens, self.T = tokens, T
        begins = tokens.starts[:-1]  # [documents]
        again = begins[: np.searchsorted(begins, T, side="right")] + tokens.ids.size
        self.begins = np.concatenate([begins, again]) if mask_documents else begins[:0]

    @property
    def size(self) -> int:
        """Windows of an epoch.

        Raises:
            ConfigError: the stream has fewer than T + 1 tokens.
        """
        if self.tokens.ids.size < self.T + 1:
            raise ConfigError(
                f"data.source gives {self.tokens.ids.size} tokens to train on, and one window of "
                f"model.context={self.T} needs {self.T + 1}: use more text, or model.context of at "
                f"most {self.tokens.ids.size - 1}."
            )
        return self.tokens.ids.size // self.T

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The first token of each window; where the first one begins differs between epochs."""
        phase = rng.integers(self.T)
        return phase + self.T * rng.permutation(self.size)

    def cut(self, rows: np.ndarray) -> Batch:
        """The windows that begin at these tokens, int64 [B] in [0, ring + T)."""
        firsts = rows % self.tokens.ids.size
        window = self.tokens.cut(firsts, self.T + 1)  # [B T+1]
        begins = self._begins(firsts)  # [B T+1]
        positions, segments = _coordinates(begins[:, : self.T])
        return Batch(
            tokens=np.ascontiguousarray(window[:, :-1]),
            targets=np.ascontiguousarray(window[:, 1:]),
            positions=positions,
            segments=segments,
            weights=(~begins[:, 1:]).astype(np.float32),
        )

    def _begins(self, firsts: np.ndarray) -> np.ndarray:
        """Where a document begins inside a window, after its first token: bool [B T+1]."""
        low = np.searchsorted(self.begins, firsts, side="right")  # [B]
        high = np.searchsorted(self.begins, firsts + self.T, side="right")  # [B]
        rows, nth = _members(high - low)
        columns = self.begins[low[rows] + nth] - firsts[rows]
        begins = np.zeros((firsts.size, self.T + 1), bool)
        begins[rows, columns] = True
        return begins


def _coordinates(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments, int32 [B T] each, from where documents begin, bool [B T].

    The first column begins one in any case.
    """
    columns = np.arange(begins.shape[1], dtype=np.int32)
    latest = np.where(begins, columns, np.int32(0))
    positions = columns - np.maximum.accumulate(latest, axis=1)
    segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
    return positions, segments


def _members(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of so many members, one after the other: the group of each, and its number in it.

    >>> [x.tolist() for x in _members(np.array([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    groups = np.repeat(np.arange(counts.size), counts)
    return groups, np.arange(groups.size) - np.repeat(np.cumsum(counts) - counts, counts)


# --- whole documents -------------------------------------------------------------------------


class Documents:
    """Documents whole, several to a row, with nothing between them and padding at the end.

    A document longer than a row is cut into rows, and what is left of it. A target that counts is
    the token after in the same document, even where that lies in another row: so every token that
    a document predicts is a target exactly once an epoch. The rows are put together once; epochs
    differ in their order.

    Args:
        tokens: the stream.
        T: tokens of a row.
        mask_documents: true, for which Config cares: documents are always kept apart.
        pad: the token where there is none.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
    """

    def __init__(self, tokens: Tokens, T: int, mask_documents: bool = True, pad: int = 0):
        self.tokens, self.T, self.pad = tokens, T, pad
        lengths = np.diff(tokens.starts)  # [documents]
        document, nth = _members(-(-lengths // T))  # [P] for P pieces
        self.firsts = tokens.starts[document] + nth * T  # [P]
        left = tokens.starts[document + 1] - self.firsts  # [P]
        self.sizes = np.minimum(T, left)  # [P]
        self.is_last = left <= T  # [P] of its document
        self.shelves = Shelves(best_fit(self.sizes, T))
        self.size = self.shelves.size
        self.padding = 1 - tokens.ids.size / (self.size * T)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of the rows."""
        return rng.permutation(self.size)

    def cut(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, int64 [B]."""
        row, piece = self.shelves.take(rows)
        firsts, sizes = self.firsts[piece], self.sizes[piece]
        laid = lay(self.tokens, firsts, sizes, row, (rows.size, self.T), self.pad)
        weights = (laid.segments > 0).astype(np.float32)
        ends = laid.places + sizes - 1  # [P], followed by another document if that is the last
        weights.reshape(-1)[ends[self.is_last[piece]]] = 0
        return Batch(*laid[:4], weights)


class Shelves:
    """Which pieces lie in which row.

    Args:
        rows: int [P], the row of each piece; every number up to the largest one occurs.
    """

    def __init__(self, rows: np.ndarray):
        self.pieces = np.argsort(rows, kind="stable")  # [P], row after row
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])  # [size + 1]
        self.size = self.starts.size - 1

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of these rows [B]: for each the place of its row in `rows`, and its number.

        A row beyond the last one is empty.
        """
        first, end = (self.starts[np.minimum(rows + i, self.size)] for i in (0, 1))
        row, nth = _members(end - first)
        return row, self.pieces[first[row] + nth]


class Laid(NamedTuple):
    """Pieces of a stream in rows.

    Args:
        tokens, targets, positions, segments: as in `Batch`.
        places: int64 [P], where each piece begins in the rows, counted through all of them.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    places: np.ndarray


def lay(
    stream: Tokens,
    firsts: np.ndarray,
    sizes: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, int],
    pad: int,
) -> Laid:
    """Puts pieces into rows [B T], one after the other from the left.

    Args:
        firsts, sizes: int64 [P], where each piece begins in the stream, and its tokens, 1 or more.
        rows: int64 [P], the row of each, in order.
        shape: (B, T). What is in a row must fit.
        pad: the token, and the target, where there is none.
    """
    B, T = shape
    used = np.bincount(rows, sizes, minlength=B).astype(np.int64)  # [B]
    before = np.cumsum(sizes) - sizes  # [P]
    columns = before - (np.cumsum(used) - used)[rows]  # [P]
    places = rows * T + columns  # [P]
    tokens, targets = (np.full(B * T, pad, np.int32) for _ in range(2))
    # Pieces of similar size are read together, so that little is read in vain.
    widths = 1 << np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for width in np.unique(widths):
        here = np.flatnonzero(widths == width)
        read = stream.cut(firsts[here], int(width) + 1)
        pieces = zip(read, places[here].tolist(), sizes[here].tolist(), strict=True)
        for piece, place, size in pieces:
            tokens[place : place + size] = piece[:size]
            targets[place : place + size] = piece[1 : size + 1]
    begins = np.zeros((B, T), bool)
    begins.reshape(-1)[places[columns > 0]] = True
    positions, segments = _coordinates(begins)
    is_empty = np.arange(T) >= used[:, None]  # [B T]
    positions[is_empty] = segments[is_empty] = 0
    return Laid(tokens.reshape(shape), targets.reshape(shape), positions, segments, places)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Puts pieces together into few rows: the largest first, each where it leaves least room.

    Pieces of one size and rows of one room are exchangeable, so that all of them move at once: the
    rows of the least room that is enough are filled up with pieces of this size, then those of the
    next larger room. That is best fit decreasing piece by piece, but takes as many turns as there
    are pairs of a size and a room, not as there are pieces.

    Args:
        sizes: int64 [P], each from 1 to `capacity`.
        capacity: of a row.

    Returns:
        The row of each piece, int64 [P]; rows are numbered from 0 without gaps.
    """
    order = np.argsort(-sizes, kind="stable")  # [P]
    distinct, counts = np.unique(-sizes, return_counts=True)
    rows = np.empty(sizes.size, np.int64)
    with_room: dict[int, list[np.ndarray]] = defaultdict(list)  # rows by the room that is left
    rooms: list[int] = []  # those that rows have, in order
    made, done = 0, 0

    def put(filled: np.ndarray, room: int):
        if filled.size and room:
            if room not in with_room:
                insort(rooms, room)
            with_room[room].append(filled)

    for size, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                open_rows = np.concatenate(with_room.pop(room))
            else:
                room = capacity
                open_rows = made + np.arange(-(-count // (room // size)))
                made += open_rows.size
            each = room // size  # pieces that a row takes
            placed = min(count, each * open_rows.size)
            full, rest = divmod(placed, each)  # rows that are filled up, pieces in one that is not
            rows[order[done : done + placed]] = np.repeat(open_rows, each)[:placed]
            put(open_rows[:full], room - each * size)
            put(open_rows[full : full + bool(rest)], room - rest * size)
            put(open_rows[full + bool(rest) :], room)
            count, done = count - placed, done + placed
    return rows


def first_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Puts pieces that have two sizes together into few rows, each where both fit.

    Of the rows only the last few stay open; if none of them has room, the fullest makes way for a
    new one. Translations fill some 96% of their rows so, in 5 microseconds a pair.

    Args:
        sizes: int64 [P 2], each from 1 to `capacity`.
        capacity: of a row, for either size.

    Returns:
        The row of each piece, int64 [P]; rows are numbered from 0 without gaps.
    """
    rooms = np.zeros((2, OPEN), np.int64)
    open_rows = np.zeros(OPEN, np.int64)
    rows, made = np.empty(len(sizes), np.int64), 0
    for piece, (one, other) in enumerate(sizes.tolist()):
        fits = (rooms[0] >= one) & (rooms[1] >= other)
        place = int(fits.argmax())
        if not fits[place]:
            place = int(rooms.min(axis=0).argmin())
            rooms[:, place], open_rows[place], made = capacity, made, made + 1
        rooms[0, place] -= one
        rooms[1, place] -= other
        rows[piece] = open_rows[place]
    return rows


PACKINGS: dict[str, Callable[..., Rows]] = {"stream": Windows, "documents": Documents}
