"""`python -m jaxgpt.evaluate`: the command `jaxgpt evaluate`."""

import sys

from jaxgpt.settings import resolve_table

if __name__ == "__main__":
    run_command = resolve_table("jaxgpt.cli:run_command")
    run_command("evaluate", sys.argv[1:], "jaxgpt evaluate")  # type: ignore[operator]
