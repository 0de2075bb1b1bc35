"""Merge the adapters of a run into its base, as a model of its own.

    jaxgpt merge runs/tuned runs/merged
    jaxgpt merge adapters/ runs/merged --dtype bfloat16     a folder of peft

The result is W + scale · A B, added in float32 and then cast; the largest rounding is shown. It is
a saved model: generate from it, export it, begin a run with it (train.start=).
"""

from jaxgpt.cli import check_checkpoint, check_model, make_parser, parse
from jaxgpt.settings import ConfigError, choose

MERGE_DTYPES = ("float32", "bfloat16")


def main(argv: list[str], program: str) -> int:
    """Write the merged model of a run with adapters.

    Returns:
        The exit status: 0, or 2 if an argument is missing.

    Raises:
        ConfigError: the run has no adapters, its base is gone or another one, or the folder exists.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run with adapters, or a folder of peft")
    parser.add_argument("path", nargs="?", help="the new folder")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default that of the base")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    args = parse(argv, parser, "path")
    if isinstance(args, int):
        return args
    check_model(args.run)
    check_checkpoint(args.checkpoint)
    if args.dtype is not None:
        choose(dict.fromkeys(MERGE_DTYPES), args.dtype, "--dtype")

    from jaxgpt import console, loading
    from jaxgpt.interop import importing

    model = loading.load(args.run, checkpoint=args.checkpoint)
    if not model.adapter:
        raise ConfigError(f"{args.run} has no adapters to merge: it is a model as it is.")
    merged = model.merge(dtype=args.dtype, log=lambda line: console.print_note(f"[{line}]"))
    loading.save(importing.rename_model(merged, args.path), args.path)
    console.print_note(f"[{args.path} is complete]")
    return 0
