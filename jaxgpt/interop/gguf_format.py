"""The container of llama.cpp's models: metadata, a table of tensors, and their data.

    "GGUF"  version  tensor count  metadata count
    key, type, value                                   one per metadata entry
    name, dimensions (fastest first), kind, offset     one per tensor
    padding to the alignment, then the tensors, each padded to the alignment

Everything here is read before memory is taken for it: a count or a length that the rest of the file
cannot hold is refused. Tensors are read in strips of rows, so that a quantized tensor needs little
more memory than its values. Quantization itself is that of the package gguf.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import itertools
import math
import os
import struct
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.optional import require
from jaxgpt.settings import ConfigError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # of version 1, lengths had 32 bits
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16  # bytes
MAX_KEY_BYTES = 1 << 16
DEFAULT_ALIGNMENT = 32  # bytes
STRIP_BYTES = 1 << 22  # of a tensor, read and dequantized at once

STRING, ARRAY, BOOL = 8, 9, 7
# By the number of a type of values: its name, and as numpy and struct write it.
SCALARS: dict[int, tuple[str, str]] = {
    0: ("uint8", "<u1"), 1: ("int8", "<i1"), 2: ("uint16", "<u2"), 3: ("int16", "<i2"),
    4: ("uint32", "<u4"), 5: ("int32", "<i4"), 6: ("float32", "<f4"), BOOL: ("bool", "<u1"),
    10: ("uint64", "<u8"), 11: ("int64", "<i8"), 12: ("float64", "<f8"),
}  # fmt: skip
_TYPE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"string": STRING}
# Kinds whose values are not quantized, by name: the dtype in the file.
PLAIN_KINDS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorEntry(NamedTuple):
    """Where one tensor of a file is."""

    path: str
    name: str
    shape: tuple[int, ...]  # slowest dimension first, as in numpy
    kind: str  # "F32", "Q4_K", ...
    offset: int  # in bytes, from the beginning of the file

    @property
    def dtype(self) -> str:
        """The numpy dtype of the values after dequantization."""
        return PLAIN_KINDS.get(self.kind, np.dtype("float32")).name

    @property
    def quantization(self) -> str:
        """The kind, if the values are quantized."""
        return "" if self.kind in PLAIN_KINDS else self.kind


class Header(NamedTuple):
    """What a file says about its tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]


# --- reading -----------------------------------------------------------------------------------


def read_header(path: str) -> Header:
    """Read the metadata and the table of tensors of a GGUF file, or of all parts of a split one.

    Args:
        path: the file; of a split one, the first part, NAME-00001-of-00003.gguf.

    Returns:
        Metadata values: int, float, bool, str, a list of str, or a numpy array; and the tensors.

    Raises:
        ConfigError: the file is damaged, or of a kind that cannot be read; the message names it.
    """
    header = _read_one_header(path)
    count = header.metadata.get("split.count", 1)
    if count == 1:
        return header
    tensors = dict(header.tensors)
    for number in range(1, count):
        part = _find_part(path, header.metadata, number)
        found = _read_one_header(part)
        if (found.metadata.get("split.no"), found.metadata.get("split.count")) != (number, count):
            raise ConfigError(f"{part}: it is not part {number + 1} of {count} of {path}.")
        if twice := tensors.keys() & found.tensors.keys():
            raise ConfigError(f"{part}: the tensor {min(twice)!r} is in another part as well.")
        tensors |= found.tensors
    expected = header.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ConfigError(f"{path}: its parts have {len(tensors)} tensors, not {expected}.")
    return Header(header.metadata, tensors)


def _find_part(path: str, metadata: dict[str, Any], number: int) -> str:
    count, first = metadata["split.count"], metadata.get("split.no")
    if not isinstance(count, int) or not 1 <= count <= 99_999:
        raise ConfigError(f"{path}: split.count={count!r} is not from 1 to 99999.")
    ending = "-{:05}-of-{:05}.gguf"
    if first != 0 or not path.endswith(ending.format(1, count)):
        raise ConfigError(
            f"{path}: a model in {count} parts is opened by the first: "
            f"NAME{ending.format(1, count)}, with the others beside it."
        )
    part = path.removesuffix(ending.format(1, count)) + ending.format(number + 1, count)
    if not os.path.isfile(part):
        raise ConfigError(f"{path}: {part}, another part of the model, is missing.")
    return part


def _read_one_header(path: str) -> Header:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        reader = _Reader(file, path, size)
        version = _read_version(reader)
        tensor_count, value_count = reader.unpack("<QQ", "the counts")
        reader.check_count(value_count, 13, "metadata entries")
        reader.check_count(tensor_count, 25, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = reader.string("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise reader.error(f"the metadata key {key!r} is there twice")
            metadata[key] = reader.value(f"the metadata value {key!r}")
        entries = [_read_entry(reader) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_valid = isinstance(alignment, int) and 0 < alignment <= MAX_ALIGNMENT
        if not is_valid or alignment & (alignment - 1):
            raise reader.error(f"general.alignment={alignment!r} is not a power of two")
        start = math.ceil(reader.position / alignment) * alignment
    metadata["GGUF.version"] = version
    return Header(metadata, _place(entries, path, start, size, alignment))


def _read_version(reader: "_Reader") -> int:
    if (magic := reader.take(4, "the magic number")) != MAGIC:
        raise reader.error(f"it begins with {magic!r}, not b'GGUF': this is no GGUF file")
    raw = reader.take(4, "the version")
    version = int.from_bytes(raw, "little")
    if version in VERSIONS:
        return version
    if int.from_bytes(raw, "big") in VERSIONS:
        raise reader.error(
            "it is of a big-endian machine; convert it with the command of the package gguf: "
            "gguf-convert-endian FILE little"
        )
    raise reader.error(f"GGUF version {version} is not {' or '.join(map(str, VERSIONS))}")


def _read_entry(reader: "_Reader") -> tuple[str, tuple[int, ...], str, int]:
    name = reader.string("the name of a tensor", MAX_KEY_BYTES)
    (rank,) = reader.unpack("<I", f"the rank of {name!r}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise reader.error(f"the tensor {name!r} has {rank} dimensions, not 1 to {MAX_DIMENSIONS}")
    dimensions = reader.unpack(f"<{rank}Q", f"the shape of {name!r}")
    number, offset = reader.unpack("<IQ", f"the kind of {name!r}")
    known = {kind.value: kind.name for kind in _gguf(reader.path).GGMLQuantizationType}
    if number not in known:
        raise reader.error(f"the tensor {name!r} is of the unknown kind {number}")
    return name, tuple(reversed(dimensions)), known[number], offset


def _place(entries, path: str, start: int, size: int, alignment: int) -> dict[str, TensorEntry]:
    """Check that tensors lie in the file and do not overlap."""
    tensors: dict[str, TensorEntry] = {}
    spans = []
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ConfigError(f"{path}: the tensor {name!r} is there twice.")
        length = count_bytes(shape, kind, f"{path}: the tensor {name!r}")
        if offset % alignment:
            raise ConfigError(
                f"{path}: the tensor {name!r} begins at {offset}, no multiple of {alignment}."
            )
        if start + offset + length > size:
            raise ConfigError(
                f"{path}: the tensor {name!r} ends at byte {start + offset + length:,}, and the "
                f"file has {size:,}: it is cut short, or damaged."
            )
        spans.append((offset, offset + length, name))
        tensors[name] = TensorEntry(path, name, shape, kind, start + offset)
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ConfigError(f"{path}: the tensors {name!r} and {other!r} overlap.")
    return tensors


def count_bytes(shape: tuple[int, ...], kind: str, what: str) -> int:
    """Return how many bytes a tensor has in a file."""
    if 0 in shape:
        raise ConfigError(f"{what} has the shape {shape}: no dimension may be 0.")
    package = _gguf(what)
    block, width = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    if shape[-1] % block:
        raise ConfigError(
            f"{what} is {kind}, in blocks of {block} values, and has rows of {shape[-1]}."
        )
    return math.prod(shape) // block * width


def fits(shape: tuple[int, ...], kind: str) -> bool:
    """Return whether the rows of a tensor are whole blocks of a quantization."""
    package = _gguf(kind)
    return shape[-1] % package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]][0] == 0


class _Reader:
    """A file read from its beginning, with every length checked against what is left of it."""

    def __init__(self, file: BinaryIO, path: str, size: int):
        self._file, self.path, self._size = file, path, size
        self.position = 0

    def error(self, found: str) -> ConfigError:
        return ConfigError(f"{self.path}: {found}.")

    def take(self, count: int, what: str) -> bytes:
        if count > self._size - self.position:
            raise self.error(f"{what} does not fit in the file: it is cut short, or damaged")
        self.position += count
        return self._file.read(count)

    def unpack(self, form: str, what: str) -> tuple:
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count of items of at least `least` bytes that the file has no room for."""
        if count * least > self._size - self.position:
            raise self.error(f"there is no room for {count:,} {what}: it is cut short, or damaged")

    def string(self, what: str, limit: int | None = None) -> str:
        (count,) = self.unpack("<Q", what)
        if limit is not None and count > limit:
            raise self.error(f"{what} has {count:,} bytes, more than {limit:,}")
        raw = self.take(count, what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def value(self, what: str) -> Any:
        (number,) = self.unpack("<I", what)
        if number == STRING:
            return self.string(what)
        if number == ARRAY:
            return self._array(what)
        return self._scalars(number, 1, what).tolist()[0]

    def _array(self, what: str) -> list[str] | np.ndarray:
        number, count = self.unpack("<IQ", what)
        if number == STRING:
            self.check_count(count, 8, f"strings of {what}")
            return [self.string(what) for _ in range(count)]
        return self._scalars(number, count, what)

    def _scalars(self, number: int, count: int, what: str) -> np.ndarray:
        if number not in SCALARS:
            raise self.error(f"{what} is of the unknown type {number}")
        _, form = SCALARS[number]
        array = np.frombuffer(self.take(count * np.dtype(form).itemsize, what), form)
        if number != BOOL:
            return array
        if array.size and array.max() > 1:
            raise self.error(f"{what} is {array.max()}, neither true nor false")
        return array.astype(bool)


def read_tensor(entry: TensorEntry, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Read a tensor, or a part of it, and dequantize it.

    Args:
        entry: of `read_header`.
        begin, end: which of the first dimension to read; all without them.

    Returns:
        `entry.dtype` [end - begin, ...]: the values that `gguf.quants.dequantize` gives.
    """
    end = entry.shape[0] if end is None else end
    shape = (end - begin, *entry.shape[1:])
    rows = math.prod(shape[:-1])  # a row is stored in whole blocks
    row_bytes = count_bytes((entry.shape[-1],), entry.kind, entry.name)
    first = begin * math.prod(entry.shape[1:-1]) if len(entry.shape) > 1 else 0
    out = np.empty((rows, entry.shape[-1]), entry.dtype)
    strip = max(1, STRIP_BYTES // out[:1].nbytes)
    with open(entry.path, "rb") as file:
        file.seek(entry.offset + first * row_bytes)
        for at in range(0, rows, strip):
            count = min(strip, rows - at)
            raw = file.read(count * row_bytes)
            if len(raw) != count * row_bytes:
                raise ConfigError(f"{entry.path}: the file became shorter while it was read.")
            out[at : at + count] = _dequantize(raw, entry, count)
    if not np.isfinite(out).all():
        raise ConfigError(
            f"{entry.path}: the tensor {entry.name!r} has values that are not finite."
        )
    return out.reshape(shape)


def _dequantize(raw: bytes, entry: TensorEntry, rows: int) -> np.ndarray:
    if entry.kind in PLAIN_KINDS:
        return np.frombuffer(raw, PLAIN_KINDS[entry.kind]).reshape(rows, -1)
    package = _gguf(entry.path)
    data = np.frombuffer(raw, np.uint8).reshape(rows, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales, which are refused
        return package.quants.dequantize(data, package.GGMLQuantizationType[entry.kind])


def check_kind(entry: TensorEntry) -> None:
    """Refuse a tensor of a kind that the package gguf cannot dequantize."""
    if entry.kind not in list_readable_kinds():
        raise ConfigError(
            f"{entry.path}: the tensor {entry.name!r} is {entry.kind}, which cannot be read. "
            f"Readable: {', '.join(list_readable_kinds())}."
        )


def list_readable_kinds() -> list[str]:
    """Return the names of all quantizations that can be read."""
    return [*PLAIN_KINDS, *_list_traits("dequantize_blocks")]


def list_writable_kinds() -> list[str]:
    """Return the names of all quantizations that can be written."""
    return [*PLAIN_KINDS, *_list_traits("quantize_blocks")]


def _list_traits(method: str) -> list[str]:
    quants = _gguf("a GGUF file").quants
    traits = quants._type_traits  # the package has no list of what it implements
    return [
        kind.name
        for kind, quant in traits.items()
        if method in vars(quant) and kind.name not in PLAIN_KINDS
    ]


# --- writing -----------------------------------------------------------------------------------


class Value(NamedTuple):
    """One metadata value and its type: a row of SCALARS, "string", or an array of one of them."""

    value: Any
    type: str
    is_array: bool = False


class NewTensor(NamedTuple):
    """A tensor to write; `read` is called once, when it is its turn."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], np.ndarray]


def write(
    path: str, architecture: str, metadata: dict[str, Value], tensors: Iterable[NewTensor]
) -> None:
    """Write a GGUF file, one tensor at a time, atomically.

    Args:
        path: of the file.
        architecture: the value of general.architecture.
        metadata: values by their keys.
        tensors: what to write, each in its kind.

    Raises:
        ConfigError: a tensor is not of the shape that was announced.
    """
    package, temporary = _gguf(path), f"{path}.{os.getpid()}.tmp"
    types = {number: package.GGUFValueType(number) for number in (*SCALARS, STRING)}
    writer = package.GGUFWriter(temporary, architecture)
    for key, (value, name, is_array) in metadata.items():
        kind = types[_TYPE_NUMBERS[name]]
        if not is_array:
            writer.add_key_value(key, value, kind)
        elif len(value):
            writer.add_key_value(key, value, package.GGUFValueType.ARRAY, sub_type=kind)
    tensors = list(tensors)
    for name, shape, kind, _ in tensors:
        size = count_bytes(shape, kind, f"the tensor {name!r}")
        number = package.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, shape, np.dtype("float32"), size, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_quantize(tensor))
        writer.close()
        os.replace(temporary, path)
    finally:
        for file in writer.fout or ():
            file.close()
        if os.path.exists(temporary):
            os.remove(temporary)


def _quantize(tensor: NewTensor) -> np.ndarray:
    array = tensor.read()
    if array.shape != tensor.shape:
        raise ConfigError(f"{tensor.name!r} has the shape {array.shape}, not {tensor.shape}.")
    if tensor.kind in PLAIN_KINDS:
        return np.ascontiguousarray(array.astype(PLAIN_KINDS[tensor.kind], copy=False))
    package = _gguf(tensor.name)
    number = package.GGMLQuantizationType[tensor.kind]
    return package.quants.quantize(np.ascontiguousarray(array, np.float32), number)


def _gguf(user: str) -> Any:
    return require("gguf", user)
