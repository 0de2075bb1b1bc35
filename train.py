"""Trains a Transformer.

    python train.py                                              a small GPT on Python's own text
    python train.py --config configs/gpt_mini.py data.source=my_texts/
    python train.py --config gpt_mini model.width=512 optimizer.lr=3e-4

The same command again goes on from the last checkpoint. Ctrl-C saves first.
"""

import argparse
import sys

from jaxgpt import script


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="this text and every setting")
    parser.add_argument("--config", default="configs/stdlib.py", help="a file in configs/")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="model.width=512, ...")
    args, more = parser.parse_known_intermixed_args()

    from jaxgpt import config as configs
    from jaxgpt import trainer

    if args.help:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe()}")
        return 0
    try:
        trainer.train(configs.load(args.config, args.settings + more))
    except trainer.DivergedError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    script.run(main)
