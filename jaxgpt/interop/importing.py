"""Import of a foreign model as the model of a run folder."""

import dataclasses
import os
from collections.abc import Callable

import jax

from jaxgpt.interop import convert, loaders
from jaxgpt.language_model import LanguageModel


def import_model(
    path: str, run_folder: str, dtype: str | None, log: Callable[[str], None]
) -> LanguageModel:
    """Return a foreign model with the config of a run folder, which `loading.save` writes.

    Args:
        path: see `jaxgpt.load`.
        run_folder: that it is to become.
        dtype: "float32", "bfloat16" or None, as it is stored.
        log: takes messages about what was left out.
    """
    model = convert.to_model(loaders.open_archive(path), dtype=dtype, log=log)
    return rename_model(model, run_folder)


def rename_model(model: LanguageModel, run_folder: str) -> LanguageModel:
    """Return a model with the config of a run folder."""
    folder, name = os.path.split(os.path.normpath(run_folder))
    data = dataclasses.replace(
        model.config.data, tokenizer=os.path.join(run_folder, "tokenizer.json")
    )
    config = dataclasses.replace(model.config, name=name, folder=folder or ".", data=data)
    return dataclasses.replace(model, config=config)


def list_arrays(model: LanguageModel) -> list[jax.Array]:
    """Return the parameters of a model."""
    return jax.tree.leaves(model.params)
