"""Source units: pieces of a source that any process can read on their own, in any order.

One after another they make up the source in its order. A unit lists facts about what it would read
(files by path, size and time, a data set by its fingerprint) without reading it, so that cached
results for an unchanged unit stay valid.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.settings import ConfigError
from jaxgpt.text import encode_utf8

# Approximate bytes of text in a unit: seconds of work each, and thousands of units per terabyte.
TARGET_UNIT_BYTES = 1 << 26

# As `data.text_key`: the text is the whole record, as JSON.
WHOLE_RECORD = "*"

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
    final measurement. If it has neither, `data.split` decides, as for any other source. A source
    that ends in @name is this split only, without parts.

    Raises:
        ConfigError: there is no split of this name.
    """
    source, wanted = split_source(source)
    if wanted:
        if wanted not in splits:
            raise ConfigError(
                f"data.source={source}@{wanted} is not there: {source} has the splits "
                f"{', '.join(sorted(splits))}."
            )
        splits, facts = {wanted: splits[wanted]}, [*facts, "@"]
        return _make_range_units(source, wanted, splits[wanted], facts, "")
    held_out = next((name for name in ("validation", "test") if name in splits), "")
    units = []
    for name, split in sorted(splits.items()):
        if name == "test" and held_out == "validation":
            continue
        part = "held" if name == held_out else "train" if held_out else ""
        units += _make_range_units(source, name, split, facts, part)
    return units


def _make_range_units(
    source: str, name: str, split: Split, facts: list, part: str
) -> list[SourceUnit]:
    """Return the units of a split: ranges of its examples."""
    units = []
    count = max(min(count_units(split.num_bytes), split.num_examples), 1)
    borders = [split.num_examples * n // count for n in range(count + 1)]
    for begin, end in itertools.pairwise(borders):
        unit_name = f"{source}/{name}[{begin}:{end}]"
        read = split.make_reader(begin, end, part)
        size = split.num_bytes // count
        units.append(SourceUnit(unit_name, [*facts, name, begin, end], size, read))
    return units


def split_source(source: str) -> tuple[str, str]:
    """Divide "hf:name@split" into the data set and the split, "" if none is named."""
    name, _, split = source.partition("@")
    return name, split


def assign_part(unit: SourceUnit, part: str) -> SourceUnit:
    """Return a unit whose documents are all "train" or all "held", whatever `data.split` is.

    Those that the source itself has for the other part are left out. With the part "" the unit is
    unchanged.
    """
    if not part:
        return unit
    return unit._replace(facts=[*unit.facts, part], read=partial(_read_as, unit.read, part))


def _read_as(read: Callable[[], RawDocuments], part: str) -> RawDocuments:
    for name, content, own, target in read():
        if own in ("", part):
            yield name, content, part, target


def extract_texts(cfg: DataConfig, example: Mapping[str, Any], name: str) -> tuple[bytes, bytes]:
    """Return the text of an example and its answer, b"" if there is none.

    Raises:
        ConfigError: the example, called `name`, has no such feature, or it is not text.
    """
    if cfg.text_key == WHOLE_RECORD:
        return dump_record(example, name), b""
    keys = (("data.text_key", cfg.text_key), ("data.target_key", cfg.target_key))
    content, target = (_extract_text(example, key, name, setting) for setting, key in keys)
    return content, target


def dump_record(record: Mapping[str, Any], name: str) -> bytes:
    """Return a record as JSON, the same for equal records.

    Raises:
        ConfigError: the record, called `name`, has a value that JSON has not.
    """
    try:
        plain = json.dumps(record, ensure_ascii=False, sort_keys=True, default=_to_plain)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no record of plain values: {error}.") from error
    return encode_utf8(plain)


def _to_plain(value: Any) -> Any:
    """Return what JSON has for a value of a data set: an array, a number, or text in bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value.tolist()


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
    return encode_utf8(value) if isinstance(value, str) else value


Stamp = tuple[str, int, int, int]


def read_stamp(path: str) -> Stamp:
    """Return what identifies the state of a file: its path, size and times.

    The second time is that of the last change of any kind, which no program can set back.

    Raises:
        ConfigError: it has vanished or is not accessible.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"data.source: {path} cannot be read: {error}.") from error
    return os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def make_file_unit(name: str, stamps: list[Stamp], facts: list, read) -> SourceUnit:
    """Return the unit that reads these files whole."""
    size = sum(stamp[1] for stamp in stamps)
    mtime = max(stamp[2] for stamp in stamps) / 1e9
    return SourceUnit(name, [*facts, stamps], size, read, mtime)
