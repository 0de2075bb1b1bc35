"""Source units: pieces of a source that any process can read on their own, in any order.

One after another they make up the source in its order. A unit lists facts about what it would read
(files by path, size and time, a data set by its fingerprint) without reading it, so that cached
results for an unchanged unit stay valid.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.settings import ConfigError

# Approximate bytes of text in a unit: seconds of work each, and thousands of units per terabyte.
TARGET_UNIT_BYTES = 1 << 26

RawDocuments = Iterator[tuple[str, bytes, str, bytes]]  # name, content, part, target: see Document


class SourceUnit(NamedTuple):
    """A piece of a source.

    Args:
        name: a readable name, for messages.
        facts: plain values that change when what would be read changes.
        size: approximate bytes to read.
        read: yields the documents; it can be pickled.
        mtime: when its files were last modified, in seconds; 0 if the facts do not depend on it.
    """

    name: str
    facts: list
    size: int
    read: Callable[[], RawDocuments]
    mtime: float = 0.0


class Split(NamedTuple):
    """A split of a data set: its number of examples, their bytes, and a reader of ranges."""

    num_examples: int
    num_bytes: int
    make_reader: Callable[[int, int, str], Callable[[], RawDocuments]]  # (begin, end, part) -> read


def count_units(size: int) -> int:
    """Return how many units to divide this many bytes into."""
    return max(-(-size // TARGET_UNIT_BYTES), 1)


def make_split_units(source: str, splits: Mapping[str, Split], facts: list) -> list[SourceUnit]:
    """Return the units of a data set with named splits.

    If it has its own validation split (or else a test split), that split is held out and every
    other one is trained on; except that the test split of a data set with both stays unread, for a
    final measurement. If it has neither, `data.split` decides, as for any other source.
    """
    held_out = next((name for name in ("validation", "test") if name in splits), "")
    units = []
    for name, split in sorted(splits.items()):
        if name == "test" and held_out == "validation":
            continue
        part = "held" if name == held_out else "train" if held_out else ""
        count = max(min(count_units(split.num_bytes), split.num_examples), 1)
        borders = [split.num_examples * n // count for n in range(count + 1)]
        for begin, end in itertools.pairwise(borders):
            unit_name = f"{source}/{name}[{begin}:{end}]"
            read = split.make_reader(begin, end, part)
            size = split.num_bytes // count
            units.append(SourceUnit(unit_name, [*facts, name, begin, end], size, read))
    return units


def extract_texts(cfg: DataConfig, example: Mapping[str, Any], name: str) -> tuple[bytes, bytes]:
    """Return the text of an example and its answer, b"" if there is none.

    Raises:
        ConfigError: the example, called `name`, has no such feature, or it is not text.
    """
    keys = (("data.text_key", cfg.text_key), ("data.target_key", cfg.target_key))
    content, target = (_extract_text(example, key, name, setting) for setting, key in keys)
    return content, target


def _extract_text(example: Mapping[str, Any], key: str, name: str, setting: str) -> bytes:
    if setting == "data.target_key" and not key:
        return b""
    if key not in example:
        raise ConfigError(
            f"{setting}={key!r} is not a feature of {name}: it has {', '.join(sorted(example))}."
        )
    value = "" if example[key] is None else example[key]
    if setting == "data.target_key" and isinstance(value, (int, np.integer)):
        value = str(value)  # the number of a class
    if not isinstance(value, (bytes, str)):
        raise ConfigError(
            f"{setting}={key!r} is a {type(value).__name__} in {name}, not text. "
            f"It has {', '.join(sorted(example))}."
        )
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value


def read_stamp(path: str) -> tuple[str, int, int]:
    """Return what identifies the state of a file: its path, size and modification time.

    Raises:
        ConfigError: it has vanished or is not accessible.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"data.source: {path} cannot be read: {error}.") from error
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def make_file_unit(name: str, stamps: list[tuple[str, int, int]], facts: list, read) -> SourceUnit:
    """Return the unit that reads these files whole."""
    size = sum(stamp[1] for stamp in stamps)
    mtime = max(stamp[2] for stamp in stamps) / 1e9
    return SourceUnit(name, [*facts, stamps], size, read, mtime)
