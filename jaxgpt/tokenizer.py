"""Byte-level BPE: encode any text or bytes as integers and back, losslessly.

A token is a string of bytes. The 256 single bytes are tokens, so nothing is unknown; each merge
adds the concatenation of two tokens. Decoding is only a table lookup of bytes by id. Training and
encoding run in the `tokenizers` library (Rust, all cores); files are its tokenizer.json.

Source: Sennrich et al. 2016 (BPE, arXiv:1508.07909); Radford et al. 2019 (on bytes, with the
pattern that splits text into words; no token crosses a word boundary).
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.settings import ConfigError, choose
from jaxgpt.text import (
    PRE_TOKENIZER,
    cut_long_text,
    cut_very_long_text,
    group_by_size,
    split_non_utf8,
)

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
MIN_VOCAB = len(SPECIALS) + 256  # a vocabulary without merges

# Names of the special tokens in common tokenizers, in order of preference.
EOS_NAMES = ("<eos>", "</s>", "[EOS]", "<|end_of_text|>", "<|endoftext|>")
BOS_NAMES = ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
UNK_NAMES = ("<unk>", "[UNK]")

# The character that represents each byte in tokenizer.json: GPT-2's table, all printable.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SUBSTITUTES = iter(range(256, 512))
BYTE_CHARACTERS = [chr(byte if byte in _VISIBLE else next(_SUBSTITUTES)) for byte in range(256)]
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}

MAX_VOCAB = 1 << 24  # ids in a tokenizer.json: a larger one is a mistake, and would fill the memory
MAX_TRAINED_WORD_BYTES = 256  # training takes time in the square of the length of a word

_PIECES_PER_CALL = 512  # of the library, whose results take about 100 bytes per token
_BYTES_PER_CALL = 1 << 20  # of text, at least one piece: at most so many tokens
_PROBE = "A  b\r\n\t c'd 1234 é e\u0301 ﬁ 北京 \U0001f642 <eos>  ".encode() + bytes(range(256))
_USAGE_HINT = (
    "Use 'train', 'bytes', the path of a byte-level BPE tokenizer.json, "
    "or a folder with GPT-2's encoder.json and vocab.bpe."
)


class Tokenizer:
    """Converts text to token ids and back. Made by `train`, `load` or `make_byte_tokenizer`.

    Examples:
        >>> tokenizer = make_byte_tokenizer()
        >>> tokenizer.encode("hi")
        array([108, 109], dtype=int32)
        >>> tokenizer.decode([2, 108, 109, 3])
        'hi'

    Args:
        content: the text of a tokenizer.json.
        name: its name in error messages.

    Attributes:
        vocab_size: V, one more than the largest id.
        pad, unk, bos, eos: ids of the special tokens. Text is never encoded to them, even if
            it spells them.
        token_bytes: the bytes of each id, [V]; b"" for specials.
        lengths: bytes per token, int32 [V]; 0 for specials.

    Raises:
        ConfigError: the content is not a byte-level BPE tokenizer.
    """

    def __init__(self, content: str, name: str = "tokenizer.json"):
        self._content, self._name = content, name
        self.parse(content, name)

    def parse(self, content: str, name: str) -> None:
        """Set `token_bytes`, `pad`, `unk`, `bos` and `eos` from the text of a tokenizer.json."""
        try:
            spec = json.loads(content)
            model, added = spec["model"], spec["added_tokens"]
            if model.get("type", "BPE") == "BPE":
                _check_ids(name, [*model["vocab"].values(), *(token["id"] for token in added)])
            step = spec["pre_tokenizer"] or {"type": "none"}
            steps = step.get("pretokenizers", [step])
            self._library = _make_encoder(spec)
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise _make_error(name, f"{type(error).__name__}: {error}") from error
        kind, words = model.get("type", "BPE"), [step["type"] for step in steps]
        if kind != "BPE" or "ByteLevel" not in words:
            raise _make_error(name, f"it is {kind} with the pre-tokenizer {' + '.join(words)}")
        if missing := [byte for byte in range(256) if BYTE_CHARACTERS[byte] not in model["vocab"]]:
            raise _make_error(name, f"it has no token for byte {missing[0]}")

        specials = {token["content"]: token["id"] for token in added if token["special"]}
        spelled = {token["content"]: token["id"] for token in added if not token["special"]}
        ends = [specials[name] for name in EOS_NAMES + BOS_NAMES if name in specials]
        if not ends:
            raise ConfigError(
                f"data.tokenizer={name!r} has no token that ends a document: "
                f"one of {', '.join(EOS_NAMES)} must be among its special tokens."
            )
        self.eos = ends[0]
        self.bos, self.pad, self.unk = (
            next((specials[name] for name in names if name in specials), self.eos)
            for names in (BOS_NAMES, PAD_NAMES, UNK_NAMES)
        )
        names = {**model["vocab"], **spelled, **specials}
        self.token_bytes = [b""] * (max(names.values()) + 1)
        for token, index in names.items():
            if token in spelled:
                self.token_bytes[index] = token.encode()
            elif token not in specials:
                if not CHARACTER_BYTES.keys() >= set(token):
                    raise _make_error(name, f"token {token!r} is not written in its bytes")
                self.token_bytes[index] = bytes(map(CHARACTER_BYTES.__getitem__, token))
        self._byte_ids = np.array(
            [names[character] for character in BYTE_CHARACTERS], np.int32
        )  # [256]
        has_gpt2_pattern = words == ["ByteLevel"] and steps[0].get("use_regex", True)
        # Words of other patterns, and added tokens, may cross a space.
        self._cut_text = cut_long_text
        if spelled or not has_gpt2_pattern:
            split = self._library.pre_tokenizer.pre_tokenize_str
            self._cut_text = functools.partial(cut_very_long_text, split, tuple(spelled))
        probe = b" \t ".join([_PROBE, *(token.encode() for token in spelled), b""])
        if self.decode_bytes(self.encode(probe)) != probe:
            raise _make_error(name, "it changes text before it encodes it")

    def __reduce__(self):
        # The library's own pickle loses `encode_special_tokens`.
        return type(self), (self._content, self._name)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.token_bytes)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, int32 [V]."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    @staticmethod
    def make(argument: str) -> "Tokenizer":
        """Return the tokenizer of this kind that data.tokenizer=KIND:argument names."""
        return load(argument)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hex digest, equal for two tokenizers if and only if their files have equal content."""
        canonical = json.dumps(json.loads(self._content), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check_fingerprint(self, expected: str, run_folder: str) -> None:
        """Check that this is the tokenizer that a run was trained with.

        Args:
            expected: its fingerprint, saved with the run; "" if the run is older than that.
            run_folder: names the run in the error.

        Raises:
            ConfigError: it is another one, whose ids would mean other text.
        """
        if expected and expected != self.fingerprint:
            raise ConfigError(
                f"{self._name} is not the tokenizer that {run_folder} was trained with: its "
                f"fingerprint is {self.fingerprint[:12]}, and that of the run {expected[:12]}. The "
                "same text would have other ids: put the run's own tokenizer.json back."
            )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids of a text, without bos or eos.

        Args:
            text: any str or bytes. Bytes that are not UTF-8 become single-byte tokens; for lone
                surrogates in a str see `text.encode_utf8`. Of a word of more than 32,768 characters
                (no language has one), each 32,768 are a word.

        Returns:
            int32 [N]; `decode_bytes` maps them back to exactly the bytes of the text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, documents: Sequence[str | bytes]) -> list[np.ndarray]:
        """Return the ids of many texts, computed on all cores.

        Args:
            documents: as for `encode`.

        Returns:
            One int32 [N] per document: the same as `encode` returns.
        """
        ids: list[list[np.ndarray]] = [[] for _ in documents]
        for place, piece in self._encode_parts(documents):
            ids[place].append(piece)
        return [pieces[0] if len(pieces) == 1 else np.concatenate(pieces) for pieces in ids]

    def encode_pieces(self, documents: Sequence[str | bytes]) -> Iterator[tuple[int, np.ndarray]]:
        """Return the ids of many texts in pieces, computed on all cores in bounded memory.

        Args:
            documents: as for `encode`.

        Returns:
            Pairs of the index of a document and the next of its ids, int32 [N], in order; at least
            one per document.
        """
        if type(self).encode_batch is Tokenizer.encode_batch:
            return self._encode_parts(documents)
        return enumerate(self.encode_batch(documents))  # of another kind of tokenizer

    def _encode_parts(self, documents: Sequence[str | bytes]) -> Iterator[tuple[int, np.ndarray]]:
        parts = (
            (place, part)
            for place, document in enumerate(documents)
            for part in split_non_utf8(document, self._cut_text)
        )
        for group in group_by_size(parts, _PIECES_PER_CALL, _BYTES_PER_CALL):
            texts = [part for _, part in group if isinstance(part, str)]
            encodings = iter(self._library.encode_batch_fast(texts, add_special_tokens=False))
            for place, part in group:
                if isinstance(part, bytes):
                    yield place, self._byte_ids[np.frombuffer(part, np.uint8)]
                else:
                    yield place, np.array(next(encodings).ids, np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Return the bytes of these ids; special tokens have none.

        Args:
            ids: integers of any shape, read in order.

        Raises:
            ValueError: an id is outside the vocabulary, or not an integer.
        """
        flat = np.asarray(ids).reshape(-1)  # [N]
        if flat.dtype.kind not in "iu":  # a list of floats, none, or with integers of over 64 bits
            flat = np.asarray(ids, object).reshape(-1)
            if wrong := [index for index in flat if not _is_integer(index)][:1]:
                raise ValueError(f"token ids must be integers, and {wrong[0]!r} is not.")
        outside = flat[(flat < 0) | (flat >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is not in the vocabulary: "
                f"ids go from 0 to {self.vocab_size - 1}."
            )
        return b"".join([self.token_bytes[index] for index in flat.tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json, which `load` and transformers read, atomically."""
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(self._content)
        os.replace(temporary, path)


class StreamDecoder:
    """Decodes ids incrementally; a character is held back until all its bytes have arrived.

    The concatenated results of `push` and `flush` equal `decode` of all ids at once.

    Examples:
        >>> stream = StreamDecoder(make_byte_tokenizer())
        >>> [stream.push(index) for index in make_byte_tokenizer().encode("né")], stream.flush()
        (['n', '', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Sequence[int] | np.ndarray) -> str:
        """Return the text completed by these ids (one id, or many)."""
        return self._decoder.decode(self._tokenizer.decode_bytes(np.atleast_1d(ids)))

    def flush(self) -> str:
        """Return the rest after the last id: U+FFFD for an incomplete character, else nothing."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


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
    return _build([(left, right) for left, right in merges])


def make_byte_tokenizer() -> Tokenizer:
    """Return the tokenizer without merges: one byte is one token, V = 260."""
    return _build([])


def load(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer from disk.

    An NFC normalizer is dropped, because it would change text. GPT-2's only special token,
    <|endoftext|>, serves as pad, unk, bos and eos.

    Args:
        path: a tokenizer.json, a folder with one, or a folder with GPT-2's encoder.json and
            vocab.bpe.

    Returns:
        The tokenizer, with the ids of the file.

    Raises:
        ConfigError: there is no such file, or it is not a byte-level BPE tokenizer.
    """
    path = pathlib.Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    ranks, pairs = path / "encoder.json", path / "vocab.bpe"
    if file.is_file():
        content = _read(file)
        return TOKENIZER_KINDS[_read_kind(content, str(file))](content, str(file))
    if not (ranks.is_file() and pairs.is_file()):
        raise ConfigError(
            f"data.tokenizer={str(path)!r}: there is no such tokenizer. {_USAGE_HINT}"
        )
    try:
        lines = _read(pairs).split("\n")[1:]  # the first line is the version
        merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
        return _build(merges, json.loads(_read(ranks)), ["<|endoftext|>"])
    except ConfigError:
        raise
    except Exception as error:  # not JSON, not pairs; and the library raises bare Exceptions
        raise _make_error(str(path), f"{type(error).__name__}: {error}") from error


# By the key "kind" in a tokenizer.json, which files of the tokenizers library do not have. Another
# kind is a subclass of `Tokenizer` that defines `parse`, `encode_batch` and `make`.
TOKENIZER_KINDS: dict[str, type[Tokenizer]] = {"bpe": Tokenizer}


def _read_kind(content: str, name: str) -> str:
    """Return the kind of tokenizer that a tokenizer.json describes."""
    try:
        kind = json.loads(content).get("kind", "bpe")
    except (ValueError, AttributeError):
        return "bpe"  # which reports what is wrong
    choose(TOKENIZER_KINDS, kind, f"{name}: kind")
    return kind


def measure_compression(tokenizer: Tokenizer, documents: Iterable[str | bytes]) -> float:
    """Compute bytes of text per token, over all documents: higher means shorter sequences.

    Raises:
        ConfigError: the documents contain no text.
    """
    size = tokens = 0
    for document in documents:
        for _, ids in tokenizer.encode_pieces([document]):
            size += int(tokenizer.lengths[ids].sum())
            tokens += ids.size
    if not tokens:
        raise ConfigError("there is no text to measure compression on: data.source is empty.")
    return size / tokens


# --- the tokenizers library ---


def _build(
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


def _make_encoder(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, without steps that change, cut, pad or randomize text."""
    without = dict.fromkeys(("post_processor", "truncation", "padding"))
    if (spec.get("normalizer") or {}).get("type") == "NFC":
        without["normalizer"] = None
    # Stripping the whitespace beside an added token would lose it.
    exact = {"lstrip": False, "rstrip": False}
    without["added_tokens"] = [token | exact for token in spec["added_tokens"]]
    library = tokenizers.Tokenizer.from_str(json.dumps(spec | without))
    if isinstance(library.model, models.BPE):
        library.model.dropout = None
    library.encode_special_tokens = True  # "<eos>" in a text is five bytes, not the end of text
    return library


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _make_error(str(path), f"{type(error).__name__}: {error}") from error


def _make_error(name: str, found: str) -> ConfigError:
    return ConfigError(
        f"data.tokenizer={name!r} is not a byte-level BPE tokenizer: {found}. {_USAGE_HINT}"
    )


def _check_ids(name: str, ids: Iterable[Any]):
    """Refuse ids that a table, or the library, would never come to the end of."""
    if wrong := [index for index in ids if not _is_integer(index) or not 0 <= index < MAX_VOCAB]:
        raise _make_error(name, f"it has the token id {wrong[0]!r}, not 0 to {MAX_VOCAB - 1:,}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
