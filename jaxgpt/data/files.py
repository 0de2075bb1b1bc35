"""Documents in files: text, .jsonl records or tables, optionally compressed by gzip or zstandard.

Text is bytes in UTF-8. Files are read in chunks, so only one document at a time is in memory. A
unit is a group of files, one large file, or some megabytes of a large .jsonl.
"""

import csv
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
from jaxgpt.data.encodings import Chunks, decode_chunks
from jaxgpt.data.paths import find_files
from jaxgpt.data.units import (
    WHOLE_RECORD,
    RawDocuments,
    SourceUnit,
    count_units,
    dump_record,
    make_file_unit,
    read_stamp,
)
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError
from jaxgpt.suggestions import check_local
from jaxgpt.text import encode_utf8

CHUNK_BYTES = 1 << 20  # read at a time
READER_VERSION = 2  # what is read from the same bytes; with another number they are read again

Reader = Callable[[str, Chunks, DataConfig], RawDocuments]


def list_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of a file, a folder (searched recursively) or a glob (`**`: any depth).

    Hidden files and files with other endings are skipped, and tables if a folder has other texts.
    The name of a document is its path, or path:line for .jsonl and tables, or its byte offset if
    the line number is not known; path:number if `separator` divides a file.

    Args:
        cfg: `source` names the files, `text_key` the field of a .jsonl record (the column of a .csv
            or .tsv) with the text, and `target_key` the one with the answer if texts come in
            pairs. `separator`, `encoding` and `max_document` are about their bytes.

    Returns:
        The units in the order of the paths.

    Raises:
        ConfigError: nothing matches, or nothing that matches can be read. Reading raises it too, if
            a file is corrupt.
    """
    check_local(cfg.source, "data.source")
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
    files = [path for path in find_files(source) if _split_ending(path)[0] not in ("", ".md")]
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
    facts = [reader, READER_VERSION, cfg.text_key, cfg.target_key, cfg.encoding, cfg.separator]
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
        chunks = decode_chunks(path, _read_decompressed(path, compression), cfg.encoding)
        if ending == ".txt":
            label = encode_utf8(os.path.basename(os.path.dirname(path)))
            yield path, _join_text(path, chunks, cfg), "", label
        else:
            for _, name, line in _split_lines(path, chunks, cfg):
                yield name, line.strip(), "", encode_utf8(ending[1:])


def _read_range(cfg: DataConfig, path: str, begin: int, end: int) -> RawDocuments:
    """Yield the records of a .jsonl whose lines begin in this range of bytes."""
    return _read_jsonl(path, _read_decompressed(path, "", max(begin - 1, 0)), cfg, begin, end)


def _find_readable_files(source: str) -> list[str]:
    files = find_files(source)
    readable = [file for file in files if _split_ending(file)[0] in READERS]
    if readable:
        texts = [file for file in readable if _split_ending(file)[0] not in TABLES]
        is_folder = os.path.isdir(os.path.expanduser(source))
        return texts if texts and is_folder else readable
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
    """Collects the chunks of one text after another, each of at most `data.max_document` MB."""

    def __init__(self, cfg: DataConfig) -> None:
        self.chunks: list[bytes] = []
        self.size, self.limit = 0, cfg.max_document

    def add(self, chunk: bytes, name: str):
        """Add a chunk of the text called `name`.

        Raises:
            ConfigError: the text is too long; what was collected is dropped.
        """
        self.size += len(chunk)
        if self.size > self.limit * 1e6:
            self.chunks.clear()
            raise ConfigError(
                f"data.source: {name} is one text of more than data.max_document={self.limit:g} "
                "MB: divide it (by data.separator, if one stands between its documents), leave it "
                "out of data.source, or set a larger data.max_document if the memory has room for "
                "some times as much."
            )
        self.chunks.append(chunk)

    def take(self) -> bytes:
        """Return the text and empty the buffer."""
        text = b"".join(self.chunks)
        self.chunks, self.size = [], 0
        return text


def _join_text(path: str, chunks: Chunks, cfg: DataConfig) -> bytes:
    buffer = _BoundedBuffer(cfg)
    for chunk in chunks:
        buffer.add(chunk, path)
    return buffer.take()


def read_text_file(path: str, cfg: DataConfig) -> bytes:
    """Return the content of an uncompressed text file.

    Raises:
        ConfigError: it cannot be read, or is not text.
    """
    return _join_text(path, decode_chunks(path, _read_decompressed(path, ""), cfg.encoding), cfg)


def _read_text(path: str, chunks: Chunks, cfg: DataConfig) -> RawDocuments:
    """Yield a file as one document, or those between separators."""
    chunks = decode_chunks(path, chunks, cfg.encoding)
    if not cfg.separator:
        yield path, _join_text(path, chunks, cfg), "", b""
        return
    separator = encode_utf8(cfg.separator.replace("\\n", "\n").replace("\\t", "\t"))
    for number, text in enumerate(_split_chunks(path, chunks, separator, cfg), start=1):
        yield f"{path}:{number}", text.strip(b"\r\n"), "", b""


def _split_chunks(path: str, chunks: Chunks, separator: bytes, cfg: DataConfig) -> Iterator[bytes]:
    """Yield the texts between separators, also where one is cut by the end of a chunk."""
    text, rest = _BoundedBuffer(cfg), b""
    for chunk in chunks:
        *ends, rest = (rest + chunk).split(separator)
        for end in ends:
            text.add(end, path)
            yield text.take()
        kept = max(len(rest) - len(separator) + 1, 0)  # what follows may begin a separator
        text.add(rest[:kept], path)
        rest = rest[kept:]
    text.add(rest, path)
    yield text.take()


def _read_jsonl(
    path: str, chunks: Chunks, cfg: DataConfig, begin: int = 0, end: float = math.inf
) -> RawDocuments:
    """Yield the records whose lines begin in this range of bytes.

    The chunks start one byte before, so that a line at the beginning of the range is recognized as
    whole.
    """
    for offset, name, line in _split_lines(path, chunks, cfg, max(begin - 1, 0)):
        if offset >= end:
            return
        if offset >= begin and line.strip():
            record = _parse_record(line, cfg.text_key, name)
            text = _get_text(record, cfg.text_key, "data.text_key", name)
            key = cfg.target_key
            yield name, text, "", _get_text(record, key, "data.target_key", name) if key else b""


def _read_table(delimiter: str, path: str, chunks: Chunks, cfg: DataConfig) -> RawDocuments:
    """Yield the rows of a table; its first row has the names of the columns."""
    csv.field_size_limit(int(min(cfg.max_document * 1e6, 2**31 - 1)))
    chunks = decode_chunks(path, chunks, cfg.encoding)
    lines = (
        line.decode("utf-8", "surrogateescape") + "\n"
        for *_, line in _split_lines(path, chunks, cfg)
    )
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names = None
    try:
        for row in filter(None, rows):
            where = f"{path}:{rows.line_num}"
            if names is None:
                names = row
            elif len(row) != len(names):
                raise ConfigError(
                    f"{where} has {len(row)} fields, and the first row names {len(names)} columns: "
                    f"{', '.join(names)}. Quote fields that have the delimiter {delimiter!r}."
                )
            else:
                record, key = dict(zip(names, row, strict=True)), cfg.target_key
                text = _get_text(record, cfg.text_key, "data.text_key", where)
                target = _get_text(record, key, "data.target_key", where) if key else b""
                yield where, text, "", target
    except csv.Error as error:
        raise ConfigError(f"{path}:{rows.line_num} is not a row of a table: {error}.") from error


def _split_lines(
    path: str, chunks: Chunks, cfg: DataConfig, begin: int = 0
) -> Iterator[tuple[int, str, bytes]]:
    """Yield lines, each with its byte offset and its name.

    The name is path:number, or the byte offset if reading began inside the file.
    """
    line, number, offset = _BoundedBuffer(cfg), 1, begin
    for chunk in itertools.chain(chunks, [b"\n"]):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            name = f"{path} at byte {offset}" if begin else f"{path}:{number}"
            line.add(end, name)
            next_offset = offset + line.size + 1
            yield offset, name, line.take()
            number, offset = number + 1, next_offset
        line.add(rest, f"{path} at byte {offset}" if begin else f"{path}:{number}")


def _parse_record(line: bytes, key: str, name: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        wide = " It has NULs, as in UTF-16: save it as UTF-8." if b"\0" in line else ""
        raise ConfigError(
            f"{name} is not JSON: {error}.{wide} Each line of a .jsonl file must be one record, "
            f'such as {{"{key}": "a document"}}.'
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{name} is a JSON {type(record).__name__}, not a record such as "
            f'{{"{key}": "a document"}}.'
        )
    return record


def _get_text(record: dict, key: str, setting: str, name: str) -> bytes:
    if key == WHOLE_RECORD:
        return dump_record(record, name)
    if key not in record:
        raise ConfigError(
            f"{name} has no key {key!r}; it has {', '.join(record) or 'none'}. "
            f"Set {setting} to the one with the text."
        )
    value = record[key]
    if setting == "data.target_key" and isinstance(value, int):
        value = str(value)  # the number of a class
    if not isinstance(value, str):
        raise ConfigError(
            f"{name}: {key!r} is {value!r:.60}, not a string. "
            f"Set {setting} to the key with the text."
        )
    return encode_utf8(value)


TABLES = {".csv": ",", ".tsv": "\t"}
READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".py": _read_text,
    ".jsonl": _read_jsonl,
    **{ending: partial(_read_table, delimiter) for ending, delimiter in TABLES.items()},
}
