"""Train a Transformer: `python train.py ...` is `jaxgpt train ...`, from a checkout."""

try:
    from jaxgpt import interrupts

    interrupts.end_process_at_once()  # before what takes time to import
except KeyboardInterrupt:
    raise SystemExit(130) from None

import sys

from jaxgpt import cli

if __name__ == "__main__":
    cli.run_command("train", sys.argv[1:], "train.py")
