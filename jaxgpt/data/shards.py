"""Tokenize text once, into files on disk that later runs map into memory.

The cache has a folder for each corpus. It contains the tokenizer; for each unit of the source a
shard of training tokens, one of held-out tokens, and a record of both; and, once all of these
exist, a manifest of all records. Files are written atomically, so after a process is killed, others
make what is missing, one or many at once (work.py).

    cache/units/<facts>.json            survey of a unit, read again only if its files change
    cache/<corpus>/tokenizer.json
    cache/<corpus>/000000.json          inputs and checksums of the shards of a unit
    cache/<corpus>/000000.train.bin     token ids, one document after another
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import DataConfig
from jaxgpt.data import sources, work
from jaxgpt.data.conversations import RecordEncoder
from jaxgpt.data.sources import Document, Survey
from jaxgpt.data.units import WHOLE_RECORD, SourceUnit
from jaxgpt.data.work import Job, LogFn
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

FORMAT_VERSION = 2  # of the files; with another number, old folders are not found
ENCODE_BATCH_BYTES = 1 << 22  # of text encoded at a time
MAX_SAMPLE_BYTES = 1 << 30  # of text that a tokenizer is trained on
MTIME_RESOLUTION_SECONDS = 2.0  # a second change within this time may leave the mtime as it was
SUBSETS = ("train", "held")  # as in the names of files


class ConcatenatedArray:
    """Several arrays read as one: the ids of many files.

    Args:
        arrays: arrays of one dtype, none of them empty; not np.memmap, whose slices are slow.
    """

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([array.size for array in arrays])  # [arrays]
        self.size, self.dtype = int(self.ends[-1]), arrays[0].dtype

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice) -> np.ndarray:
        begin, end, _ = key.indices(self.size)
        return self.gather_windows(np.array([begin]), max(end - begin, 0), self.dtype)[0]

    def gather_windows(self, firsts: np.ndarray, size: int, dtype: Any = np.int32) -> np.ndarray:
        """Return `size` elements from each of these places [B]: [B size], wrapping at the end."""
        firsts = firsts % self.size  # [B]
        indexes = np.searchsorted(self.ends, firsts, side="right")  # [B]
        offsets = firsts - np.append(0, self.ends)[indexes]  # [B], inside its array
        out = np.empty((firsts.size, size), dtype)
        for row, index, offset in zip(out, indexes.tolist(), offsets.tolist(), strict=True):
            filled = 0
            while filled < size:  # one iteration, except at the end of an array
                piece = self.arrays[index][offset : offset + size - filled]
                row[filled : filled + piece.size] = piece
                filled, index, offset = filled + piece.size, (index + 1) % len(self.arrays), 0
        return out


class Tokens(NamedTuple):
    """A stream of tokens: [bos] + document + [eos], one document after another.

    There is no bos if the texts of the tokenizer do not begin with it; but in pairs, the second
    text, a target, always begins with it.

    Args:
        ids: uint16 or uint32 [N], usually mapped from disk, from one file or from many.
        starts: int64 [documents + 1], where each document begins in ids, and N at the end.
    """

    ids: np.ndarray | ConcatenatedArray
    starts: np.ndarray

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return len(self.starts) - 1

    def gather_windows(self, firsts: np.ndarray, size: int) -> np.ndarray:
        """Return `size` tokens from each of these places [B]: int32 [B size], wrapping around."""
        if isinstance(self.ids, ConcatenatedArray):
            return self.ids.gather_windows(firsts, size)
        indexes = firsts[:, None] + np.arange(size)
        return self.ids.take(indexes, mode="wrap").astype(np.int32)


@dataclass(frozen=True)
class Corpus:
    """The tokens of one or several sources.

    Args:
        tokenizer: the tokenizer that made the tokens.
        train, held_out: the tokens to train and to evaluate on, of all sources in order.
        fingerprint: hex; equal only for the same tokenizer, the same tokens and the same shares.
        source: the value of data.source.
        rule: what is held out: "document", "tail", or "own" for the source's own split.
        train_bytes, held_out_bytes: size of the text.
        mixture: the share of each stream in training (they add up to 1), and the stream: one for
            each source that has a weight, else only `train`.
        names: of the streams in the mixture.
        is_paired: every second document is the answer to the one before.
        test: the tokens of data.test, for the final measurement; None if there are none.
        labels: names of the classes, if they are known; else they are found in the answers.
        counts: what an encoder of records has counted, of "train" and of "held".
    """

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens
    fingerprint: str
    source: str
    rule: str
    train_bytes: int
    held_out_bytes: int
    mixture: tuple[tuple[float, Tokens], ...] = ()
    names: tuple[str, ...] = ()
    is_paired: bool = False
    test: Tokens | None = None
    labels: tuple[str, ...] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def train_documents(self) -> int:
        """The number of documents, or of pairs, to train on."""
        return self.train.documents // (2 if self.is_paired else 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token on the held-out part, not counting bos and eos."""
        frames = _count_frame_tokens(self.held_out.documents, self.tokenizer, self.is_paired)
        return self.held_out_bytes / (self.held_out.ids.size - frames)


def prepare(
    cfg: DataConfig,
    vocab: int,
    tokenizer: Tokenizer | None = None,
    is_paired: bool = False,
    log: LogFn = work.print_line,
    encoder: RecordEncoder | None = None,
) -> Corpus:
    """Return the tokens of the source, from the cache if they are there.

    Any number of processes may call this at once, also on several hosts that share one cache: they
    divide the work. A source that has not changed since is not read again.

    Args:
        cfg: the source, what is held out of it, the tokenizer and the cache.
        vocab: the largest vocabulary size allowed.
        tokenizer: used instead of the one that `cfg.tokenizer` describes, if given.
        is_paired: each text is followed by its answer, as a separate document.
        log: receives progress lines; there are none if it is quick.
        encoder: makes the documents of whole records, which are not texts.

    Returns:
        The corpus. A tokenizer is trained on the training part only, on at most MAX_SAMPLE_BYTES,
        sampled evenly over the source.

    Raises:
        ConfigError: the source or the tokenizer cannot be read or does not fit, or a file of the
            cache is damaged.
    """
    cfg = _read_whole_records(cfg, encoder)
    with _name_cache_errors(cfg):
        corpus = _prepare_corpus(cfg, vocab, tokenizer, is_paired, log, encoder)
        if not cfg.test:
            return corpus
        test, _ = _prepare_held_out(cfg, "test", corpus.tokenizer, is_paired, log, encoder)
        return dataclasses.replace(corpus, test=test)


def _read_whole_records(cfg: DataConfig, encoder: RecordEncoder | None) -> DataConfig:
    """Return a config that reads records as JSON if there is an encoder of them."""
    return dataclasses.replace(cfg, text_key=WHOLE_RECORD, target_key="") if encoder else cfg


def prepare_evaluation(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    is_paired: bool = False,
    labels: Sequence[str] = (),
    setting: str = "test",
    log: LogFn = work.print_line,
    encoder: RecordEncoder | None = None,
) -> Corpus:
    """Return a corpus to evaluate a trained model on: all of `data.test`, or of `data.source`.

    Args:
        cfg: the source, the cache.
        tokenizer: that of the model.
        is_paired: as for `prepare`.
        labels: the classes of the model, in order, if it is a classifier.
        setting: "test" or "source": which source to evaluate on.
        log, encoder: as for `prepare`.

    Returns:
        The corpus; all of the source is held out (and also `train`, so that tasks accept it).

    Raises:
        ConfigError: as for `prepare`.
    """
    cfg = _read_whole_records(cfg, encoder)
    with _name_cache_errors(cfg):
        tokens, survey = _prepare_held_out(cfg, setting, tokenizer, is_paired, log, encoder)
    size = survey.sizes["document"][1]
    return Corpus(
        tokenizer=tokenizer,
        train=tokens,
        held_out=tokens,
        fingerprint=_digest([FORMAT_VERSION, survey.digest, tokenizer.fingerprint]),
        source=getattr(cfg, setting),
        rule="own",
        train_bytes=size,
        held_out_bytes=size,
        is_paired=is_paired,
        labels=tuple(labels),
    )


@contextlib.contextmanager
def _name_cache_errors(cfg: DataConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # errors of reading the source are ConfigErrors already
        raise ConfigError(f"data.cache={cfg.cache!r} cannot be used: {error}.") from error


def _count_frame_tokens(documents: int, tokenizer: Tokenizer, is_paired: bool) -> int:
    """Count bos and eos of documents, every second of which is a target if they are paired."""
    targets = documents // 2 if is_paired else 0
    return documents + targets + (documents - targets) * len(tokenizer.prefix)


class Plan(NamedTuple):
    """How documents are divided and tokenized, the same for all units."""

    cfg: DataConfig
    rule: str
    is_paired: bool
    tokenizer: Tokenizer | None
    encoder: RecordEncoder | None = None

    @property
    def facts(self) -> list:
        """Return plain values that change when an encoder makes other documents of a record."""
        return [self.encoder.facts] if self.encoder else []

    @property
    def dtype(self) -> str:
        """Return the smallest type that holds all token ids, and the flag of an encoder."""
        if self.encoder:
            return "uint32"
        return "uint16" if self.known_tokenizer.vocab_size <= 1 << 16 else "uint32"

    @property
    def known_tokenizer(self) -> Tokenizer:
        """Return the tokenizer, where it exists by now."""
        assert self.tokenizer is not None
        return self.tokenizer

    def divide(self, document: Document) -> Iterator[sources.Division]:
        """Yield the division into training and held-out text: of the text, then of its answer."""
        train, held_out = sources.divide(document, self.rule, self.cfg.holdout)
        yield train, held_out
        if self.is_paired:
            target = _get_target(document, self.cfg)
            yield (target, b"") if train else (b"", target)


def _prepare_corpus(
    cfg: DataConfig,
    vocab: int,
    tokenizer: Tokenizer | None,
    is_paired: bool,
    log: LogFn,
    encoder: RecordEncoder | None,
) -> Corpus:
    weighted_sources = sources.parse_sources(cfg)
    units_by_source = sources.list_groups(cfg)
    units = [unit for group in units_by_source for unit in group]
    surveys = _survey_units(units, cfg, log)
    total = sum(surveys, sources.EMPTY_SURVEY)
    rule = sources.choose_rule(cfg, total, is_paired or encoder is not None)
    data = [FORMAT_VERSION, total.digest, rule, cfg.holdout, *(["pairs"] if is_paired else [])]

    given = tokenizer or _load_configured_tokenizer(cfg)
    if encoder:
        encoder = encoder.resolve(given)
        given = encoder.adapt(given) if given else None
        data.append(encoder.facts)
    if given:
        _check_vocab(given, cfg, vocab)
        if not given.is_lossless:
            name = "the model's tokenizer" if tokenizer else f"data.tokenizer={cfg.tokenizer}"
            log(
                f"{name} ({given.kind}) does not keep all of a text: the model learns what "
                "decoding its tokens gives"
            )
    plan = Plan(cfg, rule, is_paired, given, encoder)
    key = [*data, [survey.digest for survey in surveys]]  # another division has other files
    keys = [_digest([*key, "train", vocab])] if cfg.tokenizer == "train" else []
    if given:  # a resumed run passes the tokenizer that it trained itself: look in both folders
        keys.append(_digest([*key, given.fingerprint]))
    folders = [os.path.join(os.path.expanduser(cfg.cache), key) for key in keys]
    folder = next((f for f in folders if _read_stored_tokenizer(f, given)), folders[-1])
    train_tokenizer = partial(_train_tokenizer, plan, vocab, units, surveys, log)
    found = _get_tokenizer(folder, given, train_tokenizer)
    plan = plan._replace(tokenizer=encoder.adapt(found) if encoder else found)

    list_again = lambda: itertools.chain(*sources.list_groups(cfg))  # noqa: E731
    records = _make_shards(folder, units, surveys, plan, list_again, log)
    borders = [0, *itertools.accumulate(map(len, units_by_source[: len(weighted_sources)]))]
    spans = [slice(*border) for border in itertools.pairwise(borders)]
    train, held_out, mixture = _map_streams(folder, records, spans, plan)
    digests = [sum(surveys[span], sources.EMPTY_SURVEY).digest for span in spans]
    mixed = [
        [round(share, 9), digest] for (share, _), digest in zip(mixture, digests, strict=False)
    ]
    is_mixed = weighted_sources[0][0] is not None
    names = tuple(source.source for _, source in weighted_sources) if is_mixed else (cfg.source,)
    tokenizer_print = plan.known_tokenizer.fingerprint
    return Corpus(
        tokenizer=given or plan.known_tokenizer,
        train=train,
        held_out=held_out,
        fingerprint=_digest([*data, tokenizer_print, *(mixed if is_mixed else [])]),
        source=cfg.source,
        rule="own" if total.has_own_split else rule,
        train_bytes=total.sizes[rule][0],
        held_out_bytes=total.sizes[rule][1],
        mixture=mixture,
        names=names,
        is_paired=is_paired,
        counts=_sum_counts(records) if encoder else {},
    )


def _sum_counts(records: list[dict]) -> dict[str, dict[str, int]]:
    """Return what an encoder has counted in all shards, of training and of held-out records."""
    counts = {
        subset: sum((Counter(record[subset]["counts"]) for record in records), Counter())
        for subset in SUBSETS
    }
    return {subset: dict(count) for subset, count in counts.items()}


def _prepare_held_out(
    cfg: DataConfig,
    setting: str,
    tokenizer: Tokenizer,
    is_paired: bool,
    log: LogFn,
    encoder: RecordEncoder | None,
) -> tuple[Tokens, Survey]:
    """Return all tokens of the source that this setting names, and its survey."""
    list_units = partial(sources.list_held_out_units, cfg, setting)
    units = list_units()
    surveys = _survey_units(units, cfg, log)
    total = sum(surveys, sources.EMPTY_SURVEY)
    if not total.documents:
        raise ConfigError(f"data.{setting}={getattr(cfg, setting)!r} has no text to evaluate on.")
    digests = [survey.digest for survey in surveys]
    encoder = encoder and encoder.resolve(tokenizer)
    facts = [encoder.facts] if encoder else []
    key = _digest([FORMAT_VERSION, "evaluation", digests, is_paired, tokenizer.fingerprint, *facts])
    folder = os.path.join(os.path.expanduser(cfg.cache), key)
    found = _get_tokenizer(folder, tokenizer, lambda: tokenizer)
    found = encoder.adapt(found) if encoder else found
    plan = Plan(cfg, "document", is_paired, found, encoder)
    records = _make_shards(folder, units, surveys, plan, list_units, log)
    _raise_open_file_limit(len(records))
    return _concatenate([_map_shard(folder, "held", record, plan) for record in records]), total


def _make_shards(
    folder: str,
    units: Sequence[SourceUnit],
    surveys: Sequence[Survey],
    plan: Plan,
    list_again: Callable[[], Iterable[SourceUnit]],
    log: LogFn,
) -> list[dict]:
    """Make the missing shards, check all of them, and return their records."""
    pairs = zip(units, surveys, strict=True)
    jobs = [_make_shard_job(folder, number, *pair, plan) for number, pair in enumerate(pairs)]
    records = _read_manifest(folder, jobs)
    if records is None:
        records = work.run_jobs(jobs, plan.cfg.workers, "tokenizing", log)
        if [unit.facts for unit in list_again()] != [unit.facts for unit in units]:
            raise _make_change_error(plan.cfg.source)
        _write_manifest(folder, plan, records)
    _check_files(folder, records, plan.cfg.verify)
    return records


def _map_streams(
    folder: str, records: list[dict], spans: list[slice], plan: Plan
) -> tuple[Tokens, Tokens, tuple[tuple[float, Tokens], ...]]:
    """Return the training and held-out streams, and the mixture of the sources.

    The shards of each source are the records of one of these spans.
    """
    _raise_open_file_limit(len(SUBSETS) * len(records))
    shards = {
        subset: [_map_shard(folder, subset, record, plan) for record in records]
        for subset in SUBSETS
    }
    train, held_out = (_concatenate(shards[subset]) for subset in SUBSETS)
    weighted_sources = sources.parse_sources(plan.cfg)
    if weighted_sources[0][0] is None:
        return train, held_out, ((1.0, train),)
    streams = [_concatenate(shards["train"][span]) for span in spans]
    for (_, source), stream in zip(weighted_sources, streams, strict=True):
        if not stream.ids.size:
            raise ConfigError(
                f"data.source={plan.cfg.source!r} gives a weight to {source.source!r}, of which "
                "nothing is trained on: leave it out, or hold out less of it."
            )
    weights = [weight or 0.0 for weight, _ in weighted_sources]
    shares = [weight / sum(weights) for weight in weights]
    return train, held_out, tuple(zip(shares, streams, strict=True))


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _make_change_error(source: str) -> ConfigError:
    return ConfigError(
        f"data.source={source!r} changed while it was tokenized: start again when no process "
        "writes to it."
    )


# --- the tokenizer ---


def _get_target(document: Document, cfg: DataConfig) -> bytes:
    if not document.target:
        raise ConfigError(
            f"{document.name} has no answer, but train.objective needs texts in pairs: use a "
            f".jsonl, tfds or hf source with data.target_key (it is {cfg.target_key!r}), or "
            "data.source=classes:folder."
        )
    return document.target


def _load_configured_tokenizer(cfg: DataConfig) -> Tokenizer | None:
    """Return the tokenizer that `data.tokenizer` names; None for "train"."""
    kind, _, argument = cfg.tokenizer.partition(":")
    if kind in tokenizers.TOKENIZER_KINDS:
        return tokenizers.TOKENIZER_KINDS[kind].make(argument)
    factories = {"train": lambda: None, "bytes": tokenizers.make_byte_tokenizer}
    return factories.get(cfg.tokenizer, lambda: tokenizers.load(cfg.tokenizer))()


def _check_vocab(tokenizer: Tokenizer, cfg: DataConfig, vocab: int):
    if tokenizer.vocab_size > vocab:
        raise ConfigError(
            f"data.tokenizer={cfg.tokenizer!r} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab={vocab}: set model.vocab={tokenizer.vocab_size} or more."
        )


def _read_stored_tokenizer(folder: str, given: Tokenizer | None) -> Tokenizer | None:
    """Return the folder's tokenizer; None if it is missing, damaged, or not the `given` one."""
    try:
        found = tokenizers.load(os.path.join(folder, "tokenizer.json"))
    except ConfigError:
        return None
    return found if found.fingerprint == (given or found).fingerprint else None


def _get_tokenizer(
    folder: str, given: Tokenizer | None, train: Callable[[], Tokenizer]
) -> Tokenizer:
    """Return the folder's tokenizer, stored first if missing: the `given` one, or a trained one."""
    if found := _read_stored_tokenizer(folder, given):
        return found
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "tokenizer.json")
    with work.file_lock(path):
        if found := _read_stored_tokenizer(folder, given):
            return found
        tokenizer = given or train()
        tokenizer.save(path)
        return tokenizer


def _train_tokenizer(
    plan: Plan, vocab: int, units: Sequence[SourceUnit], surveys: Sequence[Survey], log: LogFn
) -> Tokenizer:
    """Train on all of the training part, or on the same share of each unit's."""
    sizes = [survey.sizes[plan.rule][0] for survey in surveys]
    total = sum(sizes)
    if total > work.MIN_PARALLEL_BYTES:
        sampled = min(total, MAX_SAMPLE_BYTES)
        log(f"training a tokenizer on {sampled / 1e6:.0f} of {total / 1e6:.0f} MB")

    def texts() -> Iterator[bytes]:
        for unit, size in zip(units, sizes, strict=True):
            if not size:
                continue
            is_whole = total <= MAX_SAMPLE_BYTES
            bytes_left = sys.maxsize if is_whole else size * MAX_SAMPLE_BYTES // total
            documents = sources.read_unit(unit)
            divisions = (division for doc in documents for division in plan.divide(doc))
            encoder = plan.encoder
            parts = (train for train, _ in divisions if train)
            if encoder:
                parts = (text for record in parts for text in encoder.read_texts(record))
            for train in parts:
                if bytes_left <= 0:
                    break
                yield train[:bytes_left]
                bytes_left -= len(train)

    tokenizer = tokenizers.train(texts(), vocab, log)
    _check_vocab(tokenizer, plan.cfg, vocab)
    return tokenizer


# --- units: their surveys and their shards ---


def _survey_units(units: Sequence[SourceUnit], cfg: DataConfig, log: LogFn) -> list[Survey]:
    """Return the survey of each unit, from the cache if its facts have not changed."""
    folder = os.path.join(os.path.expanduser(cfg.cache), "units")
    jobs = []
    for unit in units:
        facts = _digest([FORMAT_VERSION, cfg.holdout, unit.facts])
        is_recent = time.time() - unit.mtime < MTIME_RESOLUTION_SECONDS
        record = "" if is_recent else os.path.join(folder, facts + ".json")
        jobs.append(Job(record, facts, unit.size, partial(_make_survey_record, unit, cfg.holdout)))
    records = work.run_jobs(jobs, cfg.workers, "reading", log)
    return [Survey.from_record(record) for record in records]


def _make_survey_record(unit: SourceUnit, holdout: float) -> dict[str, Any]:
    return dataclasses.asdict(sources.survey_unit(unit, holdout))


def _make_shard_job(folder: str, number: int, unit: SourceUnit, survey: Survey, plan: Plan) -> Job:
    tokenizer = plan.known_tokenizer.fingerprint
    data = [survey.digest, plan.rule, plan.cfg.holdout, plan.is_paired, *plan.facts]
    facts = _digest([FORMAT_VERSION, *data, tokenizer])
    stem = os.path.join(folder, f"{number:06}")
    make = partial(_write_shards, stem, unit, survey.digest, plan)
    return Job(f"{stem}.json", facts, unit.size, make)


def _write_shards(stem: str, unit: SourceUnit, digest: str, plan: Plan) -> dict[str, Any]:
    """Write the shards of a unit that had this digest; return their record."""
    survey = sources.EMPTY_SURVEY
    with contextlib.ExitStack() as stack:
        writers = [_ShardWriter(stack, f"{stem}.{subset}", plan) for subset in SUBSETS]
        for document in sources.read_unit(unit):
            survey += sources.survey_document(document, plan.cfg.holdout)
            for division in plan.divide(document):
                for writer, text in zip(writers, division, strict=True):
                    writer.add(text, document.name)
        for writer in writers:
            writer.close()
        if survey.digest != digest:
            raise _make_change_error(unit.name)
    files = {name: facts for writer in writers for name, facts in writer.files.items()}
    sizes = {subset: writer.sizes for subset, writer in zip(SUBSETS, writers, strict=True)}
    return {"unit": unit.name, **sizes, "files": files}


class _ShardWriter:
    """Writes a shard; documents are encoded in batches of some megabytes.

    Args:
        stack: the files are renamed to their final names when the stack exits normally.
        stem: their path, without the ending.
        plan: the tokenizer and its dtype.

    Attributes:
        files: size and checksum of each file, after `close`.
        sizes: tokens, documents, and bytes of text.
    """

    def __init__(self, stack: contextlib.ExitStack, stem: str, plan: Plan):
        self.stem, self.plan = stem, plan
        self.ids_file, self.starts_file = (
            stack.enter_context(work.atomic_write(stem + ending)) for ending in (".bin", ".npy")
        )
        self.starts = [0]
        self.pending: list[bytes] = []
        self.counts: Counter[str] = Counter()  # of an encoder
        self.pending_bytes = self.text_bytes = 0  # not yet encoded, and encoded
        self.hash = hashlib.blake2b(digest_size=16)
        self.files: dict[str, dict] = {}

    @property
    def sizes(self) -> dict[str, Any]:
        sizes = dict(tokens=self.starts[-1], documents=len(self.starts) - 1, bytes=self.text_bytes)
        return sizes | ({"counts": dict(self.counts)} if self.plan.encoder else {})

    def add(self, text: bytes, name: str):
        if text and self.plan.encoder:
            self.add_record(self.plan.encoder, text, name)
        elif text:
            self.pending.append(text)
            self.pending_bytes += len(text)
        if self.pending_bytes >= ENCODE_BATCH_BYTES:
            self.flush()

    def add_record(self, encoder: RecordEncoder, record: bytes, name: str):
        for ids in encoder.encode(self.plan.known_tokenizer, name, record, self.counts):
            self.write(ids.astype(self.plan.dtype))
            self.starts.append(self.starts[-1] + ids.size)
        self.text_bytes += len(record)

    def flush(self):
        tokenizer, dtype = self.plan.known_tokenizer, self.plan.dtype
        target, prefix, eos = (
            np.array(ids, dtype) for ids in ([tokenizer.bos], tokenizer.prefix, [tokenizer.eos])
        )
        pieces = tokenizer.encode_pieces(self.pending)
        for _, group in itertools.groupby(pieces, key=lambda piece: piece[0]):  # of a document
            is_target = self.plan.is_paired and (len(self.starts) - 1) % 2
            before = target if is_target else prefix
            size = before.size + 1
            for _, ids in group:  # written one by one: a document may be long
                self.write(np.concatenate([before, ids.astype(dtype)]))
                size, before = size + ids.size, ids[:0].astype(dtype)
            self.write(eos)
            self.starts.append(self.starts[-1] + size)
        self.text_bytes += self.pending_bytes
        self.pending, self.pending_bytes = [], 0

    def write(self, ids: np.ndarray):
        """Append ids to the file and to its checksum."""
        content = ids.tobytes()
        self.ids_file.write(content)
        self.hash.update(content)

    def close(self):
        self.flush()
        starts = io.BytesIO()
        np.save(starts, np.array(self.starts, np.int64))
        self.starts_file.write(starts.getbuffer())
        hashes = (self.hash, hashlib.blake2b(starts.getbuffer(), digest_size=16))
        files = (self.ids_file, self.starts_file)
        for file, ending, checksum in zip(files, (".bin", ".npy"), hashes, strict=True):
            name = os.path.basename(self.stem) + ending
            self.files[name] = dict(bytes=file.tell(), blake2b=checksum.hexdigest())


# --- the corpus folder ---


def _write_manifest(folder: str, plan: Plan, records: list[dict]):
    content = dict(
        format=FORMAT_VERSION,
        source=plan.cfg.source,
        tokenizer=plan.known_tokenizer.fingerprint,
        dtype=plan.dtype,
        units=records,
    )
    work.write_json_atomically(os.path.join(folder, "manifest.json"), content)
    for name in os.listdir(folder):  # left by killed processes
        is_manifest = name.startswith("manifest")  # of another process that is at this point too
        if name.endswith((".tmp", ".lock")) and not is_manifest:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, name))


def _read_manifest(folder: str, jobs: list[Job]) -> list[dict] | None:
    """Return the records if they are those of all jobs, and all files that they list exist."""
    try:
        with open(os.path.join(folder, "manifest.json"), encoding="utf-8") as file:
            records = json.load(file)["units"]
        if [record["facts"] for record in records] != [job.facts for job in jobs]:
            return None
        names = set(os.listdir(folder))
        return records if all(names.issuperset(record["files"]) for record in records) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_files(folder: str, records: list[dict], use_checksums: bool):
    """Compare sizes, and optionally checksums; hashing uses all cores."""

    def check(item: tuple[str, dict]):
        name, expected = item
        path = os.path.join(folder, name)
        found: dict[str, Any] = {"bytes": os.path.getsize(path)}
        if use_checksums and found["bytes"] == expected["bytes"]:
            with open(path, "rb") as file:
                hashed = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            found["blake2b"] = hashed.hexdigest()
        if wrong := next((key for key in found if found[key] != expected[key]), ""):
            raise ConfigError(
                f"{path} was damaged after it was written: {wrong} should be {expected[wrong]}, "
                f"and is {found[wrong]}. Delete it, and the same command rebuilds it."
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(check, (item for record in records for item in record["files"].items())))


def _raise_open_file_limit(files: int):
    """Raise this process's limit by this many open files if possible: each map keeps one open."""
    with contextlib.suppress(ImportError, ValueError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = files + 1024 if hard == resource.RLIM_INFINITY else min(files + 1024, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _map_shard(folder: str, subset: str, record: dict, plan: Plan) -> Tokens:
    starts_name, ids_name = sorted(n for n in record["files"] if f".{subset}." in n)[::-1]
    size = record[subset]["tokens"]
    starts = np.load(os.path.join(folder, starts_name))  # [documents + 1]
    if not size:  # an empty file cannot be mapped
        return Tokens(np.zeros(0, plan.dtype), starts)
    ids = np.memmap(os.path.join(folder, ids_name), plan.dtype, "r", shape=(size,))
    return Tokens(ids, starts)


def _concatenate(streams: Sequence[Tokens]) -> Tokens:
    nonempty = [stream for stream in streams if stream.ids.size]
    if len(nonempty) < 2:
        return nonempty[0] if nonempty else streams[0]
    offsets = itertools.accumulate((stream.ids.size for stream in nonempty), initial=0)
    pairs = zip(nonempty, offsets, strict=False)
    starts = [stream.starts[:-1] + offset for stream, offset in pairs]
    ids = ConcatenatedArray([np.asarray(stream.ids) for stream in nonempty])
    return Tokens(ids, np.concatenate([*starts, [ids.size]]))
