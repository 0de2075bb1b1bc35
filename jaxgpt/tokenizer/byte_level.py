"""Byte-level tokens, as in GPT-2, Llama 3, Qwen, SmolLM, GPT-NeoX and DeepSeek.

The 256 single bytes are tokens, so nothing is unknown, and every text comes back exactly, unless a
normalizer changes it first, or the vocabulary lacks some bytes. The models differ in the pattern
that divides text into words, and no token crosses a word's border.

Source: Radford et al. 2019, section 2.2.
"""

from typing import Any

from jaxgpt.text import CUT_CONTEXT
from jaxgpt.tokenizer.kind import IsBorder, Kind
from jaxgpt.tokenizer.spec import Spec

# The character that represents each byte in tokenizer.json: GPT-2's table, all printable.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_SUBSTITUTES = iter(range(256, 512))
BYTE_CHARACTERS = [chr(byte if byte in _VISIBLE else next(_SUBSTITUTES)) for byte in range(256)]
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _is_byte_level(spec: Spec) -> bool:
    steps = spec.list_types("pre_tokenizer") + spec.list_types("normalizer")
    return spec.model_type == "BPE" and "ByteLevel" in steps


def _read_token(spec: Spec, token: str) -> bytes:
    if not CHARACTER_BYTES.keys() >= set(token):
        raise ValueError(f"token {token!r} is not written in its bytes")
    return bytes(map(CHARACTER_BYTES.__getitem__, token))


def has_gpt2_words(spec: Spec) -> bool:
    """Return whether the words are those of GPT-2's pattern, and the text is unchanged."""
    steps = spec.steps["pre_tokenizer"]
    is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
    is_plain = is_byte_level and not steps[0].get("add_prefix_space")
    return is_plain and steps[0].get("use_regex", True) and not spec.steps["normalizer"]


def _continue_steps(steps: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    words = [step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else step
             for step in steps["pre_tokenizer"]]  # fmt: skip
    return steps | {"pre_tokenizer": words}


def _make_is_border(spec: Spec, library: Any) -> IsBorder:
    """Return the rule of a pattern that is not known: a place where the library begins a word."""
    split = library.pre_tokenizer.pre_tokenize_str

    def is_border(text: str, place: int) -> bool:
        begin = max(place - CUT_CONTEXT, 0)
        words = split(text[begin : place + CUT_CONTEXT])
        return place - begin in {span[0] for _, span in words}

    return is_border


BYTE_LEVEL = Kind(
    name="byte-level BPE",
    is_for=_is_byte_level,
    read_token=_read_token,
    read_added=lambda spec, token: token.encode(),
    name_byte=lambda spec, byte: BYTE_CHARACTERS[byte],
    drops_first_space=lambda spec: False,
    continue_steps=_continue_steps,
    make_is_border=_make_is_border,
)
