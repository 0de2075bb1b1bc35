"""Folders of transformers <-> `Archive`: config.json, *.safetensors, tokenizer.json, ...

archive = open_folder("SmolLM2-135M/")      nothing but headers is read
write_folder(archive, "exported/")          it gets its name when it is complete
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxgpt import tokenizer as tokenizers
from jaxgpt.interop import safetensors_files
from jaxgpt.interop.archive import Archive
from jaxgpt.interop.families import FAMILIES
from jaxgpt.interop.safetensors_files import read_json
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer, companions
from jaxgpt.tokenizer.convert import FORMS
from jaxgpt.tokenizer.placeholder import NoTokenizer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


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
    return Archive(config, tensors, _read_tokenizer(folder), generation, folder)


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


def _read_tokenizer(folder: str) -> Tokenizer | None:
    """Return the tokenizer of a folder, which ends a text at any id that a file there names."""
    files = {*os.listdir(folder)}
    return tokenizers.load(folder) if any(files >= {*form.files} for form in FORMS) else None


def list_ids(value: Any) -> list[int]:
    """Return the ids of a key that has one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [x for x in values if isinstance(x, int) and not isinstance(x, bool) and x >= 0]


# --- writing -------------------------------------------------------------------------------------


def write_archive(archive: Archive, path: str, quantize: str | None = None):
    """Write a model into a new folder; see `write_folder`.

    Raises:
        ConfigError: `quantize` is given.
    """
    if quantize:
        raise ConfigError(
            f"--quantize {quantize} is for --format gguf; with --format hf, --dtype bfloat16 "
            "halves the size."
        )
    write_folder(archive, path)


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
    if archive.tokenizer is not None and not isinstance(archive.tokenizer, NoTokenizer):
        files |= describe_tokenizer(archive.tokenizer, archive.config)
        write_text(os.path.join(folder, "tokenizer.json"), archive.tokenizer.content)
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
    names = {index: name for name, index in tokenizer.special_ids.items()}
    special = {
        f"{role}_token": names[index]
        for role in ("bos", "eos", "pad", "unk")
        if (index := getattr(tokenizer, role)) in names
    }
    settings = companions.describe(tokenizer) | special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos,
    }  # fmt: skip
    context = config.get("max_position_embeddings") or config.get("n_positions")
    if context:
        settings["model_max_length"] = context
    return {"tokenizer_config.json": settings, "special_tokens_map.json": special}
