"""Where documents come from, and which of them are held out.

A source is a list of units (units.py) that are read several times (to survey them, to train the
tokenizer, to write the tokens) rather than kept in memory, so its order is always the same.
"""

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from jaxgpt.config import DataConfig
from jaxgpt.data import files, hub, tfds
from jaxgpt.data.units import Texts, Unit, stamp, stamped
from jaxgpt.settings import ConfigError, choose


class Document(NamedTuple):
    """One text.

    Args:
        name: where it comes from: a path, path:line, or tfds:name/split/index.
        content: the text, never empty. Usually UTF-8, but any bytes will do.
        part: "train" or "held" where the source itself says what is held out, else "".
        target: the answer, if texts come in pairs: a translation, the name of a class.
    """

    name: str
    content: bytes
    part: str = ""
    target: bytes = b""


def read(unit: Unit) -> Iterator[Document]:
    """The documents of a unit, always in the same order; empty ones are left out."""
    return (document for item in unit.read() if (document := Document(*item)).content)


def units(cfg: DataConfig) -> list[Unit]:
    """The pieces of a single source.

    Raises:
        ConfigError: the source does not exist or can not be read.
    """
    kind, colon, _ = cfg.source.partition(":")
    return SOURCES.get(kind + colon, files.units)(cfg)


def documents(cfg: DataConfig) -> Iterator[Document]:
    """The documents of `cfg.source`, which may be several sources, in order.

    Raises:
        ConfigError: a source does not exist or can not be read.
    """
    return (found for _, part in parts(cfg) for unit in units(part) for found in read(unit))


_WEIGHTED = re.compile(r"([\d.][\d.e-]*)\s+\*\s+(.+)", re.DOTALL)


def parts(cfg: DataConfig) -> list[tuple[float | None, DataConfig]]:
    """The single sources of `data.source`, "0.7 * wiki/ + 0.3 * tfds:lm1b", and their weights.

    Returns:
        Each weight, None where there are none, and the config with this source alone.

    Raises:
        ConfigError: a weight is no positive number, or only some sources have one.
    """
    found: list[tuple[float | None, DataConfig]] = []
    for text in cfg.source.split(" + "):
        weighted = _WEIGHTED.fullmatch(text.strip())
        weight, source = weighted.groups() if weighted else (None, text.strip())
        try:
            number = None if weight is None else float(weight)
        except ValueError:
            number = 0.0
        if not source or (number is not None and not 0 < number < math.inf):
            raise ConfigError(
                f"data.source={cfg.source!r}: {text!r} must be a source, or a weight above 0 and a "
                'source, such as "0.7 * wiki/*.jsonl + 0.3 * tfds:lm1b".'
            )
        found.append((number, replace(cfg, source=source)))
    bare = [part.source for weight, part in found if weight is None]
    if 0 < len(bare) < len(found):
        raise ConfigError(
            f"data.source={cfg.source!r}: {bare[0]!r} has no weight, and others have: give one to "
            "all, or to none, and they are read one after the other."
        )
    return found


# --- Python itself ---

_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}  # fmt: skip; encodings is an eighth of the library, and tables of characters


def stdlib(cfg: DataConfig) -> list[Unit]:
    """Python's documentation by topic, then the source of its library without tests."""
    from pydoc_data import topics

    root = sysconfig.get_paths()["stdlib"]
    names = sorted(_modules(root))
    stamps = [stamp(path) for path in (topics.__file__, *(os.path.join(root, n) for n in names))]
    return [stamped("stdlib", stamps, ["stdlib"], partial(_stdlib, root, names))]


def _stdlib(root: str, names: list[str]) -> Texts:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name].encode(), "", b""
    for name in names:
        yield name, files.content(os.path.join(root, name)), "", b""


def _modules(root: str) -> Iterator[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = [n for n in inner if n not in _SKIPPED and not n.startswith("config-")]
        for name in names:
            # The topics are there as documents; _sysconfigdata is about one machine's compiler.
            if name.endswith(".py") and not name.startswith(("topics.", "_sysconfigdata")):
                yield os.path.relpath(os.path.join(folder, name), root)


SOURCES: dict[str, Callable[[DataConfig], list[Unit]]] = {  # and everything else is files
    "stdlib": stdlib,
    "tfds:": tfds.units,
    "hf:": hub.units,
    "classes:": files.class_units,
}


# --- what is held out ---

Parts = tuple[bytes, bytes]  # what a document gives to training, and what it holds out


def by_document(content: bytes, holdout: float) -> Parts:
    """Holds out a document if a hash of its content says so.

    So equal documents are on the same side, and adding or moving others changes nothing.
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    held = int.from_bytes(digest, "big") < holdout * 2**64
    return (b"", content) if held else (content, b"")


def by_tail(content: bytes, holdout: float) -> Parts:
    """Holds out the end of a document: it is cut at int(len * (1 - holdout)), as nanoGPT does.

    If that is inside a UTF-8 character, the cut moves to the character's end.
    """
    cut = int(len(content) * (1 - holdout))
    for _ in range(3):
        if content[cut : cut + 1] and content[cut] & 0xC0 == 0x80:
            cut += 1
    return content[:cut], content[cut:]


RULES: dict[str, Callable[[bytes, float], Parts]] = {"document": by_document, "tail": by_tail}
FEW = 20  # documents, below which a share of them is too coarse to hold out


_PRIME, _BASE = 2**127 - 1, 0x9E3779B97F4A7C15F39CC0605CEDC83  # of the digest, a polynomial


@dataclass(frozen=True)
class Survey:
    """What one look at documents tells. The survey of two runs of documents is the sum of theirs.

    Args:
        documents: how many there are.
        sizes: for each rule of RULES, the bytes that it would train on and hold out.
        own: how many of them the source itself puts into training or holds out.
        mark: a digest of their contents in order, however they are divided into units and files.
            Names are not in it: data may move.
    """

    documents: int
    sizes: dict[str, tuple[int, int]]
    own: int = 0
    mark: int = 0

    def __add__(self, other: "Survey") -> "Survey":
        sizes = {
            rule: (train + other.sizes[rule][0], held + other.sizes[rule][1])
            for rule, (train, held) in self.sizes.items()
        }
        mark = (self.mark * pow(_BASE, other.documents, _PRIME) + other.mark) % _PRIME
        return Survey(self.documents + other.documents, sizes, self.own + other.own, mark)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "Survey":
        """The survey whose fields went through JSON, maybe among others."""
        sizes = {rule: (train, held) for rule, (train, held) in record["sizes"].items()}
        return Survey(record["documents"], sizes, record["own"], record["mark"])

    @property
    def is_own(self) -> bool:
        """The source itself says for every document what is held out."""
        return self.own == self.documents

    @property
    def digest(self) -> str:
        """What it was a survey of, in hex."""
        return f"{self.documents:x}-{self.mark:032x}"


NOTHING = Survey(0, dict.fromkeys(RULES, (0, 0)))


def divide(document: Document, rule: str, holdout: float) -> Parts:
    """What a document gives to training and what it holds out; one of them may be empty.

    Args:
        document: if it has a part of its own, the rule is not asked.
        rule: a name in RULES.
        holdout: the share of the text to hold out.
    """
    if document.part:
        return (document.content, b"") if document.part == "train" else (b"", document.content)
    return RULES[rule](document.content, holdout)


def look(document: Document, holdout: float) -> Survey:
    """The survey of one document."""
    hashes = map(_hash, (document.content, document.target))
    mark = _hash(b"".join([*hashes, document.part.encode()]))
    sizes = {}
    for rule in RULES:
        train, held = divide(document, rule, holdout)
        sizes[rule] = (len(train), len(held))
    return Survey(1, sizes, int(bool(document.part)), int.from_bytes(mark, "big") % _PRIME)


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def survey(unit: Unit, holdout: float) -> Survey:
    """Reads a unit and keeps nothing but its survey."""
    return sum((look(document, holdout) for document in read(unit)), NOTHING)


def _auto(found: Survey) -> str:
    return "document" if found.documents >= FEW and all(found.sizes["document"]) else "tail"


SPLITS: dict[str, Callable[[Survey], str]] = {
    "auto": _auto,  # whole documents if there are enough of them, else the end of each
    "document": lambda _: "document",
    "tail": lambda _: "tail",
}


def rule_for(cfg: DataConfig, found: Survey, is_paired: bool = False) -> str:
    """The name in RULES that `data.split` means for these documents; pairs are never cut.

    Raises:
        ConfigError: nothing would be left to train on or to hold out.
    """
    rule = choose(SPLITS, cfg.split, "data.split")(found)
    if is_paired and cfg.split == "tail":
        raise ConfigError("data.split='tail' would cut texts from their answers: use document.")
    if is_paired:
        rule = "document"
    if not found.documents:
        raise ConfigError(f"data.source={cfg.source!r} holds no text: every document is empty.")
    for size, use in zip(found.sizes[rule], ("train on", "hold out"), strict=True):
        if not size:
            raise ConfigError(
                f"data.split={cfg.split!r} with data.holdout={cfg.holdout} leaves nothing to {use} "
                f"of data.source={cfg.source!r}: {found.documents} documents of "
                f"{sum(found.sizes[rule])} bytes in all. Use data.split=tail, which cuts inside "
                "documents, another data.holdout, or more text."
            )
    return rule
