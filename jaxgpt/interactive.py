"""`jaxgpt sample RUN --interactive`: prompts from a terminal, one after the other, in one process.

A line is a prompt. A line that begins with / is a command: /temperature 0.7 changes a setting,
/help lists all. Ctrl-C stops a generation, Ctrl-D leaves.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxgpt.config import SampleConfig
from jaxgpt.console import answer, load_model, print_note
from jaxgpt.language_model import LanguageModel
from jaxgpt.settings import ConfigError, choose, list_types, parse

KEYS = {key: kind for key, kind in list_types(SampleConfig).items() if key != "prompt"}
COMMANDS = {"help": "list the commands", "settings": "show the settings", "quit": "leave (Ctrl-D)"}


def run_cli(run_folder: str, checkpoint: str, settings: Sequence[str], **quantization):
    """Load the model of a run and answer prompts until the input ends; see `sample_cli`."""
    model = load_model(run_folder, checkpoint, settings, **quantization)
    with contextlib.suppress(ImportError):  # line editing and a history; Windows has its own
        import readline  # noqa: F401
    print_note(f"[{run_folder}, step {model.step}; /help lists commands, Ctrl-D leaves]")
    run_session(model, lambda: input("> "))


def run_session(model: LanguageModel, read_line: Callable[[], str]):
    """Answer lines until the input ends.

    Args:
        read_line: returns the next line; raises EOFError at the end and KeyboardInterrupt for
            Ctrl-C.
    """

    def apply(line: str):
        nonlocal model
        model = apply_line(model, line)

    run_lines(read_line, apply)


def run_lines(read_line: Callable[[], str], apply: Callable[[str], Any]):
    """Apply a function to lines until the input ends, or one of them is /quit or /exit.

    A mistake is printed, and Ctrl-C stops what a line has begun.

    Args:
        read_line: as of `run_session`.
        apply: executes a line; it may raise ConfigError.
    """
    while True:
        try:
            line = read_line()
        except EOFError:
            print_note("")
            return
        except KeyboardInterrupt:
            print_note("\n[Ctrl-D or /quit leaves]")
            continue
        if line.split() in (["/quit"], ["/exit"]):
            return
        try:
            apply(line)
        except ConfigError as error:
            print_note(str(error))
        except KeyboardInterrupt:
            print_note("\n[stopped]")


def apply_line(model: LanguageModel, line: str) -> LanguageModel:
    """Do what a line says, and return the model with the settings for the next one.

    After a generation the seed is one larger, so that the same prompt gives another text.

    Raises:
        ConfigError: an unknown command, an invalid setting or prompt.
    """
    sample = model.config.sample
    if line.startswith("/"):
        sample = apply_command(sample, line[1:])
    elif line.strip() or "generate" in model.abilities:
        answer(model, [line], [1])
        sample = dataclasses.replace(sample, seed=sample.seed + 1)
    return with_sample(model, sample)


def apply_command(
    sample: SampleConfig, command: str, others: Iterable[str] = COMMANDS
) -> SampleConfig:
    """Carry out a command without its slash, and return the settings.

    Args:
        others: commands that exist besides the settings, for the message about an unknown one.

    Raises:
        ConfigError: the command is unknown, or its value is invalid.
    """
    name, _, text = command.strip().partition(" ")
    if name == "settings" or (name in KEYS and not text):
        shown = KEYS if name == "settings" else (name,)
        print_note("\n".join(f"/{key} {format_value(getattr(sample, key))}" for key in shown))
    elif name in KEYS:
        return dataclasses.replace(sample, **{name: parse(text.strip(), KEYS[name], name)})
    elif name in COMMANDS:
        print_note(format_settings_help("A line is a prompt; Ctrl-C stops a generation.", COMMANDS))
    else:
        choose(dict.fromkeys(f"/{key}" for key in [*others, *KEYS]), f"/{name}", "command")
    return sample


def format_settings_help(title: str, commands: Mapping[str, str]) -> str:
    """Return the text of /help: a title, commands, and a command for each setting."""
    meanings = {f.name: f.metadata["doc"] for f in dataclasses.fields(SampleConfig)}
    rows = dict(commands) | {f"{key} VALUE": meanings[key] for key in KEYS}
    lines = [f"  /{key:26} {meaning}" for key, meaning in rows.items()]
    return "\n".join([f"{title} Commands:", *lines])


def format_value(value) -> str:
    """Format a setting as it is written in a command."""
    return ",".join(value) if isinstance(value, tuple) else str(value).lower()


def with_sample(model: LanguageModel, sample: SampleConfig) -> LanguageModel:
    """Return the model with other sampling rules; what was computed once is kept."""
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, sample=sample))
    for name in ("decode_params", "nonfinite_params"):  # cached properties, of the parameters
        if name in vars(model):
            vars(changed)[name] = vars(model)[name]
    return changed
