"""The command line: `jaxgpt COMMAND ...`, also as `python -m jaxgpt` and in train.py, sample.py.

A subcommand is a module here, named after it, and a row of COMMANDS. The module has

    def main(argv: list[str], program: str) -> int

which returns the exit status; `program` is how the user called it ("jaxgpt train"), for messages.
It is imported when its command is given. Its own imports at the top must be light: jax and what
imports it come inside `main`, after all that can be refused without them.
"""

import importlib
import sys
from functools import partial
from typing import NoReturn

import jaxgpt
from jaxgpt import script
from jaxgpt.settings import choose

COMMANDS = {
    "train": "train a model, or continue a run",
    "sample": "generate text from a trained model",
}


def main() -> NoReturn:
    """Run `jaxgpt` with the shell's arguments."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run_command(name, argv, f"jaxgpt {name}")
    script.run(partial(_run_option, name), "jaxgpt")


def run_command(name: str, argv: list[str], program: str) -> NoReturn:
    """Run a subcommand and exit with its status.

    Args:
        name: a row of COMMANDS.
        argv: the arguments after it.
        program: the name that messages begin with.
    """

    def command() -> int:
        return importlib.import_module(f"jaxgpt.cli.{name}").main(argv, program)

    script.run(command, program)


def _run_option(name: str) -> int:
    """Answer --help and --version; refuse anything else that is not a subcommand."""
    if name == "--version":
        print(f"jaxgpt {jaxgpt.__version__}")
    elif name in ("-h", "--help"):
        print(usage())
    else:
        choose(COMMANDS, name, "command")
    return 0


def usage() -> str:
    """Return the text of `jaxgpt --help`."""
    rows = "\n".join(f"  {name:10} {meaning}" for name, meaning in COMMANDS.items())
    return (
        "usage: jaxgpt COMMAND [arguments]\n       jaxgpt COMMAND --help\n"
        f"       jaxgpt --version\n\n{jaxgpt.__doc__}\n\ncommands:\n{rows}"
    )
