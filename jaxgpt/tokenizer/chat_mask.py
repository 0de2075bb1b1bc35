"""Which tokens of a conversation a model is to learn: the assistant's texts and what ends them.

A template may have `generation` marks around them. With any other one, the conversation is rendered
up to each answer and through it: what the second rendering adds is the answer. That holds only for
a template that is prefix-stable, which is checked token for token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.chat import ChatWriter, EncodedChat
from jaxgpt.tokenizer.chat_templates import REQUIRED_TOKENS, TEMPLATES

if TYPE_CHECKING:
    from jaxgpt.tokenizer.core import Tokenizer


def mark_answers(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    template: str | None = None,
) -> EncodedChat:
    """Return a conversation of which `is_generated` are the tokens that a model is to learn.

    They are the texts of the assistant, each with the token that ends it; not the line break that a
    template writes after that.

    Args:
        tokenizer, messages, tools, template: as for `encode_chat`.

    Raises:
        ConfigError: as for `encode_chat`; or the template has no `generation` marks and is not
            prefix-stable; or it does not end an answer with a special token.
    """
    writer = ChatWriter(tokenizer, messages, tools, template)
    chat = writer.encode()
    if not any(message["role"] == "assistant" for message in messages):
        return chat
    if not chat.is_generated.any():
        chat = _encode_by_prefixes(writer, messages)
    is_learned = np.zeros_like(chat.is_generated)  # [N]
    for begin, end in _find_runs(chat.is_generated):
        is_learned[begin : _find_end(tokenizer, chat.ids, begin, end)] = True
    return chat._replace(is_generated=is_learned)


def _find_runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of True in bool [N]."""
    borders = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)


def _encode_by_prefixes(writer: ChatWriter, messages: Sequence[Mapping[str, Any]]) -> EncodedChat:
    """Return a conversation with its answers marked, found by rendering what comes before each."""
    text, _ = writer.render()
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = writer.render(number, add_generation_prompt=True)
        through, _ = writer.render(number + 1)
        for part in (before, through):
            if not text.startswith(part):
                raise _make_unstable_error(writer.tokenizer, number + 1, part, text)
        if len(through) <= len(before):
            raise _make_unstable_error(writer.tokenizer, number + 1, before, through)
        spans.append((len(before), len(through)))
    chat = writer.encode_text(text, spans)
    for number, (begin, _) in enumerate(spans):  # the prompt of an answer has the same tokens
        prompt = writer.encode_text(text[:begin], spans[:number]).ids
        if not np.array_equal(prompt, chat.ids[: prompt.size]):
            raise _make_unstable_error(writer.tokenizer, number + 1, text[:begin], text)
    return chat


def _make_unstable_error(tokenizer: Tokenizer, number: int, part: str, whole: str) -> ConfigError:
    pairs = enumerate(zip(part, whole, strict=False))
    place = next((n for n, (one, other) in pairs if one != other), min(len(part), len(whole)))
    return ConfigError(
        "the chat template has no generation marks and is not prefix-stable: with the first "
        f"{number} messages it writes {part[place : place + 30]!r} where the whole conversation has"
        f" {whole[place : place + 30]!r}, so that what is to be learned is unknown. Use one with "
        f"marks: data.chat_template={' or '.join(list_suitable(tokenizer))}."
    )


def list_suitable(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the built-in templates whose special tokens a tokenizer has."""
    known = tokenizer.special_ids
    return [name for name in TEMPLATES if all(x in known for x in REQUIRED_TOKENS[name])]


def _find_end(tokenizer: Tokenizer, ids: np.ndarray, begin: int, end: int) -> int:
    """Return the end of an answer: after its last special token, which must be its last text."""
    specials = np.fromiter(tokenizer.special_ids.values(), np.int64)
    found = np.flatnonzero(np.isin(ids[begin:end], specials))
    last = begin + int(found[-1]) + 1 if found.size else begin
    if not found.size or tokenizer.join_bytes(ids[last:end]).strip():
        raise ConfigError(
            "the chat template does not end the assistant's text with a special token that is "
            f"learned (it ends with {spell(tokenizer, ids[max(begin, end - 4) : end])!r}), so that "
            "the model would never learn to stop: use a template that does, "
            f"data.chat_template={' or '.join(list_suitable(tokenizer))}."
        )
    return last


def spell(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of ids with special tokens as they are written."""
    names = {index: token.encode() for token, index in tokenizer.special_ids.items()}
    parts = [names.get(index) or tokenizer.token_bytes[index] for index in map(int, ids)]
    return b"".join(parts).decode("utf-8", "replace")


def show_learned(tokenizer: Tokenizer, chat_ids: np.ndarray, is_learned: np.ndarray) -> str:
    """Return the text of a conversation with what is learned in [[ ]]: ids and bool [N]."""
    borders = [0, *np.flatnonzero(np.diff(is_learned)) + 1, len(chat_ids)]
    parts = []
    for begin, end in itertools.pairwise(borders):
        text = spell(tokenizer, chat_ids[begin:end])
        parts.append(f"[[{text}]]" if end > begin and is_learned[begin] else text)
    return "".join(parts)
