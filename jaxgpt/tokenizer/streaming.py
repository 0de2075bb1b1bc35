"""Decoding of ids as they arrive, and the size of text in tokens."""

import codecs
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.core import Tokenizer


class StreamDecoder:
    """Decodes ids incrementally; a character is held back until all its bytes have arrived.

    The concatenated results of `push` and `flush` equal `decode` of all ids at once.

    Examples:
        >>> from jaxgpt.tokenizer import make_byte_tokenizer
        >>> stream = StreamDecoder(make_byte_tokenizer())
        >>> [stream.push(index) for index in make_byte_tokenizer().encode("né")], stream.flush()
        (['n', '', 'é'], '')

    Args:
        tokenizer: of the ids.
        is_start: whether the ids begin a text. In the middle of one, a first space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, is_start: bool = True):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_start = is_start
        self._drops_space = is_start and tokenizer.drops_first_space

    def restart(self) -> "StreamDecoder":
        """Return another decoder, which begins where this one has begun."""
        return StreamDecoder(self._tokenizer, self._is_start)

    def push(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """Return the text completed by these ids (one id, or many)."""
        found = self._tokenizer.join_bytes(np.atleast_1d(ids))
        if found and self._drops_space:
            self._drops_space = False
            found = found.removeprefix(b" ")
        return self._decoder.decode(found)

    def flush(self) -> str:
        """Return the rest after the last id: U+FFFD for an incomplete character, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def measure_compression(tokenizer: Tokenizer, documents: Iterable[str | bytes]) -> float:
    """Compute bytes of text per token, over all documents: higher means shorter sequences.

    Raises:
        ConfigError: the documents contain no text.
    """
    size = tokens = 0
    for document in documents:
        for _, ids in tokenizer.encode_pieces([document]):
            size += int(tokenizer.lengths[ids].sum())
            tokens += ids.size
    if not tokens:
        raise ConfigError("there is no text to measure compression on: data.source is empty.")
    return size / tokens
