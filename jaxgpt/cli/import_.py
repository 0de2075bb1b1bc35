"""Import a model of another library as a run folder.

    jaxgpt import SmolLM2-135M/ runs/smollm                a folder of transformers
    jaxgpt import model.gguf runs/chat                     a file of llama.cpp
    jaxgpt import stories15M.bin runs/stories              a file of llama2.c
    jaxgpt import HuggingFaceTB/SmolLM2-135M runs/smollm   from the Hugging Face hub
    jaxgpt import adapters/ runs/tuned                     a folder of peft, onto its base

The run folder is as any other: generate from it, evaluate it, begin a run with it (train.start=).
"""

import os

from jaxgpt.cli import make_parser, parse
from jaxgpt.interop.formats import find_format
from jaxgpt.settings import ConfigError, choose

IMPORT_DTYPES = ("float32", "bfloat16")


def main(argv: list[str], program: str) -> int:
    """Write a run folder of a model.

    Returns:
        The exit status: 0, or 2 if an argument is missing.

    Raises:
        ConfigError: the path is no model, it is damaged or not supported, or the folder exists.
    """
    parser = make_parser(program, __doc__)
    parser.add_argument("path", nargs="?", help="of the model")
    parser.add_argument("run", nargs="?", help="the new run folder, such as runs/mine")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default as it is stored")
    args = parse(argv, parser, "run")
    if isinstance(args, int):
        return args
    if args.dtype is not None:
        choose(dict.fromkeys(IMPORT_DTYPES), args.dtype, "--dtype")
    if os.path.exists(args.run) and not (os.path.isdir(args.run) and not os.listdir(args.run)):
        raise ConfigError(f"{args.run} exists: import into a new folder, or delete it first.")

    from jaxgpt import console, loading
    from jaxgpt.interop import importing

    if find_format(args.path) == "peft":
        model = importing.rename_model(loading.load(args.path, dtype=args.dtype), args.run)
    else:
        model = importing.import_model(args.path, args.run, args.dtype, console.print_note)
    loading.save(model, args.run)
    size = sum(x.size for x in importing.list_arrays(model))
    console.print_note(f"[{args.run}: {size:,} parameters, {model.config.model.dtype}]")
    console.print_note(f'[jaxgpt sample {args.run} --prompt "..."]')
    return 0
