"""Show how a tokenizer cuts a text: tokens, ids and bytes; and the merges, step by step.

jaxgpt tokenize runs/stdlib "def main():"
jaxgpt tokenize runs/stdlib " abab abab" --merges
jaxgpt tokenize tokenizer.json "text" --json
"""

import json
import os

from jaxgpt.cli import make_parser, parse
from jaxgpt.prompts import decode_argument
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Print the tokens.

    Returns:
        The exit status: 0, or 2 if no tokenizer or text is given.

    Raises:
        ConfigError: there is no tokenizer, or it has no merges to show.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder, or what data.tokenizer= takes")
    parser.add_argument("text", nargs="?", help="the text")
    parser.add_argument("--merges", action="store_true", help="show how BPE merges each word")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parse(argv, parser, "run", "text")
    if isinstance(args, int):
        return args

    from jaxgpt import tokenizer as tokenizers
    from jaxgpt.inspect import tokens

    path = os.path.join(args.run, "tokenizer.json")
    tokenizer = tokenizers.load(path if os.path.isfile(path) else args.run)
    found = tokens.tokenize(tokenizer, decode_argument(args.text))
    if args.json:
        print(json.dumps([{"id": t.id, "piece": t.piece, "bytes": list(t.bytes)} for t in found]))
        return 0
    for token in found:
        print_text(f"{token.id:8}  {token.piece!r:20} {token.bytes.hex(' ')}")
    print_text(f"{len(found)} tokens, {len(args.text.encode(errors='surrogateescape'))} bytes")
    if args.merges:
        for word in tokens.split_words(tokenizer, decode_argument(args.text)):
            print_text(f"\n{word!r}")
            for step in tokens.merge_steps(tokenizer, word):
                merge = "" if step.merge is None else f"merge {step.rank}: {' + '.join(step.merge)}"
                print_text(f"  {len(step.pieces):3}  {' | '.join(step.pieces)}   {merge}")
    return 0
