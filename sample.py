"""Generate text: `python sample.py ...` is `jaxgpt sample ...`, from a checkout."""

import sys

from jaxgpt import cli

if __name__ == "__main__":
    cli.run_command("sample", sys.argv[1:], "sample.py")
