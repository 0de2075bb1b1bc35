"""SentencePiece's tokens: BPE as in Llama 2, Mistral and Gemma, Unigram as in T5.

A space is written ▁ and belongs to the word after it. Before a text comes one more, so that a word
has the same token at the beginning as elsewhere; decoding drops it. A character without a token is
written in its bytes, <0xE2>, if the tokenizer has these tokens (byte fallback), else it is unknown,
and does not come back. Neither do the characters that a normalizer replaces.

Source: Kudo and Richardson 2018 (SentencePiece, arXiv:1808.06226); Kudo 2018 (Unigram,
arXiv:1804.10959).
"""

import itertools
import re
from typing import Any

from jaxgpt.tokenizer.kind import IsBorder, Kind
from jaxgpt.tokenizer.spec import Spec

MARK = "▁"  # U+2581, how a space is written
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Steps that change a text on both sides of a cut as they change the whole: a cut is at a single
# space, between two visible ASCII characters.
_LOCAL_STEPS = {"Prepend", "Strip", "Precompiled", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt",
                "StripAccents", "Metaspace", "Digits"}  # fmt: skip


def _is_metaspace(spec: Spec) -> bool:
    decoders = spec.steps["decoder"]
    is_replaced = any(MARK in str(step.get("pattern")) for step in decoders)
    has_step = "Metaspace" in spec.list_types("decoder") + spec.list_types("pre_tokenizer")
    return spec.model_type in ("BPE", "Unigram") and (is_replaced or has_step)


def _has_byte_tokens(spec: Spec) -> bool:
    return bool(spec.model.get("byte_fallback")) or "ByteFallback" in spec.list_types("decoder")


def _read_token(spec: Spec, token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    if byte and _has_byte_tokens(spec):
        return bytes([int(byte[1], 16)])
    return token.replace(_get_mark(spec), " ").encode()


def _get_mark(spec: Spec) -> str:
    """Return the character for a space: ▁, or the one that a Metaspace step names."""
    steps = spec.steps["decoder"] + spec.steps["pre_tokenizer"]
    marks = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    return marks[0] if marks else MARK


def _adds_space(step: dict[str, Any]) -> bool:
    """Return whether a Metaspace step adds a space, in its newer form or the older one."""
    if "prepend_scheme" in step:
        return step["prepend_scheme"] != "never"
    return bool(step.get("add_prefix_space", True))


def _drops_first_space(spec: Spec) -> bool:
    for step in spec.steps["decoder"] or spec.steps["pre_tokenizer"]:
        if step["type"] == "Metaspace":
            return _adds_space(step)
        if step["type"] == "Strip":
            return step.get("content") == " " and step.get("start", 0) > 0
    return False


def _continue_steps(steps: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    changed = [step | {"strip_left": False} if step["type"] == "Strip" else step
               for step in steps["normalizer"] if step["type"] != "Prepend"]  # fmt: skip
    words = [
        {"type": "Metaspace", "replacement": step["replacement"], "prepend_scheme": "never",
         "split": step.get("split", True)}
        if step["type"] == "Metaspace" else step
        for step in steps["pre_tokenizer"]
    ]  # fmt: skip
    return steps | {"normalizer": changed, "pre_tokenizer": words}


def _is_local(step: dict[str, Any]) -> bool:
    if step["type"] in ("Replace", "Split"):
        (kind, pattern), *_ = step["pattern"].items()
        is_spaces = {*pattern} == {" "} or (kind, pattern) == ("Regex", " {2,}")
        return is_spaces or (kind == "String" and " " not in pattern)
    return step["type"] in _LOCAL_STEPS


def _make_is_border(spec: Spec, library: Any) -> IsBorder | None:
    """Return the rule: a space after a character that no token has before a space.

    Then no merge of a BPE, and no piece of a Unigram's best path, crosses the border.
    """
    if not all(map(_is_local, spec.steps["normalizer"] + spec.steps["pre_tokenizer"])):
        return None
    splits = any(step["type"] == "Metaspace" and step.get("split", True)
                 for step in spec.steps["pre_tokenizer"])  # fmt: skip
    if spec.model_type == "Unigram" and not splits:
        return None  # the sums of the scores are rounded: a tie may be broken otherwise
    mark = _get_mark(spec)
    before = {left for token in spec.vocab for left, right in itertools.pairwise(token)
              if right == mark}  # fmt: skip
    if mark not in spec.vocab:
        return None  # unknown characters in a row are one token

    def is_border(text: str, place: int) -> bool:
        return text[place] == " " and text[place - 1] not in before

    return is_border


METASPACE = Kind(
    name="SentencePiece",
    is_for=_is_metaspace,
    read_token=_read_token,
    read_added=_read_token,
    name_byte=lambda spec, byte: f"<0x{byte:02X}>",
    drops_first_space=_drops_first_space,
    continue_steps=_continue_steps,
    make_is_border=_make_is_border,
)
