"""Folders of saved arrays: how Orbax writes and reads them here, and what its errors mean.

A checkpoint is a folder named after its step, with one folder per part (params, rest, progress).
"""

import glob
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from jaxgpt.settings import ConfigError

FOLDERS = ("checkpoints", "best")  # of a run, with checkpoints


class ShapeMismatchError(ConfigError):
    """A checkpoint's arrays have other names or shapes than expected."""


def latest_step(folder: str) -> int | None:
    """Return the last step with a complete checkpoint in `folder`, or None."""
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def make_manager(folder: str, is_read_only: bool = False) -> ocp.CheckpointManager:
    """Return the writer and reader of the checkpoints in a folder. It deletes none by itself."""
    folder = os.path.abspath(folder)
    match_literally(folder)
    options = (
        ocp.CheckpointManagerOptions(read_only=True)
        if is_read_only
        else ocp.CheckpointManagerOptions(cleanup_tmp_directories=True)
    )
    arrays = {part: ocp.StandardCheckpointHandler() for part in ("params", "rest")}
    handlers = {**arrays, "progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def match_literally(folder: str):
    """Make Orbax find files in a folder whose path has a bracket, a star or a question mark.

    Orbax joins the pattern of its files to the path of the folder and matches both, so that in
    runs/lr[1e-3] it finds nothing, and saves a checkpoint that cannot be read. The correction, of
    its class of paths, is applied only where such a path is used.
    """
    path_type = type(epath.Path(folder))
    if glob.escape(folder) == folder or hasattr(path_type, "_glob_before"):
        return
    path_type._glob_before = before = path_type.glob

    def match(self, pattern: str) -> Iterator:
        if "://" in os.fspath(self):
            return before(self, pattern)
        return (self / name for name in glob.glob(pattern, root_dir=os.fspath(self)))

    path_type.glob = match


@contextmanager
def describe_read_errors(folder: str) -> Iterator[None]:
    """Turn any error of reading a checkpoint into one message. Orbax raises all kinds of errors.

    Raises:
        ConfigError: in place of the original error; gives the checkpoint, and what to do.
    """
    try:
        yield
    except ConfigError:
        raise
    except MemoryError as error:
        raise ConfigError(f"there is not enough memory to read the checkpoint {folder}.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if is_out_of_memory(error):
            text = f"there is not enough memory to read the checkpoint {folder} ({reason})."
        elif is_readable(folder):  # at least its list of arrays is whole
            text = f"the checkpoint {folder} cannot be read ({reason})."
        else:
            text = f"the checkpoint {folder} is damaged ({reason}). {_describe_fallback(folder)}"
        raise ConfigError(text) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is one of memory, of this machine or of a device."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )


def is_readable(folder: str) -> bool:
    """Return whether the list of arrays of a checkpoint's parts, and its progress, can be read.

    It takes milliseconds: the arrays themselves are not read.
    """
    try:
        read_manifest(folder)
    except Exception:  # Orbax raises all kinds of errors
        return False
    return True


def read_shapes(folder: str) -> Any:
    """Read the tree of names and shapes of the arrays in a folder."""
    folder = os.path.abspath(folder)
    match_literally(folder)
    with _avoid_leak():
        return ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).tree


@contextmanager
def _avoid_leak() -> Iterator[None]:
    """Make Orbax open arrays without asking TensorStore for their specs as JSON.

    `tensorstore.Spec.to_json` (seen in 0.1.86) never frees the dicts and lists inside of what it
    returns: 5 kB an array, and every checkpoint is read back after it was saved. Orbax wants only
    a note of the compression from them, and does without.
    """
    before = vars(tensorstore.Spec)["to_json"]  # as an attribute it would not be bound again
    tensorstore.Spec.to_json = lambda spec, include_defaults=False: {}  # type: ignore
    try:
        yield
    finally:
        tensorstore.Spec.to_json = before  # type: ignore


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the names and shapes of a checkpoint's arrays, by part, and its progress."""
    found = {}
    for part in ("params", "rest"):
        path = os.path.join(folder, part)
        if os.path.isdir(path):
            found[part] = read_shapes(path)
    if not found:
        raise ValueError(f"{folder} has no arrays")
    with open(os.path.join(folder, "progress", "metadata"), encoding="utf-8") as file:
        return {**found, "progress": json.load(file)}


def _describe_fallback(folder: str) -> str:
    """Advise what to do without a checkpoint: only what has been seen to work."""
    parent, step = os.path.split(folder)
    run_folder, name = os.path.split(parent)
    others = sorted((n for n in ocp.utils.checkpoint_steps(parent) if n != int(step)), reverse=True)
    for other in others:
        if is_readable(os.path.join(parent, str(other))):
            return f"Move it away or delete it: step {other}, the one before, can be read."
    for sibling in set(FOLDERS) - {name}:
        other = latest_step(os.path.join(run_folder, sibling))
        if other is not None and is_readable(os.path.join(run_folder, sibling, str(other))):
            path = os.path.join(run_folder, sibling, str(other))
            return f"{path} can be read, and holds the parameters: keep it."
    return "No other checkpoint of this run can be read (train.keep=2 keeps two)."


def check_shapes(folder: str, saved: Mapping[str, Any], **expected):
    """Raise ShapeMismatchError unless the saved arrays have the expected names and shapes.

    Args:
        folder: of the checkpoint.
        saved: trees of arrays, or of their shapes, by part.
        expected: likewise.
    """
    missing = [part for part in expected if part not in saved]
    if missing:
        raise ConfigError(
            f"the checkpoint {folder} lacks its part {missing[0]!r}: it was not copied or saved "
            f"as a whole. {_describe_fallback(folder)}"
        )
    saved_shapes = {part: get_shapes(saved.get(part)) for part in expected}
    expected_shapes = {part: get_shapes(tree) for part, tree in expected.items()}
    lines = [
        f"  {name}: {saved_shapes[part].get(name, 'nothing')} is saved, "
        f"{expected_shapes[part].get(name, 'nothing')} is expected"
        for part in expected
        for name in saved_shapes[part] | expected_shapes[part]
        if saved_shapes[part].get(name) != expected_shapes[part].get(name)
    ]
    if lines:
        more = [f"  and {len(lines) - 4} more"] if len(lines) > 4 else []
        text = "\n".join(lines[:4] + more)
        raise ShapeMismatchError(f"{folder} is of another model or optimizer:\n{text}")


def get_shapes(tree) -> dict[str, list[int]]:
    """Map the name of every array of a tree to its shape. Saved trees have lists for tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
