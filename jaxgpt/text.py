"""Text as bytes, and the division of long texts into pieces, which bounds memory.

GPT-2's pattern splits a text into words, and no token crosses a word's border; so a text that is
cut between words has the same tokens, whatever its size.
"""

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import pre_tokenizers

PRE_TOKENIZER = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern

# Bytes that are not UTF-8, as surrogateescape writes them.
_NON_UTF8 = re.compile("([\udc80-\udcff]+)")
# Where text can be cut without changing a word: in GPT-2's pattern no word has whitespace after
# another character, and there is no look-behind. (U+180E was whitespace in older versions.)
_CUT_POINT = re.compile(r"(?<=[^\s\u180e])[ \n]")
MIN_PIECE_CHARACTERS = 16_384  # between cuts: enough pieces for all cores, and bounded memory
MAX_WORD_CHARACTERS = 32_768  # of a word of GPT-2's pattern; each so many of a longer one are one
_CONTRACTION = 3  # characters ("'re"): a shorter rest of a window may hold a part of one
# Other patterns are unknown. Candidates are places where those in use begin a word: a space between
# a visible character and a letter, the beginning of a line, an ideograph after punctuation. They
# are checked, and only in texts whose tokens at once would fill the memory.
_OTHER_CUT_POINT = re.compile(
    r"(?<=[!-~]) (?=[A-Za-z])|(?<=\n)(?=[!-~\u4e00-\u9fff])"
    r"|(?<=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])(?=[\u4e00-\u9fff])"
)
_MIN_OTHER_PIECE_CHARACTERS = 1 << 19
_MAX_CANDIDATES = 100  # before a word is taken to be gigantic
CUT_CONTEXT = 256  # characters on both sides of a cut that are split into words to check it


def encode_utf8(text: str) -> bytes:
    r"""Return the bytes of a text, the same for a prompt as for a document.

    A lone surrogate that stands for a byte which is not UTF-8, as Python reads arguments and paths
    ("surrogateescape"), becomes that byte; any other becomes its three bytes ("surrogatepass").

    >>> encode_utf8("é\udcff\ud800")
    b'\xc3\xa9\xff\xed\xa0\x80'
    """
    return text.encode("utf-8", "jaxgpt_surrogates")


def _encode_surrogates(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    lone = error.object[error.start : error.end]
    encoded = (
        bytes([ord(character) - 0xDC00])
        if "\udc80" <= character <= "\udcff"
        else character.encode("utf-8", "surrogatepass")
        for character in lone
    )
    return b"".join(encoded), error.end


codecs.register_error("jaxgpt_surrogates", _encode_surrogates)


def split_non_utf8(
    document: str | bytes, cut: Callable[[str], Iterable[str]] | None = None
) -> Iterator[str | bytes]:
    """Split a document into pieces of text (str) and, between them, bytes that are not UTF-8.

    Text costs one decode (or, for a str, one check) and the search for cut points.

    Args:
        cut: splits a long text; by default between words of GPT-2's pattern.
    """
    try:
        if isinstance(document, str):
            document.encode()
            runs = [document]
        else:
            runs = [str(document, "utf-8")]
    except UnicodeError:
        if isinstance(document, str):
            document = encode_utf8(document)
        runs = _NON_UTF8.split(bytes(document).decode("utf-8", "surrogateescape"))
    for place, run in enumerate(runs):  # text, bytes, text, ..., text
        if place % 2:
            yield run.encode("utf-8", "surrogateescape")
        else:
            yield from (cut or cut_long_text)(run)


def cut_long_text(text: str) -> Iterator[str]:
    """Split a long text between words of GPT-2's pattern.

    Where no whitespace follows a word for long, as in CJK or base64, the library finds the words. A
    word of more than MAX_WORD_CHARACTERS is cut after each so many.
    """
    start, longest = 0, max(MAX_WORD_CHARACTERS, MIN_PIECE_CHARACTERS)
    while len(text) - start > MIN_PIECE_CHARACTERS:
        found = _CUT_POINT.search(text, start + MIN_PIECE_CHARACTERS, start + longest)
        if not found and len(text) - start <= longest:
            break
        end = found.start() if found else start + _find_border(text, start, longest)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _find_border(text: str, start: int, longest: int) -> int:
    """Return the size of the most whole words from here on, at most `longest`, or else `longest`.

    A word is whole if the window has the few characters after it that could be a part of it.
    """
    window = text[start : start + longest + _CONTRACTION]
    ends = (end for _, (_, end) in reversed(PRE_TOKENIZER.pre_tokenize_str(window)))
    return next((end for end in ends if end <= longest), longest)


def cut_very_long_text(
    is_border: Callable[[str, int], bool] | None, added: Sequence[str], has_words: bool, text: str
) -> Iterator[str]:
    """Split a very long text where that does not change its tokens.

    Args:
        is_border: whether no token crosses a place of a text; None if there is no such place.
        added: tokens that are found before all others are.
        has_words: the tokens are inside of words, and a gigantic word is cut; else the text is not
            cut before there is a border.
        text: text of any length.
    """

    def is_cut(place: int) -> bool:
        near = ((text[max(place - len(t) + 1, 0) : place + len(t) - 1], t) for t in added)
        return (
            is_border is not None
            and is_border(text, place)
            and not any(token in around for around, token in near)
        )

    start, size = 0, _MIN_OTHER_PIECE_CHARACTERS
    while is_border is not None and len(text) - start > 2 * size:
        last = start + 2 * size if has_words else len(text)
        found = (match.start() for match in _OTHER_CUT_POINT.finditer(text, start + size, last))
        places = itertools.islice(found, _MAX_CANDIDATES) if has_words else found
        end = next(filter(is_cut, places), last)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:] if start else text


def group_by_size(
    parts: Iterable[tuple[int, str | bytes]], count: int, size: int
) -> Iterator[list[tuple[int, str | bytes]]]:
    """Yield groups of at most `count` parts, of up to this many bytes, but at least one part."""
    group: list[tuple[int, str | bytes]] = []
    total = 0
    for place, part in parts:
        weight = len(part) if isinstance(part, bytes) or part.isascii() else 3 * len(part)
        if group and (len(group) == count or total + weight > size):
            yield group
            group, total = [], 0
        group.append((place, part))
        total += weight
    if group:
        yield group
