"""Contamination: how much of a benchmark stands in the text that a model was trained on.

A question is contaminated if n words of it, one after the other, occur in the training text. Words
are runs of letters and digits, in lower case, so that punctuation and line breaks do not hide a
copy. The training text is read once; what is kept of it is which n-grams of the benchmark were
found.

Source: Brown et al. 2020 (GPT-3, arXiv:2005.14165), appendix C, which uses 8 to 13 words.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxgpt.config import Config
from jaxgpt.data import Corpus, prepare
from jaxgpt.data.work import LogFn, print_line
from jaxgpt.evaluate.tasks import Question
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

NGRAM_WORDS = 8
PIECE_TOKENS = 1 << 16  # of a document that are decoded at once
_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # of the hash, odd


@dataclass(frozen=True)
class Contamination:
    """How many questions of a benchmark occur in the training text.

    Attributes:
        words: n, of an n-gram.
        questions: with at least so many words.
        contaminated: of these, with an n-gram in the training text.
        share: mean fraction of the n-grams of a question that occur in it.
        short: questions with fewer words, which are not counted.
        ids: of the contaminated questions.
    """

    words: int
    questions: int
    contaminated: int
    share: float
    short: int
    ids: tuple[str, ...]

    def format(self) -> str:
        """Format as one line."""
        part = self.contaminated / max(self.questions, 1)
        few = ", ".join(self.ids[:3]) + (", ..." if len(self.ids) > 3 else "")
        return (
            f"{self.contaminated:,} of {self.questions:,} questions ({part:.2%}) have "
            f"{self.words} words in a row from the training text, {self.share:.2%} of their "
            f"{self.words}-grams" + (f" ({few})" if few else "")
            + (f"; {self.short:,} are shorter" if self.short else "")
        )  # fmt: skip


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return _WORD.findall(text.lower())


def find_contamination(
    questions: Sequence[Question], texts: Iterable[str], words: int = NGRAM_WORDS
) -> Contamination:
    """Return how many questions have an n-gram that occurs in texts.

    Args:
        questions: of a benchmark; `Question.text` is looked for.
        texts: of the training, as an iterator: each is read once.
        words: n.
    """
    vocabulary: dict[str, int] = {}
    rows = [
        np.array([vocabulary.setdefault(w, len(vocabulary) + 1) for w in split_words(x.text)])
        for x in questions
    ]
    grams = [set(map(tuple, _cut(row, words).tolist())) for row in rows]
    wanted = set().union(*grams)
    hashes = np.unique(_hash(np.array(sorted(wanted), np.int64).reshape(-1, words)))
    found: set[tuple[int, ...]] = set()
    for text in texts:
        found |= _match(text, vocabulary, hashes, wanted, words)
    long = [(x, g) for x, g in zip(questions, grams, strict=True) if g]
    shares = [len(g & found) / len(g) for _, g in long]
    return Contamination(
        words=words,
        questions=len(long),
        contaminated=sum(share > 0 for share in shares),
        share=float(np.mean(shares)) if shares else 0.0,
        short=len(questions) - len(long),
        ids=tuple(x.id for (x, _), share in zip(long, shares, strict=True) if share),
    )


def _cut(row: np.ndarray, words: int) -> np.ndarray:
    """Return the n-grams of a row of words, [N n]."""
    if len(row) < words:
        return np.zeros((0, words), np.int64)
    return np.lib.stride_tricks.sliding_window_view(row.astype(np.int64), words)


def _hash(grams: np.ndarray) -> np.ndarray:
    """Return a hash of each n-gram [N n], uint64 [N]; equal ones may differ in their words."""
    total = np.zeros(len(grams), np.uint64)
    for column in range(grams.shape[1]):
        total = total * _FACTOR + grams[:, column].astype(np.uint64)
    return total


def _match(
    text: str, vocabulary: Mapping[str, int], hashes: np.ndarray, wanted: set, words: int
) -> set[tuple[int, ...]]:
    """Return the n-grams that are wanted and occur in a text."""
    row = np.array([vocabulary.get(word, 0) for word in split_words(text)], np.int64)
    grams = _cut(row, words)
    grams = grams[(grams > 0).all(axis=1)]  # a word that no question has matches nothing
    grams = grams[np.isin(_hash(grams), hashes)]
    return set(map(tuple, grams.tolist())) & wanted


def decode_training_text(corpus: Corpus) -> Iterator[str]:
    """Yield the training text of a corpus in pieces; longer documents overlap by some words."""
    tokenizer, ids, starts = corpus.tokenizer, corpus.train.ids, corpus.train.starts
    overlap = 64
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for first in range(begin, end, PIECE_TOKENS):
            last = min(first + PIECE_TOKENS + overlap, end)
            yield _decode(tokenizer, np.asarray(ids[first:last]))


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.join_bytes(ids).decode("utf-8", "replace")


def read_training_text(
    config: Config, tokenizer: Tokenizer, run: str, log: LogFn = print_line
) -> Iterator[str]:
    """Yield the text that a run was trained on, without what it held out.

    Raises:
        ConfigError: there is none, since the model was not trained here.
    """
    if not config.data.source:
        raise ConfigError(f"--contamination: {run} names no text that it was trained on.")
    corpus = prepare(
        config.data,
        config.tokenizer_vocab,
        tokenizer=tokenizer,
        is_paired=config.objective.task.IS_PAIRED,
        log=log,
    )
    return decode_training_text(corpus)
