"""Documents in files: text as it is, or records of .jsonl, each maybe packed by gzip or zstandard.

Text is bytes; nothing is decoded but JSON. Files are read in pieces, so only one document at a time
is in memory. A unit is a group of files, one large file, or some megabytes of a large .jsonl.
"""

import glob
import gzip
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

from jaxgpt.config import DataConfig
from jaxgpt.data.units import Texts, Unit, pieces, stamp, stamped
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

PIECE = 1 << 20  # bytes read at a time
LONGEST = 1 << 30  # bytes of a document or line; more is an accident, and would fill the memory
FIRST = 8192  # bytes of a file in which a NUL tells that it is no text

Bytes = Iterator[bytes]
Reader = Callable[[str, Bytes, DataConfig], Texts]


def units(cfg: DataConfig) -> list[Unit]:
    """A file, all files below a folder, or all that a glob matches (`**` for any depth).

    Hidden files and files with other endings are passed over. The name of a document is its path,
    or path:line for .jsonl, or the place in bytes where the line is not known.

    Args:
        cfg: `source` names the files, `text_key` the field of a .jsonl record, and `target_key` the
            one that holds the answer, if texts come in pairs.

    Returns:
        The units in the order of the paths.

    Raises:
        ConfigError: nothing matches, or nothing that matches can be read. So does reading, if a
            file is corrupt.
    """
    return _grouped(_matches(cfg.source), cfg, _read)


def class_units(cfg: DataConfig) -> list[Unit]:
    """Texts that files or folders put into classes: `classes:` and a file, folder or glob.

    A .txt file is one text, of the class that its folder is called after. Any other file has one
    text a line, and its ending is their class: reviews.pos, reviews.neg. Files without an ending,
    hidden ones and those of documentation (.md) are passed over.

    Returns:
        The units in the order of the paths; the class is the documents' target.

    Raises:
        ConfigError: nothing matches. So does reading, if a file is corrupt.
    """
    source = cfg.source.removeprefix("classes:")
    files = [path for path in _found(source) if _form(path)[0] not in ("", ".md")]
    if not files:
        raise ConfigError(
            f"data.source={cfg.source!r} matches no file with an ending: it takes files of one "
            "text a line whose ending is the class, such as reviews.pos, or .txt files in folders "
            "that are called after the class."
        )
    return _grouped(files, cfg, _read_classes)


def _grouped(paths: list[str], cfg: DataConfig, read: Callable[..., Texts]) -> list[Unit]:
    """Units of neighbouring files, and of ranges of those that can be cut."""
    facts = [read.__name__, cfg.text_key, cfg.target_key]
    groups: list[list[str]] = []
    stamps, total = {path: stamp(path) for path in paths}, 0
    for path in paths:
        size = stamps[path][1]
        if not groups or pieces(total + size) > 1:
            groups.append([])
            total = 0
        groups[-1].append(path)
        total += size

    found = []
    for group in groups:
        first, size = group[0], stamps[group[0]][1]
        many = pieces(size) if _form(first) == (".jsonl", "") and read is _read else 1
        whole = stamped(f"{first} to {group[-1]}", [stamps[p] for p in group], facts,
                        partial(read, cfg, group))  # fmt: skip
        borders = [size * n // many for n in range(many + 1)]
        ranges = [
            whole._replace(
                name=f"{first}[{begin}:{end}]",
                facts=[*whole.facts, begin, end],
                size=end - begin,
                read=partial(_range, cfg, first, begin, end),
            )
            for begin, end in itertools.pairwise(borders)
        ]
        found += ranges if many > 1 else [whole]
    return found


def _read(cfg: DataConfig, paths: list[str]) -> Texts:
    for path in paths:
        ending, packing = _form(path)
        yield from READERS[ending](path, _unpacked(path, packing), cfg)


def _read_classes(cfg: DataConfig, paths: list[str]) -> Texts:
    for path in paths:
        ending, packing = _form(path)
        pieces = _unpacked(path, packing)
        if ending == ".txt":
            yield path, _joined(path, pieces), "", os.path.basename(os.path.dirname(path)).encode()
        else:
            for _, where, line in _lines(path, pieces):
                yield where, line.strip(), "", ending[1:].encode()


def _range(cfg: DataConfig, path: str, begin: int, end: int) -> Texts:
    """The records of a .jsonl whose lines begin in these bytes."""
    return _records(path, _unpacked(path, "", max(begin - 1, 0)), cfg, begin, end)


def _found(source: str) -> list[str]:
    path = os.path.expanduser(source)
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    for folder in filter(os.path.isdir, found):  # which glob would pass over
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigError(f"data.source={source!r}: the folder {folder} can not be read.")
    return sorted(file for file in found if os.path.isfile(file))


def _matches(source: str) -> list[str]:
    files = _found(source)
    readable = [file for file in files if _form(file)[0] in READERS]
    if readable:
        return readable
    works = f"{' '.join(READERS)} (each also with {' or '.join(filter(None, PACKINGS))})"
    if not files:
        raise ConfigError(
            f"data.source={source!r} matches no file. It can be stdlib, tfds:name, hf:name, or a "
            f"file, folder or glob of {works}."
        )
    others = sorted({os.path.splitext(file)[1] or "no ending" for file in files})
    raise ConfigError(
        f"data.source={source!r} matches {len(files)} files, none of which can be read "
        f"({', '.join(others[:8])}). Endings that work: {works}."
    )


def _form(path: str) -> tuple[str, str]:
    """The ending and the packing: (".txt", ".gz") for a.txt.gz, (".md", "") for b.md."""
    stem, packing = os.path.splitext(path)
    if packing.lower() not in PACKINGS:
        stem, packing = path, ""
    return os.path.splitext(stem)[1].lower(), packing.lower()


# --- packings: file -> pieces of bytes ---


def _unpacked(path: str, packing: str, begin: int = 0) -> Bytes:
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            yield from PACKINGS[packing](file)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"data.source: {path} can not be read: {error or type(error).__name__}. "
            "If it was copied or downloaded, get it again; or leave it out of data.source."
        ) from error


def _plain(file: BinaryIO) -> Bytes:
    while piece := file.read(PIECE):
        yield piece


def _gzip(file: BinaryIO) -> Bytes:
    with gzip.open(file, "rb") as unpacked:
        yield from _plain(unpacked)  # type: ignore[arg-type]


def _zstd(file: BinaryIO) -> Bytes:
    zstandard = require("zstandard", f"data.source: {file.name}")

    # Frame by frame, because zstandard's own stream reader takes a cut file for its end.
    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    fresh = True
    try:
        for packed in _plain(file):
            while packed:
                yield frame.decompress(packed)
                fresh, packed = False, frame.unused_data
                if frame.eof:
                    frame, fresh = unpacker.decompressobj(), True
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not fresh:
        raise EOFError("the file ends in the middle of a frame")


PACKINGS = {"": _plain, ".gz": _gzip, ".zst": _zstd}


# --- readers: pieces of bytes -> documents ---


class _Bounded:
    """Collects the pieces of one text after the other; beyond LONGEST it only counts them."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, piece: bytes):
        self.size += len(piece)
        if self.size > LONGEST:
            self.parts.clear()
        else:
            self.parts.append(piece)

    def take(self, where: str) -> bytes:
        if self.size > LONGEST:
            raise ConfigError(
                f"data.source: {where} is one text of {self.size} bytes, and the longest that can "
                f"be read has {LONGEST}: divide it, or leave it out of data.source."
            )
        whole = b"".join(self.parts)
        self.parts, self.size = [], 0
        return whole


def _joined(path: str, pieces: Bytes) -> bytes:
    whole = _Bounded()
    for number, piece in enumerate(pieces):
        if not number and b"\0" in piece[:FIRST]:
            raise ConfigError(
                f"data.source: {path} is not text: it has a NUL byte at {piece.index(0)}. If it is "
                "UTF-16, save it as UTF-8; else move it, or leave it out with a glob that does not "
                "match it."
            )
        whole.add(piece)
    return whole.take(path)


def content(path: str) -> bytes:
    """All of a plain file.

    Raises:
        ConfigError: it can not be read, or is not text.
    """
    return _joined(path, _unpacked(path, ""))


def _whole(path: str, pieces: Bytes, cfg: DataConfig) -> Texts:
    yield path, _joined(path, pieces), "", b""


def _records(
    path: str, pieces: Bytes, cfg: DataConfig, begin: int = 0, end: float = math.inf
) -> Texts:
    """Records whose lines begin in these bytes. The pieces start one byte before, so that a line
    which begins there is known to be whole."""
    for place, where, line in _lines(path, pieces, max(begin - 1, 0)):
        if place >= end:
            return
        if place >= begin and line.strip():
            record = _record(line, cfg.text_key, where)
            text = _text(record, cfg.text_key, "data.text_key", where)
            key = cfg.target_key
            yield where, text, "", _text(record, key, "data.target_key", where) if key else b""


def _lines(path: str, pieces: Bytes, begin: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """Lines, each with its first byte and its name: path:number, or where reading began inside the
    file, that byte."""
    line, number, place = _Bounded(), 1, begin
    for piece in itertools.chain(pieces, [b"\n"]):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            line.add(end)
            after = place + line.size + 1
            where = f"{path} at byte {place}" if begin else f"{path}:{number}"
            yield place, where, line.take(where)
            number, place = number + 1, after
        line.add(rest)


def _record(line: bytes, key: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not JSON: {error}. Each line of a .jsonl file must be one record, such as "
            f'{{"{key}": "a document"}}.'
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{where} is a JSON {type(record).__name__}, not a record such as "
            f'{{"{key}": "a document"}}.'
        )
    return record


def _text(record: dict, key: str, setting: str, where: str) -> bytes:
    if key not in record:
        raise ConfigError(
            f"{where} has no key {key!r}; it has {', '.join(record) or 'none'}. "
            f"Set {setting} to the one that holds the text."
        )
    if not isinstance(record[key], str):
        raise ConfigError(
            f"{where}: {key!r} is {record[key]!r:.60}, not a string. "
            f"Set {setting} to the key that holds the text."
        )
    return record[key].encode("utf-8", "surrogatepass")


READERS: dict[str, Reader] = {".txt": _whole, ".md": _whole, ".py": _whole, ".jsonl": _records}
