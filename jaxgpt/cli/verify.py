"""Check the files of a run: every array of every checkpoint against the checksum it was saved with.

    jaxgpt verify runs/stdlib
    jaxgpt verify runs/stdlib --json

Prints a table, and exits with 1 if anything is damaged. A run that is training may be verified.
"""

import json

from jaxgpt.cli import make_parser, parse
from jaxgpt.config_files import find_run_config
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Print which files of a run are as they were saved.

    Returns:
        The exit status: 0, 1 if something is damaged, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder, or a saved model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parse(argv, parser, "run")
    if isinstance(args, int):
        return args
    find_run_config(args.run)

    from jaxgpt import verification

    found = verification.verify(args.run)
    is_good = verification.is_usable(found)
    if args.json:
        rows = [finding._asdict() for finding in found]
        print(json.dumps({"run": args.run, "is_good": is_good, "findings": rows}))
    else:
        print_text(verification.format_findings(args.run, found))
    return 0 if is_good else 1
