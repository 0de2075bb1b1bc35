"""Train a Transformer: `python train.py ...` is `jaxgpt train ...`, from a checkout."""

import sys

from jaxgpt import cli

if __name__ == "__main__":
    cli.run_command("train", sys.argv[1:], "train.py")
