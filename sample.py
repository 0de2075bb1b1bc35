"""Generate text: `python sample.py ...` is `jaxgpt sample ...`, from a checkout."""

from jaxgpt import interrupts

interrupts.end_process_at_once()  # before what takes time to import

import sys  # noqa: E402

from jaxgpt import cli  # noqa: E402

if __name__ == "__main__":
    cli.run_command("sample", sys.argv[1:], "sample.py")
