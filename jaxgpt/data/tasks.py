"""What is to be learned, made of tokens: the batches of every objective.

    causal     every token predicts the next one
    prefix     as causal, but the beginning of a document is given, and seen from everywhere in it
    masked     some tokens are hidden or replaced, and are to be told (BERT)
    span       some spans are replaced by one mask each, and are to be written (T5)
    pairs      a text is to be written, given another one
    classify   a text is to be told which class it belongs to

The first four are made of windows of a stream of tokens, the last two of documents in pairs. All
that is random is drawn for each row from (seed, number of the row), so that a batch is a function
of the step and any host can make any row of it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.loader import Batch, Epochs, Loader, Source, eval_batches
from jaxgpt.data.shards import Corpus, Tokens
from jaxgpt.settings import ConfigError

HELD = 1  # second number of the seeds of held-out rows, so that they are masked alike every time
Dice = Sequence[np.random.Generator]  # one for each row


class Task:
    """What all objectives have in common: batches that are functions of the step."""

    IS_PAIRED: ClassVar[bool] = False  # whether it needs texts in pairs

    T: int  # tokens of text in a row
    labels: Sequence[str] = ()  # of classes
    note: str = ""  # what the user should know of how the text fits

    def __init__(self, cfg: Config, corpus: Corpus):
        self.cfg, self.corpus = cfg, corpus

    @staticmethod
    def reserved(cfg: Config) -> int:
        """How many of the last rows of the table are masks, and no token of the tokenizer's."""
        return 0

    @property
    def tokens(self) -> int:
        """Tokens of text that a batch shows."""
        return self.cfg.train.batch * self.T

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or some rows of it: arrays [B T]."""
        raise NotImplementedError

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """The batches from `step` on, without end."""
        return map(self.batch, itertools.count(step))

    def held(self) -> Iterator[Batch]:
        """Held-out batches, the same every time."""
        raise NotImplementedError


class Causal(Task):
    """Windows of the stream as they are."""

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        self.T = self.window(cfg)
        mask = cfg.data.mask_documents
        self.loader = Loader(corpus.train, cfg.train.batch, self.T, cfg.seed, mask)

    @staticmethod
    def window(cfg: Config) -> int:
        """Tokens of text in a row."""
        return cfg.model.context

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        numbers = step * self.cfg.train.batch + np.arange(self.cfg.train.batch)[rows]
        dice = [np.random.default_rng([self.cfg.seed, 0, n]) for n in numbers.tolist()]
        return self.shape(self.loader.batch(step, rows), dice)

    def held(self) -> Iterator[Batch]:
        cfg, B = self.cfg, self.cfg.train.batch
        windows = eval_batches(
            self.corpus.held,
            B,
            self.T,
            limit=cfg.train.eval_batches,
            pad=self.corpus.tokenizer.pad,
            mask_documents=cfg.data.mask_documents,
        )
        for number, batch in enumerate(windows):
            dice = [np.random.default_rng([0, HELD, number * B + row]) for row in range(B)]
            yield self.shape(batch, dice)

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        """A batch of windows as the objective wants it."""
        return batch


class Prefix(Causal):
    """Of each document in a window, a random beginning is given; the rest is to be predicted.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1.
    """

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        prefix = np.zeros_like(batch.tokens)  # [B T]
        for row, rng in enumerate(dice):
            segments = batch.segments[row]
            for document in range(1, segments.max(initial=0) + 1):
                here = segments == document
                prefix[row, here] = rng.integers(1, max(2, here.sum()))
        is_asked = batch.positions >= prefix - 1  # the prefix's last token predicts what follows
        return batch._replace(prefix=prefix, weights=batch.weights * is_asked)


class Masked(Causal):
    """Of the tokens `train.noise` are to be told: 80% of them are hidden, 10% replaced, 10% left.

    Source: Devlin et al. 2019 (BERT), section 3.1; masks drawn anew every time, as in Liu et al.
    2019 (RoBERTa), arXiv:1907.11692, section 4.1.
    """

    @staticmethod
    def reserved(cfg: Config) -> int:
        return 1

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        T, words = self.T, self.corpus.tokenizer
        drawn = np.stack([rng.random((2, T)) for rng in dice])  # [B 2 T]
        others = np.stack([rng.integers(words.vocab_size, size=T) for rng in dice])
        is_word = (batch.segments > 0) & ~np.isin(batch.tokens, [words.bos, words.eos, words.pad])
        is_asked = is_word & (drawn[:, 0] < self.cfg.train.noise)
        mask = self.cfg.model.vocab - 1
        how = drawn[:, 1]
        shown = np.where(how < 0.8, mask, np.where(how < 0.9, others, batch.tokens))
        tokens = np.where(is_asked, shown, batch.tokens).astype(np.int32)
        weights = is_asked.astype(np.float32)
        return batch._replace(tokens=tokens, targets=batch.tokens, weights=weights)


class Span(Causal):
    """A source with `train.noise` of its tokens gone, each span of them behind one mask; the target
    says every mask and what was there.

        source   the <0> sat on <1> mat <eos>
        target   <0> cat <1> the <eos>

    Masks count down from the last row of the table. A row is a window of the stream, whatever the
    documents in it, long enough for its source to fill the context.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.1.4.
    """

    @staticmethod
    def reserved(cfg: Config) -> int:
        return _spans(Span.window(cfg), cfg)[1]

    @staticmethod
    def window(cfg: Config) -> int:
        def source(n):
            hidden, spans = _spans(n, cfg)
            return n - hidden + spans + 1

        fits = (n for n in range(2 * cfg.model.context, 1, -1) if source(n) <= cfg.model.context)
        return next(fits, 2)

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        hidden, spans = _spans(self.T, self.cfg)
        masks = self.cfg.model.vocab - 1 - np.arange(spans)
        eos = [self.corpus.tokenizer.eos]
        sources, targets = [], []
        for tokens, rng in zip(batch.tokens, dice, strict=True):
            # Kept and hidden spans alternate, and a kept one comes first.
            kept = _cuts(rng, self.T - hidden, spans)
            gone = _cuts(rng, hidden, spans)
            ends = np.cumsum(np.stack([kept, gone], axis=1).reshape(-1))[:-1]
            pieces = np.split(tokens, ends)
            source = [x for i in range(spans) for x in (pieces[2 * i], masks[i : i + 1])]
            target = [x for i in range(spans) for x in (masks[i : i + 1], pieces[2 * i + 1])]
            sources.append(np.concatenate([*source, eos]))
            targets.append(np.concatenate([*target, eos]))
        is_whole = np.all(batch.segments > 0, axis=1)  # a last, padded window is left out
        read, said = (np.stack(x).astype(np.int32) for x in (sources, targets))
        return _written(read, said, self.corpus.tokenizer.bos, is_whole)


def _spans(n: int, cfg: Config) -> tuple[int, int]:
    """Of n tokens: how many are hidden, and in how many spans."""
    hidden = min(max(round(n * cfg.train.noise), 1), n - 1)
    return hidden, min(max(round(hidden / cfg.train.span), 1), hidden, n - hidden)


def _cuts(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """The sizes of `parts` random parts of `total`, none empty, all divisions as likely."""
    places = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(places, prepend=0, append=total)


def _written(source: np.ndarray, target: np.ndarray, bos: int, is_real: Any) -> Batch:
    """A batch of whole rows: source [B S], target [B T], is_real [B]."""

    def places(x):
        positions = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape)
        return positions, np.broadcast_to(is_real[:, None], x.shape).astype(np.int32)

    tokens = np.concatenate([np.full((len(target), 1), bos, np.int32), target[:, :-1]], axis=1)
    positions, segments = places(target)
    weights = segments.astype(np.float32)
    return Batch(
        tokens, target, positions, segments, weights, source=Source(source, *places(source))
    )


# --- texts in pairs --------------------------------------------------------------------------


class Pairs(Task):
    """One pair a row: the source is read, the target written; what is too long is cut off."""

    IS_PAIRED = True
    READS = 2  # how many texts of a pair the model reads

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        self.T = cfg.model.context
        size = corpus.train.documents // 2
        self._order = Epochs(cfg.seed, size, lambda rng: rng.permutation(size))
        both = np.concatenate([np.diff(part.starts) for part in (corpus.train, corpus.held)])
        sizes = both.reshape(-1, 2)[:, : self.READS]  # [pairs READS]
        if long := int((sizes > self.T).any(axis=1).sum()):
            self.note = (
                f"{long:,} of {len(sizes):,} are longer than model.context={self.T}, and cut"
            )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        B = self.cfg.train.batch
        numbers = self._order.take(step * B + np.arange(B)[rows])
        return self.pack(self.corpus.train, numbers.tolist())

    def held(self) -> Iterator[Batch]:
        B, size = self.cfg.train.batch, self.corpus.held.documents // 2
        total = math.ceil(size / B)
        for number in range(min(total, self.cfg.train.eval_batches or total)):
            yield self.pack(self.corpus.held, [*range(number * B, min(size, (number + 1) * B))])

    def pack(self, stream: Tokens, numbers: list[int]) -> Batch:
        """The pairs of these numbers as rows, and empty rows up to a whole batch."""
        source = self._rows([_text(stream, 2 * n)[: self.T] for n in numbers])
        targets = [_text(stream, 2 * n + 1)[: self.T + 1] for n in numbers]
        into, out = self._rows([x[:-1] for x in targets]), self._rows([x[1:] for x in targets])
        return Batch(into.tokens, out.tokens, *into[1:], out.segments.astype(np.float32),
                     source=source)  # fmt: skip

    def _rows(self, texts: list[np.ndarray]) -> Source:
        """Texts from the left of rows, [B T] in all."""
        shape = (max(len(texts), self.cfg.train.batch), self.T)
        tokens = np.full(shape, self.corpus.tokenizer.pad, np.int32)
        segments = np.zeros(shape, np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
            segments[row, : len(text)] = 1
        return Source(tokens, segments.cumsum(axis=1, dtype=np.int32) - segments, segments)


class Classify(Pairs):
    """One text a row, and the number of its class: targets and weights are [B].

    Raises:
        ConfigError: the model tells another number of classes than there are.
    """

    READS = 1

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        parts = (corpus.train, corpus.held)
        named = [[self._label(part, n) for n in range(part.documents // 2)] for part in parts]
        self.labels = sorted({name for names in named for name in names})
        if len(self.labels) != cfg.model.classes:
            few = ", ".join(map(repr, self.labels[:6])) + (", ..." if len(self.labels) > 6 else "")
            raise ConfigError(
                f"model.classes={cfg.model.classes}, but data.source={cfg.data.source!r} has "
                f"{len(self.labels)} classes ({few}): set model.classes={len(self.labels)}."
            )
        number = {name: i for i, name in enumerate(self.labels)}
        self._numbers = [np.array([number[name] for name in names], np.int32) for names in named]

    def _label(self, stream: Tokens, n: int) -> str:
        return self.corpus.tokenizer.decode(_text(stream, 2 * n + 1))

    def pack(self, stream: Tokens, numbers: list[int]) -> Batch:
        text = self._rows([_text(stream, 2 * n)[: self.T] for n in numbers])
        known = self._numbers[0 if stream is self.corpus.train else 1][numbers]
        missing = len(text.tokens) - len(numbers)
        return Batch(
            text.tokens,
            np.pad(known, (0, missing)),
            text.positions,
            text.segments,
            np.pad(np.ones(len(numbers), np.float32), (0, missing)),
        )


def _text(stream: Tokens, number: int) -> np.ndarray:
    """The tokens of a document, with bos and eos."""
    return stream.ids[stream.starts[number] : stream.starts[number + 1]]
