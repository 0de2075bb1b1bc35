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
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt import tokenizer as tokenizers
from jaxgpt.adapter_loading import (
    adapt,
    cast_tree,
    check_adapters,
    find_saved_adapter,
    join_base,
    set_adapter,
    set_dtype,
)
from jaxgpt.adapters import BASE_FILE, Adapter, format_base
from jaxgpt.checksums import Record, hash_json, read_arrays, seal, sum_arrays
from jaxgpt.config import Config
from jaxgpt.config_files import find_run_config
from jaxgpt.interop import peft
from jaxgpt.interop.formats import FORMATS
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import describe_trained
from jaxgpt.model import abstract_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.quantization import check_kind, check_unquantized
from jaxgpt.saved_arrays import (
    check_shapes,
    describe_read_errors,
    latest_step,
    list_saved_parts,
    make_manager,
    read_newest,
    read_progress,
    read_shapes,
)
from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError, resolve_table
from jaxgpt.sharding import MESH_AXES, make_load_shardings

# Where the parameters of a run are, by the value of `checkpoint=`: the first folder that has any.
CHECKPOINT_FOLDERS: dict[str, tuple[str, ...]] = {
    "best": ("best", "checkpoints"),
    "latest": ("checkpoints", "best"),
}

LABELS = "labels.json"  # of a run, the names of its classes


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    checkpoint: str = "best",
    plugins: Sequence[str] | None = None,
    quantize: str | None = None,
    group: int | None = None,
) -> LanguageModel:
    """Load a model for inference, whatever kind of path holds it (see LOADERS).

    Args:
        path: a run folder or saved model, such as runs/gpt_mini, also its `best` or `checkpoints`,
            or one checkpoint in it, runs/gpt_mini/best/40; a folder of transformers, a GGUF file, a
            .bin of llama2.c; or user/name of the Hugging Face hub.
        dtype: of the parameters and of the computation, "float32" or "bfloat16"; None keeps the
            parameters as they were saved, and computes in `model.dtype` of the config.
        mesh: a mesh of `sharding.make_mesh` to shard the parameters over; None puts them on the
            first device of this process.
        checkpoint: of a run, "best" (the lowest held-out loss) or "latest"; the other one if there
            is none. Every array is checked; in place of a damaged checkpoint the latest good one is
            loaded, with a warning on standard error.
        plugins: of a run, see `read_config`.
        quantize, group: "int8" or "int4" for kernels of integers, and the inputs that share a
            scale; see `LanguageModel.quantize`. The whole model is read first.

    Raises:
        ConfigError: there is no model at this path, it cannot be read, or an argument is invalid.
    """
    path = os.fspath(path)
    if dtype is not None:
        configs.choose(DTYPES, dtype, "dtype")
    if quantize is not None or group is not None:
        check_kind(quantize, group)
    if mesh is not None and mesh.axis_names != MESH_AXES:
        raise ConfigError(
            f"mesh has the axes {', '.join(map(str, mesh.axis_names))}, not {', '.join(MESH_AXES)}:"
            " make it with jaxgpt.sharding.make_mesh."
        )
    fits = (loader for loader in LOADERS.values() if loader.is_for(path))
    loader = next(fits, LOADERS["run"])
    read: Any = resolve_table(loader.function)
    model = read(path, dtype=dtype, mesh=mesh, checkpoint=checkpoint, plugins=plugins)
    return model if quantize is None else model.quantize(quantize, group)


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
    config = set_dtype(config, dtype)
    labels = tuple(read_labels(run_folder))

    def read(path: str) -> LanguageModel:
        progress, records = _read_progress(path)
        has_base = bool(config.lora.rank)
        saved = (
            _load_trained(path, config, mesh, records)
            if has_base
            else _load_params(path, config, dtype, mesh, records)
        )
        check_config_file(run_folder)  # after the shapes, whose error says more
        tokenizer.check_fingerprint(progress.get("tokenizer", ""), run_folder)
        check_labels(labels, progress.get("labels", ""), run_folder)
        params = {} if has_base else saved
        model = LanguageModel(config, params, tokenizer, labels, int(os.path.basename(path)), path)
        if not has_base:
            return model
        return join_base(model, saved, run_folder, partial(load, mesh=mesh), dtype, mesh)

    names = configs.choose(CHECKPOINT_FOLDERS, checkpoint, "checkpoint")
    folders = [named] if named else [os.path.join(run_folder, name) for name in names]
    folders = [os.path.abspath(folder) for folder in folders]
    if is_checkpoint(folders[0]):
        return read(folders[0])
    try:
        if mesh is not None and hosts.process_count() > 1:  # all processes read the same one
            first = next(f"{f}/{latest_step(f)}" for f in folders if latest_step(f) is not None)
            return read(first)
        return read_newest(folders, read, partial(print_text, file=sys.stderr))
    except (FileNotFoundError, StopIteration):
        raise ConfigError(
            f"{run_folder} has no checkpoint yet: train it first, or for longer."
        ) from None


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
LOADERS: dict[str, Loader] = {
    **{name: Loader(row.is_for, row.load) for name, row in FORMATS.items()},
    "run": Loader(is_run, "jaxgpt.loading:load_run"),
}


def save(model: LanguageModel, folder: str | os.PathLike):
    """Save a model as a run folder, which `load` and sample.py open.

    The folder gets its name when it is complete.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    adapter = find_saved_adapter(model)
    saved = model.params if adapter is None else adapter.trained
    check_unquantized(saved, "jaxgpt.save")
    folder = os.path.abspath(os.fspath(folder))
    partial = f"{folder}.partial"
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ConfigError(f"{folder} exists: save into a new folder, or delete it first.")
    hosts.run_on_all(lambda: _write_files(model, partial))
    with make_manager(os.path.join(partial, "best")) as manager:
        facts = {"step": model.step, "tokenizer": model.tokenizer.fingerprint}
        facts["labels"] = hash_labels(model.labels)
        if adapter:
            facts["base"] = adapter.base.fingerprint
        progress = ocp.args.JsonSave(seal(facts, sum_arrays(params=saved)))
        params = ocp.args.StandardSave(saved)
        manager.save(model.step, args=ocp.args.Composite(params=params, progress=progress))
    hosts.run_on_all(lambda: _rename(partial, folder))


@hosts.run_on_first
def _write_files(model: LanguageModel, folder: str):
    """Write all but the parameters into a new folder."""
    adapter = find_saved_adapter(model)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    model.tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = set_adapter(model.config, adapter)
    files = {"config.json": configs.to_json(config)}
    if adapter:
        files[BASE_FILE] = format_base(adapter.base, folder)
    if model.labels:
        files[LABELS] = json.dumps(list(model.labels)) + "\n"
    for name, text in files.items():
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)


@hosts.run_on_first
def _rename(partial: str, folder: str):
    os.rename(partial, folder)


# --- adapters --------------------------------------------------------------------------------


def load_peft(
    path: str,
    *,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    checkpoint: str = "best",
    plugins: object = None,
) -> LanguageModel:
    """Load a folder of peft onto its base; see `load`."""
    place = peft.find_base(path)
    base = load(place, mesh=mesh).merge()
    adapter = peft.read_folder(path, base, place)
    data = dataclasses.replace(base.config.train, start=place)
    name = os.path.basename(os.path.normpath(path))
    config = dataclasses.replace(base.config, name=name, train=data)
    config = set_adapter(config, adapter)
    params = cast_tree(base.params, dtype)
    model = dataclasses.replace(base, config=set_dtype(config, dtype), params=params, origin=path)
    return adapt(model, adapter)


def load_adapters(model: LanguageModel, adapters: Mapping[str, Any]) -> dict[str, Adapter]:
    """Return the adapters that `LanguageModel.with_adapters` is given; those of paths are loaded.

    Raises:
        ConfigError: one has no adapter, is of another base, or does not fit.
    """
    loaded = {
        name: load(value) if isinstance(value, (str, os.PathLike)) else value
        for name, value in adapters.items()
    }
    return check_adapters(model, loaded)


def _load_trained(folder: str, config: Config, mesh, records) -> Any:
    """Read the adapters of a checkpoint, and what is trained in full beside them."""
    shapes, letters = describe_trained(config)
    shardings = make_load_shardings(shapes, letters, mesh)
    _read_saved_shapes(folder, shapes)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, shardings,
    )  # fmt: skip
    return _restore_params(folder, abstract, records)


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


def count_dtypes(run_folder: str) -> dict[str, int]:
    """Return how many parameters of a run there are of each dtype; nothing but shapes is read."""
    found: dict[str, int] = {}
    for name in CHECKPOINT_FOLDERS["best"]:
        folder = os.path.join(run_folder, name)
        step = latest_step(folder)
        if step is not None:
            for x in jax.tree.leaves(read_shapes(os.path.join(folder, str(step), "params"))):
                kind = str(x.dtype)
                found[kind] = found.get(kind, 0) + math.prod(x.shape)
            break
    return found


def read_labels(run_folder: str) -> list[str]:
    """Read the class names of a run; none if it is not a classifier.

    Raises:
        ConfigError: the file is not a list of names.
    """
    path = os.path.join(run_folder, LABELS)
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            labels = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise ConfigError(f"{path} is not a list of class names.")
    return labels


def hash_labels(labels: Sequence[str]) -> str:
    """Return the checksum of class names, which belongs to the progress of a run; "" of none."""
    return hash_json(list(labels)) if labels else ""


def check_labels(labels: Sequence[str], expected: str, run_folder: str):
    """Check that the class names are those that a run was trained with.

    Args:
        labels: as `read_labels` returns them.
        expected: their checksum; "" if the run is no classifier, or older than that.
        run_folder: names the run in the error.

    Raises:
        ConfigError: they are others, or there are none.
    """
    if expected and expected != hash_labels(labels):
        path = os.path.join(run_folder, LABELS)
        raise ConfigError(
            f"{path} does not hold the class names that the run was trained with: put its own "
            "labels.json back."
        )


def check_config_file(run_folder: str):
    """Check that the config.json of a run is as it was written.

    Raises:
        ConfigError: it has changed.
    """
    path = find_run_config(run_folder)
    with open(path, encoding="utf-8") as file:
        configs.check_json(file.read(), path)


def read_facts(folder: str) -> dict[str, Any]:
    """Read and check the progress that was saved with a checkpoint; nothing if it was left out."""
    return _read_progress(folder)[0]


def _read_progress(folder: str) -> tuple[dict[str, Any], dict[str, Record] | None]:
    """Read the progress and the checksums of a checkpoint; nothing if they were left out."""
    if not os.path.isdir(os.path.join(folder, "progress")) and os.path.isdir(folder):
        if list_saved_parts(folder):
            note = f"warning: {folder} has no progress, and so no checksums: it is not checked."
            print_text(note, sys.stderr)
        return {}, None
    with describe_read_errors(folder):
        return read_progress(folder)


def read_params(folder: str, abstract) -> Any:
    """Read and check the parameters of one checkpoint.

    Args:
        abstract: their shapes, dtypes and shardings.
    """
    _, records = _read_progress(folder)
    _read_saved_shapes(folder, abstract)
    return _restore_params(folder, abstract, records)


def _read_saved_shapes(folder: str, expected) -> Any:
    """Read the names and shapes of the parameters of a checkpoint; they must be `expected`."""
    with describe_read_errors(folder):
        saved = read_shapes(os.path.join(folder, "params"))
        check_shapes(folder, {"params": saved}, params=expected)
    return saved


def _restore_params(folder: str, abstract, records: dict[str, Record] | None) -> Any:
    with describe_read_errors(folder):
        return read_arrays(folder, "params", abstract, records)


def _load_params(
    folder: str,
    config: Config,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    records: dict[str, Record] | None,
) -> Any:
    """Read the parameters of a checkpoint onto one device or a mesh, wherever they were trained."""
    shapes, letters = abstract_params(config.model)
    shardings = make_load_shardings(shapes, letters, mesh)
    saved = _read_saved_shapes(folder, shapes)
    abstract = jax.tree.map(
        lambda x, old, sharding: jax.ShapeDtypeStruct(
            x.shape, DTYPES[dtype] if dtype else old.dtype, sharding=sharding
        ),
        shapes, saved, shardings,
    )  # fmt: skip
    return _restore_params(folder, abstract, records)
