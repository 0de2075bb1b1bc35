"""The look-inside page of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt import visualize
from jaxgpt.language_model import LanguageModel
from jaxgpt.tokenizer.chat import encode_chat


def make_look_page(
    model: LanguageModel, messages_or_text: str | Sequence[Mapping[str, Any]], template: str
) -> str:
    """Return the page that shows the inside of a model on a conversation or a text.

    Args:
        template: the chat template that writes the messages.

    Raises:
        ConfigError: the text is longer than a page shows, or the template refuses the messages.
    """
    text = messages_or_text
    if not isinstance(text, str):
        text = encode_chat(model.tokenizer, text, template=template).text
    return visualize.look(model, text).html
