"""Checksums of checkpoints: made from memory before writing, checked by everything that reads.

The hash of an array is that of its bytes in memory. A process hashes the parts that it writes, one
for each of its shards, so nothing is gathered but hashes:

    {"params.embed.table": {"dtype": "float32", "parts": {"0:260,0:16": "1f0c...", ...}}, ...}

A reader reads these parts, checks each, and cuts from them what its own devices need. So any number
of processes and devices checks what any other number has saved. The checksums are in the
progress of a checkpoint, with one of the progress itself and one of their own table. config.json
carries its own, and the tokenizer's fingerprint is part of the progress. XXH3 is used (64 bits): it
finds every changed bit, and hashes faster than memory is copied.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts
import xxhash

from jaxgpt import hosts

Record = dict[str, Any]  # of an array: {"dtype": its name, "parts": {box: hash}}
Box = tuple[tuple[int, int], ...]  # [start, stop) in each dimension
KEY = "checksums"  # in the progress of a checkpoint
READERS = 4  # arrays that are read at the same time


class ChecksumError(ValueError):
    """What was read is not what was saved; the message names it."""


# --- making them -----------------------------------------------------------------------------


def hash_bytes(data: Any) -> str:
    """Return the hash of bytes, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def hash_json(value: Any) -> str:
    """Return the hash of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(value, sort_keys=True).encode())


def hash_array(array: np.ndarray) -> str:
    """Return the hash of an array's elements in row-major order, of any dtype."""
    return hash_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def sum_arrays(**trees) -> dict[str, Record]:
    """Return the record of every array of some trees, in all processes. All must call it.

    Args:
        trees: of jax.Array or np.ndarray, by the name of the part: params=..., rest=...
    """
    arrays = {name: x for part, tree in trees.items() for name, x in name_arrays(part, tree)}
    shards = {name: list(_list_shards(x)) for name, x in arrays.items()}
    for _, data in (shard for found in shards.values() for shard in found):
        if isinstance(data, jax.Array):
            data.copy_to_host_async()  # all at once; Orbax saves the same copies
    own = {
        name: {format_box(box): hash_array(np.asarray(data)) for box, data in found}
        for name, found in shards.items()
    }
    records: dict[str, Record] = {
        name: {"dtype": str(x.dtype), "parts": {}} for name, x in arrays.items()
    }
    for text in hosts.all_gather_text(KEY, json.dumps(own)):
        for name, parts in json.loads(text).items():
            records[name]["parts"] |= parts
    return records


def name_arrays(part: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the array of every leaf: params.embed.table."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{part}.{jax.tree_util.keystr(path, simple=True, separator='.')}", leaf


def _list_shards(x: Any) -> Iterator[tuple[Box, Any]]:
    """Yield the parts of an array that this process writes."""
    if not isinstance(x, jax.Array):
        if hosts.process_index() == 0:
            yield make_box((slice(None),) * x.ndim, x.shape), x
        return
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            yield make_box(shard.index, x.shape), shard.data


def seal(progress: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the progress of a checkpoint with its checksums, as it is saved."""
    sums = {"arrays": records, "progress": hash_json(progress)}
    return {**progress, KEY: {**sums, "table": hash_json(sums)}}


def unseal(saved: Any) -> tuple[dict[str, Any], dict[str, Record] | None]:
    """Check a saved progress, and return it with the records of the arrays.

    Returns:
        The progress, and the records; None if it is of a version that made no checksums.

    Raises:
        ChecksumError: the progress or the checksums have changed since they were made.
    """
    if not isinstance(saved, dict):
        raise ChecksumError("progress is not a JSON object")
    progress = {key: value for key, value in saved.items() if key != KEY}
    if KEY not in saved:
        parts = {"arrays", "progress", "table"}  # they may be there under a damaged name
        if any(isinstance(value, dict) and parts <= value.keys() for value in progress.values()):
            raise ChecksumError("progress has its checksums under another name")
        return progress, None
    sums = saved[KEY]
    made = {key: value for key, value in sums.items() if key != "table"} if sums else {}
    if made.keys() != {"arrays", "progress"} or hash_json(made) != sums["table"]:
        raise ChecksumError("the table of checksums has changed since it was saved")
    if hash_json(progress) != made["progress"]:
        raise ChecksumError("progress has changed since it was saved")
    return progress, made["arrays"]


# --- checking them ---------------------------------------------------------------------------


def read_arrays(folder: str, part: str, abstract: Any, records: Mapping[str, Record] | None) -> Any:
    """Read and check the arrays of one part of a checkpoint.

    Each process reads what its devices need, and no process waits for another.

    Args:
        folder: of the checkpoint.
        part: such as "params".
        abstract: tree of jax.ShapeDtypeStruct with shardings, with the saved shapes. Arrays are
            cast to the dtypes after the check.
        records: of `unseal`; None reads without a check.

    Returns:
        The tree of arrays.

    Raises:
        ChecksumError: an array is not as it was saved.
        ValueError: TensorStore cannot read it.
    """
    tree = jax.tree.structure(abstract)
    leaves = list(name_arrays(part, abstract))
    open_array = make_opener(folder, part)

    def read(item: tuple[str, jax.ShapeDtypeStruct]) -> jax.Array:
        name, x = item
        record = None if records is None else find_record(records, name)
        read_box = make_box_reader(name, open_array(name), record)

        @functools.cache  # devices may hold the same shard
        def read_shard(box: Box) -> np.ndarray:
            return np.asarray(read_box(box), dtype=x.dtype)

        return jax.make_array_from_callback(
            x.shape, x.sharding, lambda index: read_shard(make_box(index or (), x.shape))
        )

    with ThreadPoolExecutor(READERS) as pool:
        return jax.tree.unflatten(tree, list(pool.map(read, leaves)))


def find_record(records: Mapping[str, Record], name: str) -> Record:
    """Return the record of an array.

    Raises:
        ChecksumError: there is none.
    """
    if name not in records:
        raise ChecksumError(f"{name} has no checksum, and other arrays have one")
    return records[name]


def make_opener(folder: str, part: str) -> Callable[[str], Any]:
    """Return a function from the name of an array to its open TensorStore."""
    context = ts.Context()  # shares what is read of the database of arrays

    def open_array(name: str) -> Any:
        base = {"driver": "file", "path": os.path.join(os.path.abspath(folder), part, "")}
        path = name.removeprefix(f"{part}.") + "/"
        kvstore = {"driver": "ocdbt", "base": base, "path": path}
        return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context).result()

    return open_array


def make_box_reader(name: str, store: Any, record: Record | None) -> Callable[[Box], np.ndarray]:
    """Return a function that reads a box of an array, from saved parts that it has checked.

    Raises:
        ChecksumError: now or when it is called: dtype or contents are not as saved.
    """
    if record is None:
        return lambda box: read_part(store, box)
    if record["dtype"] != str(store.dtype.numpy_dtype):
        raise ChecksumError(f"{name} is {store.dtype.numpy_dtype}, and was {record['dtype']}")
    parts = {parse_box(text): found for text, found in record["parts"].items()}

    @functools.cache
    def read_checked(box: Box) -> np.ndarray:
        data = read_part(store, box)
        if hash_array(data) != parts[box]:
            raise ChecksumError(f"{name} has another checksum than when it was saved")
        return data

    def read_box(box: Box) -> np.ndarray:
        if box in parts:
            return read_checked(box)
        out = np.empty([stop - start for start, stop in box], store.dtype.numpy_dtype)
        filled = 0
        for saved in parts:
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(saved, box, strict=True)]
            if all(start < stop for start, stop in both):
                inner, outer = (cut(both, origin) for origin in (saved, box))
                out[outer] = read_checked(saved)[inner]
                filled += math.prod(stop - start for start, stop in both)
        if filled != out.size:
            raise ChecksumError(f"{name} has no checksums for some of its elements")
        return out

    return read_box


def read_part(store: Any, box: Box) -> np.ndarray:
    """Read a box of an open array."""
    return store[tuple(slice(*bounds) for bounds in box)].read().result()


def make_box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """Return the bounds of an index of slices."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def cut(box: Any, origin: Box) -> tuple[slice, ...]:
    """Return a box as slices of an array that is another box."""
    pairs = zip(box, origin, strict=True)
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)


def format_box(box: Box) -> str:
    """Format a box: "0:260,16:32"; "" for the one element of a scalar."""
    return ",".join(f"{start}:{stop}" for start, stop in box)


def parse_box(text: str) -> Box:
    """Parse the output of `format_box`."""
    bounds = [edge.split(":") for edge in text.split(",")] if text else []
    return tuple((int(start), int(stop)) for start, stop in bounds)
