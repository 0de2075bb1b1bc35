"""What both scripts do when something stops them: one line for people in place of a traceback.

Imports nothing heavy, so that it is already there while JAX is imported.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxgpt.settings import ConfigError


def run(main: Callable[[], int], name: str) -> NoReturn:
    """Exits with what `main` returns, 2 for a setting that can not work, 130 for Ctrl-C.

    Messages begin with `name`, as the user called it. Where the output has no reader any more, as
    in `jaxgpt train --help | head -1`, it exits with 1.
    """
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
        # Python flushes once more as it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
