"""Typed, validated settings: parsing from text, bounds, and errors that name the key.

This module is independent of what is configured; the schema is in config.py.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import json
import os
import sys
import threading
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

# Held while the code of a user is imported: sys.modules and sys.path are shared by all threads. (A
# config file may load another one in its thread.)
import_lock = threading.RLock()


class ConfigError(ValueError):
    """An invalid setting: the message names the key, the value and what would be right."""


def option(
    default,
    doc: str,
    *,
    table: str = "",
    low=None,
    high=None,
    above=None,
    is_runtime=False,
    aliases=None,
    effective="",
) -> Any:
    """Declare one field of a section.

    Args:
        default: the value if it is not set.
        doc: its meaning and unit, shown by `jaxgpt train --help`.
        table: the registry of its possible names, as "module:NAME". It is a string rather than
            an import so that adding a row to the registry is all it takes to add a choice.
        low, high, above: inclusive bounds, and an exclusive lower bound.
        is_runtime: whether it concerns how a run is executed rather than what is learned, so that
            it may change when the run is resumed.
        aliases: other values that are accepted, such as those of older versions, and the present
            ones that they stand for.
        effective: the key of the property with the value in effect, if the default follows from
            other settings.
    """
    metadata = dict(doc=doc, table=table, low=low, high=high, above=above, is_runtime=is_runtime)
    metadata |= dict(effective=effective)
    return field(default=default, metadata=metadata | dict(aliases=aliases or {}))


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """Look `name` up in a registry: the only lookup by name in the library.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one and all of them.
    """
    if name in table:
        return table[name]
    near = find_nearest(name, table)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{key}={name!r} is not known.{hint} Known: {', '.join(sorted(table))}.")


def find_nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return the known names that a mistyped one may stand for, the likeliest first.

    The same letters in another case come first, then a name that begins so, then similar spelling.

    >>> find_nearest("adamW", ["adam", "adamw"]), find_nearest("temp", ["stop", "temperature"])
    (['adamw'], ['temperature'])
    """
    known, low = list(known), str(name).lower()
    same = [other for other in known if other.lower() == low]
    longer = [other for other in known if len(low) > 1 and other.lower().startswith(low)]
    by_case = {other.lower(): other for other in known}
    close = difflib.get_close_matches(low, by_case, n=count)
    return list(dict.fromkeys([*same, *longer, *(by_case[other] for other in close)]))[:count]


def resolve_table(pointer: str) -> Mapping[str, Any]:
    """Return the registry that "module:NAME" points to."""
    module, name = pointer.split(":")
    return getattr(importlib.import_module(module), name)


def list_choices(pointer: str) -> list[str]:
    """Return the names in the registry that "module:NAME" points to, read from the source.

    Importing the module would import jax, which takes a second. A registry that is not written as a
    dict with literal keys is imported nevertheless.
    """
    module, name = pointer.split(":")
    if module in sys.modules:  # plugins may have added rows
        return list(resolve_table(pointer))
    stem = os.path.join(os.path.dirname(__file__), *module.split(".")[1:])
    path = next(path for path in (f"{stem}.py", f"{stem}/__init__.py") if os.path.isfile(path))
    with open(path, encoding="utf-8") as file:
        statements = ast.parse(file.read()).body
    for node in statements:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if name in [getattr(target, "id", None) for target in targets]:
            keys = getattr(getattr(node, "value", None), "keys", [])
            if keys and all(isinstance(key, ast.Constant) for key in keys):
                return [key.value for key in keys]
    return list(resolve_table(pointer))


@dataclass(frozen=True)
class Section:
    """A group of settings that is validated when it is constructed."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        hints = _read_type_hints(type(self))
        for f in dataclasses.fields(self):
            key = f"{self.section}.{f.name}" if self.section else f.name
            value = check_field(getattr(self, f.name), f, hints[f.name], key)
            object.__setattr__(self, f.name, value)
            if f.metadata.get("table") and value is not None:
                for name in value if isinstance(value, tuple) else (value,):
                    choose(resolve_table(f.metadata["table"]), name, key)
        self.check()

    def check(self):
        """Raise ConfigError for impossible combinations of fields. Sections override this."""


# --- reading and writing values ---


def parse(text: str, kind, key: str) -> Any:
    """Parse a value of type `kind` from a command-line string."""
    args = typing.get_args(kind)
    if _is_per_layer(kind):
        return parse(text, args[1], key)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if text.lower() == "none" else parse(text, args[0], key)
    if typing.get_origin(kind) is tuple:
        items = text.split(",") if text else []
        if text.startswith("["):
            try:
                items = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{key}={text!r} is not a JSON list: {error}.") from None
        return tuple(parse(item, args[0], key) if isinstance(item, str) else item for item in items)
    if kind is str:
        return text
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ConfigError(f"{key}={text!r} is not a bool: use true or false.")
        return words[text.lower()]
    try:
        return _parse_number(text, kind)
    except ValueError:
        raise ConfigError(f"{key}={text!r} is not {_describe_type(kind)}.") from None


def _parse_number(text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        return float(text)  # "2e3" is accepted for 2000; _coerce rejects 2.5


def to_dict(config) -> dict:
    """Convert to nested dicts of plain values; `from_dict` is the inverse."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(config, f.name)) else v
        for f in dataclasses.fields(config)
    }


def from_dict(kind: type, values: Mapping, prefix: str = ""):
    """Build `kind` from nested dicts. Raise ConfigError for keys that it does not have."""
    if not isinstance(values, Mapping):
        where = f"{prefix.removesuffix('.')}=" if prefix else ""
        raise ConfigError(f"{where}{values!r} is not a group of settings.")
    hints = _read_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(describe_unknown_key(prefix + name, list_types(kind, prefix)))
    nested = {n: hints[n] for n in values if _is_section(hints[n])}
    inner = {n: from_dict(nested[n], values[n], f"{prefix}{n}.") for n in nested}
    return kind(**{**values, **inner})


def get(config, key: str) -> Any:
    """Return the value at a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


# --- the schema, read from the dataclasses ---


@functools.cache
def _read_type_hints(kind: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {k: v for k, v in typing.get_type_hints(kind).items() if k in names}


def _walk_fields(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield every leaf field: its dotted key, the field and its type."""
    for f in dataclasses.fields(kind):
        inner = _read_type_hints(kind)[f.name]
        if _is_section(inner):
            yield from _walk_fields(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, inner


def list_fields(kind: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return every leaf field by its dotted key."""
    return {key: f for key, f, _ in _walk_fields(kind, prefix)}


def list_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf field by its dotted key."""
    return {key: inner for key, _, inner in _walk_fields(kind, prefix)}


def _is_section(kind) -> bool:
    return dataclasses.is_dataclass(kind)


def _is_per_layer(kind) -> bool:
    """Whether a type is `T | tuple[T, ...]`: one value, or several that the layers cycle."""
    return any(typing.get_origin(arg) is tuple for arg in typing.get_args(kind))


def format_nearest_multiples(value: int, divisor: int) -> str:
    """Format the multiples of `divisor` on either side of `value`, for messages: "12 or 16"."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)


def describe_unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown key, with the nearest known keys."""
    known = list(known)
    same_leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = same_leaf or find_nearest(key, known)
    if not near:
        leaves = {k.split(".")[-1]: k for k in known}
        near = [leaves[n] for n in find_nearest(key.split(".")[-1], leaves)]
    hint = (
        f" Did you mean {' or '.join(near)}?" if near else " `jaxgpt train --help` lists all keys."
    )
    return f"there is no setting {key!r}.{hint}"


def check_field(value, f: dataclasses.Field, kind, key: str):
    """Check a value against the type and the bounds of its field, and return it with that type."""
    if isinstance(value, (str, bool)):
        value = f.metadata.get("aliases", {}).get(value, value)
    value = _coerce(value, kind, key)
    if not _is_section(kind):
        _check_bounds(value, key, **{k: f.metadata[k] for k in ("low", "high", "above")})
    return value


def _coerce(value, kind, key: str):
    """Check a value against its annotated type; an int is accepted where a float is expected."""
    args = typing.get_args(kind)
    if _is_per_layer(kind):
        values = _coerce(value if isinstance(value, (tuple, list)) else (value,), args[1], key)
        return values[0] if len(values) == 1 else values
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, args[0], key)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{key}={value!r} is not a list: for one value, write [{value!r}].")
        return tuple(_coerce(item, args[0], key) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}={value!r} is not {_describe_type(kind)}.")
    return value


def _describe_type(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, f"a {kind.__name__}")


def _check_bounds(value, key: str, low, high, above):
    if isinstance(value, tuple):
        for item in value:
            _check_bounds(item, key, low, high, above)
        return
    if value is None or isinstance(value, (str, bool)):
        return
    limits = [
        f"at least {low}" if low is not None else "",
        f"more than {above}" if above is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    is_outside = (low is not None and value < low) or (high is not None and value > high)
    is_finite = abs(value) < float("inf")  # nan is not
    if is_outside or (above is not None and value <= above) or not is_finite:
        limits = [limit for limit in limits if limit] if is_finite else ["a finite number"]
        raise ConfigError(f"{key}={value!r} must be {' and '.join(limits)}.")
