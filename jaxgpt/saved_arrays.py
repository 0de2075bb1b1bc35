"""Folders of saved arrays: how Orbax writes and reads them here, and what its errors mean.

A checkpoint is a folder named after its step, with one folder per part (params, rest, progress).
"""

import glob
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from jaxgpt.checksums import ChecksumError, Record, unseal
from jaxgpt.settings import ConfigError

Result = TypeVar("Result")
FOLDERS = ("checkpoints", "best")  # of a run, with checkpoints
PARTS = ("params", "rest")  # of a checkpoint, with arrays
PROGRESS = "progress"
DELETED = ".deleted"  # folder of checkpoints that are being deleted


class ShapeMismatchError(ConfigError):
    """A checkpoint's arrays have other names or shapes than expected."""


class DamagedError(ConfigError):
    """A checkpoint cannot be read, or is not as it was saved: another one may do.

    Attributes:
        what: which one, and the reason.
    """

    def __init__(self, what: str, advice: str = ""):
        super().__init__(f"{what}. {advice}".strip())
        self.what = what


def list_steps(folder: str) -> list[int]:
    """Return the steps with a complete checkpoint in `folder`, the latest first.

    A checkpoint gets its name, a number, when it is complete, and loses it before it is deleted.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = (int(name) for name in names if name.isdecimal() and name == str(int(name)))
    return sorted((n for n in steps if os.path.isdir(os.path.join(folder, str(n)))), reverse=True)


def latest_step(folder: str) -> int | None:
    """Return the last step with a complete checkpoint in `folder`, or None."""
    return next(iter(list_steps(folder)), None)


def make_manager(
    folder: str, is_read_only: bool = False, barrier: Callable[..., None] | None = None
) -> ocp.CheckpointManager:
    """Return the writer and reader of the checkpoints in a folder. It deletes none by itself.

    Args:
        folder: of the checkpoints.
        is_read_only: whether nothing is saved.
        barrier: where the processes wait for each other's writes; Orbax's by default.
    """
    folder = os.path.abspath(folder)
    match_literally(folder)
    silence_save_errors()
    avoid_leaks()
    options = (
        ocp.CheckpointManagerOptions(read_only=True)
        if is_read_only
        else ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=barrier),
        )
    )
    arrays = {part: ocp.StandardCheckpointHandler() for part in PARTS}
    handlers = {**arrays, PROGRESS: ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def silence_save_errors():
    """Keep tracebacks of failed saves out of the output: the error itself is raised, and handled.

    After the first error of a save, Orbax leaves other writes alone. Each of them then prints one.
    """
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(_is_for_users)  # once, however often it is added
    if sys.unraisablehook is not _print_unraisable:
        _previous["unraisable"], sys.unraisablehook = sys.unraisablehook, _print_unraisable
    if threading.excepthook is not _print_thread_error:
        _previous["thread"], threading.excepthook = threading.excepthook, _print_thread_error


def _is_for_users(record: logging.LogRecord) -> bool:
    text = f"{record.pathname} {record.getMessage()}"
    if record.exc_info and record.exc_info[0]:
        text += "".join(traceback.format_exception(*record.exc_info))
    is_of_failed_save = "temporary directory" in text and "already exists" in text
    return "orbax" not in text or (record.levelno < logging.ERROR and not is_of_failed_save)


_previous: dict[str, Any] = {}


def _print_unraisable(unraisable: Any):
    error = unraisable.exc_value
    if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        _previous["unraisable"](unraisable)


def _print_thread_error(found: Any):
    if ".orbax-checkpoint-tmp" not in str(found.exc_value):
        _previous["thread"](found)


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
        DamagedError: in place of the original error; gives the checkpoint, and what to do.
        ConfigError: there is not enough memory.
    """
    try:
        yield
    except ConfigError:
        raise
    except MemoryError as error:
        raise ConfigError(f"there is not enough memory to read the checkpoint {folder}.") from error
    except Exception as error:
        reason = describe_error(error)
        if is_out_of_memory(error):
            text = f"there is not enough memory to read the checkpoint {folder} ({reason})."
            raise ConfigError(text) from error
        if is_readable(folder) and not isinstance(error, ChecksumError):
            # At least its list of arrays is whole.
            raise DamagedError(f"the checkpoint {folder} cannot be read ({reason})") from error
        what = f"the checkpoint {folder} is damaged ({reason})"
        raise DamagedError(what, _describe_fallback(folder)) from error


def describe_error(error: BaseException) -> str:
    """Return what an error of Orbax or TensorStore is about, on one line."""
    if isinstance(error, ChecksumError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if found := re.search(r"(?:os_error_code=|OS error )'?(\d+)", str(error)):  # of TensorStore
        return os.strerror(int(found[1]))
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


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


def read_newest(
    folders: Sequence[str], read: Callable[[str], Result], warn: Callable[[str], object]
) -> Result:
    """Read the first good checkpoint, also beside a run that deletes old ones meanwhile.

    Args:
        folders: with checkpoints; of each, the latest is tried first.
        read: reads the checkpoint of a path, and raises DamagedError if it is not good.
        warn: receives a line if a damaged one was passed over.

    Raises:
        DamagedError: all of them are damaged; of the first.
        FileNotFoundError: there is none.
    """
    damaged: dict[tuple[str, int], DamagedError] = {}
    while True:
        paths = (os.path.join(f, str(step)) for f in folders for step in list_steps(f))
        identified = ((path, _identify(path)) for path in paths)
        path, inode = next((p for p in identified if p[1] and p not in damaged), ("", 0))
        if not path:
            raise next(iter(damaged.values()), FileNotFoundError(folders[0]))
        try:
            result = read(path)
        except Exception as error:
            if _identify(path) != inode:
                continue  # it was deleted, or replaced, while it was read
            if not isinstance(error, DamagedError):
                raise
            damaged[path, inode] = error
            continue
        if damaged:
            names = "; ".join(error.what for error in damaged.values())
            warn(f"warning: {names}. {path} is used in its place.")
        return result


def _identify(path: str) -> int:
    """Return a number that another folder of the same path does not have; 0 if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def read_shapes(folder: str) -> Any:
    """Read the tree of names and shapes of the arrays in a folder."""
    folder = os.path.abspath(folder)
    match_literally(folder)
    avoid_leaks()
    with _leave_out_specs():
        return ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).tree


# --- what TensorStore never frees (seen in 0.1.86): all that is inside of JSON that it returns ---


def avoid_leaks():
    """Make Orbax do without JSON of TensorStore's, which would never be freed.

    Before and after each save, Orbax asks for all counts of bytes so far, only to pass their
    difference on to `jax.monitoring`: 23 kB a save, whatever its size. It gets 0. And for each
    array it asks for the spec of its folder: 0.3 kB.
    """
    utils = sys.modules.get("orbax.checkpoint._src.serialization.tensorstore_utils")
    if hasattr(utils, "get_tensorstore_raw_bytes"):
        utils.get_tensorstore_raw_bytes = lambda *_, **__: 0  # type: ignore
    if vars(tensorstore.KvStore.Spec)["to_json"] is not _format_spec:
        _previous["to_json"] = vars(tensorstore.KvStore.Spec)["to_json"]
        tensorstore.KvStore.Spec.to_json = _format_spec  # type: ignore


def _format_spec(spec: Any, include_defaults: bool = False) -> Any:
    """Return the JSON of a spec of TensorStore's: by itself, if it is that of a folder."""
    plain = {"driver": "file", "path": spec.path}
    if not include_defaults and spec == tensorstore.KvStore.Spec(plain):
        return plain
    return _previous["to_json"](spec, include_defaults=include_defaults)


@contextmanager
def _leave_out_specs() -> Iterator[None]:
    """Make Orbax open arrays without their specs: 5 kB an array, at every reading.

    Orbax wants only a note of the compression from them, and does without.
    """
    before = vars(tensorstore.Spec)["to_json"]  # as an attribute it would not be bound again
    tensorstore.Spec.to_json = lambda spec, include_defaults=False: {}  # type: ignore
    try:
        yield
    finally:
        tensorstore.Spec.to_json = before  # type: ignore


def read_manifest(folder: str) -> dict[str, Any]:
    """Read the names and shapes of a checkpoint's arrays, by part, and its progress.

    Raises:
        ChecksumError: a part is missing, or the progress is not as it was saved.
    """
    for part in list_saved_parts(folder):
        if not os.path.isdir(os.path.join(folder, part)):
            raise ChecksumError(f"its folder {part} is missing")
    found = {}
    for part in PARTS:
        path = os.path.join(folder, part)
        if os.path.isdir(path):
            found[part] = read_shapes(path)
    if not found:
        raise ValueError(f"{folder} has no arrays")
    return {**found, "progress": read_progress(folder)[0]}


def list_saved_parts(folder: str) -> Sequence[str]:
    """Return the parts that a checkpoint was saved with, as far as Orbax has recorded them."""
    try:
        with open(os.path.join(folder, "_CHECKPOINT_METADATA"), encoding="utf-8") as file:
            return [part for part in json.load(file)["item_handlers"] if part in (*PARTS, PROGRESS)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_progress(folder: str) -> tuple[dict[str, Any], dict[str, Record] | None]:
    """Read and check the progress of a checkpoint, and the checksums of its arrays.

    Raises:
        ChecksumError: it is not as it was saved.
        OSError, ValueError: it is missing, or no JSON.
    """
    with open(os.path.join(folder, PROGRESS, "metadata"), encoding="utf-8") as file:
        return unseal(json.load(file))


def _describe_fallback(folder: str) -> str:
    """Advise what to do without a checkpoint: only what has been seen to work."""
    parent, step = os.path.split(folder)
    run_folder, name = os.path.split(parent)
    for other in list_steps(parent):
        if str(other) != step and is_readable(os.path.join(parent, str(other))):
            return f"Move it away or delete it: step {other}, the one before, can be read."
    for sibling in set(FOLDERS) - {name}:
        path = os.path.join(
            run_folder, sibling, str(latest_step(os.path.join(run_folder, sibling)))
        )
        if is_readable(path):
            return f"{path} can be read, and holds the parameters: keep it."
    return "No other checkpoint of this run can be read (train.keep sets how many are kept)."


def check_shapes(folder: str, saved: Mapping[str, Any], **expected):
    """Raise ShapeMismatchError unless the saved arrays have the expected names and shapes.

    Args:
        folder: of the checkpoint.
        saved: trees of arrays, or of their shapes, by part.
        expected: likewise.
    """
    missing = [part for part in expected if part not in saved]
    if missing:
        what = (
            f"the checkpoint {folder} lacks its part {missing[0]!r}: it was not copied or saved "
            "as a whole"
        )
        raise DamagedError(what, _describe_fallback(folder))
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
