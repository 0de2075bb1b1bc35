"""Files of tensors: safetensors, of one file or of several with an index.

Nothing is executed: a file is a header, which is JSON, and the bytes of its tensors. The header is
checked before anything is allocated. A tensor is mapped into memory while it is copied, and no
longer, so that the pages of the file do not add up beside the arrays.

Source: the format as documented at https://huggingface.co/docs/safetensors.
"""

import importlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxgpt.interop.archive import Stored
from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the bound of the library
ALIGNMENT = 64  # bytes, of the arrays of XLA
MAX_SHARD_BYTES = 1 << 30  # of a file that is written: it is in memory as a whole

DTYPES: dict[str, Any] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


# --- reading -------------------------------------------------------------------------------------


def open_folder(folder: str) -> dict[str, Stored]:
    """Return the tensors of a folder by name; nothing but headers is read.

    Raises:
        ConfigError: there are none, or the index or a file is damaged.
    """
    index = os.path.join(folder, INDEX_FILE)
    if os.path.isfile(index):
        return _open_shards(folder, index)
    single = os.path.join(folder, SINGLE_FILE)
    if os.path.isfile(single):
        return open_file(single)
    raise ConfigError(describe_missing(folder))


def describe_missing(folder: str) -> str:
    """Return why a folder has no tensors that can be read, and the way out."""
    files = sorted(os.listdir(folder))
    pickles = [name for name in files if name.endswith((".bin", ".pth", ".pt", ".ckpt", ".pkl"))]
    if pickles:
        return (
            f"{folder} has {pickles[0]}, a pickle, which could execute anything and is never "
            "opened. Convert it to safetensors where you trust it: with transformers, "
            f"`AutoModel.from_pretrained({folder!r}).save_pretrained('converted/')`."
        )
    other = [name for name in files if name.endswith(".safetensors")]
    if other:
        return f"{folder} has no {SINGLE_FILE}; is {other[0]} it, or a part of it without an index?"
    return f"{folder} has no {SINGLE_FILE}, nor {INDEX_FILE}."


def _open_shards(folder: str, index: str) -> dict[str, Stored]:
    """Return the tensors of the files that an index names."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ConfigError(f"{index}: weight_map is missing: it names the file of each tensor.")
    found: dict[str, Stored] = {}
    paths = {str(shard): _check_shard(folder, index, shard) for shard in places.values()}
    for shard, path in paths.items():
        for name, stored in open_file(path).items():
            if name in found:
                raise ConfigError(f"{index}: the tensor {name!r} is in two files, also in {shard}.")
            if places.get(name) != shard:
                there = places.get(name, "none")
                raise ConfigError(
                    f"{index}: the tensor {name!r} is in {shard}, and {there} by weight_map."
                )
            found[name] = stored
    if missing := places.keys() - found.keys():
        name = min(missing)
        raise ConfigError(f"{index}: {places[name]} does not have the tensor {name!r}.")
    return found


def _check_shard(folder: str, index: str, shard: Any) -> str:
    """Return the path of a file that an index names; it cannot be outside of the folder."""
    is_name = isinstance(shard, str) and shard == os.path.basename(shard) and "\\" not in shard
    if not is_name or not shard.endswith(".safetensors") or "\0" in shard:
        raise ConfigError(
            f"{index}: {shard!r} is not the name of a .safetensors file in the same folder."
        )
    path = os.path.join(folder, shard)
    if not os.path.isfile(path):
        raise ConfigError(f"{index}: the file {shard} is missing: download it as well.")
    return path


def open_file(path: str) -> dict[str, Stored]:
    """Return the tensors of one file by name; nothing but its header is read.

    Raises:
        ConfigError: the file is damaged; the message names the tensor and what is wrong.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header, start = _read_header(file, path, size)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        shape, dtype, begin, end = _check_entry(path, name, entry, size - start)
        spans.append((begin, end, name))
        found[name] = _make_stored(path, name, shape, dtype, start + begin)
    _check_spans(path, spans, size - start)
    return found


def _read_header(file, path: str, size: int) -> tuple[dict[str, Any], int]:
    """Return the header and where the data begin."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ConfigError(f"{path} is not a safetensors file: it has {size} bytes.")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ConfigError(
            f"{path} is damaged, or not a safetensors file: its header would have {length:,} "
            f"bytes, and the file has {size:,}."
        )
    header = parse_json(file.read(length), path)
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the header is not an object.")
    return header, 8 + length


def _check_entry(path: str, name: str, entry: Any, room: int) -> tuple[tuple, Any, int, int]:
    """Return (shape, dtype, begin, end) of a tensor, after all checks of itself."""

    def fail(what: str) -> ConfigError:
        return ConfigError(f"{path}: the tensor {name!r} {what}.")

    if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        hint = (
            ": numbers of 8 bits with scales beside them; convert it to BF16"
            if str(kind).startswith("F8") else ""
        )  # fmt: skip
        raise fail(f"has the dtype {kind!r}, which is not supported{hint}")
    if not _is_list_of_sizes(shape):
        raise fail(f"has the shape {shape!r}, which is not a list of sizes")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise fail(f"has the data_offsets {offsets!r}, which are not two positions")
    begin, end = offsets
    if not begin <= end <= room:
        raise fail(f"has data_offsets {begin} to {end}, outside of the file's {room} bytes of data")
    dtype = DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise fail(
            f"has the shape {shape} of {kind}, {math.prod(shape) * dtype.itemsize} bytes, and "
            f"data_offsets of {end - begin} bytes"
        )
    return tuple(shape), dtype, begin, end


def _is_list_of_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 32 and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**48 for x in values
    )  # fmt: skip


def _check_spans(path: str, spans: Iterable[tuple[int, int, str]], room: int):
    """Refuse tensors that overlap, and bytes that belong to none."""
    last = 0
    for begin, end, name in sorted(spans):
        if begin != last:
            what = "overlaps the one before it" if begin < last else "follows bytes of no tensor"
            raise ConfigError(
                f"{path}: the tensor {name!r} at {begin} {what}, which ends at {last}."
            )
        last = end
    if last != room:
        raise ConfigError(
            f"{path}: the tensors end at {last}, and the data at {room}: the file is damaged."
        )


def _make_stored(path: str, name: str, shape: tuple, dtype: np.dtype, offset: int) -> Stored:
    size = math.prod(shape) * dtype.itemsize

    def read() -> np.ndarray:
        """Return the tensor where it is in the file, mapped as long as the array is used."""
        try:
            if os.path.getsize(path) < offset + size:
                raise ConfigError(f"{path}: the file has become shorter; it lacks {name!r}.")
            if not size:
                return np.empty(shape, dtype)
            content = np.memmap(path, np.uint8, "r", offset, (size,))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        return np.asarray(content).view(dtype).reshape(shape)

    return Stored(shape, dtype.name, read)


def allocate_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array that a device whose memory is the host's takes as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    # Not np.empty, which asks for huge pages: where memory is fragmented, they take seconds.
    buffer = np.frombuffer(bytearray(size + ALIGNMENT), np.uint8)
    offset = -buffer.ctypes.data % ALIGNMENT
    return buffer[offset : offset + size].view(dtype).reshape(shape)


# --- JSON that may be damaged ---------------------------------------------------------------------


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: it cannot be read, is not JSON, or gives a key twice.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_HEADER_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes, more than {MAX_HEADER_BYTES:,}.")
        with open(path, "rb") as file:
            return parse_json(file.read(), path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def parse_json(content: bytes, where: str) -> Any:
    """Return the value of a JSON text whose objects have no key twice."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: {name!r} is there twice.")
        return found

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error


# --- writing -------------------------------------------------------------------------------------


def write_folder(tensors: Mapping[str, Stored], folder: str, max_bytes: int = MAX_SHARD_BYTES):
    """Write tensors into a folder: one file, or several with an index.

    Args:
        tensors: by name. Each is read when it is written.
        max_bytes: of a file, unless one tensor is larger.
    """
    groups = list(_group_by_size(tensors, max_bytes))
    names = [SINGLE_FILE]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        index = {
            "metadata": {"total_size": sum(map(count_bytes, tensors.values()))},
            "weight_map": {n: file for file, g in zip(names, groups, strict=True) for n in g},
        }
        with open(os.path.join(folder, INDEX_FILE), "w") as file:
            json.dump(index, file, indent=2)
    for name, group in zip(names, groups, strict=True):
        write_file({n: tensors[n] for n in group}, os.path.join(folder, name))


def write_file(tensors: Mapping[str, Stored], path: str):
    """Write tensors into one file, which has the permissions of a new file."""
    require("safetensors", path)
    library = importlib.import_module("safetensors.numpy")
    # The library writes other bytes than the values of an array that is not contiguous.
    arrays = {name: np.ascontiguousarray(stored.read()) for name, stored in tensors.items()}
    with open(path, "wb") as file:
        mode = os.stat(file.fileno()).st_mode
    library.save_file(arrays, path, metadata={"format": "pt"})  # renames a file of the owner alone
    os.chmod(path, stat.S_IMODE(mode))


def count_bytes(stored: Stored) -> int:
    """Return the bytes of a tensor."""
    return math.prod(stored.shape) * np.dtype(get_dtype(stored.dtype)).itemsize


def get_dtype(name: str) -> np.dtype:
    """Return the dtype of NumPy with a name, also "bfloat16"."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _group_by_size(tensors: Mapping[str, Stored], max_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, stored in tensors.items():
        if group and size + count_bytes(stored) > max_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += count_bytes(stored)
    yield group
