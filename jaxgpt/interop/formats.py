"""The formats of foreign models: which paths are of one, and what reads and writes it.

Nothing heavy is imported: functions are named, and imported when they are used.
"""

import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# First parts of a path that mean a folder of this library, also where it is not there yet.
_LOCAL_FOLDERS = ("", ".", "..", "runs", "models")


class Format(NamedTuple):
    """One format.

    Attributes:
        title: for people.
        is_for: whether a path is of this format.
        open: "module:function", (path) -> Archive.
        write: "module:function", (archive, path, quantize) -> None; "" if it is only read.
        is_folder: whether it is written as a folder.
        load: "module:function", with the arguments of `jaxgpt.load`.
    """

    title: str
    is_for: Callable[[str], bool]
    open: str
    write: str = ""
    is_folder: bool = False
    load: str = "jaxgpt.interop.loaders:load"


def is_peft(path: str) -> bool:
    """Return whether a path is a folder of adapters of peft."""
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def is_transformers(path: str) -> bool:
    """Return whether a path is a folder of transformers: its config.json has a model_type."""
    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        return os.path.isdir(path) and has_tensors(path)
    try:
        with open(file, encoding="utf-8") as handle:
            content = json.load(handle)
    except (OSError, ValueError, RecursionError):
        return has_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return False  # of a run
    keys = {*content} if isinstance(content, dict) else set()
    return bool(keys & {"model_type", "architectures"}) or has_tensors(path)


def has_tensors(path: str) -> bool:
    """Return whether a folder has a file of tensors in it, of any format."""
    endings = (".safetensors", ".bin", ".pth", ".pt", ".safetensors.index.json")
    return any(name.endswith(endings) for name in os.listdir(path))


def is_hub_name(path: str) -> bool:
    """Return whether a path that is none names a model of the Hugging Face hub: "user/name"."""
    user, _, name = path.partition("/")
    if os.path.exists(path) or user in _LOCAL_FOLDERS or os.path.isdir(user):
        return False
    return all(HUB_NAME.fullmatch(part) for part in (user, name))


def is_gguf(path: str) -> bool:
    """Return whether a path is a GGUF file."""
    return os.path.isfile(path) and path.endswith(".gguf")


def is_other_file(path: str) -> bool:
    """Return whether a path is a file of tensors: of llama2.c, or one that is refused."""
    return os.path.isfile(path) and path.endswith((".bin", ".pth", ".pt", ".ckpt", ".safetensors"))


FORMATS: dict[str, Format] = {
    "peft": Format(
        "a folder of peft, with adapters",
        is_peft,
        "jaxgpt.interop.peft:open_folder",
        "jaxgpt.interop.peft_write:write_folder",
        is_folder=True,
        load="jaxgpt.loading:load_peft",
    ),
    "hf": Format(
        "a folder of transformers",
        is_transformers,
        "jaxgpt.interop.huggingface:open_folder",
        "jaxgpt.interop.huggingface:write_archive",
        is_folder=True,
    ),
    "gguf": Format(
        "a GGUF file of llama.cpp",
        is_gguf,
        "jaxgpt.interop.gguf_files:open_file",
        "jaxgpt.interop.gguf_files:write_file",
    ),
    "llama2c": Format(
        "a file of llama2.c", is_other_file, "jaxgpt.interop.loaders:open_other_file"
    ),
    "hub": Format(
        "a model of the Hugging Face hub", is_hub_name, "jaxgpt.interop.loaders:open_hub"
    ),
}


def find_format(path: str) -> str:
    """Return the name of the format of a path in FORMATS, or "" if it is of none."""
    return next((name for name, row in FORMATS.items() if row.is_for(path)), "")
