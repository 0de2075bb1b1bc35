"""Records of conversations as tokens, with a flag on the tokens that are to be learned.

A record is a JSON object, as a line of a .jsonl file:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "Hi", "completion": "Hello"}
    {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}

A prompt and its completions are texts or lists of messages. `chosen` and `rejected` may also be
whole conversations, which begin with the same messages.

In the token files a token to be learned has the bit LEARNED: text and mask cannot get out of step.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.settings import ConfigError
from jaxgpt.text import encode_utf8
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tokenizer.chat_mask import list_suitable, mark_answers
from jaxgpt.tokenizer.chat_templates import TEMPLATES

LEARNED = 1 << 30  # the bit of a token that is to be learned; no vocabulary is so large
Messages = list[dict[str, Any]]
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def take_flags(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids of any shape without the flag, and which had it."""
    return ids & (LEARNED - 1), (ids & LEARNED) > 0


@dataclass(frozen=True)
class RecordEncoder:
    """Makes the documents of a record: one token sequence or, of a preference, two.

    Args:
        context: tokens of a row. Of a conversation that is longer, whole turns leave from the
            front; a record that still does not fit is left out.
        template: a name of `TEMPLATES`, the path of a file with Jinja source, or the source; "" for
            that of the tokenizer. After `resolve`, it is the source.
    """

    context: int
    template: str = ""
    kind = "chat"

    @property
    def facts(self) -> list:
        """Plain values that change when the documents of a record do."""
        return [self.kind, self.context, self.template]

    def resolve(self, tokenizer: Tokenizer | None) -> RecordEncoder:
        """Return the encoder with the source of its template.

        Args:
            tokenizer: has a template of its own; None if it is still to be trained.

        Raises:
            ConfigError: there is no template.
        """
        found = self.template and _read_template(self.template)
        found = found or (tokenizer.chat_template if tokenizer else "")
        if not found:
            suitable = ["plain", "mistral"] if tokenizer is None else list_suitable(tokenizer)
            raise ConfigError(
                "data.chat_template='' and the tokenizer has no chat template: name one, of "
                f"{', '.join(suitable)}, or give the path of a file with Jinja source."
            )
        return dataclasses.replace(self, template=found)

    def adapt(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return a tokenizer with the template, and with the token that ends an answer as an end.

        Raises:
            ConfigError: the template needs special tokens that the tokenizer lacks, is not
                prefix-stable, or does not end an answer.
        """
        name = next((name for name, text in TEMPLATES.items() if text == self.template), None)
        tokenizer = tokenizer.with_chat_template(name or self.template)
        return with_answer_end(tokenizer)

    def read_texts(self, content: bytes) -> Iterator[bytes]:
        """Yield the texts of a record, from which a tokenizer can be trained."""
        for value in _walk(_parse(content)):
            yield encode_utf8(value)

    def encode(
        self, tokenizer: Tokenizer, name: str, content: bytes, counts: Counter
    ) -> list[np.ndarray]:
        """Return the documents of a record, int64 [N] each with flags; none if it is left out.

        Args:
            tokenizer: of `adapt`.
            name: of the record, in messages.
            content: the record as JSON.
            counts: what is counted, by name: learned (tokens), shortened (records that lost turns),
                too_long and unanswered (records that are left out).

        Raises:
            ConfigError: the record has not the fields of a conversation, or the template refuses
                it.
        """
        try:
            return self.encode_record(tokenizer, _parse(content), counts)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    def encode_record(
        self, tokenizer: Tokenizer, record: dict[str, Any], counts: Counter
    ) -> list[np.ndarray]:
        """Do the work of `encode`."""
        messages, tools = read_conversation(record), record.get("tools") or None
        if not any(message["role"] == "assistant" for message in messages):
            counts["unanswered"] += 1
            return []
        for shorter in drop_turns(messages):
            chat = mark_answers(tokenizer, shorter, tools)
            if chat.ids.size <= self.context:
                counts["shortened"] += len(shorter) < len(messages)
                counts["learned"] += int(chat.is_generated.sum())
                return [add_flags(chat.ids, chat.is_generated)]
        counts["too_long"] += 1
        return []


class PreferenceEncoder(RecordEncoder):
    """Makes two documents of a record: the prompt with what was chosen, and with what was rejected.

    Only what follows the prompt is learned. The prompt is tokenized once, and both documents must
    begin with exactly its tokens.
    """

    kind = "preference"

    def encode_record(
        self, tokenizer: Tokenizer, record: dict[str, Any], counts: Counter
    ) -> list[np.ndarray]:
        prompt, chosen, rejected = read_preference(record)
        tools = record.get("tools") or None
        for shorter in drop_turns(prompt):
            before = tokenizer.encode_chat(shorter, tools, add_generation_prompt=True)
            sides = [_encode_side(tokenizer, before, shorter, x, tools) for x in (chosen, rejected)]
            if sum(side.size for side in sides) <= self.context:
                counts["shortened"] += len(shorter) < len(prompt)
                counts["learned"] += sum(int(take_flags(side)[1].sum()) for side in sides)
                return sides
        counts["too_long"] += 1
        return []


class PromptEncoder(RecordEncoder):
    """Makes two documents of a record: the prompt as the model reads it, and the record itself.

    The second is the JSON of the record, for a reward, as tokens of text.
    """

    kind = "prompt"

    def encode_record(
        self, tokenizer: Tokenizer, record: dict[str, Any], counts: Counter
    ) -> list[np.ndarray]:
        prompt = read_prompt(record)
        for shorter in drop_turns(prompt):
            ids = tokenizer.encode_chat(
                shorter, record.get("tools") or None, add_generation_prompt=True
            )
            if ids.size < self.context:
                counts["shortened"] += len(shorter) < len(prompt)
                counts["learned"] += 1
                stored = np.frombuffer(json.dumps(record).encode(), np.uint8)
                return [ids.astype(np.int64), stored.astype(np.int64)]
        counts["too_long"] += 1
        return []


def with_answer_end(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer whose texts end also where an answer does by its template.

    Raises:
        ConfigError: as for `mark_answers`.
    """
    end = find_end(tokenizer)
    return tokenizer if end in tokenizer.ends else tokenizer.with_ends([*tokenizer.ends, end])


def find_end(tokenizer: Tokenizer) -> int:
    """Return the token that ends an answer by the tokenizer's template.

    Raises:
        ConfigError: as for `mark_answers`.
    """
    probe = mark_answers(tokenizer, _PROBE)
    return int(probe.ids[np.flatnonzero(probe.is_generated)[-1]])


def add_flags(ids: np.ndarray, is_learned: np.ndarray) -> np.ndarray:
    """Return ids [N] with the flag where they are learned, int64."""
    return ids.astype(np.int64) | np.where(is_learned, LEARNED, 0)


def _encode_side(
    tokenizer: Tokenizer, before: np.ndarray, prompt: Messages, answer: Messages, tools
) -> np.ndarray:
    """Return the tokens of a prompt and one of its completions, with flags on the latter."""
    chat = mark_answers(tokenizer, [*prompt, *answer], tools)
    if chat.ids.size < before.size or not np.array_equal(chat.ids[: before.size], before):
        raise ConfigError(
            "the chat template writes the prompt otherwise when a completion follows, so that both "
            "completions would not have the same prompt: use "
            f"data.chat_template={' or '.join(list_suitable(tokenizer))}."
        )
    last = int(np.flatnonzero(chat.is_generated)[-1]) + 1  # without what follows the last end token
    is_learned = chat.is_generated & (np.arange(chat.ids.size) >= before.size)
    return add_flags(chat.ids, is_learned)[:last]


def _parse(content: bytes) -> dict[str, Any]:
    """Return a record."""
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ConfigError(
            f"{content[:40].decode('utf-8', 'replace')!r} is no record: conversations come from a "
            '.jsonl file, a table or a data set, with "messages", or "prompt" and "completion".'
        )
    return record


def _read_template(template: str) -> str:
    """Return the source of a template of this name, or in the file of this path; or itself."""
    if template in TEMPLATES or "{{" in template:
        return TEMPLATES.get(template, template)
    path = os.path.expanduser(template)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.chat_template={template!r} is none of {', '.join(TEMPLATES)}, and no file with "
            f"a template: {error}."
        ) from error


def _walk(value: Any) -> Iterator[str]:
    """Yield the texts in JSON, without keys and roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "role":
                yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


# --- the fields of a record ------------------------------------------------------------------


def read_conversation(record: Mapping[str, Any]) -> Messages:
    """Return the messages of a record with `messages`, or with `prompt` and `completion`.

    Raises:
        ConfigError: it has neither, or a field is of another kind.
    """
    if "messages" in record:
        return _read_messages(record["messages"], "messages")
    if {"prompt", "completion"} <= record.keys():
        answer = _read_side(record["completion"], "completion", "assistant")
        return [*read_prompt(record), *answer]
    raise ConfigError(
        'a record has "messages": [{"role": ..., "content": ...}], or "prompt" and "completion"; '
        f"this one has {', '.join(record) or 'nothing'}."
    )


def read_prompt(record: Mapping[str, Any]) -> Messages:
    """Return the messages of a record's `prompt`: up to its last one of the user, of `messages`."""
    if "prompt" in record:
        system = record.get("system")
        begin = [{"role": "system", "content": system}] if isinstance(system, str) else []
        return [*begin, *_read_side(record["prompt"], "prompt", "user")]
    messages = read_conversation(record)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def read_preference(record: Mapping[str, Any]) -> tuple[Messages, Messages, Messages]:
    """Return the messages of the prompt, of what was chosen, and of what was rejected.

    Raises:
        ConfigError: a field is missing, or one of the completions has no answer.
    """
    if not {"chosen", "rejected"} <= record.keys():
        raise ConfigError(
            'a record has "prompt", "chosen" and "rejected"; this one has '
            f"{', '.join(record) or 'nothing'}."
        )
    chosen, rejected = (_read_side(record[key], key, "assistant") for key in ("chosen", "rejected"))
    given = record.get("prompt", record.get("messages"))
    prompt = _read_side(given, "prompt", "user") if given is not None else []
    if given is None:  # two conversations that begin alike
        while chosen and rejected and chosen[0] == rejected[0]:
            prompt.append(chosen[0])
            chosen, rejected = chosen[1:], rejected[1:]
    elif chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant":
            raise ConfigError(
                f"{key!r} has no answer of the assistant after the prompt: it must differ from the "
                "other one in its last message."
            )
    if not prompt:
        raise ConfigError("there is no prompt: both conversations must begin with one message.")
    return prompt, chosen, rejected


def _read_side(value: Any, key: str, role: str) -> Messages:
    """Return the messages of a text, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _read_messages(value, key)


def _read_messages(value: Any, key: str) -> Messages:
    value = _transpose(value)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key!r} must be a list of messages, and is {value!r:.60}.")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f'{key!r}: message {number} must be {{"role": "user", "content": ...}}, and is '
                f"{message!r:.60}."
            )
        if not isinstance(message.get("content"), str | list | None):
            raise ConfigError(
                f"{key!r}: the content of message {number} is {message.get('content')!r:.60}, not "
                "text."
            )
    return [_drop_missing(message) for message in value]


def _transpose(value: Any) -> Any:
    """Return the messages of a mapping of columns, as data sets store sequences of records.

    >>> _transpose({"role": ["user", "assistant"], "content": ["a", "b"]})
    [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
    """
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(x, list) for x in columns):
        return value
    if len({len(x) for x in columns}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _drop_missing(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without null fields, which in a table are those of other messages."""
    return {key: x for key, x in message.items() if x is not None or key == "content"}


def drop_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Messages]:
    """Yield a conversation, then what is left of it as whole turns leave from the front.

    A turn begins with a message of the user. A system message at the front stays, and the last turn
    stays too.

    >>> turns = [{"role": r, "content": c} for r, c in [("user", "1"), ("assistant", "2"),
    ...          ("user", "3"), ("assistant", "4")]]
    >>> for left in drop_turns(turns):
    ...     print(*(m["content"] for m in left))
    1 2 3 4
    3 4
    """
    has_system = bool(messages) and messages[0]["role"] == "system"
    first = [dict(message) for message in messages[:has_system]]
    rest = [dict(message) for message in messages[has_system:]]
    yield [*first, *rest]
    for number, message in enumerate(rest):
        if number and message["role"] == "user":
            yield [*first, *rest[number:]]
