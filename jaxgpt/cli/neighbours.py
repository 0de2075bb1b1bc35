"""Show the tokens whose embeddings are nearest to that of a word.

jaxgpt neighbours runs/stdlib import
jaxgpt neighbours runs/stdlib king --minus man --plus woman
"""

import json

from jaxgpt.cli import add_run, check_checkpoint, check_model, make_parser, parse
from jaxgpt.prompts import decode_argument
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError


def main(argv: list[str], program: str) -> int:
    """Print the tokens.

    Returns:
        The exit status: 0, or 2 if no model or word is given.

    Raises:
        ConfigError: there is no model, or a word is no single token of it.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("word", nargs="?", help="a word that is one token")
    parser.add_argument("--minus", help="a word to subtract, with --plus: an analogy")
    parser.add_argument("--plus", help="a word to add")
    parser.add_argument("--count", type=int, default=10, help="how many tokens (10)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parse(argv, parser, "run", "word")
    if isinstance(args, int):
        return args
    check_model(args.run)
    check_checkpoint(args.checkpoint)
    if bool(args.minus) != bool(args.plus):
        raise ConfigError("--minus and --plus go together: king --minus man --plus woman.")

    from jaxgpt import console, inspect

    model = console.load_model(args.run, args.checkpoint, [])
    word = decode_argument(args.word)
    if args.minus:
        minus, plus = decode_argument(args.minus), decode_argument(args.plus)
        found = inspect.analogy(model, minus, plus, word, args.count)
    else:
        found = inspect.neighbours(model, word, args.count)
    if args.json:
        print(json.dumps([{"piece": piece, "cosine": cosine} for piece, cosine in found]))
        return 0
    for piece, cosine in found:
        print_text(f"{cosine:7.3f}  {piece!r}")
    return 0
