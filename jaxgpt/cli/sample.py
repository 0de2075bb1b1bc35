"""Generate text with a trained model.

    jaxgpt sample runs/stdlib
    jaxgpt sample runs/stdlib --prompt "def main(" --prompt "import" tokens=300 temperature=0.7
    cat prompts.txt | jaxgpt sample runs/stdlib --file -

The defaults are the `sample.*` settings of the run's config; any of them is set with key=value.
"""

import argparse

from jaxgpt import config as configs
from jaxgpt.config_files import find_run_config


def main(argv: list[str], program: str) -> int:
    """Print what the model of a run generates.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, or a setting is invalid.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this text and every setting"
    )
    parser.add_argument("run", nargs="?", help="a run folder of `jaxgpt train`")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="top_k=50, seed=7, ...")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--file", help="a file with one prompt a line; - reads standard input")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not args.run:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('sample')}")
        return 0 if args.help else 2
    keys = [setting.removeprefix("--").removeprefix("sample.") for setting in args.settings + more]
    settings = [key if key.startswith("plugins=") else f"sample.{key}" for key in keys]
    find_run_config(args.run)
    configs.parse_assignments(settings)

    from jaxgpt import console

    console.sample_cli(args.run, args.checkpoint, args.prompt, args.file, settings)
    return 0
