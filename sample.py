"""Generate text with a trained model.

    python sample.py runs/stdlib
    python sample.py runs/stdlib --prompt "def main(" --prompt "import" tokens=300 temperature=0.7
    cat prompts.txt | python sample.py runs/stdlib --file -

The defaults are the `sample.*` settings of the run's config; any of them is set with key=value.
"""

import argparse

from jaxgpt import script


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this text and every setting"
    )
    parser.add_argument("run", nargs="?", help="a run folder of train.py")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="top_k=50, seed=7, ...")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--file", help="a file with one prompt a line; - reads standard input")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    args, more = parser.parse_known_intermixed_args()

    from jaxgpt import config as configs
    from jaxgpt import console

    if args.help or not args.run:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('sample')}")
        return 0 if args.help else 2
    console.sample_cli(args.run, args.checkpoint, args.prompt, args.file, args.settings + more)
    return 0


if __name__ == "__main__":
    script.run(main)
