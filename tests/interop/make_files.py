"""A tiny model with a tokenizer in a folder of transformers, written without transformers."""

import dataclasses
import json
import pathlib
import struct
from collections.abc import Callable

import jax
import numpy as np
from helpers import random_params, tiny

from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.interop import convert, huggingface
from jaxgpt.language_model import LanguageModel
from jaxgpt.tokenizer import make_byte_tokenizer

MODEL = tiny(vocab=270, context=32)


def make_model(cfg: ModelConfig = MODEL, objective: str = "causal", **more) -> LanguageModel:
    """Return a model with random parameters and the tokenizer of bytes."""
    config = Config(name="tiny", model=cfg, data=DataConfig(tokenizer="bytes"),
                    train=TrainConfig(objective=objective))  # fmt: skip
    return LanguageModel(config, random_params(cfg), make_byte_tokenizer(), **more)


def write_folder(
    folder: pathlib.Path, shards: int = 1, dtype: str | None = None, cfg: ModelConfig = MODEL
) -> pathlib.Path:
    """Write the model for transformers, in about so many shards."""
    archive = convert.to_archive(make_model(cfg), dtype)
    size = sum(x.read().nbytes for x in archive.tensors.values())
    huggingface.write_folder(archive, str(folder), max_shard_bytes=size // shards + 1)
    return folder


def to_float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# --- damage --------------------------------------------------------------------------------------


def edit_json(path: pathlib.Path, change: Callable[[dict], dict | None]):
    """Change the content of a JSON file; a change in place returns None."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_header(path: pathlib.Path, change: Callable[[dict], dict | None]):
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def without_dtype(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, dtype="float32")
