"""What runs next: plain Python over slots and requests, without arrays and without a clock.

A request waits, then holds a slot, a row of the engine's state. Its prompt is read in chunks whose
sizes follow from its length alone; then it decodes until it ends, and the slot is free again. What
whole chunks of a prompt have left in the cache is found by later prompts that begin alike.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxgpt.engine.request import Request

MIN_CHUNK_TOKENS = 16  # a smaller chunk takes as long: its time is that of reading the parameters
# For the matrices of SmolLM2 135M, two cores take 15 ms for 16 tokens, 23 for 32, 25 for 40 and 47
# for 64: about 10 ms for a chunk and 0.5 for each token.
MAX_PADDING = 24


def round_up(tokens: int) -> int:
    """Return the smallest size of a chunk that is not less: 16, 24, 32, 40, 48, 64, 80, 96, ...

    Above 24 tokens, padding is less than a quarter of a chunk.

    >>> round_up(5), round_up(37), round_up(64), round_up(65)
    (16, 40, 64, 80)
    """
    power = MIN_CHUNK_TOKENS << max(0, -(-tokens // MIN_CHUNK_TOKENS) - 1).bit_length()
    sizes = (power // 8 * 5, power // 4 * 3, power)
    least = max(tokens, MIN_CHUNK_TOKENS)
    return next(size for size in sizes if size >= least and size % 8 == 0)


def list_sizes(chunk: int) -> list[int]:
    """Return the sizes of chunks up to `chunk`, the smallest first."""
    return sorted({round_up(tokens) for tokens in range(1, chunk + 1)})


def split_prompt(length: int, start: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Yield (tokens, size) of the chunks from `start` to the end of a prompt.

    Sizes are those of `round_up`, up to `chunk`. A prompt of 37 tokens is read as 40, and one of
    100 as 96 and 16, not as 128, since a chunk more takes about as long as MAX_PADDING tokens. The
    sizes do not depend on `start` if it is a multiple of `chunk`.

    >>> list(split_prompt(300, 0, 256)), list(split_prompt(100, 0, 256))
    ([(256, 256), (44, 48)], [(96, 96), (4, 16)])
    """
    rest = length - start
    while rest > 0:
        size = round_up(min(rest, chunk))
        if size - rest > MAX_PADDING:
            size = max(each for each in list_sizes(size) if each < size)
        yield min(rest, size), size
        rest -= min(rest, size)


@dataclass(eq=False)
class Slot:
    """A row of the state, and who holds it."""

    number: int
    request: Request | None = None
    start: int = 0  # tokens of the request's prompt that are in the cache
    is_decoding: bool = False
    exact: list[int] = field(default_factory=list)  # tokens that whole chunks left in the cache
    adapter: int = 0  # with which they were read

    @property
    def is_reading(self) -> bool:
        """Whether its request has a prompt to read."""
        return self.request is not None and not self.is_decoding


class Chunk(NamedTuple):
    """A part of a prompt that is read next."""

    slot: Slot
    start: int
    tokens: int
    size: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends with it."""
        assert self.slot.request is not None
        return self.start + self.tokens == len(self.slot.request.row.ids)


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens at the start of a that are those of b.

    >>> count_common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)


class Scheduler:
    """Requests in the order of their arrival, and slots.

    Attributes:
        waiting: requests without a slot.
        slots: one for each row.
        chunk: tokens of a chunk, at most; a size of `round_up`.
        has_reuse: whether prompts are looked up in the cache.
    """

    def __init__(self, rows: int, chunk: int, has_reuse: bool):
        self.waiting: deque[Request] = deque()
        self.slots = [Slot(number) for number in range(rows)]
        self.chunk, self.has_reuse = chunk, has_reuse

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and all(slot.request is None for slot in self.slots)

    @property
    def decoding(self) -> list[Slot]:
        """The slots that decode."""
        return [slot for slot in self.slots if slot.is_decoding]

    def admit(self) -> Iterator[tuple[Slot, Slot]]:
        """Give free slots to waiting requests; yield (from, to) where a cache is to be copied."""
        while self.waiting:
            free = [slot for slot in self.slots if slot.request is None]
            if not free:
                return
            request = self.waiting.popleft()
            start, source = self._find_prefix(request)
            # A slot that remembers little is given away first.
            slot = source if source in free else min(free, key=lambda each: len(each.exact))
            slot.request, slot.start, slot.is_decoding = request, start, False
            slot.exact, slot.adapter = list(request.row.ids[:start]), request.adapter
            request.reused = start
            if source is not None and source is not slot:
                yield source, slot

    def _find_prefix(self, request: Request) -> tuple[int, Slot | None]:
        """Return how many tokens of a prompt the cache has, in whole chunks, and in which slot."""
        ids = request.row.ids
        found: tuple[int, Slot | None] = (0, None)
        slots = [slot for slot in self.slots if slot.adapter == request.adapter]
        for slot in slots if self.has_reuse else ():
            # The scores after the last token are not kept: it is read again.
            common = min(count_common(slot.exact, ids), len(ids) - 1)
            whole = common // self.chunk * self.chunk
            if whole > found[0]:
                found = whole, slot
        return found

    def next_chunk(self, is_whole: bool = False) -> Chunk | None:
        """Return what to read next, of the request that came first; None if there is nothing.

        Args:
            is_whole: whether a prompt is read in one chunk.
        """
        reading = [slot for slot in self.slots if slot.is_reading]
        if not reading:
            return None
        slot = min(reading, key=lambda each: each.request.number)  # type: ignore[union-attr]
        length = len(slot.request.row.ids)  # type: ignore[union-attr]
        if is_whole:
            return Chunk(slot, 0, length, round_up(length))
        return Chunk(slot, slot.start, *next(split_prompt(length, slot.start, self.chunk)))

    def finish_chunk(self, chunk: Chunk):
        """Note that a chunk was read."""
        slot = chunk.slot
        assert slot.request is not None
        is_exact = chunk.tokens == self.chunk and len(slot.exact) == chunk.start
        slot.start = chunk.start + chunk.tokens
        if is_exact:
            slot.exact = list(slot.request.row.ids[: slot.start])
        slot.is_decoding = chunk.is_last

    def read_again(self, slot: Slot):
        """Let a slot read the tokens of its request from the first: its window has moved."""
        slot.start, slot.is_decoding, slot.exact = 0, False, []

    def free(self, slot: Slot):
        """Take a slot from its request; what it remembers of prompts stays."""
        slot.request, slot.is_decoding = None, False

    def forget(self):
        """Forget what the cache holds: it was lost."""
        for slot in self.slots:
            slot.exact = []
