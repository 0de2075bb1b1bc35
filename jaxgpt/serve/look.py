"""The page about the inside of a model, of a conversation or a text that a server was sent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgpt import inspect, visualize
from jaxgpt.data.conversations import drop_turns, read_conversation
from jaxgpt.generate import encode_text
from jaxgpt.inspect.attention import list_attention_layers
from jaxgpt.language_model import LanguageModel
from jaxgpt.settings import ConfigError

MAX_WEIGHTS = 8 << 20  # attention weights in a page, of a byte each
MIN_TOKENS = 32  # of a page, whatever their weights take

Messages = Sequence[Mapping[str, Any]]


def make_look_page(
    model: LanguageModel,
    *,
    messages: Messages | None = None,
    prompt: str | None = None,
    template: str | None = None,
) -> str:
    """Return the page of `jaxgpt look` about a conversation or a text, as HTML.

    Of a conversation that is longer than a page shows, whole turns leave from the front, and of a
    longer text or turn its first tokens; the page notes what was left out.

    Args:
        messages: dicts with `role` and `content`.
        prompt: a text, in place of messages.
        template: of the conversation: Jinja source or the name of a built-in template; None for
            that of the model's tokenizer.

    Raises:
        ConfigError: not one of messages and prompt was given; the model cannot be looked into, or
            has no chat template; or the template refuses the messages.
    """
    if (messages is None) == (prompt is None):
        raise ConfigError("a page shows either messages or a prompt: give one of them.")
    _check_model(model, has_messages=messages is not None)
    model = model.merge()  # adapters are shown as what they make of the weights
    limit = count_max_tokens(model)
    if messages is not None:
        tokens, note = _encode_messages(model, messages, template, limit)
    else:
        tokens, note = _encode_prompt(model, prompt or "", limit)
    text = inspect.EncodedText(tokens, inspect.spell_tokens(model, tokens))
    title = f"Inside {model.config.name or 'a model'}"
    return visualize.look(model, text, title=title, note=note).html


def count_max_tokens(model: LanguageModel) -> int:
    """Return how many tokens a page shows: the weights of all heads grow with their square."""
    cfg = model.config.model
    heads = max(1, cfg.heads * len(list_attention_layers(model)))
    most = min(math.isqrt(MAX_WEIGHTS // heads), visualize.MAX_TOKENS)
    return min(max(most, MIN_TOKENS), cfg.context)


def _check_model(model: LanguageModel, has_messages: bool):
    """Raise ConfigError if a model has no page of one text, or of a conversation."""
    family = model.config.model.family
    if family == "encoder_decoder":
        raise ConfigError(
            "an encoder_decoder reads two texts, and a server is sent one: write its page by "
            "jaxgpt look RUN --source ... --text ..."
        )
    if has_messages and family != "decoder":
        raise ConfigError(
            f"a model of family {family!r} has no conversations: give a prompt instead of messages."
        )
    model.check_finite()


def _encode_messages(
    model: LanguageModel, messages: Messages, template: str | None, limit: int
) -> tuple[np.ndarray, str]:
    """Return the tokens of a conversation, at most `limit`, and what the page notes about it."""
    messages = read_conversation({"messages": list(messages)})
    left, tokens = messages, np.zeros(0, np.int32)
    for left in drop_turns(messages):
        is_question = left[-1].get("role") != "assistant"
        tokens = model.tokenizer.encode_chat(
            left, add_generation_prompt=is_question, template=template
        )
        if len(tokens) <= limit:
            break
    notes = []
    if dropped := len(messages) - len(left):
        notes.append(
            f"The conversation is longer than the {limit} tokens of this page: its first "
            f"{dropped} messages{' after the system prompt' * _has_system(left)} are left out."
        )
    if len(tokens) > limit:
        notes.append(_describe_cut(len(tokens), limit))
    return np.asarray(tokens[-limit:]), " ".join(notes)


def _has_system(messages: Messages) -> bool:
    return messages[0].get("role") == "system"


def _encode_prompt(model: LanguageModel, prompt: str, limit: int) -> tuple[np.ndarray, str]:
    """Return the tokens of a text as the model reads it, at most `limit`, and a note."""
    tokenizer = model.tokenizer
    ids = encode_text(model.config, tokenizer, prompt).tolist()
    first = tokenizer.prefix
    last = [tokenizer.eos] if model.config.model.family == "encoder" else []
    room = max(limit - len(first) - len(last), 1)
    note = _describe_cut(len(ids), room) if len(ids) > room else ""
    return np.array([*first, *ids[-room:], *last] or [tokenizer.bos], np.int32), note


def _describe_cut(count: int, shown: int) -> str:
    return (
        f"Of {count} tokens the last {shown} are shown, which the model read here as if there were "
        "none before them."
    )
