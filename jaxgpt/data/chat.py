"""Batches of conversations, of preferences, and of prompts that the model answers itself.

    chat        every token of the assistant is predicted, and those that end its texts
    preference  a row is a prompt with what was chosen, then with what was rejected
    online      a row is a prompt; the model writes the rest of the batch (see trainer/online.py)

A document is a whole conversation (see conversations.py). Nothing is decided by the id of a token:
padding is document 0, and what is learned has a flag.
"""

import json
from typing import Any

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data.conversations import (
    PreferenceEncoder,
    PromptEncoder,
    RecordEncoder,
    take_flags,
)
from jaxgpt.data.packing import Batch, PackedDocuments
from jaxgpt.data.shards import Corpus, Tokens
from jaxgpt.data.tasks import RowTask
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.chat_mask import show_learned, spell


class FlaggedRows(PackedDocuments):
    """Rows of whole documents whose targets count if they have the flag; several to a row."""

    def gather(self, rows: np.ndarray) -> Batch:
        """Return the rows with these numbers, int64 [B]; rows beyond the last are empty."""
        batch = super().gather(rows)
        tokens, _ = take_flags(batch.tokens)
        targets, is_learned = take_flags(batch.targets)
        weights = batch.weights * is_learned
        return batch._replace(tokens=tokens, targets=targets, weights=weights)


class SingleRows(FlaggedRows):
    """Rows of one document each."""

    def assign_rows(self) -> np.ndarray:
        return np.arange(self.sizes.size)


class CompletionRows(FlaggedRows):
    """Rows of two documents each: a prompt with what was chosen, and with what was rejected.

    Attributes:
        reference: the log-probabilities of both under the reference model, float32 [rows 2]; None
            until they are computed.
    """

    reference: np.ndarray | None = None

    def assign_rows(self) -> np.ndarray:
        return np.arange(self.sizes.size) // 2

    def gather(self, rows: np.ndarray) -> Batch:
        batch = super().gather(rows)
        found = np.zeros((rows.size, 2), np.float32)
        if self.reference is not None:
            is_row = rows < self.size
            found[is_row] = self.reference[rows[is_row]]
        return batch._replace(reference=found)


class ChatTask(RowTask):
    """Conversations: one to a row or, if `data.packing` is documents, several, kept separate."""

    ENCODER: type[RecordEncoder] = RecordEncoder
    UNIT = "conversations"

    def __init__(self, cfg: Config, corpus: Corpus):
        self._check_counts(cfg, corpus)
        super().__init__(cfg, corpus)
        self.note = "; ".join(filter(None, (*self._list_notes(), self.note)))
        self.example = self.show_example()

    @classmethod
    def make_encoder(cls, cfg: Config) -> RecordEncoder:
        return cls.ENCODER(cls.compute_row_tokens(cfg), cfg.data.chat_template)

    def make_rows(self, tokens: Tokens) -> PackedDocuments:
        rows = FlaggedRows if self.cfg.data.packing == "documents" else SingleRows
        return rows(tokens, self.T, pad=self.corpus.tokenizer.pad)

    def show_example(self) -> str:
        """Return the first document to train on, with what is learned in [[ ]]."""
        ids, is_learned = take_flags(_read_document(self.corpus.train, 0))
        shown = show_learned(self.corpus.tokenizer, ids, is_learned)
        return f"--- one of the {self.UNIT}, with what is learned in [[ ]]\n{shown}\n---"

    def _check_counts(self, cfg: Config, corpus: Corpus):
        for subset, counts in corpus.counts.items():
            if counts.get("learned"):
                continue
            why = [f"{counts[key]:,} {meaning}" for key, meaning in _REASONS.items()
                   if counts.get(key)]  # fmt: skip
            use = "trained on" if subset == "train" else "held out"
            raise ConfigError(
                f"data.source={cfg.data.source!r} has nothing to learn among the {self.UNIT} that "
                f"are {use}: {' and '.join(why) or 'there are none'} (model.context="
                f"{cfg.model.context}, data.holdout={cfg.data.holdout:g})."
            )

    def _list_notes(self) -> list[str]:
        counts = {key: sum(found.get(key, 0) for found in self.corpus.counts.values())
                  for key in ("learned", "shortened", *_REASONS)}  # fmt: skip
        notes = []
        if counts["shortened"]:
            notes.append(f"{counts['shortened']:,} {self.UNIT} lost turns at the front to fit "
                         f"model.context={self.T}")  # fmt: skip
        return notes + [f"{counts[key]:,} {meaning}, and left out"
                        for key, meaning in _REASONS.items() if counts[key]]  # fmt: skip


_REASONS = {
    "too_long": "are longer than model.context even with their last turn alone",
    "unanswered": "have no answer of the assistant",
}


class PreferenceTask(ChatTask):
    """Prompts with two completions, of which one was chosen: two documents of one row."""

    ENCODER = PreferenceEncoder
    UNIT = "pairs"

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        reference = np.broadcast_to(np.float32(0), (cfg.train.batch, 2))
        return super().describe_batch(cfg)._replace(reference=reference)

    def make_rows(self, tokens: Tokens) -> CompletionRows:
        return CompletionRows(tokens, self.T, pad=self.corpus.tokenizer.pad)

    @property
    def all_rows(self) -> list[CompletionRows]:
        """The rows of every stream, and those held out: what a reference is computed of."""
        rows: Any = [*self.loader.rows, self.held_out_rows]
        return rows


class OnlineTask(ChatTask):
    """Prompts, whose records a reward function reads. The model writes the answers."""

    ENCODER = PromptEncoder
    UNIT = "prompts"

    def __init__(self, cfg: Config, corpus: Corpus):
        self.all_rows: list[PromptRows] = []
        super().__init__(cfg, corpus)
        self.note = ""

    @classmethod
    def describe_batch(cls, cfg: Config) -> Batch:
        rows = cfg.train.batch * cfg.online.group
        tokens = np.broadcast_to(np.int32(0), (rows, cls.compute_row_tokens(cfg)))
        weights = np.broadcast_to(np.float32(0), tokens.shape)
        reference = np.broadcast_to(np.float32(0), (rows, 2))
        return Batch(tokens, tokens, tokens, tokens, weights, reference=reference)

    def make_rows(self, tokens: Tokens) -> "PromptRows":  # type: ignore[override]
        rows = PromptRows(tokens, self.T, len(self.all_rows), self.corpus.tokenizer.pad)
        self.all_rows.append(rows)
        return rows

    def read_prompts(self, batch: Batch) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Return the ids of each prompt of a batch, and its record; none for empty rows."""
        assert batch.reference is not None
        pairs = np.asarray(batch.reference).astype(np.int64).tolist()
        return [self.all_rows[number].read(row) for number, row in pairs if row >= 0]

    def show_example(self) -> str:
        ids = _read_document(self.corpus.train, 0)
        return f"--- one of the prompts\n{spell(self.corpus.tokenizer, ids)}\n---"


class PromptRows:
    """Rows of a prompt each: documents 2 n and 2 n + 1 are a prompt and the bytes of its record.

    Args:
        tokens, T, pad: as of `PackedDocuments`.
        number: of these rows, among those of a task.
    """

    padding = 0.0

    def __init__(self, tokens: Tokens, T: int, number: int, pad: int):
        self.tokens, self.T, self.number, self.pad = tokens, T, number, pad
        self.size = tokens.documents // 2

    def draw_order(self, rng: np.random.Generator) -> np.ndarray:
        """Return the numbers of the rows in random order."""
        return rng.permutation(self.size)

    def read(self, row: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the ids of a prompt, int32 [N], and its record."""
        stored = _read_document(self.tokens, 2 * row + 1).astype(np.uint8).tobytes()
        return _read_document(self.tokens, 2 * row), json.loads(stored)

    def gather(self, rows: np.ndarray) -> Batch:
        """Return prompts [B T] padded on the right; `reference` [B 2] is where each is from."""
        tokens = np.full((rows.size, self.T), self.pad, np.int32)
        segment_ids = np.zeros_like(tokens)
        places = np.full((rows.size, 2), -1, np.float64)
        for index, row in enumerate(rows.tolist()):
            if row < self.size:
                ids = _read_document(self.tokens, 2 * row)
                tokens[index, : ids.size], segment_ids[index, : ids.size] = ids, 1
                places[index] = self.number, row
        positions = np.where(segment_ids, np.arange(self.T, dtype=np.int32), 0).astype(np.int32)
        return Batch(
            tokens, tokens, positions, segment_ids, segment_ids.astype(np.float32),
            reference=places,
        )  # fmt: skip


def _read_document(tokens: Tokens, number: int) -> np.ndarray:
    """Return a document, int32 [N]."""
    first, end = tokens.starts[number : number + 2]
    return tokens.gather_windows(np.array([first]), int(end - first))[0]
