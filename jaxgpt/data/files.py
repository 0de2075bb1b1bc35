"""Documents in files: text as it is, or records of .jsonl, each maybe packed by gzip or zstandard.

Text is bytes; nothing is decoded but JSON. Files are read in pieces, so only one document at a time
is in memory.
"""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator

from jaxgpt.config import DataConfig
from jaxgpt.settings import ConfigError

PIECE = 1 << 20  # bytes read at a time


def read(cfg: DataConfig) -> Iterator[tuple[str, bytes, str, bytes]]:
    """Reads a file, all files below a folder, or all that a glob matches (`**` for any depth).

    Hidden files and files with other endings are passed over.

    Args:
        cfg: `source` names the files, `text_key` the field of a .jsonl record, and `target_key` the
            one that holds the answer, if texts come in pairs.

    Returns:
        (name, content, "", target) in the order of the paths. The name is the path, or path:line
        for .jsonl; the target is empty where there is none.

    Raises:
        ConfigError: nothing matches, nothing that matches can be read, or a file is corrupt.
    """
    for path in _matches(cfg.source):
        ending, packing = _form(path)
        yield from READERS[ending](path, _unpacked(path, packing), cfg)


def read_classes(cfg: DataConfig) -> Iterator[tuple[str, bytes, str, bytes]]:
    """Reads texts that files or folders put into classes: `classes:` and a file, folder or glob.

    A .txt file is one text, of the class that its folder is called after. Any other file has one
    text a line, and its ending is their class: reviews.pos, reviews.neg. Files without an ending,
    hidden ones and those of documentation (.md) are passed over.

    Returns:
        (name, content, "", class) in the order of the paths.

    Raises:
        ConfigError: nothing matches, or a file is corrupt.
    """
    source = cfg.source.removeprefix("classes:")
    files = [path for path in _found(source) if _form(path)[0] not in ("", ".md")]
    if not files:
        raise ConfigError(
            f"data.source={cfg.source!r} matches no file with an ending: it takes files of one "
            "text a line whose ending is the class, such as reviews.pos, or .txt files in folders "
            "that are called after the class."
        )
    for path in files:
        ending, packing = _form(path)
        pieces = _unpacked(path, packing)
        if ending == ".txt":
            yield path, b"".join(pieces), "", os.path.basename(os.path.dirname(path)).encode()
        else:
            for number, line in enumerate(_lines(pieces), start=1):
                yield f"{path}:{number}", line.strip(), "", ending[1:].encode()


def _found(source: str) -> list[str]:
    path = os.path.expanduser(source)
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    return sorted(file for file in found if os.path.isfile(file))


def _matches(source: str) -> list[str]:
    files = _found(source)
    readable = [file for file in files if _form(file)[0] in READERS]
    if readable:
        return readable
    works = f"{' '.join(READERS)} (each also with {' or '.join(filter(None, PACKINGS))})"
    if not files:
        raise ConfigError(
            f"data.source={source!r} matches no file. It can be stdlib, tfds:name, or a file, "
            f"folder or glob of {works}."
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


# --- packings: path -> pieces of bytes ---


def _unpacked(path: str, packing: str) -> Iterator[bytes]:
    try:
        yield from PACKINGS[packing](path)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"data.source: {path} can not be read: {error or type(error).__name__}. "
            "If it was copied or downloaded, get it again; or leave it out of data.source."
        ) from error


def _plain(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _gzip(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _zstd(path: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f"data.source: {path} is packed by zstandard, and the package that reads it is "
            "missing: pip install zstandard."
        ) from error
    # Frame by frame, because zstandard's own stream reader takes a cut file for its end.
    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    fresh = True
    try:
        for packed in _plain(path):
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


Texts = Iterator[tuple[str, bytes, str, bytes]]


def _whole(path: str, pieces: Iterator[bytes], cfg: DataConfig) -> Texts:
    yield path, b"".join(pieces), "", b""


def _records(path: str, pieces: Iterator[bytes], cfg: DataConfig) -> Texts:
    for number, line in enumerate(_lines(pieces), start=1):
        if line.strip():
            where = f"{path}:{number}"
            record = _record(line, cfg.text_key, where)
            text = _text(record, cfg.text_key, "data.text_key", where)
            key = cfg.target_key
            yield where, text, "", _text(record, key, "data.target_key", where) if key else b""


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of the line whose end has not been read yet
    for piece in pieces:
        first, *others = piece.split(b"\n")
        parts.append(first)
        for line in others:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _record(line: bytes, key: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
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


READERS = {".txt": _whole, ".md": _whole, ".py": _whole, ".jsonl": _records}
