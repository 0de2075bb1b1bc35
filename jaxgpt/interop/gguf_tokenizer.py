"""Tokenizers of GGUF files: metadata to the text of a tokenizer.json.

    tokenizer.ggml.model   tokens                        becomes
    gpt2                   byte-level BPE with merges    BPE, ByteLevel
    llama                  SentencePiece BPE, scores     BPE with byte fallback; merges by score
    t5                     SentencePiece Unigram         Unigram
    bert                   "▁word" and "piece"           WordPiece: "word" and "##piece"

The type of a token tells text, control tokens, bytes and unused rows apart. The way back is in
gguf_tokenizer_write.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.interop import gguf_pretokenizers
from jaxgpt.settings import ConfigError, choose
from jaxgpt.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_TOKEN_CHARACTERS = 1024  # of SentencePiece: every split of a token is tried
SPACE = "▁"  # stands for a space in the tokens of SentencePiece
KEY = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
ID_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
    "unk": "unknown_token_id", "sep": "seperator_token_id", "pad": "padding_token_id",
    "mask": "mask_token_id",
}  # fmt: skip
# Control tokens at which llama.cpp ends a text, whether or not the file has their ids.
END_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<|end_of_text|>",
)  # fmt: skip
_DEFAULT_IDS = {
    "gpt2": {}, "llama": {"bos": 1, "eos": 2, "unk": 0}, "t5": {"eos": 1, "unk": 2, "pad": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
}  # fmt: skip

Spec = dict[str, Any]


@dataclass(frozen=True)
class Content:
    """A tokenizer that was read.

    Attributes:
        text: of a tokenizer.json.
        ids: of bos, eos, pad, unk, ..., where there are such.
        ends: ids that end a text, eos first.
        settings: as in tokenizer_config.json.
        chat_templates: by their names; the usual one is "default".
    """

    text: str
    ids: dict[str, int]
    ends: tuple[int, ...]
    settings: dict[str, Any]
    chat_templates: dict[str, str]

    def generation(self) -> dict[str, Any]:
        """Return it as generation_config.json has it."""
        found: dict[str, Any] = {
            f"{name}_token_id": self.ids[name] for name in ("bos", "pad") if name in self.ids
        }
        return found | ({"eos_token_id": list(self.ends)} if self.ends else {})

    def make(self, path: str) -> Tokenizer:
        """Make the tokenizer."""
        return Tokenizer(self.text, path, self.ends or None, self.chat_templates, self.settings)


class _Vocabulary:
    """The tokens of a file, with their types and scores."""

    def __init__(self, metadata: Mapping[str, Any], rows: int, path: str):
        self.metadata, self.path = metadata, path
        self.model = self.get("model", str)
        self.tokens: list[str] = list(self.get("tokens", list))
        self.types = self._numbers("token_type", NORMAL).tolist()
        self.scores = self._numbers("scores", 0.0).tolist()
        if len(self.tokens) > rows:
            raise self.error(f"it has {len(self.tokens):,} tokens, and embeddings of {rows:,}")
        if not set(self.types) <= set(range(7)):
            raise self.error(f"{KEY}token_type has {max(self.types)}, not 0 to 6")
        self.types = [kind or NORMAL for kind in self.types]
        while self.types and self.types[-1] == UNUSED and self.tokens[-1].startswith("[PAD"):
            del self.types[-1], self.scores[-1], self.tokens[-1]  # rows without a token
        self.ids = self._find_ids()

    def error(self, found: str) -> ConfigError:
        return ConfigError(f"{self.path}: {found}.")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(KEY + key, default)
        if not isinstance(value, kind):
            raise self.error(f"{KEY}{key} is missing, or no {kind.__name__}")
        return value

    def _numbers(self, key: str, default: float) -> np.ndarray:
        values = self.metadata.get(KEY + key)
        if values is None:
            return np.full(len(self.tokens), default)
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise self.error(f"{KEY}{key} does not have one number for each token")
        if not np.isfinite(values).all():
            raise self.error(f"{KEY}{key} has values that are not finite")
        return values

    def _find_ids(self) -> dict[str, int]:
        count, found = len(self.tokens), {}
        defaults = _DEFAULT_IDS.get(self.model, {})
        for name, key in ID_KEYS.items():
            index = self.metadata.get(KEY + key)
            if index is None and defaults.get(name, count) < count:
                index = defaults[name]
            if index is None:
                continue
            if type(index) is not int or not 0 <= index < count:
                raise self.error(f"{KEY}{key}={index!r} is not the id of a token: 0 to {count - 1}")
            found[name] = index
        return found

    def flag(self, key: str, default: bool) -> bool:
        return self.get(key, bool, default)

    def map_tokens(self, tokens: list[str] | None = None) -> dict[str, int]:
        """Return the id of every token."""
        tokens = self.tokens if tokens is None else tokens
        ids = {token: index for index, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
            raise self.error(f"{KEY}tokens has {twice!r} twice")
        return ids

    def add_tokens(self, tokens: list[str] | None = None) -> list[Spec]:
        """Return the tokens that are found in a text before it is split."""
        tokens = self.tokens if tokens is None else tokens
        return [
            {
                "id": index, "content": tokens[index], "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": kind == USER_DEFINED and SPACE in tokens[index],
                "special": kind != USER_DEFINED,
            }
            for index, kind in enumerate(self.types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and tokens[index]
        ]  # fmt: skip

    def template(self, adds_bos: bool, adds_eos: bool) -> Spec | None:
        """Return the processor that puts bos before a text and eos behind it."""
        if self.model == "bert":
            return _make_template(self.tokens, self.ids.get("bos"), self.ids.get("sep"))
        bos = self.ids.get("bos") if self.flag("add_bos_token", adds_bos) else None
        eos = self.ids.get("eos") if self.flag("add_eos_token", adds_eos) else None
        return _make_template(self.tokens, bos, eos)


def read(metadata: Mapping[str, Any], rows: int, path: str) -> Content | None:
    """Read the tokenizer of a GGUF file.

    Args:
        metadata: of the file.
        rows: of the table of embeddings; those beyond the tokens have no text.
        path: of the file, for messages.

    Returns:
        The tokenizer, or None if the file has none.

    Raises:
        ConfigError: it is damaged, or of a kind that is not supported.
    """
    kind = metadata.get(KEY + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    reader = choose(READERS, kind, f"{path}: {KEY}model")
    vocabulary = _Vocabulary(metadata, rows, path)
    if not vocabulary.tokens:
        raise vocabulary.error(f"{KEY}tokens is empty")
    spec = reader(vocabulary)
    names = {index: token for token, index in _list_pieces(spec["model"]["vocab"])}
    settings: dict[str, Any] = {
        f"{name}_token": names[vocabulary.ids[name]]
        for name in ("bos", "eos", "pad", "unk")
        if name in vocabulary.ids
    }
    settings["add_bos_token"] = _adds_bos(spec)
    return Content(
        json.dumps(spec, ensure_ascii=False),
        vocabulary.ids,
        _find_ends(vocabulary),
        settings,
        _read_templates(metadata, path),
    )


def _list_pieces(vocab: dict[str, int] | list) -> list[tuple[str, int]]:
    if isinstance(vocab, dict):
        return list(vocab.items())
    return [(piece, index) for index, (piece, _) in enumerate(vocab)]


def _adds_bos(spec: Spec) -> bool:
    template = spec["post_processor"]
    return template is not None and "SpecialToken" in template["single"][0]


def _read_templates(metadata: Mapping[str, Any], path: str) -> dict[str, str]:
    found = {}
    for key, template in metadata.items():
        name = key.removeprefix(CHAT_TEMPLATE)
        if name != key and (not name or name.startswith(".")):
            if not isinstance(template, str):
                raise ConfigError(f"{path}: {key} is no text.")
            found[name[1:] or "default"] = template
    return found


def _find_ends(vocabulary: _Vocabulary) -> tuple[int, ...]:
    named = [vocabulary.ids[name] for name in ("eos", "eot", "eom") if name in vocabulary.ids]
    by_text = [
        index
        for index, kind in enumerate(vocabulary.types)
        if kind == CONTROL and vocabulary.tokens[index] in END_TOKENS
    ]
    return tuple(dict.fromkeys(named + by_text))


def _make_spec(model: Spec, added: list[Spec], **parts: Spec | None) -> Spec:
    empty = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    return {"version": "1.0"} | empty | {"added_tokens": added} | parts | {"model": model}


def _make_template(tokens: list[str], bos: int | None, eos: int | None) -> Spec | None:
    if bos is None and eos is None:
        return None
    before, after = ([{"SpecialToken": {"id": tokens[i], "type_id": 0}}] if i is not None else []
                     for i in (bos, eos))  # fmt: skip
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]}
               for i in (bos, eos) if i is not None}  # fmt: skip
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, *(before if not after else []), second, *after],
        "special_tokens": special,
    }


def _sequence(key: str, steps: list[Spec]) -> Spec | None:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


# --- byte-level BPE ----------------------------------------------------------------------------


def _read_byte_level(vocabulary: _Vocabulary) -> Spec:
    name = vocabulary.get("pre", str, "")
    splitter = gguf_pretokenizers.find(name, vocabulary.path)
    ids = vocabulary.map_tokens()
    merges = []
    for line in filter(None, vocabulary.get("merges", list)):
        left, right = line[:1], ""
        if (at := line.find(" ", 1)) > 0:
            left, right = line[:at], line[at + 1 :]
        if left not in ids or right not in ids or left + right not in ids:
            raise vocabulary.error(f"{KEY}merges has {line!r:.80}, which are not two tokens")
        merges.append([left, right])
    model = _make_bpe(ids, merges) | {"ignore_merges": splitter.ignores_merges}
    return _make_spec(
        model,
        vocabulary.add_tokens(),
        pre_tokenizer=_sequence("pretokenizers", list(splitter.steps)),
        post_processor=vocabulary.template(splitter.adds_bos, False),
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
    )


def _make_bpe(ids: dict[str, int], merges: list[list[str]]) -> Spec:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": ids, "merges": merges,
    }  # fmt: skip


# --- SentencePiece -----------------------------------------------------------------------------


def _read_sentencepiece(vocabulary: _Vocabulary) -> Spec:
    tokens = _escape_spaces(vocabulary)
    ids = vocabulary.map_tokens(tokens)
    is_piece = [kind in (NORMAL, USER_DEFINED) for kind in vocabulary.types]
    model = _make_bpe(ids, _derive_merges(tokens, vocabulary.scores, is_piece)) | {
        "byte_fallback": all(f"<0x{byte:02X}>" in ids for byte in range(256)),
        "fuse_unk": True,
    }
    if "unk" in vocabulary.ids:
        model["unk_token"] = tokens[vocabulary.ids["unk"]]
    has_prefix = vocabulary.flag("add_space_prefix", True)
    normalizers: list[Spec] = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[Spec] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _make_spec(
        model,
        vocabulary.add_tokens(tokens),
        normalizer=_sequence("normalizers", normalizers),
        post_processor=vocabulary.template(True, False),
        decoder=_sequence("decoders", decoders),
    )


def _escape_spaces(vocabulary: _Vocabulary) -> list[str]:
    """Return the tokens with ▁ for spaces; GGUF files have spaces in user-defined ones."""
    return [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def _derive_merges(tokens: list[str], scores: list[float], is_piece: list[bool]) -> list[list[str]]:
    """Return the merges that build every piece from two others, the best score first.

    SentencePiece merges the adjacent pair whose union has the highest score. So the merges, in the
    order of the scores of what they make, do the same.
    """
    if (longest := max(map(len, tokens))) > MAX_TOKEN_CHARACTERS:
        raise ConfigError(
            f"a token of {longest:,} characters has more than {MAX_TOKEN_CHARACTERS}."
        )
    pieces = {token for token, is_part in zip(tokens, is_piece, strict=True) if is_part}
    order = sorted(
        (i for i, token in enumerate(tokens) if is_piece[i] and len(token) > 1),
        key=lambda i: (-scores[i], i),
    )
    ids = {token: index for index, token in enumerate(tokens)}
    merges = []
    for i in order:
        token = tokens[i]
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        parts = [(left, right) for left, right in splits if left in pieces and right in pieces]
        parts.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [[left, right] for left, right in parts]
    return merges


def _read_unigram(vocabulary: _Vocabulary) -> Spec:
    tokens = _escape_spaces(vocabulary)
    vocabulary.map_tokens(tokens)
    normalizers: list[Spec] = []
    charsmap = vocabulary.metadata.get(KEY + "precompiled_charsmap")
    if isinstance(charsmap, np.ndarray) and charsmap.size:
        encoded = base64.b64encode(charsmap.astype(np.uint8).tobytes()).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    has_prefix = vocabulary.flag("add_space_prefix", True)
    metaspace = {
        "type": "Metaspace", "replacement": SPACE, "split": True,
        "prepend_scheme": "always" if has_prefix else "never",
    }  # fmt: skip
    steps = [{"type": "WhitespaceSplit"}] * vocabulary.flag("remove_extra_whitespaces", False)
    model = {
        "type": "Unigram", "unk_id": vocabulary.ids.get("unk"), "byte_fallback": False,
        "vocab": [[token, score] for token, score in zip(tokens, vocabulary.scores, strict=True)],
    }  # fmt: skip
    return _make_spec(
        model,
        vocabulary.add_tokens(tokens),
        normalizer=_sequence("normalizers", normalizers),
        pre_tokenizer=_sequence("pretokenizers", [*steps, metaspace]),
        post_processor=vocabulary.template(False, True),
        decoder=metaspace,
    )


# --- WordPiece ---------------------------------------------------------------------------------


def _read_wordpiece(vocabulary: _Vocabulary) -> Spec:
    tokens = [
        token if kind in (CONTROL, UNKNOWN)
        else token[1:] if token.startswith(SPACE) and token != SPACE
        else f"##{token}"
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]  # fmt: skip
    is_lower = vocabulary.flag("normalizer.lowercase", True)
    normalizer = {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
        "strip_accents": vocabulary.flag("normalizer.strip_accents", is_lower),
        "lowercase": is_lower,
    }  # fmt: skip
    unknown = tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else "[UNK]"
    model = {
        "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": vocabulary.map_tokens(tokens),
    }  # fmt: skip
    return _make_spec(
        model,
        vocabulary.add_tokens(tokens),
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=vocabulary.template(True, True),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


READERS = {
    "gpt2": _read_byte_level,
    "llama": _read_sentencepiece,
    "t5": _read_unigram,
    "bert": _read_wordpiece,
}
