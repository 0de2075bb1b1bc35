"""Fields of JSON objects: each has a function that reads its value, or raises what it expects.

A body is read by a table of fields; a field that the table lacks is an error, never ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.serve.errors import RequestError
from jaxgpt.settings import find_nearest

MAX_SHOWN = 60  # characters of a wrong value in a message

# (value, name of the field) -> the value that is used
Reader = Callable[[Any, str], Any]


@dataclass(frozen=True)
class Field:
    """A field of an object.

    Attributes:
        read: checks its value; null is read as if the field were left out.
        meaning: what it does, for documentation.
        default: the value if it is left out.
        is_required: whether it may not be left out.
    """

    read: Reader
    meaning: str
    default: Any = None
    is_required: bool = False


def read_object(fields: Mapping[str, Field], value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all fields of a JSON object.

    Args:
        prefix: stands before names in messages: "messages[0].".

    Raises:
        RequestError: it is no object, a field is not known or missing, or a value is wrong.
    """
    if not isinstance(value, dict):
        raise make_error(prefix.rstrip(".") or None, value, "an object")
    for name in value.keys() - fields.keys():
        near = find_nearest(name, fields)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(fields)}."
        message = f"there is no field {prefix}{shorten(name)}.{hint}"
        raise RequestError(400, message, "unknown_field", f"{prefix}{name[:MAX_SHOWN]}")
    found = {}
    for name, field in fields.items():
        given = value.get(name)
        if given is None and field.is_required:
            message = f"{prefix}{name} is missing: {field.meaning}."
            raise RequestError(400, message, "missing_field", f"{prefix}{name}")
        found[name] = field.default if given is None else field.read(given, f"{prefix}{name}")
    return found


def make_error(name: str | None, value: Any, expected: str) -> RequestError:
    """Return the error of a wrong value."""
    subject = f"{name}={shorten(value)}" if name else f"the body {shorten(value)}"
    return RequestError(400, f"{subject} is not {expected}.", "invalid_value", name)


def shorten(value: Any) -> str:
    """Return a value as Python writes it, or its beginning."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**MAX_SHOWN:
        return "a number of many digits"
    if isinstance(value, str):
        value = value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
        return repr(value)
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value)


# --- readers ---------------------------------------------------------------------------------


def is_number(value: Any, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Return whether a JSON value is a number of a kind; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def number(low: float, high: float) -> Reader:
    """Return the reader of a number in a range."""

    def read(value, name):
        if not is_number(value) or not low <= value <= high:
            raise make_error(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def integer(low: int, high: int | None = None) -> Reader:
    """Return the reader of a whole number in a range."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def read(value, name):
        is_whole = is_number(value, int) or (is_number(value, float) and value.is_integer())
        if not is_whole or value < low or (high is not None and value > high):
            raise make_error(name, value, f"a whole number {limits}")
        return int(value)

    return read


def boolean(value: Any, name: str) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise make_error(name, value, "true or false")
    return value


def text(value: Any, name: str) -> str:
    """Read a text."""
    if not isinstance(value, str):
        raise make_error(name, value, "a string")
    return value


def one_of(*names: str) -> Reader:
    """Return the reader of one of several words."""

    def read(value, name):
        if value not in names:
            raise make_error(name, value, f"one of {', '.join(names)}")
        return value

    return read


def texts(most: int) -> Reader:
    """Return the reader of a text, or of a list of texts, none of which is empty: a tuple."""

    def read(value, name):
        found = [value] if isinstance(value, str) else value
        is_list = isinstance(found, list) and len(found) <= most
        if not is_list or not all(isinstance(x, str) and x for x in found):
            raise make_error(name, value, f"a string, or up to {most} of them, none empty")
        return tuple(found)

    return read


def refused(reason: str) -> Reader:
    """Return the reader of a field that this server does not have."""

    def read(value, name):
        raise RequestError(400, f"{name} is not supported: {reason}.", "unsupported_field", name)

    return read


def nested(fields: Mapping[str, Field]) -> Reader:
    """Return the reader of an object with fields."""
    return lambda value, name: read_object(fields, value, f"{name}.")


def prompts(value: Any, name: str) -> list[str | list[int]]:
    """Read a text, token ids, or a list of either: a list of prompts."""
    found: Sequence[Any] = value if isinstance(value, list) else [value]
    if isinstance(value, list) and found and all(is_number(x, int) for x in found):
        found = [found]
    is_valid = [
        isinstance(x, str) or (isinstance(x, list) and x and all(is_number(i, int) for i in x))
        for x in found
    ]
    if not found or not all(is_valid):
        raise make_error(name, value, "a string, token ids, or a list of strings or of token ids")
    return list(found)


def biases(value: Any, name: str) -> dict[int, float]:
    """Read what is added to the scores of tokens: an object from ids to numbers."""
    if not isinstance(value, dict):
        raise make_error(name, value, "an object from token ids to numbers")
    read = number(-100, 100)
    for key in value:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise make_error(name, key, "a token id")
    return {int(key): read(bias, f"{name}.{key}") for key, bias in value.items()}
