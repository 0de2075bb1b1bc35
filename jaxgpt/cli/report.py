"""Write a report of a run: one offline HTML page to hand in, which also prints to PDF.

    jaxgpt report runs/stdlib
    jaxgpt report runs/stdlib --out report.html --results results.json
    jaxgpt report runs/stdlib --text "def main():"

It has results, curves, samples, parameters, speed, a look inside, the data, the config, and how to
repeat the run. Benchmarks that training has measured are in it; so are files of results in the run
folder (results*.json), and those of --results, which `jaxgpt evaluate --tasks ... --out` writes.
"""

from jaxgpt.cli import check_checkpoint, make_parser, parse
from jaxgpt.config_files import find_run_config
from jaxgpt.interop.formats import find_format
from jaxgpt.prompts import check_output, decode_argument
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Write the report.

    Returns:
        The exit status: 0, or 2 if no run is given.

    Raises:
        ConfigError: the folder is not a run, or a file cannot be read or written.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder of `jaxgpt train`")
    parser.add_argument("--out", default="report.html", help="the file (report.html)")
    parser.add_argument("--results", action="append", help="results of benchmarks; repeatable")
    parser.add_argument("--text", help="whose inside is shown; the last sample by default")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    args = parse(argv, parser, "run")
    if isinstance(args, int):
        return args
    if not find_format(args.run):
        find_run_config(args.run)
    check_checkpoint(args.checkpoint)
    check_output(args.out)

    from jaxgpt import report

    text = None if args.text is None else decode_argument(args.text)
    page = report.write(args.run, text=text, results=args.results or (), checkpoint=args.checkpoint)
    page.save(args.out)
    print_text(f"{args.out}: {len(page.html.encode()) / 1e6:.1f} MB")
    return 0
