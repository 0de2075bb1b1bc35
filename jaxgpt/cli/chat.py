"""Chat with a model in the terminal.

    jaxgpt chat runs/mine
    jaxgpt chat models/SmolLM2-135M-Instruct.gguf --system "Answer in one sentence." temperature=0.7
    jaxgpt chat runs/mine < questions.txt

A line is a message. /reset forgets the conversation, /save FILE writes it, /help lists all
commands, /exit or Ctrl-D leaves, Ctrl-C stops an answer. When the context is full, whole turns are
forgotten, the oldest first. The settings are those of `jaxgpt sample`.
"""

from jaxgpt import config as configs
from jaxgpt import interrupts
from jaxgpt.cli import (
    add_quantize,
    add_run,
    check_checkpoint,
    check_model,
    get_quantization,
    make_parser,
)
from jaxgpt.cli.sample import list_keys
from jaxgpt.suggestions import check_options, check_sample_arguments


def main(argv: list[str], program: str) -> int:
    """Answer messages from standard input.

    Returns:
        The exit status: 0, or 2 if no model is given.

    Raises:
        ConfigError: there is no such model, it has no chat template, or a setting is invalid.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="top_k=50, seed=7, ...")
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument(
        "--template", default="", help="chatml, llama3, gemma, mistral or plain, if it has none"
    )
    add_quantize(parser)
    check_options(argv, parser, list_keys())
    args, more = parser.parse_known_intermixed_args(argv)
    if args.help or not args.run:
        parser.print_help()
        print(f"\nsettings and their defaults:\n{configs.describe('sample')}")
        return 0 if args.help else 2
    check_sample_arguments(args.settings, program, args.run)
    keys = [setting.removeprefix("--").removeprefix("sample.") for setting in args.settings + more]
    settings = [key if key.startswith("plugins=") else f"sample.{key}" for key in keys]
    check_model(args.run)
    configs.parse_assignments(settings)
    check_checkpoint(args.checkpoint)

    from jaxgpt import chat

    interrupts.raise_keyboard_interrupt()
    chat.run_cli(
        args.run, args.checkpoint, settings, args.system, args.template, **get_quantization(args)
    )
    return 0
