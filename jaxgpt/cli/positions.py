"""Draw a position encoding: what it adds or does, and how alike positions are to it.

jaxgpt positions rope --out pe.png
jaxgpt positions sinusoidal --length 128 model.width=256
jaxgpt positions --run runs/stdlib
"""

from jaxgpt import config as configs
from jaxgpt.cli import make_parser
from jaxgpt.prompts import check_output
from jaxgpt.script import print_text
from jaxgpt.suggestions import check_options


def main(argv: list[str], program: str) -> int:
    """Write the figure.

    Returns:
        The exit status: 0, or 2 if no encoding is given.

    Raises:
        ConfigError: there is no such encoding or run, or the file cannot be written.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("name", nargs="?", help="rope, alibi, t5, sinusoidal, learned, ...")
    parser.add_argument("settings", nargs="*", metavar="path=value", help="model.width=256, ...")
    parser.add_argument("--run", help="a run folder: its own encoding, with its parameters")
    parser.add_argument("--length", type=int, default=64, help="positions (64)")
    parser.add_argument("--out", default="positions.png", help="the file (positions.png)")
    check_options(argv, parser, configs.list_fields(configs.Config))
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not (args.name or args.run):
        parser.print_help()
        return 0 if args.help else 2
    if args.length < 2:
        raise configs.ConfigError(f"--length {args.length} must be 2 or more positions.")
    check_output(args.out)
    settings = args.settings + more
    values = configs.parse_assignments(settings)
    if wrong := [key for key in values if not key.startswith("model.")]:
        raise configs.ConfigError(f"{wrong[0]}: an encoding depends on model.* settings only.")

    from jaxgpt import console, inspect, visualize

    if args.run:
        model = console.load_model(args.run, "best", [])
        picture = inspect.describe_model_positions(model, args.length)
    else:
        config = configs.override(configs.Config(), settings)
        picture = inspect.describe_positions(args.name, args.length, config.model)
    visualize.draw_positions(picture).savefig(args.out)
    print_text(f"{args.out}: {picture.name}, {len(picture.similarity)} positions")
    return 0
