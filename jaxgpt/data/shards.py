"""Text becomes token ids once: files on disk that later runs map into memory.

The cache has a folder for each corpus. It holds the tokenizer, for each unit of the source a shard
of the tokens to train on, one of those held out, and a record of both; and, as soon as all are
there, a manifest of all records. Every file is whole or not there, so whoever was killed is
followed by others who make what is missing, alone or many at once (work.py).

    cache/units/<facts>.json            what a unit holds: read again only if its files change
    cache/<corpus>/tokenizer.json
    cache/<corpus>/000000.json          what the shards of a unit were made of, and their checksums
    cache/<corpus>/000000.train.bin     ids, one after the other
    cache/<corpus>/000000.train.npy     where documents begin, and the end
    cache/<corpus>/manifest.json
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import DataConfig
from jaxgpt.data import sources, work
from jaxgpt.data.sources import Document, Survey
from jaxgpt.data.units import Unit
from jaxgpt.data.work import Job, Say
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

FORMAT = 2  # of the files; another number makes old folders unknown
BATCH = 1 << 22  # bytes of text encoded at a time
SAMPLE = 1 << 30  # bytes of text that a tokenizer is trained on at most
FRESH = 2.0  # seconds in which a file may change once more without its time telling
PARTS = ("train", "held")


class Joined:
    """Arrays one after the other, as one: the ids of many files.

    Args:
        parts: arrays of one dtype, none of them empty; of np.memmap, slices would be slow.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self.ends = np.cumsum([part.size for part in parts])  # [parts]
        self.size, self.dtype = int(self.ends[-1]), parts[0].dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: slice) -> np.ndarray:
        begin, end, _ = places.indices(self.size)
        return self.cut(np.array([begin]), max(end - begin, 0), self.dtype)[0]

    def cut(self, firsts: np.ndarray, size: int, dtype: Any = np.int32) -> np.ndarray:
        """So many from each of these places [B] on: [B size]; the end is followed by the
        beginning."""
        firsts = firsts % self.size  # [B]
        which = np.searchsorted(self.ends, firsts, side="right")  # [B]
        places = firsts - np.append(0, self.ends)[which]  # [B], inside its part
        out = np.empty((firsts.size, size), dtype)
        for row, part, place in zip(out, which.tolist(), places.tolist(), strict=True):
            done = 0
            while done < size:  # once, but at the end of a part
                piece = self.parts[part][place : place + size - done]
                row[done : done + piece.size] = piece
                done, part, place = done + piece.size, (part + 1) % len(self.parts), 0
        return out


class Tokens(NamedTuple):
    """A stream of tokens: [bos] + document + [eos], one document after the other.

    Args:
        ids: uint16 or uint32 [N], usually mapped from disk, from one file or from many.
        starts: int64 [documents + 1], where each document begins in ids, and N at the end.
    """

    ids: np.ndarray | Joined
    starts: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    def cut(self, firsts: np.ndarray, size: int) -> np.ndarray:
        """So many tokens from each of these places [B] on: int32 [B size]; the end is followed by
        the beginning."""
        if isinstance(self.ids, Joined):
            return self.ids.cut(firsts, size)
        places = firsts[:, None] + np.arange(size)
        return self.ids.take(places, mode="wrap").astype(np.int32)


@dataclass(frozen=True)
class Corpus:
    """A source, or several, tokenized.

    Args:
        tokenizer: what made the tokens.
        train, held: the tokens to learn from and to evaluate on, of all sources in order.
        fingerprint: hex; the same only for the same tokenizer, the same tokens and the same shares.
        source: the value of data.source.
        rule: what is held out: "document", "tail", or "own" for the source's own split.
        train_bytes, held_bytes: size of the text.
        mixture: the share of each stream in training (they add up to 1), and the stream: one for
            each source that has a weight, else `train` alone.
        names: of the streams in the mixture.
    """

    tokenizer: Tokenizer
    train: Tokens
    held: Tokens
    fingerprint: str
    source: str
    rule: str
    train_bytes: int
    held_bytes: int
    mixture: tuple[tuple[float, Tokens], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token on the held-out part, not counting bos and eos."""
        return self.held_bytes / (self.held.ids.size - 2 * self.held.documents)


def prepare(
    cfg: DataConfig,
    vocab: int,
    tokenizer: Tokenizer | None = None,
    is_paired: bool = False,
    say: Say = work.aloud,
) -> Corpus:
    """Reads the source and gives its tokens, from the cache if they are there.

    Any number of processes may be at it at once, also on several hosts if they see one cache: they
    share the work. A source that has not changed since is not read again.

    Args:
        cfg: the source, what is held out of it, the tokenizer and the cache.
        vocab: how many tokens there may be.
        tokenizer: used instead of the one that `cfg.tokenizer` describes, if given.
        is_paired: each text is followed by its answer, as a document of its own.
        say: takes lines of progress; there are none if it is quick.

    Returns:
        The corpus. A trained tokenizer has seen the training part only, and at most SAMPLE of it,
        from all over the source.

    Raises:
        ConfigError: the source or the tokenizer can not be read or does not fit, or a file of the
            cache is damaged.
    """
    try:
        return _prepare(cfg, vocab, tokenizer, is_paired, say)
    except OSError as error:  # those of reading are ConfigErrors by now
        raise ConfigError(f"data.cache={cfg.cache!r} can not be used: {error}.") from error


class Plan(NamedTuple):
    """What is done to a document, whichever unit it is in."""

    cfg: DataConfig
    rule: str
    is_paired: bool
    tokenizer: Tokenizer | None

    @property
    def dtype(self) -> str:
        return "uint16" if self.words.vocab_size <= 1 << 16 else "uint32"

    @property
    def words(self) -> Tokenizer:
        assert self.tokenizer is not None
        return self.tokenizer

    def divide(self, document: Document) -> Iterator[sources.Parts]:
        """What goes to training and what is held out: of the text, then of its answer."""
        train, held = sources.divide(document, self.rule, self.cfg.holdout)
        yield train, held
        if self.is_paired:
            target = _target(document, self.cfg)
            yield (target, b"") if train else (b"", target)


def _prepare(
    cfg: DataConfig, vocab: int, tokenizer: Tokenizer | None, is_paired: bool, say: Say
) -> Corpus:
    parts = sources.parts(cfg)
    listed = [sources.units(part) for _, part in parts]
    units = [unit for group in listed for unit in group]
    surveys = _surveys(units, cfg, say)
    total = sum(surveys, sources.NOTHING)
    rule = sources.rule_for(cfg, total, is_paired)
    data = [FORMAT, total.digest, rule, cfg.holdout, *(["pairs"] if is_paired else [])]

    given = tokenizer or _ready_tokenizer(cfg)
    if given:
        _check_fits(given, cfg, vocab)
    plan = Plan(cfg, rule, is_paired, given)
    place = [*data, [found.digest for found in surveys]]  # divided otherwise, it has other files
    keys = [_digest([*place, "train", vocab])] if cfg.tokenizer == "train" else []
    if given:  # a run that goes on brings the tokenizer that the same run trained: see both places
        keys.append(_digest([*place, given.fingerprint]))
    folders = [os.path.join(os.path.expanduser(cfg.cache), key) for key in keys]
    folder = next((f for f in folders if _stored_tokenizer(f, given)), folders[-1])
    learn = partial(_train, plan, vocab, units, surveys, say)
    plan = plan._replace(tokenizer=_tokenizer(folder, given, learn))

    records = _shards(folder, units, surveys, plan, say)
    borders = [0, *itertools.accumulate(map(len, listed))]
    spans = [slice(*border) for border in itertools.pairwise(borders)]
    train, held, mixture = _streams(folder, records, spans, plan)
    digests = [sum(surveys[span], sources.NOTHING).digest for span in spans]
    mixed = [
        [round(share, 9), digest] for (share, _), digest in zip(mixture, digests, strict=False)
    ]
    is_mixed = parts[0][0] is not None
    return Corpus(
        tokenizer=given or plan.words,
        train=train,
        held=held,
        fingerprint=_digest([*data, plan.words.fingerprint, *(mixed if is_mixed else [])]),
        source=cfg.source,
        rule="own" if total.is_own else rule,
        train_bytes=total.sizes[rule][0],
        held_bytes=total.sizes[rule][1],
        mixture=mixture,
        names=tuple(part.source for _, part in parts) if is_mixed else (cfg.source,),
    )


def _shards(
    folder: str, units: Sequence[Unit], surveys: Sequence[Survey], plan: Plan, say: Say
) -> list[dict]:
    """Makes the shards that are missing, and checks all; gives their records."""
    pairs = zip(units, surveys, strict=True)
    jobs = [_job(folder, number, *pair, plan) for number, pair in enumerate(pairs)]
    records = _in_manifest(folder, jobs)
    if records is None:
        records = work.share(jobs, plan.cfg.workers, "tokenizing", say)
        again = [unit.facts for _, part in sources.parts(plan.cfg) for unit in sources.units(part)]
        if again != [unit.facts for unit in units]:
            raise _changed(plan.cfg.source)
        _write_manifest(folder, plan, records)
    _check_files(folder, records, plan.cfg.verify)
    return records


def _streams(
    folder: str, records: list[dict], spans: list[slice], plan: Plan
) -> tuple[Tokens, Tokens, tuple[tuple[float, Tokens], ...]]:
    """The two streams, and the mixture of those of the sources, which lie in these spans."""
    _allow_open(len(PARTS) * len(records))
    shards = {part: [_map(folder, part, record, plan) for record in records] for part in PARTS}
    train, held = (_joined(shards[part]) for part in PARTS)
    parts = sources.parts(plan.cfg)
    if parts[0][0] is None:
        return train, held, ((1.0, train),)
    streams = [_joined(shards["train"][span]) for span in spans]
    for (_, part), stream in zip(parts, streams, strict=True):
        if not stream.ids.size:
            raise ConfigError(
                f"data.source={plan.cfg.source!r} gives a weight to {part.source!r}, of which "
                "nothing is trained on: leave it out, or hold out less of it."
            )
    weights = [weight or 0.0 for weight, _ in parts]
    shares = [weight / sum(weights) for weight in weights]
    return train, held, tuple(zip(shares, streams, strict=True))


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _changed(what: str) -> ConfigError:
    return ConfigError(
        f"data.source={what!r} changed while it was tokenized: start again when nobody writes "
        "there."
    )


# --- the tokenizer ---


def _target(document: Document, cfg: DataConfig) -> bytes:
    if not document.target:
        raise ConfigError(
            f"{document.name} has no answer, and train.objective learns from texts in pairs: use a "
            f".jsonl, tfds or hf source with data.target_key (it is {cfg.target_key!r}), or "
            "data.source=classes:folder."
        )
    return document.target


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


def _stored_tokenizer(folder: str, given: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer in the folder; None if there is none, it is damaged, or it is not `given`."""
    try:
        found = tokenizers.load(os.path.join(folder, "tokenizer.json"))
    except ConfigError:
        return None
    return found if found.fingerprint == (given or found).fingerprint else None


def _tokenizer(folder: str, given: Tokenizer | None, learn: Callable[[], Tokenizer]) -> Tokenizer:
    if found := _stored_tokenizer(folder, given):
        return found
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "tokenizer.json")
    with work.alone(path):
        if found := _stored_tokenizer(folder, given):
            return found
        made = given or learn()
        made.save(path)
        return made


def _train(
    plan: Plan, vocab: int, units: Sequence[Unit], surveys: Sequence[Survey], say: Say
) -> Tokenizer:
    """Trains on all of the training part, or of each unit on the same share of it."""
    sizes = [survey.sizes[plan.rule][0] for survey in surveys]
    total = sum(sizes)
    if total > work.SMALL:
        say(f"training a tokenizer on {min(total, SAMPLE) / 1e6:.0f} of {total / 1e6:.0f} MB")

    def texts() -> Iterator[bytes]:
        for unit, size in zip(units, sizes, strict=True):
            left = sys.maxsize if total <= SAMPLE else size * SAMPLE // total
            parts = (parts for document in sources.read(unit) for parts in plan.divide(document))
            for train in (train for train, _ in parts if train):
                if left <= 0:
                    break
                yield train[:left]
                left -= len(train)

    tokenizer = tokenizers.train(texts(), vocab)
    _check_fits(tokenizer, plan.cfg, vocab)
    return tokenizer


# --- units: what they hold, and their shards ---


def _surveys(units: Sequence[Unit], cfg: DataConfig, say: Say) -> list[Survey]:
    """What each unit holds, from the cache if its facts have not changed."""
    folder = os.path.join(os.path.expanduser(cfg.cache), "units")
    jobs = []
    for unit in units:
        facts = _digest([FORMAT, cfg.holdout, unit.facts])
        is_fresh = time.time() - unit.changed < FRESH
        record = "" if is_fresh else os.path.join(folder, facts + ".json")
        jobs.append(Job(record, facts, unit.size, partial(_survey, unit, cfg.holdout)))
    records = work.share(jobs, cfg.workers, "reading", say)
    return [Survey.from_record(record) for record in records]


def _survey(unit: Unit, holdout: float) -> dict[str, Any]:
    return dataclasses.asdict(sources.survey(unit, holdout))


def _job(folder: str, number: int, unit: Unit, survey: Survey, plan: Plan) -> Job:
    words = plan.words.fingerprint
    facts = _digest([FORMAT, survey.digest, plan.rule, plan.cfg.holdout, plan.is_paired, words])
    stem = os.path.join(folder, f"{number:06}")
    return Job(f"{stem}.json", facts, unit.size, partial(_write, stem, unit, survey.digest, plan))


def _write(stem: str, unit: Unit, digest: str, plan: Plan) -> dict[str, Any]:
    """Writes the shards of a unit that had this digest; gives their record."""
    found = sources.NOTHING
    with contextlib.ExitStack() as stack:
        writers = [_Writer(stack, f"{stem}.{part}", plan) for part in PARTS]
        for document in sources.read(unit):
            found += sources.look(document, plan.cfg.holdout)
            for parts in plan.divide(document):
                for writer, text in zip(writers, parts, strict=True):
                    writer.add(text)
        for writer in writers:
            writer.close()
        if found.digest != digest:
            raise _changed(unit.name)
    files = {name: facts for writer in writers for name, facts in writer.files.items()}
    sizes = {part: writer.sizes for part, writer in zip(PARTS, writers, strict=True)}
    return {"unit": unit.name, **sizes, "files": files}


class _Writer:
    """A shard being written: documents are encoded in batches of some megabytes.

    Args:
        stack: its files get their names when the stack ends well.
        stem: where they are.
        plan: the tokenizer and its dtype.

    Attributes:
        files: size and checksum of each, when all is written.
        sizes: tokens, documents, and bytes of text.
    """

    def __init__(self, stack: contextlib.ExitStack, stem: str, plan: Plan):
        self.stem, self.plan = stem, plan
        self.ids, self.begins = (
            stack.enter_context(work.replacing(stem + ending)) for ending in (".bin", ".npy")
        )
        self.starts = [0]
        self.waiting: list[bytes] = []
        self.waits = self.text = 0  # bytes that wait, and of all text
        self.hash = hashlib.blake2b(digest_size=16)
        self.files: dict[str, dict] = {}

    @property
    def sizes(self) -> dict[str, int]:
        return dict(tokens=self.starts[-1], documents=len(self.starts) - 1, bytes=self.text)

    def add(self, text: bytes):
        if text:
            self.waiting.append(text)
            self.waits += len(text)
        if self.waits >= BATCH:
            self.flush()

    def flush(self):
        words, dtype = self.plan.words, self.plan.dtype
        ends = np.array([[words.bos], [words.eos]], dtype)
        for ids in words.encode_batch(self.waiting):
            document = np.concatenate([ends[0], ids.astype(dtype), ends[1]]).tobytes()
            self.ids.write(document)
            self.hash.update(document)
            self.starts.append(self.starts[-1] + ids.size + 2)
        self.text += self.waits
        self.waiting, self.waits = [], 0

    def close(self):
        self.flush()
        begins = io.BytesIO()
        np.save(begins, np.array(self.starts, np.int64))
        self.begins.write(begins.getbuffer())
        hashes = (self.hash, hashlib.blake2b(begins.getbuffer(), digest_size=16))
        for file, ending, found in zip(
            (self.ids, self.begins), (".bin", ".npy"), hashes, strict=True
        ):
            name = os.path.basename(self.stem) + ending
            self.files[name] = dict(bytes=file.tell(), blake2b=found.hexdigest())


# --- the folder as a whole ---


def _write_manifest(folder: str, plan: Plan, records: list[dict]):
    content = dict(
        format=FORMAT,
        source=plan.cfg.source,
        tokenizer=plan.words.fingerprint,
        dtype=plan.dtype,
        units=records,
    )
    work.write_json(os.path.join(folder, "manifest.json"), content)
    for name in os.listdir(folder):  # what killed processes left
        is_manifest = name.startswith("manifest")  # of another process, which is here as well
        if name.endswith((".tmp", ".lock")) and not is_manifest:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _in_manifest(folder: str, jobs: list[Job]) -> list[dict] | None:
    """The records, if there are those of all jobs, and all files that they name."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            records = json.load(file)["units"]
        if [record["facts"] for record in records] != [job.facts for job in jobs]:
            return None
        there = set(os.listdir(folder))
        return records if all(there.issuperset(record["files"]) for record in records) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_files(folder: str, records: list[dict], is_thorough: bool):
    """Compares sizes, and checksums if it is to be thorough; hashing uses all cores."""

    def check(item: tuple[str, dict]):
        name, expected = item
        path = os.path.join(folder, name)
        found: dict[str, Any] = {"bytes": os.path.getsize(path)}
        if is_thorough and found["bytes"] == expected["bytes"]:
            with open(path, "rb") as file:
                hashed = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found["blake2b"] = hashed.hexdigest()
        if wrong := next((key for key in found if found[key] != expected[key]), ""):
            raise ConfigError(
                f"{path} was damaged after it was written: {wrong} should be {expected[wrong]}, "
                f"and is {found[wrong]}. Delete it, and the same command makes it again."
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(check, (item for record in records for item in record["files"].items())))


def _allow_open(files: int):
    """Lets this process have so many more files open, if the system agrees: a map holds one."""
    with contextlib.suppress(ImportError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = files + 1024 if hard == resource.RLIM_INFINITY else min(files + 1024, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map(folder: str, part: str, record: dict, plan: Plan) -> Tokens:
    begins, ids = sorted(name for name in record["files"] if f".{part}." in name)[::-1]
    size = record[part]["tokens"]
    starts = np.load(os.path.join(folder, begins))  # [documents + 1]
    if not size:  # and nothing can be mapped
        return Tokens(np.zeros(0, plan.dtype), starts)
    return Tokens(np.memmap(os.path.join(folder, ids), plan.dtype, "r", shape=(size,)), starts)


def _joined(streams: Sequence[Tokens]) -> Tokens:
    full = [stream for stream in streams if stream.ids.size]
    if len(full) < 2:
        return full[0] if full else streams[0]
    begins = itertools.accumulate((stream.ids.size for stream in full), initial=0)
    starts = [stream.starts[:-1] + begin for stream, begin in zip(full, begins, strict=False)]
    ids = Joined([np.asarray(stream.ids) for stream in full])
    return Tokens(ids, np.concatenate([*starts, [ids.size]]))
