"""Run the command line: `python -m jaxgpt` is `jaxgpt`."""

from jaxgpt import interrupts

interrupts.end_process_at_once()  # before what takes time to import

from jaxgpt.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
