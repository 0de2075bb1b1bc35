"""How a tokenizer cuts a text: tokens, ids, bytes, and the merges of BPE step by step."""

import itertools
import json
from dataclasses import dataclass

import tokenizers

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import BYTE_CHARACTERS, CHARACTER_BYTES, Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int
    piece: str  # a part of a character is shown as its bytes, "\\xc3"
    bytes: bytes


def tokenize(tokenizer: Tokenizer, text: str) -> list[Token]:
    """Return the tokens of a text, without bos or eos."""
    found = []
    for index in tokenizer.encode(text).tolist():
        spelled = tokenizer.token_bytes[index]
        found.append(Token(index, spelled.decode("utf-8", "backslashreplace"), spelled))
    return found


@dataclass(frozen=True)
class MergeStep:
    """The pieces of a word after a merge, and the merge; None for the first, single bytes."""

    pieces: tuple[str, ...]
    merge: tuple[str, str] | None
    rank: int  # its place in the list of merges; -1 for the first


def merge_steps(tokenizer: Tokenizer, word: str) -> list[MergeStep]:
    """Return how byte-pair encoding merges the bytes of a word, one merge of the list at a time.

    Raises:
        ConfigError: the tokenizer is no byte-level BPE.

    Source: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1.
    """
    model = json.loads(tokenizer.content)["model"]
    _check_byte_level(model)
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
    pieces = [BYTE_CHARACTERS[byte] for byte in word.encode()]
    steps = [MergeStep(_show(pieces), None, -1)]
    while True:
        found = [ranks[pair] for pair in itertools.pairwise(pieces) if pair in ranks]
        if not found:
            return steps
        rank = min(found)
        left, right = pairs[rank]
        merged, i = [], 0
        while i < len(pieces):
            is_pair = pieces[i : i + 2] == [left, right]
            merged.append(left + right if is_pair else pieces[i])
            i += 1 + is_pair
        pieces = merged
        steps.append(MergeStep(_show(pieces), (_show([left])[0], _show([right])[0]), rank))


def _show(pieces: list[str]) -> tuple[str, ...]:
    return tuple(
        bytes(map(CHARACTER_BYTES.__getitem__, piece)).decode("utf-8", "backslashreplace")
        for piece in pieces
    )


def split_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the words that a byte-level BPE splits a text into; no merge crosses their bounds.

    Raises:
        ConfigError: the tokenizer is no byte-level BPE.
    """
    _check_byte_level(json.loads(tokenizer.content)["model"])
    library = tokenizers.Tokenizer.from_str(tokenizer.content).pre_tokenizer
    return [
        bytes(map(CHARACTER_BYTES.__getitem__, word)).decode("utf-8", "replace")
        for word, _ in library.pre_tokenize_str(text)
    ]


def _check_byte_level(model: dict):
    if model.get("type", "BPE") != "BPE" or not {"Ġ", "a"} <= model["vocab"].keys():
        raise ConfigError("the tokenizer is no byte-level BPE: it has no merges of bytes to show.")
