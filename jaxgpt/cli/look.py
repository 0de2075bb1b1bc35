"""Write one offline HTML page that shows the inside of a model on a text.

    jaxgpt look runs/stdlib --text "def main():" --out page.html

The page has the tokens by surprisal, the attention of every head, the logit lens, what adds to the
likeliest token, and more. It opens from the disk and requests nothing.
"""

from jaxgpt.cli import add_run, check_checkpoint, check_model, make_parser, parse
from jaxgpt.prompts import check_output, decode_argument
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Write the page.

    Returns:
        The exit status: 0, or 2 if no model or text is given.

    Raises:
        ConfigError: there is no model, the text does not fit it, or the file cannot be written.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("--text", help="the text; the target, for an encoder_decoder")
    parser.add_argument("--source", help="the source of an encoder_decoder")
    parser.add_argument("--out", default="page.html", help="the file (page.html)")
    parser.add_argument("--title", default="", help="of the page")
    args = parse(argv, parser, "run", "text")
    if isinstance(args, int):
        return args
    check_model(args.run)
    check_checkpoint(args.checkpoint)
    check_output(args.out)

    from jaxgpt import console, visualize

    model = console.load_model(args.run, args.checkpoint, [])
    source = None if args.source is None else decode_argument(args.source)
    page = visualize.look(model, decode_argument(args.text), source=source, title=args.title)
    page.save(args.out)
    print_text(f"{args.out}: {len(page.html.encode()) / 1e6:.1f} MB")
    return 0
