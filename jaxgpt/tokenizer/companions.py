"""What the files beside a tokenizer state about it: read, and written.

tokenizer_config.json  special_tokens_map.json  generation_config.json  config.json
chat_template.jinja    additional_chat_templates/NAME.jinja
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxgpt.tokenizer.spec import make_error

if TYPE_CHECKING:
    from jaxgpt.tokenizer.core import Tokenizer

MAX_BYTES = 1 << 28  # of a file; the largest tokenizer.json in use have 35 MB


class Stated(NamedTuple):
    """What the files beside a tokenizer state about it."""

    config: dict[str, Any]  # tokenizer_config.json, with what special_tokens_map.json adds
    ends: list[int | str]  # tokens or ids that end a text
    added: dict[str, int]  # added_tokens.json
    is_foreign: bool  # there are files of transformers


def read_stated(file: pathlib.Path, usual: Collection[str]) -> Stated:
    """Read the files beside a tokenizer; only that of its own name, unless it has a usual one."""
    folder = file.parent
    config = _read_table(_find_config_file(file))
    if file.name not in usual:
        return Stated(config, list(config.get("end_tokens") or ()), {}, False)
    names = (
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "config.json",
    )
    roles, added, generation, model = (_read_table(folder / name) for name in names)
    is_foreign = bool(config or roles or generation or "model_type" in model)
    config = {key: value for key, value in roles.items() if value is not None} | {
        key: value for key, value in config.items() if value is not None or key not in roles
    }
    config |= _read_template_files(folder)
    ends = list(config.get("end_tokens") or ())
    for table in (generation, model, model.get("text_config") or {}):
        found = table.get("eos_token_id") if isinstance(table, dict) else None
        ends += found if isinstance(found, list) else [] if found is None else [found]
    return Stated(config, ends, added, is_foreign)


def _read_template_files(folder: pathlib.Path) -> dict[str, Any]:
    """Return {"chat_template": ...} of chat_template.jinja and its additions, if they exist."""
    main, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    found = {"default": _read(main)} if main.is_file() else {}
    if others.is_dir():
        found |= {file.stem: _read(file) for file in sorted(others.glob("*.jinja"))}
    templates = [{"name": name, "template": text} for name, text in found.items()]
    return {"chat_template": templates} if templates else {}


def _find_config_file(file: pathlib.Path) -> pathlib.Path:
    """Return the file that states what is known about a tokenizer: tokenizer_config.json."""
    stem = file.stem if file.suffix == ".json" and file.stem not in ("vocab", "encoder") else ""
    return file.with_name(f"{stem or 'tokenizer'}_config.json")


def _read_table(file: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise make_error(str(file), f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise make_error(str(file), f"it holds a JSON {type(found).__name__}, not an object")
    return found


def _read(path: pathlib.Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise make_error(str(path), f"{type(error).__name__}: {error}") from error


def read_bytes(path: pathlib.Path) -> bytes:
    """Read a file of at most MAX_BYTES; ConfigError if it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise make_error(str(path), f"it has {size:,} bytes, more than {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise make_error(str(path), f"{type(error).__name__}: {error}") from error


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer.json atomically, and beside it what is known about it, if anything is."""
    file = pathlib.Path(path)
    if stated := describe(tokenizer):
        text = json.dumps(stated, indent=2, ensure_ascii=False) + "\n"
        _write_atomically(_find_config_file(file), text)
    _write_atomically(file, tokenizer.content)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer_config.json of a tokenizer; {} if its content has it all."""
    templates: Any = [{"name": name, "template": text} for name, text in
                      tokenizer.chat_templates.items()]  # fmt: skip
    if [*tokenizer.chat_templates] == ["default"]:
        templates = tokenizer.chat_template
    is_bare = not tokenizer.settings and not tokenizer.has_given_ends
    if is_bare and not templates:
        return {}
    stated = tokenizer.settings | {"add_bos_token": tokenizer.adds_bos}
    if not is_bare:
        stated["end_tokens"] = list(tokenizer.ends)
    if templates:  # what it writes at the beginning and at the end of a text
        stated = tokenizer.list_template_tokens() | stated | {"chat_template": templates}
    return stated


def _write_atomically(path: pathlib.Path, text: str):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(temporary, path)
