"""What a mistyped command line meant: checks of arguments that name the right way to write them.

Nothing heavy is imported, so that a typo is answered at once.
"""

import argparse
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxgpt.config_files import list_configs
from jaxgpt.settings import ConfigError, find_nearest


def check_options(argv: Sequence[str], parser: argparse.ArgumentParser, keys: Iterable[str]):
    """Raise ConfigError for a setting that is written as an option: `--model.width 512`.

    Args:
        argv: the arguments of a command.
        parser: the options of the command; everything else is path=value.
        keys: the settings that it takes.
    """
    options = {name: action.nargs != 0 for action in parser._actions
               for name in action.option_strings}  # fmt: skip
    keys, rest = list(keys), iter(range(len(argv)))
    spellings = {key.split(".")[-1]: f"{key}=VALUE" for key in reversed(keys)}
    spellings |= {option.lstrip("-").replace("-", "_"): option for option in options}
    for index in rest:
        arg = argv[index]
        if arg == "--":
            return
        if not arg.startswith("--") or "=" in arg:
            continue  # an argument, -h, or --key=value
        known = [name for name in options if name.startswith(arg)]  # argparse takes a beginning
        if known:
            if options[known[0]]:
                next(rest, None)  # its value
            continue
        name = arg[2:].replace("-", "_")
        same = [key for key in keys if name in (key, key.split(".")[-1])]
        if same:
            value = argv[index + 1] if index + 1 < len(argv) else "VALUE"
            ways = " or ".join(f"{key}={shlex.quote(value)}" for key in same)
            raise ConfigError(f"{arg}: settings are written without dashes, as {ways}.")
        near = find_nearest(name, [*spellings], 1) or find_nearest(name, keys, 1)
        hint = (
            f" Did you mean {spellings.get(near[0], near[0])}?"
            if near
            else " --help lists what there is."
        )
        raise ConfigError(f"there is no option {arg}.{hint}")


def check_train_arguments(settings: Sequence[str], program: str):
    """Raise ConfigError for an argument of `jaxgpt train` that is no setting: `gpt_mini`."""
    for text in (setting for setting in settings if "=" not in setting):
        if os.path.isfile(os.path.join(text, "config.json")):
            meaning = (
                f"is a run: the command that started it resumes it; a new run begins with its "
                f"parameters by train.start={text}"
            )
        elif text.endswith(".py") or text in list_configs():
            meaning = f"is a config: write {program} --config {text}"
        elif os.path.exists(text):
            meaning = f"is no setting: to train on it, write data.source={shlex.quote(text)}"
        else:
            continue  # parse_assignments says what is expected
        raise ConfigError(f"{text} {meaning}.")


def check_data_settings(values: Mapping[str, Any]):
    """Raise ConfigError for a text or tokenizer that is named as if it could be downloaded.

    Args:
        values: settings by key.
    """
    for key in ("data.source", "data.validation", "data.test"):
        check_local(values.get(key, ""), key)
    name = values.get("data.tokenizer", "")
    is_plain = name not in ("", "train", "bytes") and not any(mark in name for mark in ":/\\.~")
    if is_plain and not os.path.exists(name):
        raise ConfigError(
            f"data.tokenizer={name!r} is no file or folder here, and nothing is downloaded. Give "
            "the path of a tokenizer.json or tokenizer.model, as on a model's page on "
            "huggingface.co, or of a folder with one; or 'train', or 'bytes'."
        )


def check_local(source: str, key: str):
    """Raise ConfigError for an address in place of a path, `https://...`."""
    places = [word for word in source.split() if "://" in word]
    if places:
        raise ConfigError(
            f"{key}={places[0]!r} is an address, and sources are files: download it first "
            f"(curl -LO {shlex.quote(places[0])}), and give the path; or name a data set of the "
            "Hugging Face hub as hf:NAME."
        )


def check_sample_arguments(settings: Sequence[str], program: str, run: str):
    """Raise ConfigError for an argument of `jaxgpt sample` that is no setting: `"def main("`."""
    for text in settings:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip("-").replace("-", "_").replace(".", "_").isidentifier():
            prompt = shlex.quote(text)
            raise ConfigError(
                f"{prompt} is no key=value. As a text to continue: {program} {run} --prompt "
                f"{prompt}"
            )
