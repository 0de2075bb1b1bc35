"""Exit codes and one-line error messages of commands, in place of tracebacks.

This module imports nothing heavy, so that its handlers are in place while JAX is imported.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from jaxgpt.settings import ConfigError


def run(main: Callable[[], int], name: str = "") -> NoReturn:
    """Run `main` and exit with its return value, 2 for an invalid setting, 130 for Ctrl-C.

    Messages begin with `name`, the command as the user called it; by default the script's file
    name. If standard output is closed by its reader, as in `jaxgpt train --help | head -1`, exit
    with 1.
    """
    name = name or os.path.basename(sys.argv[0])
    for file in (sys.stdout, sys.stderr):
        _replace_unknown_characters(file)
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _replace_unknown_characters(file: TextIO | None):
    """Make a file print "?" for what its encoding cannot represent, if it would raise an error."""
    errors = getattr(file, "errors", "")
    if isinstance(file, io.TextIOWrapper) and errors in ("strict", "surrogateescape"):
        file.reconfigure(errors="replace")


def print_text(text: str, file: TextIO | None = None, end: str = "\n"):
    """Print and flush a text, with "?" for what the encoding of `file` cannot represent."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        print(text, file=file, flush=True, end=end)
    except UnicodeEncodeError:  # raised before anything is written
        shown = text.encode(encoding, "replace").decode(encoding)
        print(shown, file=file, flush=True, end=end)
