"""The command line: `jaxgpt COMMAND ...`, also as `python -m jaxgpt` and in train.py, sample.py.

A subcommand is a module here, named after it, and a row of COMMANDS. The module has

    def main(argv: list[str], program: str) -> int

which returns the exit status; `program` is the command as the user called it ("jaxgpt train"), for
messages. A module is imported only when its subcommand is run. Its imports at the top must be
light: jax, and what imports jax, is imported inside `main`, after all checks that do not need it.
"""

import argparse
import importlib
import keyword
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import script
from jaxgpt.config_files import CHECKPOINTS, find_run_config
from jaxgpt.interop.formats import find_format
from jaxgpt.settings import choose
from jaxgpt.suggestions import check_data_settings, check_options

CHECKPOINTS_FOLDERS = ("best", "checkpoints")  # of a run

COMMANDS = {
    "train": "train a model, or resume a run",
    "plan": "tell what a run needs, or what fits a device, before anything runs",
    "sample": "generate text from a trained model",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model over HTTP, as OpenAI's API, with a chat page",
    "evaluate": "measure a trained model on any text",
    "look": "write a page that shows the inside of a model on a text",
    "report": "write a report of a run: one page to hand in",
    "compare": "show the curves, settings and samples of runs side by side",
    "next": "show the likeliest next tokens after a text",
    "tokenize": "show the tokens of a text, and how they are merged",
    "neighbours": "show the tokens whose embeddings are nearest to that of a word",
    "positions": "draw a position encoding",
    "context": "show the loss of a model by position, up to contexts longer than its own",
    "import": "make a run folder of a model of another library",
    "export": "write a model for transformers or llama.cpp",
    "merge": "merge the adapters of a run into its base",
    "inspect": "show what a model is",
    "verify": "check that the files of a run are as they were saved",
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
        return find_module(name).main(argv, program)

    script.run(command, program)


def find_module(name: str) -> Any:
    """Return the module of a subcommand; that of a keyword of Python ends in _."""
    return importlib.import_module(f"jaxgpt.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def check_model(path: str):
    """Raise ConfigError unless a path is a run, a checkpoint of one, or of another library."""
    if find_format(path):
        return
    folder, name = os.path.split(path.rstrip("/"))
    if name.isdecimal():  # runs/x/best/40
        folder, name = os.path.split(folder)
    find_run_config(folder if name in CHECKPOINTS_FOLDERS else path)


def check_checkpoint(name: str):
    """Raise ConfigError unless a name is one of the checkpoints that can be chosen."""
    choose(dict.fromkeys(CHECKPOINTS), name, "--checkpoint")


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


def parse(
    argv: list[str], parser: argparse.ArgumentParser, *required: str
) -> argparse.Namespace | int:
    """Parse the arguments of a subcommand without settings.

    Args:
        argv, parser: as of `main`; the parser of `make_parser`.
        required: the names of arguments that must be there, else its help is shown.

    Returns:
        The arguments, or the exit status if the help was shown.

    Raises:
        ConfigError: an option is not known; the message has the nearest one.
    """
    check_options(argv, parser, ())
    args = parser.parse_intermixed_args(argv)
    if args.help or not all(getattr(args, name) for name in required):
        parser.print_help()
        return 0 if args.help else 2
    return args


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a model: a run, and which of its checkpoints."""
    parser.add_argument("run", nargs="?", help="a run folder of `jaxgpt train`, or any model")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")


def split_runs(arguments: Sequence[str], more: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide positional arguments into runs and settings; the first one is a run.

    Args:
        arguments: those of a command that takes RUN ... path=value ...
        more: settings that begin like an option.
    """
    runs = [x for number, x in enumerate(arguments) if not number or "=" not in x]
    return runs, [*(x for x in arguments[1:] if "=" in x), *more]


def check_runs(
    runs: Sequence[str], checkpoint: str, settings: Sequence[str], keys: Sequence[str], reason: str
) -> dict[str, Any]:
    """Check runs, their checkpoint and settings, and return the settings by key.

    Args:
        keys: the settings that the command takes.
        reason: follows the name of a setting that is none of them.

    Raises:
        ConfigError: a folder is no model, or a setting is of no use.
    """
    for run in runs:
        check_model(run)
    check_checkpoint(checkpoint)
    values = configs.parse_assignments(settings)
    if wrong := [key for key in values if key not in keys]:
        raise configs.ConfigError(f"{wrong[0]} {reason}")
    check_data_settings(values)
    return values


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that quantize a model as it is loaded; see `get_quantization`."""
    parser.add_argument(
        "--quantize", metavar="KIND", help="round the weights to int8 or int4 as they are loaded"
    )
    parser.add_argument(
        "--group",
        type=int,
        help="inputs that share a scale: 32, 64, 128, or 0 for one per output channel, which int8 "
        "has by default (int4: 32)",
    )


def get_quantization(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `add_quantize` by the names that `jaxgpt.load` gives them."""
    return {"quantize": args.quantize, "group": args.group}


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
