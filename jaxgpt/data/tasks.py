"""Make the training and evaluation batches of every objective from tokens.

    causal     every token predicts the next one
    prefix     as causal, but the beginning of a document is given, and attended to bidirectionally
    masked     some tokens are masked or replaced, and are to be predicted (BERT)
    span       some spans are replaced by one mask token each, and are to be generated (T5)
    pairs      a text is to be generated, given another one
    classify   the class of a text is to be predicted

The first four use windows of a stream of tokens, the last two use pairs of documents. Everything
random is drawn per row from (seed, number of the row), so a batch is a function of the step and any
host can make any row of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.conversations import RecordEncoder
from jaxgpt.data.loader import Loader, make_eval_batches
from jaxgpt.data.packing import (
    PACKINGS,
    Batch,
    EncoderInputs,
    PackedRows,
    RowIndex,
    Rows,
    pack_first_fit,
    pack_rows,
)
from jaxgpt.data.shards import Corpus, Tokens
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

HELD_OUT_SEED = 1  # second number of the seeds of held-out rows: their masks never change
RowRngs = Iterable[np.random.Generator]  # one per row, created when needed


def _make_zeros(*shape: int, dtype: type = np.int32) -> np.ndarray:
    """Return an array of one zero, repeated without a copy."""
    return np.broadcast_to(dtype(0), shape)


class Task:
    """What all objectives share: batches that are functions of the step."""

    IS_PAIRED: ClassVar[bool] = False  # whether it needs texts in pairs

    labels: Sequence[str] = ()  # of classes
    note: str = ""  # for the user: how well the text fits the rows
    example: str = ""  # for the user: a text, with what is learned of it marked

    def __init__(self, cfg: Config, corpus: Corpus):
        self.cfg, self.corpus = cfg, corpus
        self.T = self.compute_row_tokens(cfg)  # tokens of text in a row
        streams = corpus.mixture or ((1.0, corpus.train),)
        self.loader = Loader(
            [(weight, self.make_rows(tokens)) for weight, tokens in streams],
            cfg.train.batch,
            cfg.seed,
        )
        if self.loader.padding:
            self.note = f"{self.loader.padding:.2%} of the rows is padding"

    @staticmethod
    def count_mask_tokens(cfg: Config) -> int:
        """Return how many ids at the end of the vocabulary are masks, not tokenizer tokens."""
        return 0

    @staticmethod
    def compute_row_tokens(cfg: Config) -> int:
        """Return the tokens of text in a row."""
        return cfg.model.context

    @staticmethod
    def make_encoder(cfg: Config) -> RecordEncoder | None:
        """Return what makes tokens of whole records, None if the source is text."""
        return None

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        """Return a batch like those of `make_batch`, of zeros that take no memory."""
        shape = cfg.train.batch, cls.compute_row_tokens(cfg)
        tokens = _make_zeros(*shape)
        return Batch(tokens, tokens, tokens, tokens, _make_zeros(*shape, dtype=np.float32))

    def make_rows(self, tokens: Tokens) -> Rows:
        """Return the rows of a stream."""
        is_separate = self.cfg.model.documents == "separate"
        pad = self.corpus.tokenizer.pad
        return PACKINGS[self.cfg.data.packing](tokens, self.T, is_separate, pad)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of text in a batch."""
        return self.cfg.train.batch * self.T

    def make_batch(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """Return the batch of a step, or these rows of it: arrays [B T]."""
        numbers = self.loader.number_rows(step, rows).tolist()
        rngs = (np.random.default_rng([self.cfg.seed, 0, n]) for n in numbers)
        return self.transform(self.loader.make_batch(step, rows), rngs)

    def make_eval_batches(self, tokens: Tokens | None = None) -> Iterator[Batch]:
        """Yield the held-out batches, the same every time.

        Args:
            tokens: what to evaluate on, such as `corpus.test`; by default `corpus.held_out`.
        """
        raise NotImplementedError

    def transform(self, batch: Batch, rngs: RowRngs) -> Batch:
        """Return the rows of a batch, transformed for the objective."""
        return batch


class CausalTask(Task):
    """Rows of the stream, unchanged."""

    def make_eval_batches(self, tokens: Tokens | None = None) -> Iterator[Batch]:
        cfg, B = self.cfg, self.cfg.train.batch
        windows = make_eval_batches(
            self.corpus.held_out if tokens is None else tokens,
            B,
            self.T,
            limit=cfg.train.eval_batches,
            pad=self.corpus.tokenizer.pad,
            mask_documents=cfg.model.documents == "separate",
        )
        for number, batch in enumerate(windows):
            rngs = (np.random.default_rng([0, HELD_OUT_SEED, number * B + row]) for row in range(B))
            yield self.transform(batch, rngs)


class PrefixTask(CausalTask):
    """A random prefix of each document in a window is given; the rest is to be predicted.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1.
    """

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        batch = super().describe_batch(cfg)
        return batch._replace(prefix=batch.tokens)

    def transform(self, batch: Batch, rngs: RowRngs) -> Batch:
        prefix = np.zeros_like(batch.tokens)  # [B T]
        for row, rng in enumerate(rngs):
            sizes = np.bincount(batch.segment_ids[row], minlength=1)  # [documents + 1]
            drawn = rng.integers(1, np.maximum(2, sizes[1:]))
            prefix[row] = np.concatenate([[0], drawn])[batch.segment_ids[row]]
        # The last token of the prefix predicts the first one after it.
        is_predicted = batch.positions >= prefix - 1
        return batch._replace(prefix=prefix, weights=batch.weights * is_predicted)


class MaskedTask(CausalTask):
    """`train.mask_rate` of the tokens are predicted: 80% masked, 10% replaced, 10% unchanged.

    Source: Devlin et al. 2019 (BERT), section 3.1; masks drawn anew every time, as in Liu et al.
    2019 (RoBERTa), arXiv:1907.11692, section 4.1.
    """

    @staticmethod
    def count_mask_tokens(cfg: Config) -> int:
        return 1

    def transform(self, batch: Batch, rngs: RowRngs) -> Batch:
        T, tokenizer = self.T, self.corpus.tokenizer
        drawn = np.empty((len(batch.tokens), 2, T))
        replacements = np.empty(batch.tokens.shape, np.int64)
        for row, rng in enumerate(rngs):
            rng.random(out=drawn[row])
            replacements[row] = rng.integers(tokenizer.vocab_size, size=T)
        specials = [tokenizer.bos, tokenizer.eos, tokenizer.pad]
        is_text = (batch.segment_ids > 0) & ~np.isin(batch.tokens, specials)
        is_predicted = is_text & (drawn[:, 0] < self.cfg.train.mask_rate)
        mask = self.cfg.model.first_mask
        choice = drawn[:, 1]
        corrupted = np.where(choice < 0.8, mask, np.where(choice < 0.9, replacements, batch.tokens))
        tokens = np.where(is_predicted, corrupted, batch.tokens).astype(np.int32)
        weights = is_predicted.astype(np.float32)
        return batch._replace(tokens=tokens, targets=batch.tokens, weights=weights)


class SpanTask(CausalTask):
    """Span corruption: `train.mask_rate` of the source is removed in spans, one mask for each.

    The target lists every mask, followed by the tokens that it replaced:

        source   the <0> sat on <1> mat <eos>
        target   <0> cat <1> the <eos>

    Masks count down from `model.mask_token`, by default the last id of the vocabulary. A row is a
    window of the stream, whatever the documents in it, long enough for its source to fill the
    context.

    Source: Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.1.4.
    """

    @staticmethod
    def count_mask_tokens(cfg: Config) -> int:
        return _count_spans(SpanTask.compute_row_tokens(cfg), cfg)[1]

    @staticmethod
    def compute_row_tokens(cfg: Config) -> int:
        def count_source_tokens(n):
            masked, spans = _count_spans(n, cfg)
            return n - masked + spans + 1

        context = cfg.model.context
        fits = (n for n in range(2 * context, 1, -1) if count_source_tokens(n) <= context)
        return next(fits, 2)

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        B, T = cfg.train.batch, cls.compute_row_tokens(cfg)
        masked, spans = _count_spans(T, cfg)
        source, target = (_make_zeros(B, n + spans + 1) for n in (T - masked, masked))
        weights = _make_zeros(*target.shape, dtype=np.float32)
        return Batch(target, target, target, target, weights, None, EncoderInputs(*[source] * 3))

    def transform(self, batch: Batch, rngs: RowRngs) -> Batch:
        B, tokenizer = len(batch.tokens), self.corpus.tokenizer
        masked, spans = _count_spans(self.T, self.cfg)
        sizes = np.count_nonzero(batch.segment_ids, axis=1)  # [B], without the padding at the end
        sources = np.full((B, self.T - masked + spans + 1), tokenizer.pad, np.int32)
        targets = np.full((B, masked + spans + 1), tokenizer.pad, np.int32)
        lengths = np.zeros((2, B), np.int64)  # of sources and targets
        rngs = list(rngs)
        for n in np.unique(sizes[sizes > 1]).tolist():  # nearly always one
            rows = np.flatnonzero(sizes == n)
            source, target = self._split_spans(batch.tokens[rows, :n], [rngs[row] for row in rows])
            sources[rows, : source.shape[1]] = source
            targets[rows, : target.shape[1]] = target
            lengths[:, rows] = [[source.shape[1]], [target.shape[1]]]
        bos = np.full((B, 1), self.cfg.model.get_start_token(tokenizer.bos), np.int32)
        decoder_tokens = np.concatenate([bos, targets[:, :-1]], axis=1)
        positions, segment_ids = _make_coords(targets, lengths[1])
        weights = segment_ids.astype(np.float32)
        inputs = EncoderInputs(sources, *_make_coords(sources, lengths[0]))
        return Batch(
            decoder_tokens, targets, positions, segment_ids, weights, encoder_inputs=inputs
        )

    def _split_spans(
        self, tokens: np.ndarray, rngs: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sources and the targets of full rows [B n]."""
        B, n = tokens.shape
        masked, spans = _count_spans(n, self.cfg)
        # Kept and masked spans alternate, starting with a kept one.
        sizes = np.empty((B, spans, 2), np.int64)
        for row, rng in enumerate(rngs):
            sizes[row, :, 0] = _draw_span_sizes(rng, n - masked, spans)
            sizes[row, :, 1] = _draw_span_sizes(rng, masked, spans)
        is_masked = np.repeat(np.tile([False, True], B * spans), sizes.reshape(-1)).reshape(B, n)
        kept_ends, masked_ends = np.cumsum(sizes, axis=1).transpose(2, 0, 1)  # [B spans] each
        masks = self.cfg.model.first_mask - np.arange(spans)

        def insert_masks(text, before):  # between the tokens of a row, and eos at its end
            shape = (B, text.size // B + spans + 1)
            out = np.full(shape, self.corpus.tokenizer.eos, np.int32)
            is_text = np.ones(shape, bool)
            is_text[:, -1] = False
            np.put_along_axis(is_text, before + np.arange(spans), False, axis=1)
            out[is_text] = text
            np.put_along_axis(out, before + np.arange(spans), masks[None], axis=1)
            return out

        source = insert_masks(tokens[~is_masked], kept_ends)
        return source, insert_masks(tokens[is_masked], masked_ends - sizes[:, :, 1])


def _count_spans(n: int, cfg: Config) -> tuple[int, int]:
    """Return how many of n tokens are masked, and in how many spans."""
    masked = min(max(round(n * cfg.train.mask_rate), 1), n - 1)
    return masked, min(max(round(masked / cfg.train.span), 1), masked, n - masked)


def _draw_span_sizes(rng: np.random.Generator, total: int, spans: int) -> np.ndarray:
    """Draw a division of `total` into non-empty spans, all divisions being equally likely."""
    cuts = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _make_coords(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and segment ids of one text per row [B T], of these lengths [B]."""
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    positions = np.ascontiguousarray(np.broadcast_to(columns, tokens.shape))
    return positions, (columns < lengths[:, None]).astype(np.int32)


# --- texts in pairs --------------------------------------------------------------------------


class RowTask(Task):
    """What the tasks share that evaluate row by row, because a row is more than a piece of text."""

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        self.held_out_rows = self.make_rows(corpus.held_out)

    def make_eval_batches(self, tokens: Tokens | None = None) -> Iterator[Batch]:
        B = self.cfg.train.batch
        rows = self.held_out_rows if tokens is None else self.make_eval_rows(tokens)
        total = -(-rows.size // B)
        for number in range(min(total, self.cfg.train.eval_batches or total)):
            yield rows.gather(np.arange(number * B, (number + 1) * B))

    def make_eval_rows(self, tokens: Tokens) -> Rows:
        """Return the rows of tokens that are neither trained on nor held out."""
        return self.make_rows(tokens)


class PairTask(RowTask):
    """The source is encoded, the target generated; texts longer than a row are truncated.

    A row is one pair; or several, if `data.packing` is documents: the i-th target of a row then
    attends to the i-th source only.
    """

    IS_PAIRED = True
    TEXTS_IN_CONTEXT = 2  # texts of a pair that must fit the context

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        streams = (corpus.train, corpus.held_out)
        lengths = np.concatenate([np.diff(stream.starts) for stream in streams])
        lengths = lengths.reshape(-1, 2)[:, : self.TEXTS_IN_CONTEXT]  # [pairs TEXTS_IN_CONTEXT]
        if long := int((lengths > self.T).any(axis=1).sum()):
            cut = f"{long:,} of {len(lengths):,} are longer than model.context={self.T}, and cut"
            self.note = "; ".join(filter(None, (cut, self.note)))

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        batch = super().describe_batch(cfg)
        return batch._replace(encoder_inputs=EncoderInputs(*[batch.tokens] * 3))

    def make_rows(self, tokens: Tokens) -> "PairRows":
        is_packed = self.cfg.data.packing == "documents"
        pad, start = self.corpus.tokenizer.pad, self.cfg.model.start_token
        return PairRows(tokens, self.T, pad, is_packed, start)


class PairRows:
    """Rows of pairs: documents 2 n and 2 n + 1 of a stream are a source and its target.

    Args:
        tokens: the stream.
        T: tokens of a row, for sources and for targets.
        pad: the padding token.
        is_packed: several pairs share a row.
        start: the token that targets begin with, None = bos.
    """

    def __init__(
        self,
        tokens: Tokens,
        T: int,
        pad: int,
        is_packed: bool = False,
        start: np.int32 | int | None = None,
    ):
        self.tokens, self.T, self.pad = tokens, T, pad
        self.start = None if start is None else np.int32(start)
        self.firsts = tokens.starts[:-1].reshape(-1, 2)  # [pairs 2]
        # The last token of a target is never an input, and the first never a target.
        self.sizes = np.minimum(T, np.diff(tokens.starts).reshape(-1, 2) - [0, 1])  # [pairs 2]
        rows = pack_first_fit(self.sizes, T) if is_packed else np.arange(len(self.sizes))
        self.row_index = RowIndex(rows)
        self.size = self.row_index.size
        num_tokens = int(self.sizes.sum())
        self.padding = 1 - num_tokens / (2 * self.size * T) if is_packed else 0.0

    def draw_order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the numbers of the rows in random order."""
        return rng.permutation(self.size)

    def gather(self, rows: np.ndarray) -> Batch:
        """Return the rows with these numbers, int64 [B]; rows beyond the last are empty."""
        source, target = self.pack_side(rows, 0), self.pack_side(rows, 1)
        if self.start is not None:  # in place of bos
            is_first = (target.positions == 0) & (target.segment_ids > 0)
            target = target._replace(tokens=np.where(is_first, self.start, target.tokens))
        inputs = EncoderInputs(source.tokens, source.positions, source.segment_ids)
        weights = (target.segment_ids > 0).astype(np.float32)
        return Batch(*target[:4], weights, encoder_inputs=inputs)

    def pack_side(self, rows: np.ndarray, side: int) -> PackedRows:
        """Return the sources (side 0) or targets (side 1) of these rows [B]."""
        row, pair = self.row_index.find_pieces(rows)
        firsts, sizes = self.firsts[pair, side], self.sizes[pair, side]
        return pack_rows(self.tokens, firsts, sizes, row, (rows.size, self.T), self.pad)


class ClassifyTask(PairTask):
    """One text per row, and the number of its class: targets and weights are [B].

    Raises:
        ConfigError: `model.classes` is not the number of classes in the data.
    """

    TEXTS_IN_CONTEXT = 1

    def __init__(self, cfg: Config, corpus: Corpus):
        super().__init__(cfg, corpus)
        all_rows = [*self.loader.rows, self.held_out_rows]
        found = {name for rows in all_rows for name in rows.class_names}
        self.labels = list(corpus.labels) or sorted(found)
        if len(self.labels) != cfg.model.classes:
            few = ", ".join(map(repr, self.labels[:6])) + (", ..." if len(self.labels) > 6 else "")
            raise ConfigError(
                f"model.classes={cfg.model.classes}, but data.source={cfg.data.source!r} has "
                f"{len(self.labels)} classes ({few}): set model.classes={len(self.labels)}."
            )
        for rows in all_rows:
            self._number_classes(rows)

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        batch, B = super().describe_batch(cfg), cfg.train.batch
        weights = _make_zeros(B, dtype=np.float32)
        return batch._replace(targets=_make_zeros(B), weights=weights, encoder_inputs=None)

    def make_eval_rows(self, tokens: Tokens) -> Rows:
        rows = self.make_rows(tokens)
        self._number_classes(rows)
        return rows

    def _number_classes(self, rows: "TextRows"):
        numbers = {name: number for number, name in enumerate(self.labels)}
        if unknown := sorted(set(rows.class_names) - numbers.keys()):
            raise ConfigError(
                f"a text is of the class {unknown[0]!r}, which the model does not have: it has "
                f"{', '.join(map(repr, self.labels))}."
            )
        rows.classes = np.array([numbers[name] for name in rows.class_names], np.int32)

    def make_rows(self, tokens: Tokens) -> "TextRows":
        return TextRows(tokens, self.T, self.corpus.tokenizer)


class TextRows(PairRows):
    """Rows of one text each, whose target is its class.

    Args:
        tokens, T: as for `PairRows`.
        tokenizer: decodes the name of the class.
    """

    classes: np.ndarray  # int32 [texts], set once all class names are known

    def __init__(self, tokens: Tokens, T: int, tokenizer: Tokenizer):
        super().__init__(tokens, T, tokenizer.pad)
        lengths = np.diff(tokens.starts)[1::2].tolist()
        answers = zip(self.firsts[:, 1:], lengths, strict=True)
        self.class_names = [
            tokenizer.decode(tokens.gather_windows(first, size)[0]) for first, size in answers
        ]

    def gather(self, rows: np.ndarray) -> Batch:
        """Return the texts with these numbers, int64 [B]; those beyond the last are empty."""
        texts = self.pack_side(rows, 0)
        is_text = rows < self.size
        classes = np.where(is_text, self.classes[np.minimum(rows, self.size - 1)], 0)
        weights = is_text.astype(np.float32)
        return Batch(texts.tokens, classes, texts.positions, texts.segment_ids, weights)
