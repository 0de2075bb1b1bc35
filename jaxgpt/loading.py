"""Models on disk: every kind of path that holds one gives the same value, a `LanguageModel`.

    model = jaxgpt.load("runs/stdlib", dtype="bfloat16")
    jaxgpt.save(model, "models/stdlib")

A run folder is what training leaves (see trainer/checkpoint.py), and what `save` writes: without
the state of an optimizer, a saved model is the best checkpoint of a run that has no other.

    config.json  tokenizer.json  labels.json
    checkpoints/<step>/params   best/<step>/params
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config
from jaxgpt.config_files import find_run_config
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import abstract_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.saved_arrays import (
    check_shapes,
    describe_read_errors,
    latest_step,
    make_manager,
    read_shapes,
)
from jaxgpt.settings import ConfigError, resolve_table
from jaxgpt.sharding import MESH_AXES, make_shardings

# Where the parameters of a run are, by the value of `checkpoint=`: the first folder that has any.
CHECKPOINT_FOLDERS: dict[str, tuple[str, ...]] = {
    "best": ("best", "checkpoints"),
    "latest": ("checkpoints", "best"),
}


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoint: str = "best",
    plugins: Sequence[str] | None = None,
) -> LanguageModel:
    """Load a model for inference, whatever kind of path holds it (see LOADERS).

    Args:
        path: such as runs/gpt_mini; of a run also its `best` or `checkpoints`, or one checkpoint in
            it, runs/gpt_mini/best/40.
        dtype: of the parameters and of the computation, "float32" or "bfloat16"; None keeps the
            parameters as they were saved, and computes in `model.dtype` of the config.
        mesh: a mesh of `sharding.make_mesh` to shard the parameters over; None puts them on the
            first device of this process.
        checkpoint: of a run, "best" (the lowest held-out loss) or "latest"; the other one if there
            is none.
        plugins: of a run, see `read_config`.

    Raises:
        ConfigError: there is no model at this path, it cannot be read, or an argument is invalid.
    """
    path = os.fspath(path)
    if dtype is not None:
        configs.choose(DTYPES, dtype, "dtype")
    if mesh is not None and mesh.axis_names != MESH_AXES:
        raise ConfigError(
            f"mesh has the axes {', '.join(map(str, mesh.axis_names))}, not {', '.join(MESH_AXES)}:"
            " make it with jaxgpt.sharding.make_mesh."
        )
    fits = (loader for loader in LOADERS.values() if loader.is_for(path))
    loader = next(fits, LOADERS["run"])
    read: Any = resolve_table(loader.function)
    return read(path, dtype=dtype, mesh=mesh, checkpoint=checkpoint, plugins=plugins)


def load_run(
    run_folder: str,
    *,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    checkpoint: str,
    plugins: Sequence[str] | None,
) -> LanguageModel:
    """Load the model of a run folder; see `load`."""
    run_folder, named = split_checkpoint_path(run_folder)
    config = read_config(run_folder, plugins)
    tokenizer = tokenizers.load(os.path.join(run_folder, "tokenizer.json"))
    if dtype is not None:
        model_config = dataclasses.replace(config.model, dtype=dtype)
        config = dataclasses.replace(config, model=model_config)
    names = configs.choose(CHECKPOINT_FOLDERS, checkpoint, "checkpoint")
    for folder in [named] if named else [os.path.join(run_folder, name) for name in names]:
        step = int(os.path.basename(folder)) if is_checkpoint(folder) else latest_step(folder)
        if step is not None:
            path = os.path.abspath(folder if is_checkpoint(folder) else f"{folder}/{step}")
            tokenizer.check_fingerprint(_read_progress(path).get("tokenizer", ""), run_folder)
            params = _load_params(path, config, dtype, mesh)
            labels = tuple(read_labels(run_folder))
            return LanguageModel(config, params, tokenizer, labels, step, path)
    raise ConfigError(f"{run_folder} has no checkpoint yet: train it first, or for longer.")


def is_checkpoint(path: str) -> bool:
    """Return whether a path is one checkpoint of a run, such as runs/x/best/40."""
    return os.path.basename(path).isdecimal() and os.path.isdir(os.path.join(path, "params"))


def split_checkpoint_path(path: str) -> tuple[str, str]:
    """Return (the run folder, "" or the folder inside it that the path names).

    >>> split_checkpoint_path("runs/x"), split_checkpoint_path("runs/x/best")
    (('runs/x', ''), ('runs/x', 'runs/x/best'))
    """
    path = os.path.normpath(path)
    if is_checkpoint(path):
        return os.path.dirname(os.path.dirname(path)), path
    if os.path.basename(path) in CHECKPOINT_FOLDERS["best"] and not is_run(path):
        return os.path.dirname(path), path
    return path, ""


def is_run(path: str) -> bool:
    """Return whether a path is a run folder."""
    return os.path.isfile(os.path.join(path, "config.json"))


def is_saved_model(path: str) -> bool:
    """Return whether a path is what `save` writes: parameters without a history of training."""
    has_params = latest_step(os.path.join(path, "best")) is not None
    return has_params and not os.path.exists(os.path.join(path, "metrics.jsonl"))


class Loader(NamedTuple):
    """A kind of path that holds a model."""

    is_for: Callable[[str], bool]  # whether it loads this path
    function: str  # "module:function", imported when used; takes the arguments of `load`


# The first one that is for a path loads it, so that a more specific kind stands before "run".
LOADERS: dict[str, Loader] = {"run": Loader(is_run, "jaxgpt.loading:load_run")}


def save(model: LanguageModel, folder: str | os.PathLike):
    """Save a model as a run folder, which `load` and sample.py open.

    The folder gets its name when it is complete.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    folder = os.path.abspath(os.fspath(folder))
    partial = f"{folder}.partial"
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ConfigError(f"{folder} exists: save into a new folder, or delete it first.")
    hosts.run_on_all(lambda: _write_files(model, partial))
    with make_manager(os.path.join(partial, "best")) as manager:
        params, progress = ocp.args.StandardSave(model.params), ocp.args.JsonSave(
            {"step": model.step, "tokenizer": model.tokenizer.fingerprint}
        )  # fmt: skip
        manager.save(model.step, args=ocp.args.Composite(params=params, progress=progress))
    hosts.run_on_all(lambda: _rename(partial, folder))


@hosts.run_on_first
def _write_files(model: LanguageModel, folder: str):
    """Write all but the parameters into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    model.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    files = {"config.json": configs.to_json(model.config)}
    if model.labels:
        files["labels.json"] = json.dumps(list(model.labels)) + "\n"
    for name, text in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)


@hosts.run_on_first
def _rename(partial: str, folder: str):
    os.rename(partial, folder)


# --- run folders -----------------------------------------------------------------------------


def read_config(run_folder: str, plugins: Sequence[str] | None = None) -> Config:
    """Read the config of a run.

    Args:
        run_folder: such as runs/gpt_mini.
        plugins: modules, or paths of .py files, in place of those that the config names.

    Raises:
        ConfigError: there is none, or it is invalid.
    """
    path = find_run_config(run_folder)
    try:
        with open(path, encoding="utf-8") as file:
            return configs.from_json(file.read(), path, plugins)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read: {reason}.") from error


def read_labels(run_folder: str) -> list[str]:
    """Read the class names of a run; none if it is not a classifier."""
    path = os.path.join(run_folder, "labels.json")
    if not os.path.isfile(path):
        return []
    with open(path) as file:
        return json.load(file)


def _read_progress(folder: str) -> dict[str, Any]:
    """Read the progress saved with a checkpoint; nothing if it was left out."""
    path = os.path.join(folder, "progress")
    if not os.path.isdir(path):
        return {}
    with describe_read_errors(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path)


def read_params(folder: str, abstract) -> Any:
    """Read the parameters of one checkpoint, with the shapes and shardings of `abstract`."""
    _read_saved_shapes(folder, abstract)
    return _restore_params(folder, abstract)


def _read_saved_shapes(folder: str, expected) -> Any:
    """Read the names and shapes of the parameters of a checkpoint; they must be `expected`."""
    with describe_read_errors(folder):
        saved = read_shapes(os.path.join(folder, "params"))
        check_shapes(folder, {"params": saved}, params=expected)
    return saved


def _restore_params(folder: str, abstract) -> Any:
    with ocp.StandardCheckpointer() as reader, describe_read_errors(folder):
        return reader.restore(os.path.join(folder, "params"), abstract)


def _load_params(
    folder: str, config: Config, dtype: str | None, mesh: jax.sharding.Mesh | None
) -> Any:
    """Read the parameters of a checkpoint onto one device or a mesh, wherever they were trained."""
    shapes, letters = abstract_params(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = (
        jax.tree.map(lambda x: device, shapes)
        if mesh is None
        else make_shardings(shapes, letters, mesh)
    )
    saved = _read_saved_shapes(folder, shapes)
    abstract = jax.tree.map(
        lambda x, old, sharding: jax.ShapeDtypeStruct(
            x.shape, DTYPES[dtype] if dtype else old.dtype, sharding=sharding
        ),
        shapes, saved, shardings,
    )  # fmt: skip
    return _restore_params(folder, abstract)
