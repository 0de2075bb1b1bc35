"""Chat with a model in the terminal.

    jaxgpt chat runs/mine
    jaxgpt chat models/SmolLM2-135M-Instruct.gguf --system "Answer in one sentence." temperature=0.7
    jaxgpt chat runs/mine < questions.txt

A line is a message. /reset forgets the conversation, /save FILE writes it, /help lists all
commands, /exit or Ctrl-D leaves, Ctrl-C stops an answer. When the context is full, whole turns are
forgotten, the oldest first. The settings are those of `jaxgpt sample`.
"""

from jaxgpt import interrupts
from jaxgpt.cli import add_quantize, add_run, get_quantization, make_parser
from jaxgpt.cli.sample import parse_sampling


def main(argv: list[str], program: str) -> int:
    """Answer messages from standard input.

    Returns:
        The exit status: 0, or 2 if no model is given.

    Raises:
        ConfigError: there is no such model, it has no chat template, or a setting is invalid.
    """
    parser = make_parser(program, __doc__)
    add_run(parser)
    parser.add_argument("--system", default="", help="the system prompt")
    parser.add_argument(
        "--template", default="", help="chatml, llama3, gemma, mistral or plain, if it has none"
    )
    add_quantize(parser)
    parsed = parse_sampling(argv, parser, program)
    if isinstance(parsed, int):
        return parsed
    args, settings = parsed

    from jaxgpt import chat

    interrupts.raise_keyboard_interrupt()
    chat.run_cli(
        args.run, args.checkpoint, settings, args.system, args.template, **get_quantization(args)
    )
    return 0
