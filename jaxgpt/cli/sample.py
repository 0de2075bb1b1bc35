"""Generate text with a trained model.

    jaxgpt sample runs/stdlib
    jaxgpt sample runs/stdlib --prompt "def main(" --prompt "import" tokens=300 temperature=0.7
    jaxgpt sample runs/stdlib --file prompts.txt --out answers.jsonl
    jaxgpt sample runs/stdlib --interactive
    jaxgpt sample runs/stdlib --quantize int4 cache=int8

The defaults are the `sample.*` settings of the run's config; any of them is set with key=value.
"""

import argparse

from jaxgpt import config as configs
from jaxgpt import interrupts
from jaxgpt.cli import (
    add_quantize,
    add_run,
    check_checkpoint,
    check_model,
    get_quantization,
    make_parser,
)
from jaxgpt.suggestions import check_options, check_sample_arguments


def main(argv: list[str], program: str) -> int:
    """Print what the model of a run generates.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, or a setting is invalid.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--file", help="a file with one prompt a line; - reads standard input")
    parser.add_argument("--out", help="a file for the answers as JSON lines: ids, scores, labels")
    parser.add_argument(
        "--interactive", action="store_true", help="read prompts from the terminal until Ctrl-D"
    )
    add_quantize(parser)
    parsed = parse_sampling(argv, parser, program)
    if isinstance(parsed, int):
        return parsed
    args, settings = parsed
    if args.interactive and (args.prompt or args.file or args.out):
        raise configs.ConfigError("--interactive reads prompts itself: leave out the other ones.")

    from jaxgpt import console, interactive

    interrupts.raise_keyboard_interrupt()
    if args.interactive:
        interactive.run_cli(args.run, args.checkpoint, settings, **get_quantization(args))
    else:
        console.sample_cli(
            args.run, args.checkpoint, args.prompt, args.file, settings, args.out,
            **get_quantization(args),
        )  # fmt: skip
    return 0


def parse_sampling(
    argv: list[str], parser: argparse.ArgumentParser, program: str
) -> tuple[argparse.Namespace, list[str]] | int:
    """Parse the arguments of a command that generates: those of a parser, and `sample.*` settings.

    Args:
        argv, program: as of `main`.
        parser: of `make_parser` and `add_run`.

    Returns:
        (the arguments, the settings with their section), or the exit status if the help was shown.

    Raises:
        ConfigError: there is no such model, or a setting is invalid.
    """
    parser.add_argument("settings", nargs="*", metavar="key=value", help="top_k=50, seed=7, ...")
    check_options(argv, parser, list_keys())
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not args.run:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('sample')}")
        return 0 if args.help else 2
    check_sample_arguments(args.settings, program, args.run)
    keys = [setting.removeprefix("--").removeprefix("sample.") for setting in args.settings + more]
    settings = [key if key.startswith("plugins=") else f"sample.{key}" for key in keys]
    check_model(args.run)
    configs.parse_assignments(settings)
    check_checkpoint(args.checkpoint)
    return args, settings


def list_keys() -> list[str]:
    """Return the settings of sampling, without their section."""
    keys = configs.list_fields(configs.Config)
    return [key.removeprefix("sample.") for key in keys if key.startswith("sample.")]
