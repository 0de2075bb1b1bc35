"""Text becomes token ids once: files on disk that later runs map into memory.

A folder of the cache is whole or not there: it is written under another name, then renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import DataConfig
from jaxgpt.data import sources
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # Windows: two processes at once may then do the same work
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of the files; another number makes old folders unknown
BATCH = 1 << 22  # bytes of text encoded at a time
PARTS = ("train", "held")
FILES = ("tokenizer.json", *(f"{part}{end}" for part in PARTS for end in (".bin", ".starts.npy")))


class Tokens(NamedTuple):
    """A stream of tokens: [bos] + document + [eos], one document after the other.

    Args:
        ids: uint16 or uint32 [N], usually mapped from disk.
        starts: int64 [documents + 1], where each document begins in ids, and N at the end.
    """

    ids: np.ndarray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    def cut(self, firsts: np.ndarray, size: int) -> np.ndarray:
        """So many tokens from each of these places [B] on: int32 [B size]; the end is followed by
        the beginning."""
        places = firsts[:, None] + np.arange(size)
        return self.ids.take(places, mode="wrap").astype(np.int32)


@dataclass(frozen=True)
class Corpus:
    """A source, tokenized.

    Args:
        tokenizer: what made the tokens.
        train, held: the tokens to learn from and to evaluate on.
        fingerprint: hex; the same only for the same tokenizer and the same tokens.
        source: the value of data.source.
        rule: what is held out: "document", "tail", or "own" for the source's own split.
        train_bytes, held_bytes: size of the text.
    """

    tokenizer: Tokenizer
    train: Tokens
    held: Tokens
    fingerprint: str
    source: str
    rule: str
    train_bytes: int
    held_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token on the held-out part, not counting bos and eos."""
        return self.held_bytes / (self.held.ids.size - 2 * self.held.documents)


def prepare(
    cfg: DataConfig, vocab: int, tokenizer: Tokenizer | None = None, is_paired: bool = False
) -> Corpus:
    """Reads the source and gives its tokens, from the cache if they are there.

    Args:
        cfg: the source, what is held out of it, the tokenizer and the cache.
        vocab: how many tokens there may be.
        tokenizer: used instead of the one that `cfg.tokenizer` describes, if given.
        is_paired: each text is followed by its answer, as a document of its own.

    Returns:
        The corpus. A trained tokenizer has seen the training part only.

    Raises:
        ConfigError: the source or the tokenizer can not be read or does not fit.
    """
    survey = sources.survey(cfg)
    rule = sources.rule_for(cfg, survey, is_paired)
    given = tokenizer or _ready_tokenizer(cfg)
    if given:
        _check_fits(given, cfg, vocab)
    data = [FORMAT, survey.digest, rule, cfg.holdout, *(["pairs"] if is_paired else [])]
    keys = [_digest([*data, "train", vocab])] if cfg.tokenizer == "train" else []
    if given:  # a run that goes on brings the tokenizer that the same run trained: see both places
        keys.append(_digest([*data, given.fingerprint]))
    folders = [os.path.join(os.path.expanduser(cfg.cache), key) for key in keys]

    opened = next(filter(None, (_open(folder, given) for folder in folders)), None)
    if opened is None:
        try:
            opened = _build(folders[-1], cfg, vocab, rule, given, is_paired)
        except OSError as error:
            raise ConfigError(f"data.cache={cfg.cache!r} can not be written: {error}.") from error
        if sources.survey(cfg) != survey:
            raise ConfigError(
                f"data.source={cfg.source!r} changed while it was tokenized: start again when "
                "nobody writes there."
            )
    used, train, held = opened
    return Corpus(
        tokenizer=given or used,
        train=train,
        held=held,
        fingerprint=_digest([*data, used.fingerprint]),
        source=cfg.source,
        rule="own" if survey.is_own else rule,
        train_bytes=survey.sizes[rule][0],
        held_bytes=survey.sizes[rule][1],
    )


def _digest(facts: list) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _ready_tokenizer(cfg: DataConfig) -> Tokenizer | None:
    """The tokenizer that needs no training; None for "train"."""
    ready = {"train": lambda: None, "bytes": tokenizers.from_bytes}
    return ready.get(cfg.tokenizer, lambda: tokenizers.load(cfg.tokenizer))()


def _check_fits(tokenizer: Tokenizer, cfg: DataConfig, vocab: int):
    if tokenizer.vocab_size > vocab:
        raise ConfigError(
            f"data.tokenizer={cfg.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab={vocab}: set model.vocab={tokenizer.vocab_size} or more."
        )


# --- reading the cache ---


def _open(folder: str, given: Tokenizer | None) -> tuple[Tokenizer, Tokens, Tokens] | None:
    """What is in the folder; None if it is not there, not whole, or of another tokenizer."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in FILES}
        if sizes != manifest["sizes"]:
            return None
        tokenizer = tokenizers.load(os.path.join(folder, "tokenizer.json"))
        if tokenizer.fingerprint != (given or tokenizer).fingerprint:
            return None
        train, held = (_map(folder, part, manifest["dtype"]) for part in PARTS)
        return tokenizer, train, held
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(folder: str, part: str, dtype: str) -> Tokens:
    starts = np.load(os.path.join(folder, f"{part}.starts.npy"))  # [documents + 1]
    ids = np.memmap(os.path.join(folder, f"{part}.bin"), dtype, mode="r")  # [N]
    if starts[-1] != ids.size:
        raise ValueError(f"{part} has {ids.size} tokens where {starts[-1]} are expected")
    return Tokens(ids, starts)


# --- writing the cache ---


def _build(
    folder: str, cfg: DataConfig, vocab: int, rule: str, given: Tokenizer | None, is_paired: bool
) -> tuple[Tokenizer, Tokens, Tokens]:
    """Writes the folder, unless another process does so first."""
    os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
    with _alone(folder + ".lock"):
        if opened := _open(folder, given):
            return opened
        for remains in _remains(folder):
            shutil.rmtree(remains, ignore_errors=True)
        part_way = f"{folder}.{uuid.uuid4().hex[:8]}.tmp"
        os.mkdir(part_way)
        try:
            _write(part_way, cfg, vocab, rule, given, is_paired)
            with contextlib.suppress(OSError):  # without a lock, another process may be first
                os.rename(part_way, folder)
        finally:
            shutil.rmtree(part_way, ignore_errors=True)
        opened = _open(folder, given)
    if opened is None:
        raise OSError(f"{folder} does not read as it was written")
    return opened


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Waits until no other process is here. The system lets go if the process is killed."""
    with open(path, "w", encoding="utf-8") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remains(folder: str) -> list[str]:
    """The folder itself, which is broken, and what killed processes left; see `_alone`."""
    parent, name = os.path.split(folder)
    left = [n for n in os.listdir(parent or ".") if n.startswith(name) and n.endswith(".tmp")]
    return [folder, *(os.path.join(parent, n) for n in left if fcntl)]


def _write(
    folder: str, cfg: DataConfig, vocab: int, rule: str, given: Tokenizer | None, is_paired: bool
):
    def texts() -> Iterator[sources.Parts]:
        for document in sources.documents(cfg):
            train, held = sources.divide(document, rule, cfg.holdout)
            yield train, held
            if is_paired:
                target = _target(document, cfg)
                yield (target, b"") if train else (b"", target)

    tokenizer = given or tokenizers.train((train for train, _ in texts() if train), vocab)
    _check_fits(tokenizer, cfg, vocab)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_writer(folder, part, tokenizer, dtype)) for part in PARTS]
        for parts in texts():
            for writer, text in zip(writers, parts, strict=True):
                if text:
                    writer.add(text)
    sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in FILES}
    with open(os.path.join(folder, "manifest.json"), "w", encoding="utf-8") as file:
        json.dump({"source": cfg.source, "dtype": dtype, "sizes": sizes}, file, indent=2)


def _target(document: sources.Document, cfg: DataConfig) -> bytes:
    if not document.target:
        raise ConfigError(
            f"{document.name} has no answer, and train.objective learns from texts in pairs: use a "
            f".jsonl or tfds source with data.target_key (it is {cfg.target_key!r}), or "
            "data.source=classes:folder."
        )
    return document.target


class _Writer:
    """Encodes documents in batches of some megabytes and appends them to a file."""

    def __init__(self, file, tokenizer: Tokenizer, dtype: str):
        self.file, self.tokenizer, self.dtype = file, tokenizer, dtype
        self.starts = [0]
        self.waiting: list[bytes] = []
        self.size = 0  # bytes that wait

    def add(self, text: bytes):
        self.waiting.append(text)
        self.size += len(text)
        if self.size >= BATCH:
            self.flush()

    def flush(self):
        ends = np.array([[self.tokenizer.bos], [self.tokenizer.eos]], self.dtype)
        for ids in self.tokenizer.encode_batch(self.waiting):
            document = np.concatenate([ends[0], ids.astype(self.dtype), ends[1]])
            self.file.write(document.tobytes())
            self.starts.append(self.starts[-1] + document.size)
        self.waiting, self.size = [], 0


@contextlib.contextmanager
def _writer(folder: str, part: str, tokenizer: Tokenizer, dtype: str) -> Iterator[_Writer]:
    with open(os.path.join(folder, f"{part}.bin"), "wb") as file:
        writer = _Writer(file, tokenizer, dtype)
        yield writer
        writer.flush()
    np.save(os.path.join(folder, f"{part}.starts.npy"), np.array(writer.starts, np.int64))
