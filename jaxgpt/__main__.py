"""Run the command line: `python -m jaxgpt` is `jaxgpt`."""

from jaxgpt import cli

if __name__ == "__main__":
    cli.main()
