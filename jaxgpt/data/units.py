"""Units of work: pieces of a source that can be read on their own, in any process, in any order.

One after the other they are the source in its order. A unit says what it would read (files by
path, size and time, a data set by its fingerprint) without reading it, so that what was learned of
an unchanged unit need not be learned again.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.settings import ConfigError

SIZE = 1 << 26  # bytes of text in a unit, about: seconds of work, and thousands of them a terabyte

Texts = Iterator[tuple[str, bytes, str, bytes]]  # name, content, part, target: see Document


class Unit(NamedTuple):
    """A piece of a source.

    Args:
        name: for people.
        facts: plain values that change when what would be read changes.
        size: bytes to read, about.
        read: gives the documents; it can be pickled.
        changed: when its files were last written, in seconds; 0 where the facts do not rest on it.
    """

    name: str
    facts: list
    size: int
    read: Callable[[], Texts]
    changed: float = 0.0


class Split(NamedTuple):
    """A split of a data set: how many examples, of how many bytes, and what reads a range of it."""

    examples: int
    size: int
    read: Callable[[int, int, str], Callable[[], Texts]]  # (begin, end, part) -> Unit.read


def pieces(size: int) -> int:
    """How many units so many bytes make."""
    return max(-(-size // SIZE), 1)


def from_splits(source: str, splits: Mapping[str, Split], facts: list) -> list[Unit]:
    """The units of a data set of named splits.

    If it has its own validation split (or else a test split), that is what is held out, and every
    other split is trained on; except that the test split of a data set that has both stays unread,
    for a last measurement. If it has neither, `data.split` decides, as for any other source.
    """
    held = next((name for name in ("validation", "test") if name in splits), "")
    units = []
    for name, split in sorted(splits.items()):
        if name == "test" and held == "validation":
            continue
        part = "held" if name == held else "train" if held else ""
        count = max(min(pieces(split.size), split.examples), 1)
        borders = [split.examples * n // count for n in range(count + 1)]
        for begin, end in itertools.pairwise(borders):
            where = f"{source}/{name}[{begin}:{end}]"
            read = split.read(begin, end, part)
            units.append(Unit(where, [*facts, name, begin, end], split.size // count, read))
    return units


def texts(cfg: DataConfig, example: Mapping[str, Any], name: str) -> tuple[bytes, bytes]:
    """The text of an example and its answer; where there is none, b"".

    Raises:
        ConfigError: the example, called `name`, has no such feature, or it is no text.
    """
    keys = (("data.text_key", cfg.text_key), ("data.target_key", cfg.target_key))
    content, target = (_text(example, key, name, setting) for setting, key in keys)
    return content, target


def _text(example: Mapping[str, Any], key: str, name: str, setting: str) -> bytes:
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


def stamp(path: str) -> tuple[str, int, int]:
    """What tells one state of a file from another: its path, size and time.

    Raises:
        ConfigError: it vanished, or may not be seen.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"data.source: {path} can not be read: {error}.") from error
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def stamped(name: str, stamps: list[tuple[str, int, int]], facts: list, read) -> Unit:
    """The unit that reads these files whole."""
    size = sum(stamp[1] for stamp in stamps)
    changed = max(stamp[2] for stamp in stamps) / 1e9
    return Unit(name, [*facts, stamps], size, read, changed)
