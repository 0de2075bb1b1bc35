"""Exit codes and one-line error messages of commands, in place of tracebacks.

This module imports nothing heavy, so that its handlers are in place while JAX is imported.
"""

import io
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, TextIO

from jaxgpt import interrupts
from jaxgpt.settings import ConfigError


def run(main: Callable[[], int], name: str = "") -> NoReturn:
    """Run `main` and exit with its return value, 2 for an invalid setting, 130 for Ctrl-C.

    Messages begin with `name`, the command as the user called it; by default the script's file
    name. If standard output is closed by its reader, as in `jaxgpt train --help | head -1`, exit
    with 1.
    """
    name = name or os.path.basename(sys.argv[0])
    open_standard_files()
    for file in (sys.stdout, sys.stderr):
        _replace_unknown_characters(file)
    try:
        status = main()
        sys.stdout.flush()
        if _has_abandoned_threads():
            sys.stderr.flush()
            os._exit(status)
        interrupts.end_process_at_once()  # what remains is Python's own end
        sys.exit(status)
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # of standard output: its reader is gone, or its disk full
        if not isinstance(error, BrokenPipeError) and not _is_output_broken():
            raise
        # Python flushes standard output at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _has_abandoned_threads() -> bool:
    """Return whether threads of a checkpoint that could not be saved are left.

    Some of Orbax's wait for others that have failed, and would keep the process for minutes.
    """
    threads = (t for t in threading.enumerate() if not t.daemon)
    return any(type(thread).__module__.partition(".")[0] == "orbax" for thread in threads)


def open_standard_files():
    """Open standard input, output and error if the caller has closed them (`command >&-`).

    Otherwise Python has None in their place, and the next file that is opened takes their number,
    so that a library that prints an error writes into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _is_output_broken() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


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
