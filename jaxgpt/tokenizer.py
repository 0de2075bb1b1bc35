"""Byte-level BPE: any text or bytes to integers and back, without losing a byte.

A token is a string of bytes. The 256 single bytes are tokens, so nothing is unknown; each merge
adds the concatenation of two tokens. Decoding is a table of bytes by id, and nothing else. Training
and encoding run in the `tokenizers` library (Rust, all cores); files are its tokenizer.json.

Source: Sennrich et al. 2016 (BPE, arXiv:1508.07909); Radford et al. 2019 (on bytes, with the
pattern that divides text into words, which no token crosses).
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.settings import ConfigError

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
SMALLEST = len(SPECIALS) + 256  # a vocabulary without merges

# How tokenizers spell the same roles, in the order of preference.
EOS = ("<eos>", "</s>", "[EOS]", "<|end_of_text|>", "<|endoftext|>")
BOS = ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
UNK = ("<unk>", "[UNK]")

# The character by which tokenizer.json writes each byte: GPT-2's table, in which all are visible.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = iter(range(256, 512))
ALPHABET = [chr(byte if byte in _VISIBLE else next(_OTHERS)) for byte in range(256)]
BYTES = {character: byte for byte, character in enumerate(ALPHABET)}
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern

# Bytes that are not UTF-8, as surrogateescape writes them.
_STRAY = re.compile("([\udc80-\udcff]+)")
# Where text may be cut without changing a word: in GPT-2's pattern no word has a space after
# anything visible, and none looks behind itself.
_CUT = re.compile(r"(?<=[!-~])[ \n]")
_PIECE = 16_384  # characters between cuts: enough pieces for all cores, and a bound on memory
_GROUP = 512  # pieces per call of the library, whose answers take some 100 bytes per token
_PROBE = "A  b\r\n\t c'd 1234 é e\u0301 ﬁ 北京 \U0001f642 <eos>  ".encode() + bytes(range(256))
_RIGHT = (
    "Use 'train', 'bytes', the path of a byte-level BPE tokenizer.json, "
    "or a folder with GPT-2's encoder.json and vocab.bpe."
)


class Tokenizer:
    """Turns text into token ids and back. Made by `train`, `load` or `from_bytes`.

    >>> tokenizer = from_bytes()
    >>> tokenizer.encode("hi")
    array([108, 109], dtype=int32)
    >>> tokenizer.decode([2, 108, 109, 3])
    'hi'

    Args:
        content: the text of a tokenizer.json.
        where: names it in errors.

    Attributes:
        vocab_size: V, one more than the largest id.
        pad, unk, bos, eos: ids of the specials. Text never encodes to them, whatever it spells.
        token_bytes: the bytes of each id, [V]; b"" for specials.
        lengths: bytes per token, int32 [V]; 0 for specials.

    Raises:
        ConfigError: the content is not a byte-level BPE tokenizer.
    """

    def __init__(self, content: str, where: str = "tokenizer.json"):
        self._content, self._where = content, where
        try:
            spec = json.loads(content)
            model, added = spec["model"], spec["added_tokens"]
            step = spec["pre_tokenizer"] or {"type": "none"}
            steps = step.get("pretokenizers", [step])
            self._library = _encoder(spec)
        except Exception as error:  # the library raises bare Exceptions
            raise _refusal(where, f"{type(error).__name__}: {error}") from error
        kind, words = model.get("type", "BPE"), [step["type"] for step in steps]
        if kind != "BPE" or "ByteLevel" not in words:
            raise _refusal(where, f"it is {kind} with the pre-tokenizer {' + '.join(words)}")
        if missing := [byte for byte in range(256) if ALPHABET[byte] not in model["vocab"]]:
            raise _refusal(where, f"it has no token for byte {missing[0]}")

        specials = {token["content"]: token["id"] for token in added if token["special"]}
        spelled = {token["content"]: token["id"] for token in added if not token["special"]}
        ends = [specials[name] for name in EOS + BOS if name in specials]
        if not ends:
            raise ConfigError(
                f"data.tokenizer={where!r} has no token that ends a document: "
                f"one of {', '.join(EOS)} must be among its special tokens."
            )
        self.eos = ends[0]
        self.bos, self.pad, self.unk = (
            next((specials[name] for name in names if name in specials), self.eos)
            for names in (BOS, PAD, UNK)
        )
        names = {**model["vocab"], **spelled, **specials}
        self.vocab_size = max(names.values()) + 1
        self.token_bytes = [b""] * self.vocab_size
        for token, index in names.items():
            if token in spelled:
                self.token_bytes[index] = token.encode()
            elif token not in specials:
                if not BYTES.keys() >= set(token):
                    raise _refusal(where, f"token {token!r} is not written in its bytes")
                self.token_bytes[index] = bytes(map(BYTES.__getitem__, token))
        self.lengths = np.array([len(token) for token in self.token_bytes], np.int32)  # [V]
        self._byte_ids = np.array([names[character] for character in ALPHABET], np.int32)  # [256]
        # Another pattern's words may cross a space; only for GPT-2's is it proven that none does.
        self._cuttable = words == ["ByteLevel"] and steps[0].get("use_regex", True) and not spelled
        if self.decode_bytes(self.encode(_PROBE)) != _PROBE:
            raise _refusal(where, "it changes text before it encodes it")

    def __reduce__(self):
        # The library's own pickle forgets `encode_special_tokens`.
        return Tokenizer, (self._content, self._where)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hex digest that two tokenizers share if and only if their files say the same."""
        canonical = json.dumps(json.loads(self._content), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, without bos or eos.

        Args:
            text: any str or bytes. Bytes that are not UTF-8 become single-byte tokens; a lone
                surrogate in a str becomes the three bytes that "surrogatepass" gives it.

        Returns:
            int32 [N], for which `decode_bytes` gives exactly the bytes of the text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        """The ids of many texts, computed on all cores.

        Args:
            documents: as for `encode`.

        Returns:
            One int32 [N] for each document: the same as `encode` gives.
        """
        parts = [
            (place, part)
            for place, document in enumerate(documents)
            for part in _parts(document, self._cuttable)
        ]
        encoded = (
            np.array(encoding.ids, np.int32)
            for group in _groups((part for _, part in parts if isinstance(part, str)), _GROUP)
            for encoding in self._library.encode_batch_fast(group, add_special_tokens=False)
        )
        ids: list[list[np.ndarray]] = [[] for _ in documents]
        for place, part in parts:
            if isinstance(part, bytes):
                ids[place].append(self._byte_ids[np.frombuffer(part, np.uint8)])
            else:
                ids[place].append(next(encoded))
        return [np.concatenate(pieces) for pieces in ids]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that the ids stand for; specials stand for none.

        Args:
            ids: whole numbers of any shape, read in order.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        flat = np.asarray(ids, np.int64).reshape(-1)  # [N]
        outside = flat[(flat < 0) | (flat >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is not in the vocabulary: "
                f"ids go from 0 to {self.vocab_size - 1}."
            )
        return b"".join([self.token_bytes[index] for index in flat.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that the ids stand for; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json, which `load` and transformers read. Never leaves half a file."""
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(self._content)
        os.replace(temporary, path)


class StreamDecoder:
    """Decodes ids as they come, and holds a character back until all its bytes are there.

    Joined, everything that `push` and `flush` return is what `decode` gives for all ids at once.

    >>> stream = StreamDecoder(from_bytes())
    >>> [stream.push(index) for index in from_bytes().encode("né")], stream.flush()
    (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """The text that is certain after these ids (one id, or many)."""
        return self._decoder.decode(self._tokenizer.decode_bytes(np.atleast_1d(ids)))

    def flush(self) -> str:
        """What is left when no more ids will come: U+FFFD for half a character, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def train(documents: Iterable[str | bytes], vocab: int) -> Tokenizer:
    """Learns the merges of a byte-level BPE from text, exactly.

    Each step merges the pair of neighbouring tokens that occurs most often. Of pairs that occur
    equally often it takes the one whose left token has the smaller id, and of those the one whose
    right token has. So the outcome depends on the counts alone: not on the order of documents, nor
    on the number of threads. In a run of one token ("aaa") overlapping pairs count, and merging
    goes from left to right. Words are those of GPT-2's pattern; bytes that are not UTF-8 are left
    out.

    Ids: the SPECIALS, then the bytes at 4 + byte, then the merges in the order learnt. (No two
    merges make the same bytes: inside a token's borders merging can have gone only one way.)

    Args:
        documents: text, read once and never held as a whole.
        vocab: V, the size to reach, at least 260. If the text has too few pairs, the tokenizer is
            smaller: `vocab_size` tells.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: vocab is too small, or the documents hold no text.

    Source: Sennrich et al. 2016, algorithm 1; Radford et al. 2019, section 2.2.
    """
    if vocab < SMALLEST:
        raise ConfigError(
            f"model.vocab={vocab} has no room for the 256 bytes and {len(SPECIALS)} specials: "
            f"use at least {SMALLEST}."
        )
    # Declared as specials, the bytes get our ids, not the order of their characters; so the
    # library's tie-break (the smaller pair of ids) is the one stated above. Its counts have 32
    # bits: exact while no pair occurs 2**31 times, for which it takes tens of gigabytes.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[*SPECIALS, *ALPHABET], show_progress=False
    )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = WORDS
    texts = (part for document in documents for part in _parts(document))
    library.train_from_iterator((text for text in texts if isinstance(text, str)), trainer)
    if not trainer.get_word_count():
        raise ConfigError(
            "data.tokenizer='train': there is no text to learn from. "
            "Check that data.source names files that are not empty."
        )
    merges = json.loads(library.to_str())["model"]["merges"]
    return _build([(left, right) for left, right in merges])


def from_bytes() -> Tokenizer:
    """The tokenizer without merges: one byte is one token, V = 260."""
    return _build([])


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer from disk.

    A normalizer to NFC is left out, because it would change text. GPT-2's only special,
    <|endoftext|>, serves as pad, unk, bos and eos.

    Args:
        path: a tokenizer.json, a folder that holds one, or a folder with GPT-2's encoder.json and
            vocab.bpe.

    Returns:
        The tokenizer, with the ids of the file.

    Raises:
        ConfigError: there is no such file, or it is not a byte-level BPE tokenizer.
    """
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    ranks, pairs = path / "encoder.json", path / "vocab.bpe"
    if file.is_file():
        return Tokenizer(_read(file), str(file))
    if not (ranks.is_file() and pairs.is_file()):
        raise ConfigError(f"data.tokenizer={str(path)!r}: there is no such tokenizer. {_RIGHT}")
    try:
        lines = _read(pairs).split("\n")[1:]  # the first line names the version
        merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
        return _build(merges, json.loads(_read(ranks)), ["<|endoftext|>"])
    except ConfigError:
        raise
    except Exception as error:  # not JSON, not pairs; and the library raises bare Exceptions
        raise _refusal(str(path), f"{type(error).__name__}: {error}") from error


def compression(tokenizer: Tokenizer, documents: Iterable[str | bytes]) -> float:
    """Bytes of text per token, over all documents: higher means shorter sequences.

    Raises:
        ConfigError: the documents hold no text.
    """
    size = tokens = 0
    for group in _groups(documents, _GROUP):
        for ids in tokenizer.encode_batch(group):
            size += int(tokenizer.lengths[ids].sum())
            tokens += ids.size
    if not tokens:
        raise ConfigError("there is no text to measure compression on: data.source is empty.")
    return size / tokens


# --- the library's side ---


def _build(
    merges: list[tuple[str, str]],
    vocab: dict[str, int] | None = None,
    specials: Sequence[str] = SPECIALS,
) -> Tokenizer:
    """A tokenizer of these merges; without `vocab`, the ids are in the order of this module."""
    if vocab is None:
        tokens = [*SPECIALS, *ALPHABET, *(left + right for left, right in merges)]
        vocab = {token: index for index, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = WORDS
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(specials))
    return Tokenizer(library.to_str(pretty=True))


def _encoder(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer, without what would change, cut, pad or randomise text."""
    without = dict.fromkeys(("post_processor", "truncation", "padding"))
    if (spec.get("normalizer") or {}).get("type") == "NFC":
        without["normalizer"] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(spec | without))
    if isinstance(library.model, models.BPE):
        library.model.dropout = None
    library.encode_special_tokens = True  # "<eos>" in a text is five bytes, not the end of it
    return library


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _refusal(str(path), f"{type(error).__name__}: {error}") from error


def _refusal(where: str, found: str) -> ConfigError:
    return ConfigError(
        f"data.tokenizer={where!r} is not a byte-level BPE tokenizer: {found}. {_RIGHT}"
    )


# --- text ---


def _parts(document: str | bytes, cut: bool = True) -> Iterator[str | bytes]:
    """Divides a document into pieces of text (str) and, between them, bytes that are not UTF-8.

    Text costs one decode (or, for a str, one check) and the search for cuts.
    """
    try:
        if isinstance(document, str):
            document.encode()
            runs = [document]
        else:
            runs = [str(document, "utf-8")]
    except UnicodeError:
        if isinstance(document, str):
            document = document.encode("utf-8", "surrogatepass")
        runs = _STRAY.split(bytes(document).decode("utf-8", "surrogateescape"))
    for place, run in enumerate(runs):  # text, stray, text, ..., text
        if place % 2:
            yield run.encode("utf-8", "surrogateescape")
        elif cut:
            yield from _cut(run)
        else:
            yield run


def _cut(text: str) -> Iterator[str]:
    """Divides a long text at places that are between words of GPT-2's pattern."""
    start = 0
    while found := _CUT.search(text, start + _PIECE):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text


def _groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group
