"""Show what a model is: architecture, parameters, dtypes, tokenizer, chat template, context.

    jaxgpt inspect runs/stdlib
    jaxgpt inspect SmolLM2-135M/
    jaxgpt inspect model.gguf --json

Nothing but configs and headers is read. It also names what of the model is not supported.
"""

import json

from jaxgpt.cli import make_parser, parse
from jaxgpt.script import print_text


def main(argv: list[str], program: str) -> int:
    """Print the facts of a model.

    Returns:
        The exit status: 0, or 2 if no path is given.

    Raises:
        ConfigError: the path is no model, or it is damaged.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("path", nargs="?", help="a run folder, or a model of another library")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parse(argv, parser, "path")
    if isinstance(args, int):
        return args

    from jaxgpt import loading
    from jaxgpt.interop import formats, inspecting

    if formats.find_format(args.path):
        facts = inspecting.inspect_foreign(args.path)
    else:
        config = loading.read_config(args.path)
        facts = inspecting.inspect_run(args.path, config, loading.count_dtypes(args.path))
    if args.json:
        print(json.dumps(facts))
    else:
        print_text(inspecting.format_facts(facts))
    return 0
