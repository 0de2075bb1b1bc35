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

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.loader import Loader, eval_batches
from jaxgpt.data.packing import PACKINGS, Batch, Laid, Rows, Shelves, Source, first_fit, lay
from jaxgpt.data.shards import Corpus, Tokens
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

HELD = 1  # second number of the seeds of held-out rows, so that they are masked alike every time
Dice = Iterable[np.random.Generator]  # one for each row, made when it is asked for


class Task:
    """What all objectives have in common: batches that are functions of the step."""

    IS_PAIRED: ClassVar[bool] = False  # whether it needs texts in pairs

    labels: Sequence[str] = ()  # of classes
    note: str = ""  # what the user should know of how the text fits

    def __init__(self, cfg: Config, corpus: Corpus):
        self.cfg, self.corpus = cfg, corpus
        self.T = self.window(cfg)  # tokens of text in a row
        streams = corpus.mixture or ((1.0, corpus.train),)
        self.loader = Loader(
            [(weight, self.rows(tokens)) for weight, tokens in streams], cfg.train.batch, cfg.seed
        )
        if self.loader.padding:
            self.note = f"{self.loader.padding:.2%} of the rows is padding"

    @staticmethod
    def reserved(cfg: Config) -> int:
        """How many of the last rows of the table are masks, and no token of the tokenizer's."""
        return 0

    @staticmethod
    def window(cfg: Config) -> int:
        """Tokens of text in a row."""
        return cfg.model.context

    def rows(self, tokens: Tokens) -> Rows:
        """The rows that a stream gives."""
        apart = self.cfg.model.documents == "apart"
        return PACKINGS[self.cfg.data.packing](tokens, self.T, apart, self.corpus.tokenizer.pad)

    @property
    def tokens(self) -> int:
        """Tokens of text that a batch shows."""
        return self.cfg.train.batch * self.T

    def batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """The batch of a step, or these rows of it: arrays [B T]."""
        numbers = self.loader.numbers(step, rows).tolist()
        dice = (np.random.default_rng([self.cfg.seed, 0, n]) for n in numbers)
        return self.shape(self.loader.batch(step, rows), dice)

    def held(self) -> Iterator[Batch]:
        """Held-out batches, the same every time."""
        raise NotImplementedError

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        """A batch of rows as the objective wants it."""
        return batch


class Causal(Task):
    """Rows of the stream as they are."""

    def held(self) -> Iterator[Batch]:
        cfg, B = self.cfg, self.cfg.train.batch
        windows = eval_batches(
            self.corpus.held,
            B,
            self.T,
            limit=cfg.train.eval_batches,
            pad=self.corpus.tokenizer.pad,
            mask_documents=cfg.model.documents == "apart",
        )
        for number, batch in enumerate(windows):
            dice = (np.random.default_rng([0, HELD, number * B + row]) for row in range(B))
            yield self.shape(batch, dice)


class Prefix(Causal):
    """Of each document in a window, a random beginning is given; the rest is to be predicted.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1.
    """

    def shape(self, batch: Batch, dice: Dice) -> Batch:
        prefix = np.zeros_like(batch.tokens)  # [B T]
        for row, rng in enumerate(dice):
            sizes = np.bincount(batch.segments[row], minlength=1)  # [segments + 1]
            drawn = rng.integers(1, np.maximum(2, sizes[1:]))
            prefix[row] = np.concatenate([[0], drawn])[batch.segments[row]]
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
        drawn = np.empty((len(batch.tokens), 2, T))
        others = np.empty(batch.tokens.shape, np.int64)
        for row, rng in enumerate(dice):
            rng.random(out=drawn[row])
            others[row] = rng.integers(words.vocab_size, size=T)
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
        B, words = len(batch.tokens), self.corpus.tokenizer
        hidden, spans = _spans(self.T, self.cfg)
        sizes = np.count_nonzero(batch.segments, axis=1)  # [B], without the padding at the end
        read = np.full((B, self.T - hidden + spans + 1), words.pad, np.int32)
        said = np.full((B, hidden + spans + 1), words.pad, np.int32)
        ends = np.zeros((2, B), np.int64)  # of what is read and said
        dice = list(dice)
        for n in np.unique(sizes[sizes > 1]).tolist():  # nearly always one
            rows = np.flatnonzero(sizes == n)
            source, target = self._divide(batch.tokens[rows, :n], [dice[row] for row in rows])
            read[rows, : source.shape[1]] = source
            said[rows, : target.shape[1]] = target
            ends[:, rows] = [[source.shape[1]], [target.shape[1]]]
        into = np.concatenate([np.full((B, 1), words.bos, np.int32), said[:, :-1]], axis=1)
        positions, segments = _places(said, ends[1])
        weights = segments.astype(np.float32)
        before = Source(read, *_places(read, ends[0]))
        return Batch(into, said, positions, segments, weights, source=before)

    def _divide(
        self, tokens: np.ndarray, dice: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is read and what is to be said of whole rows [B n]."""
        B, n = tokens.shape
        hidden, spans = _spans(n, self.cfg)
        # Kept and hidden spans alternate, and a kept one comes first.
        sizes = np.empty((B, spans, 2), np.int64)
        for row, rng in enumerate(dice):
            sizes[row, :, 0] = _cuts(rng, n - hidden, spans)
            sizes[row, :, 1] = _cuts(rng, hidden, spans)
        is_hidden = np.repeat(np.tile([False, True], B * spans), sizes.reshape(-1)).reshape(B, n)
        kept, gone = np.cumsum(sizes, axis=1).transpose(2, 0, 1)  # [B spans] each
        masks = self.cfg.model.vocab - 1 - np.arange(spans)

        def insert(text, before):  # masks between the tokens of a row, and eos at its end
            shape = (B, text.size // B + spans + 1)
            out = np.full(shape, self.corpus.tokenizer.eos, np.int32)
            is_text = np.ones(shape, bool)
            is_text[:, -1] = False
            np.put_along_axis(is_text, before + np.arange(spans), False, axis=1)
            out[is_text] = text
            np.put_along_axis(out, before + np.arange(spans), masks[None], axis=1)
            return out

        return insert(tokens[~is_hidden], kept), insert(tokens[is_hidden], gone - sizes[:, :, 1])


def _spans(n: int, cfg: Config) -> tuple[int, int]:
    """Of n tokens: how many are hidden, and in how many spans."""
    hidden = min(max(round(n * cfg.train.noise), 1), n - 1)
    return hidden, min(max(round(hidden / cfg.train.span), 1), hidden, n - hidden)


def _cuts(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """The sizes of `parts` random parts of `total`, none empty, all divisions as likely."""
    places = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(places, prepend=0, append=total)


def _places(tokens: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of one text a row [B T], of so many tokens [B], none or all."""
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    positions = np.ascontiguousarray(np.broadcast_to(columns, tokens.shape))
    return positions, (columns < sizes[:, None]).astype(np.int32)


# --- texts in pairs --------------------------------------------------------------------------


class Pairs(Task):
    """The source is read, the target written; what is too long is cut off.

    A row is one pair; or several, if `data.packing` is documents: the i-th target of a row then
    sees the i-th source only.
    """

    IS_PAIRED = True
    READS = 2  # how many texts of a pair the model reads

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        self.held_rows = self.rows(corpus.held)
        lengths = np.concatenate([np.diff(part.starts) for part in (corpus.train, corpus.held)])
        read = lengths.reshape(-1, 2)[:, : self.READS]  # [pairs READS]
        if long := int((read > self.T).any(axis=1).sum()):
            cut = f"{long:,} of {len(read):,} are longer than model.context={self.T}, and cut"
            self.note = "; ".join(filter(None, (cut, self.note)))

    def rows(self, tokens: Tokens) -> "PairRows":
        is_packed = self.cfg.data.packing == "documents"
        return PairRows(tokens, self.T, self.corpus.tokenizer.pad, is_packed)

    def held(self) -> Iterator[Batch]:
        B = self.cfg.train.batch
        total = -(-self.held_rows.size // B)
        for number in range(min(total, self.cfg.train.eval_batches or total)):
            yield self.held_rows.cut(np.arange(number * B, (number + 1) * B))


class PairRows:
    """Rows of pairs: documents 2 n and 2 n + 1 of a stream are a source and its target.

    Args:
        tokens: the stream.
        T: tokens of a row, on either side.
        pad: the token where there is none.
        is_packed: several pairs share a row.
    """

    def __init__(self, tokens: Tokens, T: int, pad: int, is_packed: bool = False):
        self.tokens, self.T, self.pad = tokens, T, pad
        self.firsts = tokens.starts[:-1].reshape(-1, 2)  # [pairs 2]
        # Of a target, the last token is not read, and the first one not written.
        self.sizes = np.minimum(T, np.diff(tokens.starts).reshape(-1, 2) - [0, 1])  # [pairs 2]
        rows = first_fit(self.sizes, T) if is_packed else np.arange(len(self.sizes))
        self.shelves = Shelves(rows)
        self.size = self.shelves.size
        shown = int(self.sizes.sum())
        self.padding = 1 - shown / (2 * self.size * T) if is_packed else 0.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of the rows."""
        return rng.permutation(self.size)

    def cut(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, int64 [B]; empty ones beyond the last."""
        source, target = self.lay(rows, 0), self.lay(rows, 1)
        read = Source(source.tokens, source.positions, source.segments)
        return Batch(*target[:4], (target.segments > 0).astype(np.float32), source=read)

    def lay(self, rows: np.ndarray, side: int) -> Laid:
        """The sources (0) or targets (1) of these rows [B]."""
        row, pair = self.shelves.take(rows)
        firsts, sizes = self.firsts[pair, side], self.sizes[pair, side]
        return lay(self.tokens, firsts, sizes, row, (rows.size, self.T), self.pad)


class Classify(Pairs):
    """One text a row, and the number of its class: targets and weights are [B].

    Raises:
        ConfigError: the model tells another number of classes than there are.
    """

    READS = 1

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        every = [*self.loader.rows, self.held_rows]
        self.labels = sorted({name for rows in every for name in rows.names})
        if len(self.labels) != cfg.model.classes:
            few = ", ".join(map(repr, self.labels[:6])) + (", ..." if len(self.labels) > 6 else "")
            raise ConfigError(
                f"model.classes={cfg.model.classes}, but data.source={cfg.data.source!r} has "
                f"{len(self.labels)} classes ({few}): set model.classes={len(self.labels)}."
            )
        for rows in every:
            rows.classes = np.array([self.labels.index(name) for name in rows.names], np.int32)

    def rows(self, tokens: Tokens) -> "TextRows":
        return TextRows(tokens, self.T, self.corpus.tokenizer)


class TextRows(PairRows):
    """Rows of one text each, whose target is its class.

    Args:
        tokens, T: as for `PairRows`.
        tokenizer: tells the name of the class.
    """

    classes: np.ndarray  # int32 [texts], once all names are known

    def __init__(self, tokens: Tokens, T: int, tokenizer: Tokenizer):
        super().__init__(tokens, T, tokenizer.pad)
        lengths = np.diff(tokens.starts)[1::2].tolist()
        answers = zip(self.firsts[:, 1:], lengths, strict=True)
        self.names = [tokenizer.decode(tokens.cut(first, size)[0]) for first, size in answers]

    def cut(self, rows: np.ndarray) -> Batch:
        """The texts of these numbers, int64 [B]; empty ones beyond the last."""
        read = self.lay(rows, 0)
        is_there = rows < self.size
        classes = np.where(is_there, self.classes[np.minimum(rows, self.size - 1)], 0)
        weights = is_there.astype(np.float32)
        return Batch(read.tokens, classes, read.positions, read.segments, weights)
