"""Memory freed by a step: which options the C library gets, and what they retain."""

import ctypes
import gc
import pathlib
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore

import jaxgpt
from jaxgpt import saved_arrays
from jaxgpt.cli import train as command
from jaxgpt.saved_arrays import make_manager, read_manifest
from jaxgpt.trainer import memory
from tests.tiny_runs import single_device_env

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")

# Prints how many free MiB glibc retains after a computation that needs 64 MiB for a while.
CODE = """
import ctypes, sys
from types import SimpleNamespace
import jax, jax.numpy as jnp
from jaxgpt.trainer.memory import retain_freed_memory

if sys.argv[1] == "retain":
    retain_freed_memory()


class Mallinfo2(ctypes.Structure):  # mallinfo(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


read_mallinfo = ctypes.CDLL(None).mallinfo2
read_mallinfo.restype = Mallinfo2
x = jnp.ones((4096, 8))
y = jax.block_until_ready(x.T)  # a computation that waits for its inputs runs in another thread
jax.block_until_ready(jax.jit(lambda x, y: jnp.tanh(x @ y) @ x)(x, y))
print(read_mallinfo().fordblks / 2**20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33")
def test_one_cpu_retains_the_memory_of_a_computation():
    def measure_retained_mib(mode: str) -> float:
        command = [sys.executable, "-c", CODE, mode]
        done = subprocess.run(
            command,
            env=single_device_env(is_fast=False),
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout.split()[-1])

    assert measure_retained_mib("retain") > 60
    assert measure_retained_mib("default") < 60


@pytest.fixture
def changes(monkeypatch):
    """Record the calls of mallopt, and of changes of JAX's dispatch; neither has an effect."""
    recorded, update = [], jax.config.update

    class Libc:
        def mallopt(self, option, value):
            recorded.append((option, value))

    def record_update(name, value):
        if name == "jax_cpu_enable_async_dispatch":
            recorded.append((name, value))
        else:
            update(name, value)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(jax.config, "update", record_update)
    return recorded


@pytest.mark.parametrize(("count", "options"), [(1, [(-4, 0), (-1, -1)]), (8, [])])
def test_memory_is_retained_for_one_cpu_only(count, options, changes, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: count)
    memory.retain_freed_memory()
    assert changes == [("jax_cpu_enable_async_dispatch", False), *options]


def test_only_a_command_retains_memory():
    package = pathlib.Path(jaxgpt.__file__).parent
    files = [file for file in package.rglob("*.py") if file.parent.name != "cli"]
    users = [file.name for file in files if "retain_freed_memory" in file.read_text()]
    assert users == ["memory.py"]


def test_the_command_retains_memory_before_it_trains(changes, monkeypatch):
    def train(config):
        changes.append("train")
        return SimpleNamespace(is_done=True)

    monkeypatch.setattr("jaxgpt.trainer.train", train)
    assert command.main(["--config", "stdlib"], "jaxgpt train") == 0
    assert changes == [("jax_cpu_enable_async_dispatch", False), "train"]


def count_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_reading_the_shapes_of_a_checkpoint_leaves_nothing_behind(tmp_path):
    """TensorStore's specs as JSON are never freed: six containers an array, every save."""
    tree = {"params": {name: jnp.zeros((4, 2)) for name in "abc"}}
    with make_manager(str(tmp_path)) as manager:
        progress = ocp.args.JsonSave({"step": 1})
        arrays = ocp.args.StandardSave(tree["params"])
        manager.save(1, args=ocp.args.Composite(params=arrays, progress=progress))
    folder = str(tmp_path / "1")
    assert read_manifest(folder)["params"]["a"].shape == (4, 2)
    assert tensorstore.Spec({"driver": "zarr"}).to_json()["driver"] == "zarr"  # as before
    before = count_objects()
    for _ in range(10):
        read_manifest(folder)
    assert count_objects() < before + 10


def test_saving_leaves_nothing_behind(tmp_path):
    """TensorStore's counts of bytes are never freed: 24 lists a save, and their dicts."""
    arrays = ocp.args.StandardSave({"a": jnp.zeros((4, 2))})
    with make_manager(str(tmp_path)) as manager:

        def save(step: int):
            manager.save(step, args=ocp.args.Composite(params=arrays))
            manager.wait_until_finished()
            manager.delete(step)

        for step in range(1, 21):  # which fill Orbax's caches
            save(step)
        before = count_objects()
        for step in range(21, 31):
            save(step)
        assert count_objects() < before + 50


@pytest.mark.parametrize(
    "spec",
    [
        {"driver": "file", "path": "/tmp/x/"},
        {"driver": "file", "path": "/tmp/x/", "file_io_locking": {"mode": "non_atomic"}},
        {"driver": "ocdbt", "base": {"driver": "file", "path": "/tmp/x/"}, "path": "a/"},
    ],
)
def test_the_json_of_a_folder_is_that_of_tensorstore_and_is_freed(spec, tmp_path):
    with make_manager(str(tmp_path)):
        found = tensorstore.KvStore.Spec(spec)
        for defaults in (False, True):
            options = {"include_defaults": defaults}
            expected = saved_arrays._previous["to_json"](found, **options)
            assert found.to_json(**options) == expected
        if spec.keys() == {"driver", "path"}:
            path, own = found.to_json()["path"], "".join(["/tmp/", "x/"])
            assert sys.getrefcount(path) == sys.getrefcount(own)
