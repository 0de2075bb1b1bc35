"""Training of a byte-level BPE, our own kind of tokenizer.

Source: Sennrich et al. 2016 (BPE, arXiv:1508.07909); Radford et al. 2019 (on bytes, with the
pattern that splits text into words; no token crosses a word boundary).
"""

import itertools
import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.settings import ConfigError
from jaxgpt.text import PRE_TOKENIZER, split_non_utf8
from jaxgpt.tokenizer.byte_level import BYTE_CHARACTERS
from jaxgpt.tokenizer.core import Tokenizer

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
MIN_VOCAB = len(SPECIALS) + 256  # a vocabulary without merges
MAX_TRAINED_WORD_BYTES = 256  # training takes time in the square of the length of a word


def train(documents: Iterable[str | bytes], vocab: int) -> Tokenizer:
    """Learn the merges of a byte-level BPE from text.

    Each step merges the most frequent pair of adjacent tokens. Ties go to the pair whose left token
    has the smallest id, then to the one whose right token has. So the result depends only on the
    counts: not on the order of documents, nor on the number of threads. In a run of one token
    ("aaa") overlapping pairs count, and merging goes from left to right. Words are those of GPT-2's
    pattern; bytes that are not UTF-8 are left out.

    The counts are exact, with one bound: of a word of more than MAX_TRAINED_WORD_BYTES (DNA, CJK
    without punctuation, rulers), each so many bytes are counted as a word. Without it the time is
    quadratic in the length of a word.

    Ids: the SPECIALS, then the bytes at 4 + byte, then the merges in the order learned. (No two
    merges make the same bytes: merging is deterministic inside the borders of a token.)

    Args:
        documents: text, read once and never kept in memory as a whole.
        vocab: V, the target size, at least 260. If the text has too few pairs, the tokenizer is
            smaller: see its `vocab_size`.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: vocab is too small, or the documents contain no text.

    Source: Sennrich et al. 2016, algorithm 1; Radford et al. 2019, section 2.2.
    """
    if vocab < MIN_VOCAB:
        raise ConfigError(
            f"model.vocab={vocab} has no room for the 256 bytes and {len(SPECIALS)} specials: "
            f"use at least {MIN_VOCAB}."
        )
    # Declared as special tokens, the bytes get our ids and are not sorted by their characters; so
    # the library's tie-break (the smaller pair of ids) is the one stated above. Its counts have 32
    # bits: exact unless a pair occurs 2**31 times, which takes tens of gigabytes.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[*SPECIALS, *BYTE_CHARACTERS], show_progress=False
    )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        # After ByteLevel a character is a byte.
        [PRE_TOKENIZER, pre_tokenizers.FixedLength(MAX_TRAINED_WORD_BYTES)]
    )
    texts = (part for document in documents for part in split_non_utf8(document))
    texts = (text for text in texts if text and isinstance(text, str))
    first = next(texts, None)
    if first is None:
        raise ConfigError(
            "data.tokenizer='train': there is no text to train on. "
            "Check that data.source names files that are not empty."
        )
    library.train_from_iterator(itertools.chain([first], texts), trainer)
    merges = json.loads(library.to_str())["model"]["merges"]
    return build([(left, right) for left, right in merges])


def make_byte_tokenizer() -> Tokenizer:
    """Return the tokenizer without merges: one byte is one token, V = 260."""
    return build([])


def build(
    merges: list[tuple[str, str]],
    vocab: dict[str, int] | None = None,
    specials: Sequence[str] = SPECIALS,
) -> Tokenizer:
    """Build a tokenizer with these merges; without `vocab`, ids are ordered as in `train`."""
    if vocab is None:
        tokens = [*SPECIALS, *BYTE_CHARACTERS, *(left + right for left, right in merges)]
        vocab = {token: index for index, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = PRE_TOKENIZER
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(specials))
    return Tokenizer(library.to_str(pretty=True))
