"""Export the model of a run for other libraries.

    jaxgpt export runs/mine mine/                                   a folder of transformers
    jaxgpt export runs/mine mine/ --format hf --dtype bfloat16
    jaxgpt export runs/mine mine.gguf --format gguf --quantize Q8_0   a file of llama.cpp
    jaxgpt export runs/tuned adapters/ --format peft                adapters alone, for peft

What was written is loaded again, and its logits are compared with those of the model, before it
gets its name. A folder has a model card, README.md.
"""

from jaxgpt.cli import check_checkpoint, check_model, make_parser, parse


def main(argv: list[str], program: str) -> int:
    """Write the model of a run in another format.

    Returns:
        The exit status: 0, or 2 if an argument is missing.

    Raises:
        ConfigError: the model has no counterpart there, the path exists, or what was written
            computes something else.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("run", nargs="?", help="a run folder, or any model that jaxgpt.load takes")
    parser.add_argument("path", nargs="?", help="the new folder or file")
    parser.add_argument("--format", default="hf", help="hf (transformers), gguf or peft")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default as it is stored")
    parser.add_argument("--quantize", help="of a GGUF file: Q8_0, Q4_0, ...")
    parser.add_argument("--license", default="unknown", help="for the model card: apache-2.0, ...")
    parser.add_argument("--checkpoint", default="best", help="best (the default) or latest")
    args = parse(argv, parser, "path")
    if isinstance(args, int):
        return args
    check_model(args.run)
    check_checkpoint(args.checkpoint)

    from jaxgpt import console, loading
    from jaxgpt.interop import exporting

    model = loading.load(args.run, checkpoint=args.checkpoint)
    exporting.export(
        model,
        args.path,
        args.format,
        dtype=args.dtype,
        quantize=args.quantize,
        license=args.license,
        run=args.run,
        log=lambda line: console.print_note(f"[{line}]"),
    )
    console.print_note(f"[{args.path} is complete]")
    return 0
