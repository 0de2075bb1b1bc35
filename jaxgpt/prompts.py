"""Prompts of arguments and files, and answers as JSON lines.

A file has one prompt a line. A line that is blank has no answer, but keeps its place, so that
answer n belongs to line n.
"""

import codecs
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from jaxgpt.settings import ConfigError

LONGEST_QUOTE = 40  # characters of a text that a message shows


def decode_argument(text: str) -> str:
    """Return an argument as UTF-8, whatever the locale that Python read it by."""
    if sys.getfilesystemencoding() == "utf-8":
        return text
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def split_lines(content: bytes) -> list[str | None]:
    r"""Return the lines of a file, which end at \n or \r\n only; None for a blank one.

    >>> split_lines(b"one\x0ctwo\r\n\nthree\n")
    ['one\x0ctwo', None, 'three']
    """
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    return [line if line.strip() else None for line in lines]


def read_prompts(file: str) -> list[str | None]:
    """Return the lines of a file, "-" for standard input; see `split_lines`.

    Raises:
        ConfigError: it cannot be read, or has no prompt.
    """
    try:
        if file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as handle:
                content = handle.read()
    except OSError as error:
        raise ConfigError(f"--file {file}: {error.strerror}.") from None
    prompts = split_lines(content)
    if not any(prompts):
        raise ConfigError(f"--file {file} has no prompt: give one per line.")
    return prompts


def shorten(text: str) -> str:
    """Return the beginning of a text for a message, quoted."""
    return repr(text[:LONGEST_QUOTE]) + ("..." if len(text) > LONGEST_QUOTE else "")


def check_output(path: str):
    """Raise ConfigError if a file cannot be written: before the work, not after it."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ConfigError(f"--out {path} is a folder: give the path of a file.")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {path}: {folder} is not a folder that can be written to.")


def write_answers(path: str, answers: Sequence[dict[str, Any]]):
    """Write answers as JSON lines, the whole file or nothing.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with open(f"{path}.tmp", "w", encoding="ascii", newline="\n") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}.") from None
