"""Where documents come from, and which of them are held out.

A source is read several times (to survey it, to train the tokenizer, to write the tokens) rather
than kept in memory, so its order is always the same.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from jaxgpt.config import DataConfig
from jaxgpt.data import files, tfds
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


def documents(cfg: DataConfig) -> Iterator[Document]:
    """The documents of `cfg.source`, always in the same order; empty ones are left out.

    Raises:
        ConfigError: the source does not exist or can not be read.
    """
    kind, colon, _ = cfg.source.partition(":")
    read = SOURCES.get(kind + colon, files.read)
    return (document for item in read(cfg) if (document := Document(*item)).content)


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


def stdlib(cfg: DataConfig) -> Iterator[tuple[str, bytes]]:
    """Python's documentation by topic, then the source of its library without tests."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topics/{name}", topics[name].encode()
    root = sysconfig.get_paths()["stdlib"]
    for name in sorted(_modules(root)):
        with open(os.path.join(root, name), "rb") as file:
            yield name, file.read()


def _modules(root: str) -> Iterator[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = [n for n in inner if n not in _SKIPPED and not n.startswith("config-")]
        for name in names:
            # The topics are there as documents; _sysconfigdata is about one machine's compiler.
            if name.endswith(".py") and not name.startswith(("topics.", "_sysconfigdata")):
                yield os.path.relpath(os.path.join(folder, name), root)


Source = Callable[[DataConfig], Iterable[tuple]]
SOURCES: dict[str, Source] = {  # and everything else is files
    "stdlib": stdlib,
    "tfds:": tfds.read,
    "classes:": files.read_classes,
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


@dataclass(frozen=True)
class Survey:
    """What one look at all documents tells.

    Args:
        documents: how many there are.
        digest: of their contents in order, in hex. Names are not in it: data may move.
        sizes: for each rule of RULES, the bytes that it would train on and hold out.
        is_own: the source itself says for every document what is held out.
    """

    documents: int
    digest: str
    sizes: dict[str, tuple[int, int]]
    is_own: bool


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


def survey(cfg: DataConfig) -> Survey:
    """Reads everything once, and keeps sizes and a digest."""
    total = hashlib.blake2b(digest_size=16)
    count = own = 0
    sizes = {rule: [0, 0] for rule in RULES}
    for document in documents(cfg):
        count += 1
        own += bool(document.part)
        for text in filter(None, (document.content, document.target)):
            total.update(hashlib.blake2b(text, digest_size=16).digest())
        total.update(document.part.encode() + b".")
        for rule, size in sizes.items():
            for side, text in enumerate(divide(document, rule, cfg.holdout)):
                size[side] += len(text)
    pairs = {rule: (train, held) for rule, (train, held) in sizes.items()}
    return Survey(count, total.hexdigest(), pairs, own == count)


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
