"""Documents of TensorFlow Datasets, read from array_record files, without TensorFlow.

A data set that is not on this machine is downloaded and prepared first. Its files are below
TFDS_DATA_DIR (~/tensorflow_datasets if that is not set).
"""

import contextlib
import difflib
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from jaxgpt.config import DataConfig
from jaxgpt.data.units import (
    RawDocuments,
    SourceUnit,
    Split,
    extract_texts,
    make_split_units,
    read_stamp,
    split_source,
)
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError


def list_units(cfg: DataConfig) -> list[SourceUnit]:
    """Return the units of the data set `cfg.source`, tfds:name or tfds:name/config: example ranges.

    Each may end in @split: tfds:name@test.

    Args:
        cfg: `text_key` is the feature with the text, `target_key` the one with the answer (text or
            a class number) if texts come in pairs.

    Returns:
        The units; see `make_split_units` for what is held out. The name of a document has its split
        and index.

    Raises:
        ConfigError: the package or the data set is missing, or preparing it failed. Reading raises
            it too, if the feature is missing.
    """
    builder, splits = _open_builder(cfg.source)
    folder = str(builder.data_dir)
    stamps = [read_stamp(os.path.join(folder, name)) for name in sorted(os.listdir(folder))]
    sizes = {name: int(info.num_bytes) for name, info in builder.info.splits.items()}
    found = {
        # partial(partial, ...) is (begin, end, part) -> reader of the range
        name: Split(len(examples), sizes.get(name, 0), partial(partial, _read_range, cfg, name))
        for name, examples in splits.items()
    }
    facts = ["tfds", cfg.text_key, cfg.target_key, stamps]
    return make_split_units(cfg.source, found, facts)


def _read_range(cfg: DataConfig, split: str, begin: int, end: int, part: str) -> RawDocuments:
    examples = _open_builder(cfg.source)[1][split]
    for index in range(begin, end):
        name = f"{cfg.source}/{split}/{index}"
        content, target = extract_texts(cfg, examples[index], name)
        yield name, content, part, target


def _open_builder(source: str) -> tuple[Any, dict[str, Any]]:
    """Return the builder, and random-access sequences of examples by split name."""
    tfds = require("tensorflow_datasets", f"data.source={source}")
    builder = _find_builder(tfds, source)
    with _replace_tensorflow(builder):
        try:
            builder.download_and_prepare()
        except Exception as error:
            raise ConfigError(_describe_failure(source, builder, error)) from error
    try:
        splits = builder.as_data_source()
        return builder, {str(name): examples for name, examples in splits.items()}
    except Exception as error:  # prepared by someone else, in a format without random access
        raise ConfigError(
            f"data.source={source!r} is in {builder.data_dir}, but cannot be read from there: "
            f"{_summarize(error)} It must be array_record: set TFDS_DATA_DIR to another folder, "
            "and it is prepared again."
        ) from error


def _find_builder(tfds, source: str):
    name = split_source(source)[0].removeprefix("tfds:")
    try:
        # tfds reads the variable when it is imported, which may have been before it was set.
        folder = os.environ.get("TFDS_DATA_DIR")
        return tfds.builder(name, data_dir=folder, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, n=1)
        hint = f" Did you mean tfds:{near[0]}?" if near else ""
        raise ConfigError(
            f"data.source={source!r}: tensorflow-datasets {tfds.__version__} has no such data "
            f"set, and there is none in {folder or tfds.core.constants.DATA_DIR}.{hint}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"data.source={source!r} must be tfds:name or tfds:name/config: {_summarize(error)}"
        ) from error


def _describe_failure(source: str, builder, error: Exception) -> str:
    """Return the message of a failed preparation, with a command that prepares the data set."""
    lacks_tensorflow = isinstance(error, ImportError) and "tensorflow" in str(error)
    where = "tensorflow is installed" if lacks_tensorflow else "there is a network"
    what = "preparation needs tensorflow" if lacks_tensorflow else "download or preparation failed"
    recipe = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder('{source.removeprefix('tfds:')}', file_format='array_record')"
        ".download_and_prepare()"
    )
    return (
        f"data.source={source!r}: the {what}: {_summarize(error)} "
        f"Prepare it once where {where}, with\n"
        f'  python -c "{recipe}"\n'
        f"and copy the folder to {builder.data_dir}; or set data.source to a file with the text."
    )


def _summarize(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
    return f"{type(error).__name__}: {first}."


# --- replacements of tensorflow's file functions, for builders that need nothing else of it ---


def _open(path, mode: str = "r"):
    return open(path, mode) if "b" in mode else open(path, mode, encoding="utf-8", newline="\n")


_FILE_FUNCTIONS = SimpleNamespace(
    GFile=_open,
    Open=_open,
    copy=shutil.copyfile,
    exists=os.path.exists,
    glob=glob.glob,
    isdir=os.path.isdir,
    listdir=os.listdir,
    makedirs=lambda path: os.makedirs(path, exist_ok=True),
    walk=os.walk,
)


@contextlib.contextmanager
def _replace_tensorflow(builder) -> Iterator[None]:
    """Give a builder file functions, if they are all for which it would import tensorflow.

    Most builders of text, tiny_shakespeare among them, use tensorflow only for `tf.io.gfile.GFile`
    and the like; tensorflow-datasets 4.9.10 cannot prepare them without it. Their module's `tf` is
    replaced during preparation, unless tensorflow is installed.
    """
    module = sys.modules.get(type(builder).__module__)
    lazy = getattr(module, "tf", None)
    if lazy is None or find_spec("tensorflow"):
        yield
        return
    stand_in = SimpleNamespace(io=SimpleNamespace(gfile=_FILE_FUNCTIONS))
    setattr(module, "tf", stand_in)  # noqa: B010  (mypy)
    try:
        yield
    finally:
        setattr(module, "tf", lazy)  # noqa: B010
