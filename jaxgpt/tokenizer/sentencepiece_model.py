"""A tokenizer.model of SentencePiece, read without its library, as the parts of a tokenizer.json.

The file is a protocol buffer. Its wire format is a list of fields: a number (7 bits a byte, the
last one below 128) that holds the field's number and type, then a number, 4 or 8 bytes, or a size
and that many bytes.

Source: SentencePiece, `src/sentencepiece_model.proto`; Kudo and Richardson 2018, arXiv:1808.06226.
"""

import base64
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxgpt.tokenizer.spec import check_charsmap, make_error

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "word", 4: "char"}
_MARK = "▁"


class Converted(NamedTuple):
    """The parts of a tokenizer.json."""

    vocab: dict[str, int]
    model: dict[str, Any]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any]
    specials: list[str]
    user_defined: list[str]
    bos: str
    eos: str


class Piece(NamedTuple):
    """A token of the file."""

    text: str
    score: float
    type: int


def _read_number(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the place after it."""
    value = 0
    for count in range(10):
        byte = data[place + count]
        value |= (byte & 127) << 7 * count
        if byte < 128:
            return value, place + count + 1
    raise ValueError(f"a number at byte {place} does not end")


def read_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field, value) of a message: ints, floats (of 4 bytes) and bytes.

    Raises:
        ValueError: it is cut off, or is no protocol buffer.
    """
    place = 0
    while place < len(data):
        try:
            key, place = _read_number(data, place)
            kind, size = key & 7, {1: 8, 5: 4}.get(key & 7, 0)
            value: Any = None
            if kind == 0:
                value, place = _read_number(data, place)
            elif kind == 2:
                size, place = _read_number(data, place)
            elif not size:
                raise ValueError(f"byte {place} begins no field of a protocol buffer")
        except IndexError:
            raise ValueError("the file is cut off") from None
        if size > len(data) - place:
            raise ValueError(f"a field at byte {place} has {size} bytes, beyond the end")
        if kind == 2:
            value = data[place : place + size]
        elif kind == 5:
            (value,) = struct.unpack_from("<f", data, place)
        yield key >> 3, value
        place += size


def _read_piece(data: bytes) -> Piece:
    fields: dict[int, Any] = {1: b"", 2: 0.0, 3: NORMAL} | dict(read_fields(data))
    return Piece(fields[1].decode(), float(fields[2]), fields[3])


def convert(data: bytes, name: str) -> Converted:
    """Convert the content of a tokenizer.model.

    Raises:
        ConfigError, ValueError: it is damaged, or of a kind that is not supported.
    """
    if data[:1] != b"\n":
        raise make_error(name, "it is no SentencePiece model (Llama 3's tokenizer.model is one of "
                         "tiktoken: use its tokenizer.json)")  # fmt: skip
    fields = list(read_fields(data))
    pieces = [_read_piece(value) for field, value in fields if field == 1]
    trainer, normalizer = (
        {
            number: value
            for field, block in fields
            if field == which
            for number, value in read_fields(block)
        }
        for which in (2, 3)
    )
    kind = _MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    if kind not in ("Unigram", "BPE") or trainer.get(24):
        what = "treat_whitespace_as_suffix" if trainer.get(24) else f"model_type={kind}"
        raise make_error(name, f"{what} is not supported, only unigram and bpe models")
    vocab = {piece.text: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError("a piece is there twice")
    by_type = lambda *types: [p.text for p in pieces if p.type in types]  # noqa: E731
    if len(by_type(UNKNOWN)) != 1:
        raise ValueError(f"there are {len(by_type(UNKNOWN))} unknown tokens, not one")
    has_bytes = bool(trainer.get(35)) and len(by_type(BYTE)) == 256
    splits = kind == "Unigram" and not any(_MARK in piece.text[1:] for piece in pieces)
    unknown = by_type(UNKNOWN)[0]

    def find_named(field: int, default: bytes) -> str:
        """Return the token that the trainer names, if it is there."""
        token = bytes(trainer.get(field, default)).decode()
        return token if token in by_type(CONTROL) else ""

    return Converted(
        vocab=vocab,
        model=_make_model(kind, pieces, vocab, unknown, has_bytes),
        normalizer=_make_normalizer(normalizer, name),
        pre_tokenizer={"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "never",
                       "split": True} if splits else None,
        decoder=_make_decoder(normalizer, has_bytes),
        specials=by_type(UNKNOWN, CONTROL),
        user_defined=by_type(USER_DEFINED),
        bos=find_named(46, b"<s>"),
        eos=find_named(47, b"</s>"),
    )  # fmt: skip


def _make_model(
    kind: str, pieces: list[Piece], vocab: dict[str, int], unknown: str, has_bytes: bool
) -> dict[str, Any]:
    if kind == "Unigram":
        scores = [[piece.text, piece.score] for piece in pieces]
        return {"type": kind, "unk_id": vocab[unknown], "vocab": scores, "byte_fallback": has_bytes}
    return {"type": kind, "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": has_bytes,
            "ignore_merges": False, "vocab": vocab, "merges": _find_merges(pieces)}  # fmt: skip


def _find_merges(pieces: list[Piece]) -> list[list[str]]:
    """Return all pairs of pieces that make a piece, the best first.

    SentencePiece merges the adjacent pair whose piece has the highest score.
    """
    usable = {piece.text: index for index, piece in enumerate(pieces)
              if piece.type in (NORMAL, USER_DEFINED, UNUSED)}  # fmt: skip
    found = []
    for piece in pieces:
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in usable and right in usable:
                found.append((-piece.score, usable[left], usable[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _make_normalizer(fields: dict[int, Any], name: str) -> dict[str, Any] | None:
    """Return the steps of a NormalizerSpec: characters, whitespace, the first space, ▁."""
    steps: list[dict[str, Any]] = []
    if charsmap := fields.get(2):
        check_charsmap(charsmap, name)
        encoded = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    replace = lambda pattern, content: {  # noqa: E731
        "type": "Replace", "pattern": pattern, "content": content}  # fmt: skip
    if fields.get(4, 1):  # remove_extra_whitespaces
        steps.append(replace({"Regex": r"\A +|[ ▁]+\z"}, ""))
        steps.append(replace({"Regex": " {2,}"}, " "))
    if fields.get(3, 1):  # add_dummy_prefix
        steps.append({"type": "Prepend", "prepend": _MARK})
    if not fields.get(5, 1):  # escape_whitespaces
        raise ValueError("escape_whitespaces=false is not supported")
    steps.append(replace({"String": " "}, _MARK))
    return {"type": "Sequence", "normalizers": steps}


def _make_decoder(fields: dict[int, Any], has_bytes: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}
    ]
    if has_bytes:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if fields.get(3, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
