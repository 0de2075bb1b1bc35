"""What kinds of tokenizers differ in: how a token spells its bytes, where text may be cut."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgpt.tokenizer.spec import Spec

IsBorder = Callable[[str, int], bool]  # whether a text may be cut at this place without other ids


class Kind(NamedTuple):
    """A kind of tokenizer, for tokenizer.json files of the `tokenizers` library.

    Args:
        name: in messages.
        is_for: whether a tokenizer.json is of this kind.
        read_token: returns the bytes of a token of the model; raises ValueError.
        read_added: returns the bytes of an added token that is not special.
        name_byte: returns the token of a single byte, which stands for bytes that are not UTF-8;
            None if there are no such tokens.
        drops_first_space: whether decoded text loses a space at its beginning, which encoding adds.
        continue_steps: returns the normalizer and the pre_tokenizer steps that encode text in the
            middle of a text, where no space is added.
        make_is_border: returns the rule for places where a text may be cut before it is encoded;
            None if there is no such place.
    """

    name: str
    is_for: Callable[[Spec], bool]
    read_token: Callable[[Spec, str], bytes]
    read_added: Callable[[Spec, str], bytes]
    name_byte: Callable[[Spec, int], str] | None
    drops_first_space: Callable[[Spec], bool]
    continue_steps: Callable[[dict[str, list[dict[str, Any]]]], dict[str, list[dict[str, Any]]]]
    make_is_border: Callable[[Spec, Any], IsBorder | None]


def keep_steps(steps: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return the same steps: text is encoded alike wherever it stands."""
    return steps
