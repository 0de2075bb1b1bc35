"""Show runs side by side: their curves in one figure, the settings that differ, and samples.

jaxgpt compare runs/a runs/b --out compare.html
jaxgpt compare runs/a runs/b runs/c --out loss.png --prompt "def main("
"""

from jaxgpt.cli import make_parser, parse
from jaxgpt.config_files import find_run_config
from jaxgpt.prompts import check_output, decode_argument
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError


def main(argv: list[str], program: str) -> int:
    """Print the comparison and write the figure or the page.

    Returns:
        The exit status: 0, or 2 if no runs are given.

    Raises:
        ConfigError: a folder is not a run, or the file cannot be written.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("runs", nargs="*", help="run folders of `jaxgpt train`")
    parser.add_argument("--out", default="compare.html", help="a .html page or a figure")
    parser.add_argument("--prompt", help="of the samples; each run's own by default")
    parser.add_argument("--no-samples", action="store_true", help="leave the samples out")
    args = parse(argv, parser, "runs")
    if isinstance(args, int):
        return args
    if len(args.runs) < 2:
        raise ConfigError("compare takes two runs or more.")
    for run in args.runs:
        find_run_config(run)
    check_output(args.out)

    from jaxgpt.visualize import compare

    prompt = None if args.prompt is None else decode_argument(args.prompt)
    found = compare.compare_runs(args.runs, prompt, has_samples=not args.no_samples)
    print_text(compare.format_comparison(found))
    compare.save(found, args.out)
    print_text(f"\n{args.out}")
    return 0
