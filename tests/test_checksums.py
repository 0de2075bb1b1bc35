"""Checksums find every changed bit, and do not depend on how arrays are divided among devices."""

import json
import os
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_runs import assert_same_bits

from jaxgpt import checksums
from jaxgpt.checksums import ChecksumError, read_arrays, seal, sum_arrays, unseal
from jaxgpt.saved_arrays import read_progress
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.trainer.state import TrainState

ARRAYS = {
    "w": np.arange(16 * 8, dtype=np.float32).reshape(16, 8),
    "half": np.arange(8 * 4).reshape(8, 4).astype(jnp.bfloat16),
    "codes": np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
    "count": np.int32(7),
}
DIVISIONS = {  # of ARRAYS["w"] over two axes of 4 x 2 devices
    "whole": PartitionSpec(),
    "rows": PartitionSpec("a"),
    "columns": PartitionSpec(None, "b"),
    "both": PartitionSpec("a", "b"),
    "eight rows": PartitionSpec(("a", "b")),
}


def place(division: str):
    """Return ARRAYS on eight devices, "w" divided among them."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    spec = {name: DIVISIONS[division] if name == "w" else PartitionSpec() for name in ARRAYS}
    return {name: jax.device_put(x, NamedSharding(mesh, spec[name])) for name, x in ARRAYS.items()}


def save(folder, division: str) -> str:
    """Save ARRAYS as the parameters of a checkpoint; return its folder."""
    state = TrainState(jnp.int32(0), place(division), {}, jax.random.key(0))
    with closing(Checkpoints(str(folder), keep=1)) as saver:
        saver.save(state, Progress(step=1))
    return str(folder / "checkpoints" / "1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp("saved"), name) for name in DIVISIONS}


def abstract(division: str):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place(division)
    )


def change(saved: str, name: str, value: dict) -> dict:
    """Return the records of a checkpoint with another one for an array."""
    records = dict(read_progress(saved)[1])
    records[name] = {**records[name], **value}
    return records


# --- hashes ---


@pytest.mark.parametrize("name", ["w", "half", "codes", "count"])
def test_every_bit_of_an_array_counts(name):
    flat = np.ascontiguousarray(ARRAYS[name]).reshape(-1).view(np.uint8)
    seen = {checksums.hash_array(flat)}
    for place_ in range(flat.size):
        for bit in range(8):
            flat[place_] ^= 1 << bit
            seen.add(checksums.hash_array(flat))
            flat[place_] ^= 1 << bit
    assert len(seen) == 8 * flat.size + 1
    assert checksums.hash_array(ARRAYS[name]) == xxhash.xxh3_64_hexdigest(flat.tobytes())


def test_an_array_is_hashed_in_row_major_order():
    w = ARRAYS["w"]
    assert checksums.hash_array(np.asfortranarray(w)) == checksums.hash_array(w)
    assert checksums.hash_array(w.T) != checksums.hash_array(w)


@pytest.mark.parametrize(("division", "parts"), [("whole", 1), ("rows", 4), ("both", 8)])
def test_each_part_that_is_written_has_one_checksum(division, parts):
    record = sum_arrays(params=place(division))["params.w"]
    assert (record["dtype"], len(record["parts"])) == ("float32", parts)
    for text, found in record["parts"].items():
        rows, columns = checksums.parse_box(text)
        assert found == checksums.hash_array(ARRAYS["w"][slice(*rows), slice(*columns)])


# --- reading ---


@pytest.mark.parametrize("after", DIVISIONS)
@pytest.mark.parametrize("before", DIVISIONS)
def test_what_one_division_saves_every_other_reads_and_checks(before, after, saved):
    records = read_progress(saved[before])[1]
    target = abstract(after)
    assert_same_bits(read_arrays(saved[before], "params", target, records), place(after))
    parts = dict(records["params.w"]["parts"])
    for box in parts:  # every one of them is checked by someone
        wrong = change(saved[before], "params.w", {"parts": parts | {box: "0" * 16}})
        with pytest.raises(ChecksumError, match=r"^params.w has another checksum"):
            read_arrays(saved[before], "params", target, wrong)


def test_arrays_are_cast_after_they_are_checked(saved):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), abstract("rows")
    )
    found = read_arrays(saved["both"], "params", target, read_progress(saved["both"])[1])
    np.testing.assert_array_equal(found["w"], ARRAYS["w"].astype(jnp.bfloat16), strict=True)


def test_arrays_without_checksums_are_read(saved):
    found = read_arrays(saved["both"], "params", abstract("rows"), None)
    np.testing.assert_array_equal(found["w"], ARRAYS["w"], strict=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"dtype": "int32"}, "params.w is float32, and was int32"),
        ({"parts": {}}, "params.w has no checksums for some of its elements"),
    ],
)
def test_another_dtype_or_an_unchecked_element_is_refused(value, message, saved):
    with pytest.raises(ChecksumError, match=message):
        read_arrays(
            saved["rows"], "params", abstract("whole"), change(saved["rows"], "params.w", value)
        )


def test_an_array_without_a_checksum_among_others_is_refused(saved):
    records = dict(read_progress(saved["rows"])[1])
    del records["params.half"]
    with pytest.raises(ChecksumError, match=r"^params.half has no checksum"):
        read_arrays(saved["rows"], "params", abstract("whole"), records)


# --- the progress ---


def test_the_progress_is_restored_with_its_checksums():
    progress = {"step": 3, "best_loss": float("inf"), "data": "ab"}
    records = sum_arrays(params=ARRAYS)
    text = json.dumps(seal(progress, records))
    assert unseal(json.loads(text)) == (progress, records)


def test_every_changed_byte_of_the_progress_is_found():
    progress = {"step": 31, "best_loss": 2.25, "data": "ab", "is_done": False}
    text = json.dumps(seal(progress, sum_arrays(params={"count": ARRAYS["count"]}))).encode()
    whole = unseal(json.loads(text))
    for place_ in range(len(text)):
        for bit in (0, 2, 4):
            changed = bytearray(text)
            changed[place_] ^= 1 << bit
            try:
                found = unseal(json.loads(changed))
            except ValueError:  # a ChecksumError, or no JSON
                continue
            assert found == whole


def test_a_progress_of_an_older_version_has_no_checksums():
    assert unseal({"step": 3, "seconds": 1.5}) == ({"step": 3, "seconds": 1.5}, None)


def test_a_checkpoint_without_its_progress_is_damaged(saved, tmp_path):
    shutil.copytree(saved["rows"], tmp_path / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "progress")
    with pytest.raises(OSError, match="metadata"):
        read_progress(os.path.join(tmp_path, "checkpoints", "1"))
