"""Turn the bytes of text files into UTF-8, whatever they were written in.

Text is UTF-8 unless its bytes are something else: a byte order mark, the NULs of UTF-16, or bytes
that are not UTF-8 decide. What is no text is refused by name. Files are decoded in chunks.
"""

import codecs
import functools
import itertools
import re
import sys
from collections.abc import Iterator

from jaxgpt.settings import ConfigError

SAMPLE_BYTES = 1 << 16  # from which an encoding is recognized
# In this order: the mark of UTF-32 begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
NUL_SHARE = 0.2  # of the bytes of UTF-16 and UTF-32, at least, if a tenth of the text is ASCII
MIN_COHERENCE = 0.5  # of the frequencies of letters with those of a language: it is that one
MAX_ACCENTED = 0.25  # of the letters of a language of Western Europe

Chunks = Iterator[bytes]
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_MULTIBYTE = re.compile("[^\x00-\x7f\udc80-\udcff]")
_NOT_WESTERN = re.compile(
    r"[^\x00-\x7f\xa0-\xb0\xb4\xb7\xba-\xd6\xd8-\xf6\xf8-\xffŒœŸ€„“”‘’‚‹›–—…•™]|\w[¿¡]\w"
)
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")  # never in text, in any encoding here


def decode_chunks(path: str, chunks: Chunks, encoding: str = "auto") -> Chunks:
    """Yield a text file as UTF-8.

    Text that is mostly UTF-8 is not changed where it is not; but a byte order mark is dropped.

    Args:
        path: its name, in messages.
        chunks: its bytes.
        encoding: a codec, or "auto" to recognize it; "utf-8" lets any bytes pass.

    Raises:
        ConfigError: the bytes are not text, or not in this encoding.
    """
    head, chunks = _peek(chunks)
    mark = next((mark for mark in BYTE_ORDER_MARKS if head.startswith(mark)), b"")
    name = encoding
    if encoding == "auto":
        name = BYTE_ORDER_MARKS.get(mark) or _recognize_wide(head) or "auto"
    elif codecs.lookup(encoding).name != BYTE_ORDER_MARKS.get(mark):
        mark = b""  # the codec knows what to do with it
    chunks = _skip(chunks, len(mark))
    if codecs.lookup("utf-8" if name == "auto" else name).name != "utf-8":
        if encoding == "auto":
            _log_encoding(path, name)
        yield from _transcode(path, chunks, name)
    elif encoding == "auto":
        yield from _decode_unmarked(path, chunks, len(mark))
    else:
        yield from chunks


def _peek(chunks: Chunks, first: bytes = b"") -> tuple[bytes, Chunks]:
    """Return the first SAMPLE_BYTES or more, or all there are, and the chunks with them."""
    taken, size = [first], len(first)
    while size < SAMPLE_BYTES and (chunk := next(chunks, None)) is not None:  # it may be empty
        taken.append(chunk)
        size += len(chunk)
    head = b"".join(taken)
    return head, itertools.chain([head] if head else [], chunks)


def _skip(chunks: Chunks, size: int) -> Chunks:
    """Yield the chunks without this many bytes, all of the first chunk."""
    for number, chunk in enumerate(chunks):
        yield chunk if number else chunk[size:]


def _recognize_wide(head: bytes) -> str:
    """Return the name of UTF-16 or UTF-32 without a mark, by where its NULs are; "" if neither."""
    head = head[: len(head) // 4 * 4]
    if head.count(0) < NUL_SHARE * len(head) or not head:
        return ""
    for name, places in {
        "utf-32-le": (2, 3), "utf-32-be": (0, 1), "utf-16-le": (1, 3), "utf-16-be": (0, 2),
    }.items():  # fmt: skip
        size = 4 if "32" in name else 2
        others = [head[place::4].count(0) for place in range(4) if place not in places]
        nuls = sum(head[place::4].count(0) for place in places)
        if nuls < NUL_SHARE * len(head) or (size == 2 and any(others)):
            continue
        try:
            if "\0" not in head.decode(name):
                return name
        except UnicodeDecodeError:
            if size == 2 and "\0" not in head.decode(name, "ignore"):  # cut between surrogates
                return name
    return ""


def _decode_unmarked(path: str, chunks: Chunks, offset: int) -> Chunks:
    """Yield text of an unknown encoding; its first bytes that are not ASCII decide."""
    for chunk in chunks:
        _refuse_nul(path, chunk, offset)
        if chunk.isascii():
            yield chunk
            offset += len(chunk)
            continue
        sample, chunks = _peek(chunks, chunk)
        name = _recognize(path, sample[_find_non_ascii(sample) :])
        if name == "utf-8":
            for rest in chunks:
                _refuse_nul(path, rest, offset)
                yield rest
                offset += len(rest)
        else:
            _log_encoding(path, name)
            yield from _transcode(path, chunks, name)
        return


def _find_non_ascii(sample: bytes) -> int:
    """Return where to begin a sample: a little before its first byte that is not ASCII."""
    first = next(iter(re.finditer(rb"[\x80-\xff]", sample)))
    return max(first.start() - 200, 0) if first.start() > SAMPLE_BYTES // 2 else 0


def _refuse_nul(path: str, chunk: bytes, offset: int):
    if b"\0" in chunk:
        raise ConfigError(
            f"data.source: {path} is not text: it has a NUL byte at {offset + chunk.index(0)}. "
            "Move it, or leave it out with a glob that does not match it; or name its encoding by "
            "data.encoding, if it is text."
        )


def _recognize(path: str, sample: bytes) -> str:
    """Return the name of the encoding of a sample that is not ASCII.

    UTF-8 is damaged rather than another encoding if as many characters are right as bytes are
    wrong: in other encodings a tenth is right by chance.
    """
    sample = sample[:SAMPLE_BYTES]
    text = sample.decode("utf-8", "surrogateescape")
    wrong = len(_NOT_UTF8.findall(text[:-3])) if len(sample) == SAMPLE_BYTES else len(
        _NOT_UTF8.findall(text)
    )  # fmt: skip
    if wrong <= len(_MULTIBYTE.findall(text)):
        return "utf-8"
    if not _CONTROLS.search(sample) and (name := _guess(sample)):
        return name
    raise ConfigError(
        f"data.source: {path} is not UTF-8, and its encoding is not recognized: save it as UTF-8, "
        "name its encoding by data.encoding, or leave it out with a glob that does not match it. "
        "data.encoding=utf-8 takes its bytes as they are."
    )


def _guess(sample: bytes) -> str:
    """Return the likeliest encoding of one or two bytes a character, "" if none is likely."""
    import charset_normalizer

    end = max(sample.rfind(b"\n"), sample.rfind(b" "))  # not inside a character
    whole = sample[:end] if end > len(sample) // 2 and len(sample) == SAMPLE_BYTES else sample
    matches = charset_normalizer.from_bytes(whole)
    best = matches.best()
    if best is None:
        return ""
    # Short texts leave several; then it is the one that most such files are in.
    tied = [match for match in matches if match.chaos <= best.chaos]
    names = {codecs.lookup(name).name for match in tied for name in match.could_be_from_charset}
    is_sure = best.coherence >= MIN_COHERENCE
    if {"cp1252", "iso8859-1"} & names or (not is_sure and _is_western(whole)):
        return "cp1252"
    return best.encoding


def _is_western(sample: bytes) -> bool:
    """Return whether a sample is likely in a language of Western Europe, in cp1252."""
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = sum(character.isalpha() for character in text)
    accented = sum(character.isalpha() and not character.isascii() for character in text)
    return not _NOT_WESTERN.search(text) and accented <= MAX_ACCENTED * letters


def _transcode(path: str, chunks: Chunks, name: str) -> Chunks:
    decoder, offset = codecs.getincrementaldecoder(name)(), 0
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
            offset += len(chunk)
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise ConfigError(
            f"data.source: {path} is not {name} after byte {offset}: {error}. Name its encoding by "
            "data.encoding, save it as UTF-8, or leave it out with a glob that does not match it."
        ) from error


@functools.cache
def _log_encoding(path: str, name: str):
    """Print once that a file is not UTF-8."""
    print(f"data.source: {path} is read as {name}", file=sys.stderr, flush=True)
