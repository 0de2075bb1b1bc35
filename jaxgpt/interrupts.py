"""Ctrl-C while a command starts.

Importing JAX takes a second or more, of code that is not ours: a KeyboardInterrupt in it ends with
a traceback, or is swallowed in a callback. So until the imports are done, Ctrl-C ends the process
at once, as nothing has been written yet. This module itself imports next to nothing.
"""

import os
import signal
import sys


def end_process_at_once():
    """Let Ctrl-C end this process with status 130, unless the caller handles or ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_process)


def raise_keyboard_interrupt():
    """Let Ctrl-C raise KeyboardInterrupt again: from here on there is something to finish."""
    if signal.getsignal(signal.SIGINT) is _end_process:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_process(number, frame):
    name = os.path.basename(sys.argv[0]) if sys.argv else "jaxgpt"
    os.write(2, f"\n{name}: stopped by Ctrl-C.\n".encode(errors="replace"))
    os._exit(130)
