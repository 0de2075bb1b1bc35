"""Conversations as text and as token ids, by the chat template that comes with a model.

A special token that a message spells is text: `<|im_end|>` in a user's message ends no turn. Before
the template runs, such spellings are replaced by single characters that occur nowhere, and put back
afterwards, so that only what the template itself writes becomes a special token.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import chat_sandbox
from jaxgpt.tokenizer.chat_templates import REQUIRED_TOKENS, TEMPLATES
from jaxgpt.tokenizer.spec import make_error

if TYPE_CHECKING:
    from jaxgpt.tokenizer.core import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning
_MAX_DEPTH = 64  # of messages and tools


class EncodedChat(NamedTuple):
    """A conversation.

    Args:
        ids: int32 [N], with the special tokens that the template writes.
        is_generated: bool [N], the tokens inside of the template's `generation` blocks: what a
            model is to learn. All False if the template has no such block.
        text: what the template writes.
    """

    ids: np.ndarray
    is_generated: np.ndarray
    text: str


def find_template(template: str) -> str:
    """Return the built-in template of this name, or the given source."""
    return TEMPLATES.get(template, template)


def check_template(template: str, specials: Collection[str], name: str):
    """Check that a tokenizer has the tokens of a built-in template.

    Raises:
        ConfigError: turns would be text that anybody can write.
    """
    if missing := [token for token in REQUIRED_TOKENS.get(template, ()) if token not in specials]:
        raise ConfigError(
            f"the chat template {template} needs the special token {missing[0]}, which {name} does "
            "not have: use the template plain, or that of the model."
        )


def read_templates(template: Any, name: str) -> dict[str, str]:
    """Return chat templates by name: of one source, of a table, or of a list as in files."""
    try:
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}
        found = {"default": template} if isinstance(template, str) else dict(template or {})
    except (TypeError, ValueError, KeyError) as error:
        raise make_error(name, f"its chat_template is {template!r:.80}") from error
    if not all(isinstance(text, str) for text in (*found, *found.values())):
        raise make_error(name, "its chat_template is not a text")
    return {key: text for key, text in found.items() if text}


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """Return a conversation as text.

    Examples:
        >>> render("chatml", [{"role": "user", "content": "Hi"}])
        '<|im_start|>user\\nHi<|im_end|>\\n'

    Args:
        template: Jinja source, or the name of a built-in template: chatml, llama3, gemma, mistral,
            plain.
        messages: dicts with at least a `role`, and usually a `content`.
        tools: JSON schemas of functions that the model may call.
        add_generation_prompt: end with the beginning of the assistant's turn.
        variables: bos_token, eos_token, and others that the template uses.

    Raises:
        ConfigError: jinja2 is not installed, the template is invalid, uses what it may not, does
            not end, or refuses the conversation.
    """
    marks = (chr(_PRIVATE_USE[-2]), chr(_PRIVATE_USE[-1]))
    text = _run(template, messages, tools, add_generation_prompt, marks, variables)
    return text.replace(marks[0], "").replace(marks[1], "")


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    template: str | None = None,
) -> EncodedChat:
    """Return a conversation as token ids. No bos is added to what the template writes.

    Args:
        tokenizer: its special tokens are those of the turns.
        messages, tools, add_generation_prompt: as for `render`.
        template: Jinja source or the name of a built-in template; None: the tokenizer's own.

    Raises:
        ConfigError: as for `render`; or there is no template, or the tokenizer lacks its tokens.
    """
    return ChatWriter(tokenizer, messages, tools, template).encode(add_generation_prompt)


class ChatWriter:
    """Writes a conversation, or the beginning of it, by one template.

    Args:
        tokenizer, messages, tools, template: as for `encode_chat`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        template: str | None = None,
    ):
        self.tokenizer = tokenizer
        self._source = _choose_template(tokenizer, template, bool(tools))
        # Messages as JSON also show that they are of plain values.
        inputs = _dump([messages, tools])
        unused = [index for index in _PRIVATE_USE if chr(index) not in inputs + self._source]
        self._marks = (chr(unused[0]), chr(unused[1]))
        self._hide = _Protector(tokenizer.special_ids, iter(map(chr, unused[2:])))
        self._messages, self._tools = self._hide.protect(messages), self._hide.protect(tools)

    def render(
        self, count: int | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the first `count` messages, protected, and its marked spans."""
        listed = self.tokenizer.list_template_tokens()
        variables = {key: value for key, value in listed.items() if value}
        messages = self._messages if count is None else self._messages[:count]
        marked = _run(
            self._source, messages, self._tools, add_generation_prompt, self._marks, variables
        )
        return _take_marks(marked, self._marks)

    def encode(self, add_generation_prompt: bool = False) -> EncodedChat:
        """Return the whole conversation as tokens."""
        return self.encode_text(*self.render(None, add_generation_prompt))

    def encode_text(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedChat:
        """Return a text of `render` as tokens, with those of the spans marked.

        The text is also divided where a span begins: a model that continues a prompt cannot write a
        token that begins inside of it.
        """
        ids: list[np.ndarray] = []
        is_generated: list[np.ndarray] = []
        specials, hide = self.tokenizer.special_ids, self._hide
        for begin, part, token, place in _split_text(text, self.tokenizer, [x for x, _ in spans]):
            if token is not None:
                found, offsets = np.array([specials[token]], np.int32), [(0, len(part))]
            else:
                part, places = hide.restore(part)
                found, offsets = self.tokenizer.encode_with_offsets(part, place)
                offsets = [(places[i], places[j]) for i, j in offsets]
            ids.append(found)
            is_generated.append(_find_inside(offsets, begin, spans))
        return EncodedChat(
            np.concatenate([np.zeros(0, np.int32), *ids]),
            np.concatenate([np.zeros(0, bool), *is_generated]),
            hide.restore(text)[0],
        )


def _choose_template(tokenizer: Tokenizer, template: str | None, has_tools: bool) -> str:
    if template is not None:
        check_template(template, tokenizer.special_ids, "the tokenizer")
        return find_template(template)
    named = tokenizer.chat_templates
    found = (has_tools and named.get("tool_use")) or tokenizer.chat_template
    if not found:
        raise ConfigError(
            "this tokenizer has no chat template: name one, of "
            f"{', '.join(TEMPLATES)}, or give Jinja source."
        )
    return found


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"messages and tools must be JSON values: {error}") from error


def _check_messages(messages: Any):
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(f"messages must be a list of dicts, and is {str(messages)[:80]!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            raise ConfigError(f"message {number} has no role: it is one of system, user, assistant")


@functools.lru_cache(maxsize=64)
def _compile(source: str, marks: tuple[str, str]) -> Any:
    if len(source) > chat_sandbox.MAX_SOURCE_CHARACTERS:
        raise ConfigError(
            f"the chat template has {len(source):,} characters, more than "
            f"{chat_sandbox.MAX_SOURCE_CHARACTERS:,}"
        )
    environment = chat_sandbox.make_environment(marks)
    with _catch_template_errors():
        return environment.from_string(source)


class _catch_template_errors:  # noqa: N801
    """Raises a ConfigError for what a template raises."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            line = getattr(error, "lineno", None)
            where = f", line {line}" if line else ""
            raise ConfigError(
                f"the chat template fails{where}: {type(error).__name__}: {error}"
            ) from error


def _run(
    template: str,
    messages: Any,
    tools: Any,
    add_generation_prompt: bool,
    marks: tuple[str, str],
    variables: Mapping[str, Any],
) -> str:
    """Return what a template writes, with marks around its `generation` blocks."""
    _check_messages(messages)
    source = find_template(template)
    compiled = _compile(source, marks)
    own = chat_sandbox.make_own_names(len(source) + len(_dump([messages, tools])))
    given = {"bos_token": "", "eos_token": "", "tools": tools or None, "documents": None}
    context = {**given, **variables, "messages": messages,
               "add_generation_prompt": add_generation_prompt, **own}  # fmt: skip
    pieces = []
    with _catch_template_errors():
        for piece in compiled.generate(context):
            own["_budget"].spend(len(piece))
            pieces.append(piece)
    return "".join(pieces)


def _take_marks(text: str, marks: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without its marks, and the spans between them."""
    spans: list[tuple[int, int]] = []
    parts, size, begin = [], 0, 0
    for part in re.split(f"([{marks[0]}{marks[1]}])", text):
        if part == marks[0]:
            begin = size
        elif part == marks[1]:
            spans.append((begin, size))
        else:
            parts.append(part)
            size += len(part)
    return "".join(parts), spans


def _find_inside(
    offsets: Sequence[tuple[int, int]], begin: int, spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Return which tokens overlap a span, bool [N]; a token of no characters if it is inside."""
    found = np.zeros(len(offsets), bool)
    if not spans or not offsets:
        return found
    first, last = np.array(offsets).T + begin  # [N], [N]
    last = np.maximum(last, first + 1)
    for left, right in spans:
        found |= (first < right) & (last > left)
    return found


def _split_text(
    text: str, tokenizer: Tokenizer, cuts: Sequence[int]
) -> Iterable[tuple[int, str, str | None, str]]:
    """Yield (begin, text, special token or None, place) of a text's parts, without empty ones.

    A token may take the whitespace beside it, as the file says. Text is divided at `cuts` too.
    """
    pattern, end = tokenizer.special_pattern, 0
    for match in pattern.finditer(text) if pattern else ():
        token = match[0].strip() if match[0] not in tokenizer.special_ids else match[0]
        yield from _cut(text, end, match.start(), cuts)
        yield match.start(), match[0], token, ""
        end = match.end()
    yield from _cut(text, end, len(text), cuts)


def _cut(text: str, begin: int, end: int, cuts: Sequence[int]):
    """Yield the parts of text[begin:end] as `_split_text` does."""
    borders = [begin, *(cut for cut in cuts if begin < cut < end), end]
    for first, last in itertools.pairwise(borders):
        if first < last:
            after_token = "start" if first == 0 else "section"
            yield first, text[first:last], None, after_token if first == begin else "inside"


class _Protector:
    """Replaces spellings of special tokens in messages by characters that occur nowhere.

    Args:
        specials: the special tokens.
        unused: such characters.
    """

    def __init__(self, specials: Collection[str], unused):
        self._unused = unused
        self._characters: dict[str, str] = {}  # spelling -> character
        self._specials = [token for token in specials if token]
        longest = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None
        self._beginnings = {token[:n] for token in longest for n in range(1, len(token))}
        self._endings = {token[-n:] for token in longest for n in range(1, len(token))}
        self._longest = max(map(len, longest), default=0)

    def protect(self, value: Any, depth: int = 0) -> Any:
        """Return JSON with every text in it protected."""
        if depth > _MAX_DEPTH:
            raise ConfigError(f"messages or tools are nested more than {_MAX_DEPTH} deep")
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {
                self._protect_text(key) if isinstance(key, str) else key: self.protect(x, depth + 1)
                for key, x in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.protect(x, depth + 1) for x in value]
        return value

    def _protect_text(self, text: str) -> str:
        if self._pattern is None or text.isidentifier():
            return text if text not in self._specials else self._hide(text)
        text = self._pattern.sub(lambda match: self._hide(match[0]), text)
        # A part of a token at an end could become one with what the template writes beside it.
        core = text.strip()
        before = text[: len(text) - len(text.lstrip())]
        after = text[len(before) + len(core) :]
        for size in range(min(self._longest, len(core)), 0, -1):
            if core[-size:] in self._beginnings:
                core = core[:-size] + self._hide(core[-size:])
                break
        for size in range(min(self._longest, len(core)), 0, -1):
            if core[:size] in self._endings:
                core = self._hide(core[:size]) + core[size:]
                break
        return before + core + after

    def _hide(self, spelling: str) -> str:
        if spelling not in self._characters:
            self._characters[spelling] = next(self._unused)
        return self._characters[spelling]

    def restore(self, text: str) -> tuple[str, list[int]]:
        """Return a text with its spellings, and for each of its characters the place before."""
        spellings = {character: spelling for spelling, character in self._characters.items()}
        parts = [spellings.get(character, character) for character in text]
        places = [place for place, part in enumerate(parts) for _ in part]
        return "".join(parts), [*places, len(text)]
