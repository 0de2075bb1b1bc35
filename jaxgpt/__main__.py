"""Run the command line: `python -m jaxgpt` is `jaxgpt`."""

try:
    from jaxgpt import interrupts

    interrupts.end_process_at_once()  # before what takes time to import
except KeyboardInterrupt:
    raise SystemExit(130) from None

from jaxgpt.cli import main

if __name__ == "__main__":
    main()
