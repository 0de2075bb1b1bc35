"""Where documents come from, and which of them are held out.

A source is a list of units (units.py) that are read several times (to survey them, to train the
tokenizer, to write the tokens) rather than kept in memory, so its order must always be the same.
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
from jaxgpt.data.paths import exists
from jaxgpt.data.units import RawDocuments, SourceUnit, assign_part, make_file_unit, read_stamp
from jaxgpt.settings import ConfigError, choose


class Document(NamedTuple):
    """One text.

    Args:
        name: where it comes from: a path, path:line, or tfds:name/split/index.
        content: the text, never empty. Usually UTF-8, but any bytes are allowed.
        part: "train" or "held" if the source itself defines what is held out, else "".
        target: the answer, if texts come in pairs: a translation, the name of a class.
    """

    name: str
    content: bytes
    part: str = ""
    target: bytes = b""


def read_unit(unit: SourceUnit) -> Iterator[Document]:
    """Yield the documents of a unit, always in the same order; empty ones are left out."""
    return (document for item in unit.read() if (document := Document(*item)).content)


def list_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of a single source.

    Raises:
        ConfigError: the source does not exist or cannot be read.
    """
    kind, colon, _ = cfg.source.partition(":")
    return SOURCES.get(kind + colon, files.list_units)(cfg)


def list_groups(cfg: DataConfig) -> list[list[SourceUnit]]:
    """Return the units of each single source; then, with `data.validation`, those of it.

    With `data.validation`, it is what is held out, and the source is trained on whole.

    Raises:
        ConfigError: a source does not exist or cannot be read.
    """
    part = "train" if cfg.validation else ""
    groups = [
        [assign_part(unit, part) for unit in list_units(single)] for _, single in parse_sources(cfg)
    ]
    return [*groups, list_held_out_units(cfg, "validation")] if cfg.validation else groups


def list_held_out_units(cfg: DataConfig, setting: str) -> list[SourceUnit]:
    """Return the units of `data.validation`, `data.test` or `data.source`, held out as a whole.

    Of a data set that has its own split, only what it holds out; see also `name@split`.

    Raises:
        ConfigError: a source does not exist, cannot be read, or has a weight.
    """
    source = getattr(cfg, setting)
    try:
        singles = parse_sources(replace(cfg, source=source))
        if singles[0][0] is not None:
            raise ConfigError(f"data.source={source!r} has weights: leave them out.")
        return [assign_part(unit, "held") for _, single in singles for unit in list_units(single)]
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.source", f"data.{setting}")) from error


def read_documents(cfg: DataConfig) -> Iterator[Document]:
    """Yield the documents of `cfg.source`, which may be several sources, in order.

    Raises:
        ConfigError: a source does not exist or cannot be read.
    """
    units = (unit for _, single in parse_sources(cfg) for unit in list_units(single))
    return (document for unit in units for document in read_unit(unit))


_WEIGHTED_SOURCE = re.compile(r"([\d.][\d.e-]*)\s+\*\s+(.+)", re.DOTALL)


def parse_sources(cfg: DataConfig) -> list[tuple[float | None, DataConfig]]:
    """Return the single sources in "0.7 * wiki/ + 0.3 * tfds:lm1b", and their weights.

    What is the path of a file or a folder is one source, also if it has " + " or " * " in it.

    Returns:
        Each weight, None if there are no weights, and the config with only this source.

    Raises:
        ConfigError: a weight is not a positive number, or only some sources have one.
    """
    found: list[tuple[float | None, DataConfig]] = []
    for text in _split_sources(cfg.source):
        weighted = None if exists(text) else _WEIGHTED_SOURCE.fullmatch(text.strip())
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
    unweighted = [single.source for weight, single in found if weight is None]
    if 0 < len(unweighted) < len(found):
        raise ConfigError(
            f"data.source={cfg.source!r}: {unweighted[0]!r} has no weight, but others do: give "
            "one to all, or to none, and they are read one after another."
        )
    return found


def _split_sources(text: str) -> Iterator[str]:
    """Divide a source at " + ", but not inside the longest path that exists."""
    parts = text.split(" + ")
    while parts:
        for count in range(len(parts), 0, -1):
            joined = " + ".join(parts[:count])
            weighted = _WEIGHTED_SOURCE.fullmatch(joined.strip())
            source = weighted.group(2) if weighted else joined.strip()
            path = re.sub(r"^(classes|hf):", "", source)
            if count == 1 or exists(joined) or (path and exists(path)):
                break
        yield joined
        parts = parts[count:]


# --- Python itself ---

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
}  # fmt: skip; encodings is an eighth of the library, mostly tables of characters


def list_stdlib_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return one unit: Python's documentation by topic, then its library's source without tests."""
    from pydoc_data import topics

    root = sysconfig.get_paths()["stdlib"]
    names = sorted(_list_modules(root))
    paths = (topics.__file__, *(os.path.join(root, name) for name in names))
    stamps = [read_stamp(path) for path in paths]
    return [make_file_unit("stdlib", stamps, ["stdlib"], partial(_read_stdlib, cfg, root, names))]


def _read_stdlib(cfg: DataConfig, root: str, names: list[str]) -> RawDocuments:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name].encode(), "", b""
    for name in names:
        yield name, files.read_text_file(os.path.join(root, name), cfg), "", b""


def _list_modules(root: str) -> Iterator[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = [n for n in inner if n not in _SKIPPED_FOLDERS and not n.startswith("config-")]
        for name in names:
            # The topics are documents already; _sysconfigdata describes one machine's compiler.
            if name.endswith(".py") and not name.startswith(("topics.", "_sysconfigdata")):
                yield os.path.relpath(os.path.join(folder, name), root)


SOURCES: dict[str, Callable[[DataConfig], list[SourceUnit]]] = {  # anything else is files
    "stdlib": list_stdlib_units,
    "tfds:": tfds.list_units,
    "hf:": hub.list_units,
    "classes:": files.list_class_units,
}


# --- what is held out ---

Division = tuple[bytes, bytes]  # the parts of a document that are trained on and held out


def hold_out_document(content: bytes, holdout: float) -> Division:
    """Hold out a document or not, depending on a hash of its content.

    So equal documents are on the same side, and adding or moving others changes nothing.
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    is_held_out = int.from_bytes(digest, "big") < holdout * 2**64
    return (b"", content) if is_held_out else (content, b"")


def hold_out_tail(content: bytes, holdout: float) -> Division:
    """Hold out the end of a document: it is cut at int(len * (1 - holdout)), as in nanoGPT.

    If that is inside a UTF-8 character, the cut moves to the character's end.
    """
    cut = int(len(content) * (1 - holdout))
    for _ in range(3):
        if content[cut : cut + 1] and content[cut] & 0xC0 == 0x80:
            cut += 1
    return content[:cut], content[cut:]


RULES: dict[str, Callable[[bytes, float], Division]] = {
    "document": hold_out_document,
    "tail": hold_out_tail,
}
MIN_HOLDOUT_DOCUMENTS = 20  # with fewer, holding out whole documents is too coarse


_PRIME, _BASE = 2**127 - 1, 0x9E3779B97F4A7C15F39CC0605CEDC83  # of a polynomial digest


@dataclass(frozen=True)
class Survey:
    """Statistics of a sequence of documents; the sum of two surveys is that of the concatenation.

    Args:
        documents: their number.
        sizes: for each rule in RULES, the bytes that it would train on and hold out.
        own: how many of them the source itself assigns to training or holds out.
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
        """Return the survey with these fields, read from JSON; further fields are ignored."""
        sizes = {rule: (train, held) for rule, (train, held) in record["sizes"].items()}
        return Survey(record["documents"], sizes, record["own"], record["mark"])

    @property
    def has_own_split(self) -> bool:
        """Whether the source itself defines for every document what is held out."""
        return self.own == self.documents

    @property
    def digest(self) -> str:
        """Identifies the surveyed documents, in hex."""
        return f"{self.documents:x}-{self.mark:032x}"


EMPTY_SURVEY = Survey(0, dict.fromkeys(RULES, (0, 0)))


def divide(document: Document, rule: str, holdout: float) -> Division:
    """Divide a document into a part to train on and a held-out part; either may be empty.

    Args:
        document: if its `part` is set, the rule is not used.
        rule: a name in RULES.
        holdout: the fraction of the text to hold out.
    """
    if document.part:
        return (document.content, b"") if document.part == "train" else (b"", document.content)
    return RULES[rule](document.content, holdout)


def survey_document(document: Document, holdout: float) -> Survey:
    """Return the survey of one document."""
    hashes = map(_hash, (document.content, document.target))
    mark = _hash(b"".join([*hashes, document.part.encode()]))
    sizes = {}
    for rule in RULES:
        train, held = divide(document, rule, holdout)
        sizes[rule] = (len(train), len(held))
    return Survey(1, sizes, int(bool(document.part)), int.from_bytes(mark, "big") % _PRIME)


def _hash(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def survey_unit(unit: SourceUnit, holdout: float) -> Survey:
    """Read a unit and return its survey."""
    return sum((survey_document(document, holdout) for document in read_unit(unit)), EMPTY_SURVEY)


def _choose_auto_rule(found: Survey) -> str:
    has_enough = found.documents >= MIN_HOLDOUT_DOCUMENTS and all(found.sizes["document"])
    return "document" if has_enough else "tail"


SPLITS: dict[str, Callable[[Survey], str]] = {
    "auto": _choose_auto_rule,  # whole documents if there are enough of them, else the end of each
    "document": lambda _: "document",
    "tail": lambda _: "tail",
}


def choose_rule(cfg: DataConfig, found: Survey, is_paired: bool = False) -> str:
    """Return the name in RULES that `data.split` selects for these documents; pairs are never cut.

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
