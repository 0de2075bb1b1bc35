"""Tokenizers for GGUF files: the text of a tokenizer.json to metadata that llama.cpp reads."""

import base64
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from jaxgpt.interop import gguf_pretokenizers
from jaxgpt.interop.gguf_format import Value
from jaxgpt.interop.gguf_tokenizer import (
    BYTE,
    CHAT_TEMPLATE,
    CONTROL,
    END_TOKENS,
    ID_KEYS,
    KEY,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Spec,
)
from jaxgpt.settings import ConfigError, choose
from jaxgpt.tokenizer import Tokenizer

_UNUSED_SCORE = -10000.0


def write(
    tokenizer: Tokenizer | None, generation: Spec, config: Spec, rows: int
) -> dict[str, Value]:
    """Return the metadata of a tokenizer.

    Args:
        tokenizer: None leaves the file without one.
        generation: of the archive; its eos_token_id are ends as well.
        config: of the archive.
        rows: of the table of embeddings; llama.cpp wants a token for each.

    Returns:
        Values by their whole keys.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or it has more tokens than rows.
    """
    written = {}
    if kind_count := config.get("type_vocab_size"):
        written["token_type_count"] = Value(kind_count, "uint32")
    spec = None if tokenizer is None else json.loads(tokenizer.content)
    if tokenizer is None or spec is None or spec.get("kind") == "none":  # ids without text
        written["model"] = Value("none", "string")
        return {KEY + key: value for key, value in written.items()}
    tokens = _Tokens(spec, rows)
    written |= choose(_WRITERS, _find_kind(spec), "the tokenizer's kind")(spec, tokens)
    written["tokens"] = Value(tokens.texts, "string", is_array=True)
    written["token_type"] = Value(tokens.types, "int32", is_array=True)
    written |= _write_ids(tokenizer, generation, spec, tokens)
    found = {KEY + key: value for key, value in written.items()}
    return found | _write_templates(tokenizer.chat_templates)


def _write_templates(templates: Mapping[str, str]) -> dict[str, Value]:
    others = [name for name in templates if name != "default"]
    found = {
        CHAT_TEMPLATE if name == "default" else f"{CHAT_TEMPLATE}.{name}": Value(text, "string")
        for name, text in templates.items()
    }
    if others:
        found[f"{CHAT_TEMPLATE}s"] = Value(others, "string", is_array=True)
    return found


class _Tokens:
    """The text and the type of every row of the table of embeddings."""

    def __init__(self, spec: Spec, rows: int):
        vocab = spec["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((x[0], i) for i, x in _count(vocab))
        self.ids: dict[str, int] = dict(pairs)
        self.texts = [f"[PAD{i}]" for i in range(rows)]
        self.types = [UNUSED] * rows
        for text, index in self.ids.items():
            self._set(index, text, NORMAL)
        unknown = spec["model"].get("unk_token")
        if isinstance(spec["model"].get("unk_id"), int):
            unknown = self.texts[spec["model"]["unk_id"]]
        for token in spec.get("added_tokens") or ():
            kind = CONTROL if token["special"] else USER_DEFINED
            self._set(token["id"], token["content"], kind)
            self.ids[token["content"]] = token["id"]
        if unknown in self.ids:
            self.types[self.ids[unknown]] = UNKNOWN

    def _set(self, index: int, text: str, kind: int) -> None:
        if index >= len(self.texts):
            raise ConfigError(
                f"the tokenizer has the id {index}, and the embeddings {len(self.texts)} rows."
            )
        self.texts[index], self.types[index] = text, kind


def _count(vocab: list) -> Iterator[tuple[int, Any]]:
    return iter(enumerate(vocab))


def _flatten(part: Spec | None, key: str) -> list[Spec]:
    """Return the steps of a normalizer, a pre-tokenizer or a decoder."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _find_kind(spec: Spec) -> str:
    """Return llama.cpp's name for the kind of a tokenizer."""
    if spec.get("kind", "bpe") != "bpe":
        return f"plugin {spec['kind']}"
    kind = spec["model"].get("type", "BPE")
    if kind != "BPE":
        return {"Unigram": "t5", "WordPiece": "bert"}.get(kind, kind)
    steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
    return "gpt2" if any(step["type"] == "ByteLevel" for step in steps) else "llama"


def _write_ids(
    tokenizer: Tokenizer, generation: Spec, spec: Spec, tokens: _Tokens
) -> dict[str, Value]:
    first, last = _find_ends_of_template(spec, tokens)
    ids: dict[str, int | None] = {"bos": tokenizer.bos, "pad": tokenizer.pad, "unk": tokenizer.unk}
    ends = generation.get("eos_token_id") or []
    ends = [*tokenizer.ends, *(ends if isinstance(ends, list) else [ends])]
    ends = list(dict.fromkeys(index for index in ends if index is not None))
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    for index in ends[3:]:
        if tokens.texts[index] not in END_TOKENS:
            warnings.warn(
                f"llama.cpp will not end a text at {tokens.texts[index]!r}: it has room for three "
                "end tokens.",
                stacklevel=2,
            )
    if spec["model"].get("type") == "WordPiece":
        named = {"bos": first, "sep": last, "mask": tokens.ids.get("[MASK]")}
        ids = {key: ids[key] for key in ("pad", "unk")} | named
    flags = {
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": last is not None,
    }
    written = {ID_KEYS[name]: Value(i, "uint32") for name, i in ids.items() if i is not None}
    return written | {key: Value(flag, "bool") for key, flag in flags.items()}


def _find_ends_of_template(spec: Spec, tokens: _Tokens) -> tuple[int | None, int | None]:
    """Return the ids that are put before and behind a text."""
    for step in _flatten(spec.get("post_processor"), "processors"):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1], step["sep"][1]
        if step["type"] == "TemplateProcessing" and step["single"]:
            ends = (step["single"][0], step["single"][-1])
            names = [end.get("SpecialToken", {}).get("id") for end in ends]
            return tokens.ids.get(names[0]), tokens.ids.get(names[1])
    return None, None


# --- kinds -------------------------------------------------------------------------------------


def _write_byte_level(spec: Spec, tokens: _Tokens) -> dict[str, Value]:
    model = spec["model"]
    ignores_merges = bool(model.get("ignore_merges"))
    name = gguf_pretokenizers.find_name(spec["pre_tokenizer"], ignores_merges)
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    return {
        "model": Value("gpt2", "string"),
        "pre": Value(name, "string"),
        "merges": Value(merges or [""], "string", is_array=True),  # an array cannot be empty
    }


def _write_sentencepiece(spec: Spec, tokens: _Tokens) -> dict[str, Value]:
    model = spec["model"]
    normalizers = _flatten(spec.get("normalizer"), "normalizers")
    steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
    _refuse_others(normalizers, ("Prepend", "Replace"), "normalizer")
    _refuse_others(steps, ("Metaspace", "Split"), "pre_tokenizer")
    if _merges_spaces(normalizers, steps):
        raise ConfigError("llama.cpp's SentencePiece BPE keeps all spaces, this one does not.")
    has_prefix = _has_prefix(normalizers, steps)
    if model.get("byte_fallback"):
        for byte in range(256):
            if (index := tokens.ids.get(f"<0x{byte:02X}>")) is not None:
                tokens.types[index] = BYTE
    _spell_spaces(tokens)
    scores = _derive_scores(model["merges"], tokens)
    return {
        "model": Value("llama", "string"),
        "pre": Value("default", "string"),
        "scores": Value(scores, "float32", is_array=True),
        "add_space_prefix": Value(has_prefix, "bool"),
    }


def _has_prefix(normalizers: list[Spec], steps: list[Spec]) -> bool:
    """Return whether a text gets a space before it."""
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step.get("prepend_scheme", "always") in ("always", "first")
        for step in steps
        if step["type"] == "Metaspace"
    )


def _merges_spaces(normalizers: list[Spec], steps: list[Spec]) -> bool:
    """Return whether spaces around a text and repeated ones are dropped."""
    return any(
        step["type"] in ("Strip", "WhitespaceSplit") or "Regex" in step.get("pattern", ())
        for step in normalizers + steps
    )


def _refuse_others(steps: list[Spec], known: tuple[str, ...], part: str) -> None:
    for step in steps:
        if step["type"] not in known:
            raise ConfigError(
                f"the tokenizer's {part} {step['type']!r} has no counterpart in llama.cpp."
            )


def _spell_spaces(tokens: _Tokens) -> None:
    """Write spaces as they are in user-defined tokens, which llama.cpp looks for in the text."""
    for index, kind in enumerate(tokens.types):
        if kind == USER_DEFINED:
            tokens.texts[index] = tokens.texts[index].replace(SPACE, " ")


def _derive_scores(merges: list, tokens: _Tokens) -> list[float]:
    """Return a score for each token, which falls in the order of the merges that make them."""
    scores = [0.0 if kind == NORMAL else _UNUSED_SCORE for kind in tokens.types]
    ranks: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, len(ranks))
    for text, rank in ranks.items():
        if (index := tokens.ids.get(text)) is not None:
            scores[index] = -float(rank)
    return scores


def _write_unigram(spec: Spec, tokens: _Tokens) -> dict[str, Value]:
    normalizers = _flatten(spec.get("normalizer"), "normalizers")
    steps = _flatten(spec.get("pre_tokenizer"), "pretokenizers")
    _refuse_others(normalizers, ("Precompiled", "Strip", "Replace", "Prepend"), "normalizer")
    _refuse_others(steps, ("WhitespaceSplit", "Metaspace"), "pre_tokenizer")
    given = [score for _, score in spec["model"]["vocab"]]
    _spell_spaces(tokens)
    scores = given + [_UNUSED_SCORE] * (len(tokens.texts) - len(given))
    written = {
        "model": Value("t5", "string"),
        "pre": Value("default", "string"),
        "scores": Value(scores, "float32", is_array=True),
        "add_space_prefix": Value(_has_prefix(normalizers, steps), "bool"),
        "remove_extra_whitespaces": Value(_merges_spaces(normalizers, steps), "bool"),
    }
    for step in normalizers:
        if step["type"] == "Precompiled" and step["precompiled_charsmap"]:
            charsmap = base64.b64decode(step["precompiled_charsmap"])
            written["precompiled_charsmap"] = Value(list(charsmap), "uint8", is_array=True)
    return written


def _write_wordpiece(spec: Spec, tokens: _Tokens) -> dict[str, Value]:
    prefix = spec["model"].get("continuing_subword_prefix", "##")
    normalizers = _flatten(spec.get("normalizer"), "normalizers")
    _refuse_others(normalizers, ("BertNormalizer",), "normalizer")
    _refuse_others(
        _flatten(spec.get("pre_tokenizer"), "pretokenizers"), ("BertPreTokenizer",), "pre_tokenizer"
    )
    for index, (text, kind) in enumerate(zip(tokens.texts, tokens.types, strict=True)):
        if kind == NORMAL:
            is_piece = text.startswith(prefix) and text != prefix
            tokens.texts[index] = text.removeprefix(prefix) if is_piece else SPACE + text
    is_lower = any(step.get("lowercase", True) for step in normalizers)
    strips = [step.get("strip_accents") for step in normalizers]
    strips_accents = is_lower if not strips or strips[0] is None else strips[0]
    return {
        "model": Value("bert", "string"),
        "pre": Value("default", "string"),
        "normalizer.lowercase": Value(is_lower, "bool"),
        "normalizer.strip_accents": Value(strips_accents, "bool"),
    }


_WRITERS = {
    "gpt2": _write_byte_level,
    "llama": _write_sentencepiece,
    "t5": _write_unigram,
    "bert": _write_wordpiece,
}
