"""Folders of transformers <-> `Archive`: config.json, *.safetensors, tokenizer.json, ...

archive = open_folder("SmolLM2-135M/")      nothing but headers is read
write_folder(archive, "exported/")          it gets its name when it is complete
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from jaxgpt import tokenizer as tokenizers
from jaxgpt.interop import safetensors_files
from jaxgpt.interop.archive import Archive
from jaxgpt.interop.families import FAMILIES
from jaxgpt.interop.safetensors_files import read_json
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "encoder.json", "vocab.txt", "tokenizer.model", "spiece.model"
)  # fmt: skip


def open_folder(folder: str) -> Archive:
    """Return the model in a folder of transformers; of its tensors nothing but headers is read.

    Raises:
        ConfigError: a file is missing or damaged, or would have to be executed.
    """
    path = os.path.join(folder, CONFIG_FILE)
    config = _read_object(path)
    check_config(config, path)
    generation_path = os.path.join(folder, GENERATION_FILE)
    generation = _read_object(generation_path) if os.path.isfile(generation_path) else {}
    tensors = safetensors_files.open_folder(folder)
    return Archive(config, tensors, _read_tokenizer(folder, config, generation), generation, folder)


def _read_object(path: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not an object of keys and values.")
    return content


def check_config(config: Mapping[str, Any], path: str):
    """Refuse what is not a plain model of a family in FAMILIES.

    Raises:
        ConfigError: the model has code of its own, is quantized, or an adapter.
    """
    kind = config.get("model_type")
    if config.get("auto_map"):
        way_out = (
            f"If it is a plain {kind}, remove auto_map from the file"
            if kind in FAMILIES
            else "Save it as a model that transformers has without such code"
        )
        raise ConfigError(
            f"{path}: auto_map asks for Python code that comes with the model, and such code is "
            f"never executed. {way_out}."
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            f"{path}: the model is quantized (quantization_config, {method}): take the one that it "
            "was made from, or a GGUF file."
        )


def _read_tokenizer(
    folder: str, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Tokenizer | None:
    """Return the tokenizer of a folder, which ends a text at any id that a file there names."""
    if not any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        return None
    return add_ends(tokenizers.load(folder), config, generation)


def add_ends(
    tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Tokenizer:
    """Return the tokenizer whose ends include the eos_token_id of config and generation_config."""
    ends = list(getattr(tokenizer, "ends", (tokenizer.eos,)))
    stated = [i for x in (generation, config) for i in list_ids(x.get("eos_token_id"))]
    new = tuple(dict.fromkeys(x for x in (*ends, *stated) if x < tokenizer.vocab_size))
    if new == tuple(ends) or not hasattr(tokenizer, "with_ends"):
        return tokenizer
    return tokenizer.with_ends(new)


def list_ids(value: Any) -> list[int]:
    """Return the ids of a key that has one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, int) and not isinstance(x, bool) and x >= 0]


# --- writing -------------------------------------------------------------------------------------


def write_folder(
    archive: Archive,
    folder: str,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
):
    """Write a model into a new folder, for transformers.

    Args:
        texts: further files, such as README.md.
        max_shard_bytes: of a file of tensors.
    """
    os.makedirs(folder, exist_ok=True)
    files = {CONFIG_FILE: archive.config, GENERATION_FILE: archive.generation}
    if archive.tokenizer is not None:
        files |= describe_tokenizer(archive.tokenizer, archive.config)
        archive.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    for name, content in files.items():
        write_text(os.path.join(folder, name), json.dumps(content, indent=2, ensure_ascii=False))
    for name, text in (texts or {}).items():
        write_text(os.path.join(folder, name), text)
    safetensors_files.write_folder(archive.tensors, folder, max_shard_bytes)


def write_text(path: str, text: str):
    """Write a text file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")


def describe_tokenizer(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json and special_tokens_map.json of a tokenizer."""
    names = {index: name for name, index in list_special_tokens(tokenizer).items()}
    special = {
        f"{role}_token": names[index]
        for role in ("bos", "eos", "pad", "unk")
        if (index := getattr(tokenizer, role)) in names
    }
    context = config.get("max_position_embeddings") or config.get("n_positions")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if context:
        settings["model_max_length"] = context
    if template := getattr(tokenizer, "chat_template", ""):
        settings["chat_template"] = template
    return {"tokenizer_config.json": settings, "special_tokens_map.json": special}


def list_special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the special tokens of a tokenizer by their text."""
    content = json.loads(getattr(tokenizer, "content", "") or tokenizer._content)
    return {token["content"]: token["id"] for token in content.get("added_tokens", ())}


def replace_folder(partial: str, folder: str):
    """Give a complete folder its name; an empty one that is there makes room."""
    if os.path.isdir(folder):
        os.rmdir(folder)
    os.rename(partial, folder)


def check_new(folder: str):
    """Raise ConfigError unless a folder is not there yet, or is empty."""
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ConfigError(f"{folder} exists: give a new folder, or delete it first.")


def remove_partial(partial: str):
    """Remove what is left of a folder that was not completed."""
    shutil.rmtree(partial, ignore_errors=True)
