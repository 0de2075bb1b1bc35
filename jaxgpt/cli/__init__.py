"""The command line: `jaxgpt COMMAND ...`, also as `python -m jaxgpt` and in train.py, sample.py.

A subcommand is a module here, named after it, and a row of COMMANDS. The module has

    def main(argv: list[str], program: str) -> int

which returns the exit status; `program` is the command as the user called it ("jaxgpt train"), for
messages. A module is imported only when its subcommand is run. Its imports at the top must be
light: jax, and what imports jax, is imported inside `main`, after all checks that do not need it.
"""

import argparse
import importlib
import sys
from functools import partial
from typing import NoReturn

import jaxgpt
from jaxgpt import script
from jaxgpt.settings import choose

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "generate text from a trained model",
    "evaluate": "measure a trained model on any text",
    "autopsy": "show what a loss spike of a run was made of",
    "scaling": "train a sweep of sizes, fit a scaling law, predict a run",
}


def main() -> NoReturn:
    """Run `jaxgpt` with the arguments of the command line."""
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


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a subcommand, whose --help it shows itself, with the settings."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this text and every setting"
    )
    return parser


def _run_option(name: str) -> int:
    """Handle --help and --version, and raise ConfigError for an unknown subcommand."""
    if name == "--version":
        print(f"jaxgpt {jaxgpt.__version__}")
    elif name in ("-h", "--help"):
        print(format_usage())
    else:
        choose(COMMANDS, name, "command")
    return 0


def format_usage() -> str:
    """Return the text of `jaxgpt --help`."""
    rows = "\n".join(f"  {name:10} {meaning}" for name, meaning in COMMANDS.items())
    return (
        "usage: jaxgpt COMMAND [arguments]\n       jaxgpt COMMAND --help\n"
        f"       jaxgpt --version\n\n{jaxgpt.__doc__}\n\ncommands:\n{rows}"
    )
