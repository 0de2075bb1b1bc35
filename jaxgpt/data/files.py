"""Documents in files: plain text or .jsonl records, optionally compressed by gzip or zstandard.

Text is bytes; only JSON is decoded. Files are read in chunks, so only one document at a time is in
memory. A unit is a group of files, one large file, or some megabytes of a large .jsonl.
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
from jaxgpt.data.units import RawDocuments, SourceUnit, count_units, make_file_unit, read_stamp
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

CHUNK_BYTES = 1 << 20  # read at a time
MAX_TEXT_BYTES = 1 << 30  # of a document or line; more is a mistake, and would fill the memory
NUL_CHECK_BYTES = 8192  # at the start of a file; a NUL among them means that it is not text

Chunks = Iterator[bytes]
Reader = Callable[[str, Chunks, DataConfig], RawDocuments]


def list_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of a file, a folder (searched recursively) or a glob (`**`: any depth).

    Hidden files and files with other endings are skipped. The name of a document is its path, or
    path:line for .jsonl, or its byte offset if the line number is not known.

    Args:
        cfg: `source` names the files, `text_key` the field of a .jsonl record with the text, and
            `target_key` the one with the answer if texts come in pairs.

    Returns:
        The units in the order of the paths.

    Raises:
        ConfigError: nothing matches, or nothing that matches can be read. Reading raises it too, if
            a file is corrupt.
    """
    return _group_files(_find_readable_files(cfg.source), cfg, _read_files)


def list_class_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of labeled texts: `classes:` and a file, folder or glob.

    A .txt file is one text, and the name of its folder is the class. Any other file has one text
    per line, and its ending is their class: reviews.pos, reviews.neg. Files without an ending,
    hidden files and documentation (.md) are skipped.

    Returns:
        The units in the order of the paths; the class is the documents' target.

    Raises:
        ConfigError: nothing matches. Reading raises it too, if a file is corrupt.
    """
    source = cfg.source.removeprefix("classes:")
    files = [path for path in _find_files(source) if _split_ending(path)[0] not in ("", ".md")]
    if not files:
        raise ConfigError(
            f"data.source={cfg.source!r} matches no file with an ending: it takes files with "
            "one text per line whose ending is the class, such as reviews.pos, or .txt files in "
            "folders named after the class."
        )
    return _group_files(files, cfg, _read_class_files)


def _group_files(
    paths: list[str], cfg: DataConfig, read: Callable[..., RawDocuments]
) -> list[SourceUnit]:
    """Return units of adjacent files, and of ranges of those that can be divided."""
    # These strings are part of the keys of cached surveys, so they must not change.
    reader = {_read_files: "_read", _read_class_files: "_read_classes"}[read]
    facts = [reader, cfg.text_key, cfg.target_key]
    groups: list[list[str]] = []
    stamps, total = {path: read_stamp(path) for path in paths}, 0
    for path in paths:
        size = stamps[path][1]
        if not groups or count_units(total + size) > 1:
            groups.append([])
            total = 0
        groups[-1].append(path)
        total += size

    units = []
    for group in groups:
        first, size = group[0], stamps[group[0]][1]
        is_divisible = _split_ending(first) == (".jsonl", "") and read is _read_files
        count = count_units(size) if is_divisible else 1
        whole = make_file_unit(f"{first} to {group[-1]}", [stamps[p] for p in group], facts,
                        partial(read, cfg, group))  # fmt: skip
        borders = [size * n // count for n in range(count + 1)]
        ranges = [
            whole._replace(
                name=f"{first}[{begin}:{end}]",
                facts=[*whole.facts, begin, end],
                size=end - begin,
                read=partial(_read_range, cfg, first, begin, end),
            )
            for begin, end in itertools.pairwise(borders)
        ]
        units += ranges if count > 1 else [whole]
    return units


def _read_files(cfg: DataConfig, paths: list[str]) -> RawDocuments:
    for path in paths:
        ending, compression = _split_ending(path)
        yield from READERS[ending](path, _read_decompressed(path, compression), cfg)


def _read_class_files(cfg: DataConfig, paths: list[str]) -> RawDocuments:
    for path in paths:
        ending, compression = _split_ending(path)
        chunks = _read_decompressed(path, compression)
        if ending == ".txt":
            label = os.path.basename(os.path.dirname(path)).encode()
            yield path, _join_text(path, chunks), "", label
        else:
            for _, name, line in _split_lines(path, chunks):
                yield name, line.strip(), "", ending[1:].encode()


def _read_range(cfg: DataConfig, path: str, begin: int, end: int) -> RawDocuments:
    """Yield the records of a .jsonl whose lines begin in this range of bytes."""
    return _read_jsonl(path, _read_decompressed(path, "", max(begin - 1, 0)), cfg, begin, end)


def _find_files(source: str) -> list[str]:
    path = os.path.expanduser(source)
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    for folder in filter(os.path.isdir, found):  # glob silently skips unreadable folders
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigError(f"data.source={source!r}: the folder {folder} cannot be read.")
    return sorted(file for file in found if os.path.isfile(file))


def _find_readable_files(source: str) -> list[str]:
    files = _find_files(source)
    readable = [file for file in files if _split_ending(file)[0] in READERS]
    if readable:
        return readable
    compressed = " or ".join(filter(None, DECOMPRESSORS))
    supported = f"{' '.join(READERS)} (each also with {compressed})"
    if not files:
        raise ConfigError(
            f"data.source={source!r} matches no file. It can be stdlib, tfds:name, hf:name, or a "
            f"file, folder or glob of {supported}."
        )
    others = sorted({os.path.splitext(file)[1] or "no ending" for file in files})
    raise ConfigError(
        f"data.source={source!r} matches {len(files)} files, none of which can be read "
        f"({', '.join(others[:8])}). Supported endings: {supported}."
    )


def _split_ending(path: str) -> tuple[str, str]:
    """Return ending and compression: (".txt", ".gz") for a.txt.gz, (".md", "") for b.md."""
    stem, compression = os.path.splitext(path)
    if compression.lower() not in DECOMPRESSORS:
        stem, compression = path, ""
    return os.path.splitext(stem)[1].lower(), compression.lower()


# --- decompressors: file -> chunks of bytes ---


def _read_decompressed(path: str, compression: str, begin: int = 0) -> Chunks:
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            yield from DECOMPRESSORS[compression](file)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"data.source: {path} cannot be read: {error or type(error).__name__}. "
            "If it was copied or downloaded, get it again; or leave it out of data.source."
        ) from error


def _read_chunks(file: BinaryIO) -> Chunks:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _read_gzip(file: BinaryIO) -> Chunks:
    with gzip.open(file, "rb") as decompressed:
        yield from _read_chunks(decompressed)  # type: ignore[arg-type]


def _read_zstd(file: BinaryIO) -> Chunks:
    zstandard = require("zstandard", f"data.source: {file.name}")

    # Frame by frame, because zstandard's own stream reader does not detect a truncated file.
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    is_at_border = True
    try:
        for chunk in _read_chunks(file):
            while chunk:
                yield frame.decompress(chunk)
                is_at_border, chunk = False, frame.unused_data
                if frame.eof:
                    frame, is_at_border = decompressor.decompressobj(), True
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not is_at_border:
        raise EOFError("the file ends in the middle of a frame")


DECOMPRESSORS = {"": _read_chunks, ".gz": _read_gzip, ".zst": _read_zstd}


# --- readers: chunks of bytes -> documents ---


class _BoundedBuffer:
    """Collects the chunks of one text after another; beyond MAX_TEXT_BYTES only counts them."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0

    def add(self, chunk: bytes):
        self.size += len(chunk)
        if self.size > MAX_TEXT_BYTES:
            self.chunks.clear()
        else:
            self.chunks.append(chunk)

    def take(self, name: str) -> bytes:
        """Return the text and empty the buffer."""
        if self.size > MAX_TEXT_BYTES:
            raise ConfigError(
                f"data.source: {name} is one text of {self.size} bytes, and the longest that can "
                f"be read has {MAX_TEXT_BYTES}: divide it, or leave it out of data.source."
            )
        text = b"".join(self.chunks)
        self.chunks, self.size = [], 0
        return text


def _join_text(path: str, chunks: Chunks) -> bytes:
    buffer = _BoundedBuffer()
    for number, chunk in enumerate(chunks):
        if not number and b"\0" in chunk[:NUL_CHECK_BYTES]:
            raise ConfigError(
                f"data.source: {path} is not text: it has a NUL byte at {chunk.index(0)}. If it is "
                "UTF-16, save it as UTF-8; else move it, or leave it out with a glob that does not "
                "match it."
            )
        buffer.add(chunk)
    return buffer.take(path)


def read_text_file(path: str) -> bytes:
    """Return the content of an uncompressed text file.

    Raises:
        ConfigError: it cannot be read, or is not text.
    """
    return _join_text(path, _read_decompressed(path, ""))


def _read_whole(path: str, chunks: Chunks, cfg: DataConfig) -> RawDocuments:
    yield path, _join_text(path, chunks), "", b""


def _read_jsonl(
    path: str, chunks: Chunks, cfg: DataConfig, begin: int = 0, end: float = math.inf
) -> RawDocuments:
    """Yield the records whose lines begin in this range of bytes.

    The chunks start one byte before, so that a line at the beginning of the range is recognized as
    whole.
    """
    for offset, name, line in _split_lines(path, chunks, max(begin - 1, 0)):
        if offset >= end:
            return
        if offset >= begin and line.strip():
            record = _parse_record(line, cfg.text_key, name)
            text = _get_text(record, cfg.text_key, "data.text_key", name)
            key = cfg.target_key
            yield name, text, "", _get_text(record, key, "data.target_key", name) if key else b""


def _split_lines(path: str, chunks: Chunks, begin: int = 0) -> Iterator[tuple[int, str, bytes]]:
    """Yield lines, each with its byte offset and its name.

    The name is path:number, or the byte offset if reading began inside the file.
    """
    line, number, offset = _BoundedBuffer(), 1, begin
    for chunk in itertools.chain(chunks, [b"\n"]):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line.add(end)
            next_offset = offset + line.size + 1
            name = f"{path} at byte {offset}" if begin else f"{path}:{number}"
            yield offset, name, line.take(name)
            number, offset = number + 1, next_offset
        line.add(rest)


def _parse_record(line: bytes, key: str, name: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name} is not JSON: {error}. Each line of a .jsonl file must be one record, such as "
            f'{{"{key}": "a document"}}.'
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{name} is a JSON {type(record).__name__}, not a record such as "
            f'{{"{key}": "a document"}}.'
        )
    return record


def _get_text(record: dict, key: str, setting: str, name: str) -> bytes:
    if key not in record:
        raise ConfigError(
            f"{name} has no key {key!r}; it has {', '.join(record) or 'none'}. "
            f"Set {setting} to the one with the text."
        )
    if not isinstance(record[key], str):
        raise ConfigError(
            f"{name}: {key!r} is {record[key]!r:.60}, not a string. "
            f"Set {setting} to the key with the text."
        )
    return record[key].encode("utf-8", "surrogatepass")


READERS: dict[str, Reader] = {
    ".txt": _read_whole,
    ".md": _read_whole,
    ".py": _read_whole,
    ".jsonl": _read_jsonl,
}
