"""The machinery of settings: typed fields that check themselves, read from text, named in errors.

Nothing here knows what is being configured; the schema is in config.py.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A setting that can not work: the message names the key, the value and what would be right."""


def option(
    default, doc: str, *, table: str = "", low=None, high=None, above=None, free=False
) -> Any:
    """One field of a section.

    Args:
        default: the value if nobody sets it.
        doc: what it means and its unit, shown by `jaxgpt train --help`.
        table: where the names live that it chooses from, as "module:NAME". It is a pointer
            rather than an import so that adding a row to the registry is all it takes to add a
            choice.
        low, high, above: inclusive bounds, and an exclusive lower bound.
        free: may change between a run and its continuation without changing what is learned.
    """
    metadata = dict(doc=doc, table=table, low=low, high=high, above=above, free=free)
    return field(default=default, metadata=metadata)


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """Looks `name` up in a registry: the only look-up by name in the library.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one and all of them.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{key}={name!r} is not known.{hint} Known: {', '.join(sorted(table))}.")


def resolve_table(pointer: str) -> Mapping[str, Any]:
    """The registry that "module:NAME" points to."""
    module, name = pointer.split(":")
    return getattr(importlib.import_module(module), name)


def list_choices(pointer: str) -> list[str]:
    """Return the names in the registry that "module:NAME" points to, read from the source.

    Importing the module would import jax, for which `--help` would have to wait. A registry that
    is not written as a dict with literal keys is imported after all.
    """
    module, name = pointer.split(":")
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
    """A group of settings that checks itself when it is built."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        hints = type_hints(type(self))
        for f in dataclasses.fields(self):
            key = f"{self.section}.{f.name}" if self.section else f.name
            value = _coerce(getattr(self, f.name), hints[f.name], key)
            object.__setattr__(self, f.name, value)
            if not dataclasses.is_dataclass(value):
                _check_bounds(value, key, **{k: f.metadata[k] for k in ("low", "high", "above")})
            if f.metadata.get("table"):
                for name in value if isinstance(value, tuple) else (value,):
                    choose(resolve_table(f.metadata["table"]), name, key)
        self.check()

    def check(self):
        """Refuses impossible combinations of fields. Sections override this."""


# --- reading and writing values ---


def parse(text: str, kind, key: str) -> Any:
    """Reads a value of type `kind` from the shell."""
    args = typing.get_args(kind)
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
        return _number(text, kind)
    except ValueError:
        raise ConfigError(f"{key}={text!r} is not {_article(kind)}.") from None


def _number(text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        return float(text)  # "2e3" is a fine way to write 2000; _coerce refuses 2.5


def to_dict(config) -> dict:
    """Plain dicts of plain values; `from_dict` is its inverse."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v := getattr(config, f.name)) else v
        for f in dataclasses.fields(config)
    }


def from_dict(kind: type, values: Mapping, prefix: str = ""):
    """Builds `kind` from nested dicts, refusing keys that it does not have."""
    if not isinstance(values, Mapping):
        where = f"{prefix.removesuffix('.')}=" if prefix else ""
        raise ConfigError(f"{where}{values!r} is not a group of settings.")
    hints = type_hints(kind)
    for name in values:
        if name not in hints:
            raise ConfigError(unknown(prefix + name, flat_hints(kind, prefix)))
    nested = {n: hints[n] for n in values if _is_section(hints[n])}
    inner = {n: from_dict(nested[n], values[n], f"{prefix}{n}.") for n in nested}
    return kind(**{**values, **inner})


def get(config, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


# --- the schema, read from the dataclasses ---


@functools.cache
def type_hints(kind: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {k: v for k, v in typing.get_type_hints(kind).items() if k in names}


def _leaves(kind: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf field: its dotted key, the field and its type."""
    for f in dataclasses.fields(kind):
        inner = type_hints(kind)[f.name]
        if _is_section(inner):
            yield from _leaves(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, inner


def flat_fields(kind: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf field by its dotted key."""
    return {key: f for key, f, _ in _leaves(kind, prefix)}


def flat_hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of every leaf field by its dotted key."""
    return {key: inner for key, _, inner in _leaves(kind, prefix)}


def _is_section(kind) -> bool:
    return dataclasses.is_dataclass(kind)


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on either side of `value`, for messages: "12 or 16"."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)


def unknown(key: str, known: Iterable[str]) -> str:
    known = list(known)
    same_leaf = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = same_leaf or difflib.get_close_matches(key, known, n=1)
    if not near:
        leaves = {k.split(".")[-1]: k for k in known}
        near = [leaves[n] for n in difflib.get_close_matches(key.split(".")[-1], leaves, n=1)]
    hint = (
        f" Did you mean {' or '.join(near)}?" if near else " `jaxgpt train --help` lists all keys."
    )
    return f"there is no setting {key!r}.{hint}"


def _coerce(value, kind, key: str):
    """Checks a value against its annotated type; an int serves where a float is asked for."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, args[0], key)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ConfigError(f"{key}={value!r} is not a list.")
        return tuple(_coerce(item, args[0], key) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{key}={value!r} is not {_article(kind)}.")
    return value


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, f"a {kind.__name__}")


def _check_bounds(value, key: str, low, high, above):
    if value is None or isinstance(value, (str, tuple, bool)):
        return
    wants = [
        f"at least {low}" if low is not None else "",
        f"more than {above}" if above is not None else "",
        f"at most {high}" if high is not None else "",
    ]
    out = (low is not None and value < low) or (high is not None and value > high)
    is_finite = abs(value) < float("inf")  # nan is not
    if out or (above is not None and value <= above) or not is_finite:
        wants = [w for w in wants if w] if is_finite else ["a finite number"]
        raise ConfigError(f"{key}={value!r} must be {' and '.join(wants)}.")
