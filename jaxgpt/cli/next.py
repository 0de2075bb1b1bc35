"""Show the likeliest next tokens after a text, with their probabilities.

jaxgpt next runs/stdlib "def main("
jaxgpt next runs/stdlib "Le chat mange la" --count 20 --json
"""

import dataclasses
import json

from jaxgpt.cli import (
    add_quantize,
    add_run,
    check_checkpoint,
    check_model,
    get_quantization,
    make_parser,
    parse,
)
from jaxgpt.prompts import decode_argument
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Print the tokens.

    Returns:
        The exit status: 0, or 2 if no model or text is given.

    Raises:
        ConfigError: there is no model, it predicts no next token, or the text does not fit it.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("text", nargs="?", help="the text")
    parser.add_argument("--source", help="the source of an encoder_decoder")
    parser.add_argument("--count", type=int, default=10, help="how many tokens (10)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    add_quantize(parser)
    args = parse(argv, parser, "run")
    if isinstance(args, int):
        return args
    check_model(args.run)
    check_checkpoint(args.checkpoint)

    from jaxgpt import console, inspect

    model = console.load_model(args.run, args.checkpoint, [], **get_quantization(args))
    source = None if args.source is None else decode_argument(args.source)
    text = decode_argument(args.text or "")
    found = inspect.next_tokens(model, text, args.count, source=source)
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in found]))
        return 0
    for each in found:
        bar = "█" * round(40 * each.probability)
        print_text(f"{each.probability:7.2%}  {each.piece!r:20} {bar}")
    return 0
