"""The record of the platform in force, and that nothing but the records depends on the platform."""

import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxgpt
from jaxgpt import backend
from jaxgpt.backend import BACKENDS, get_backend
from jaxgpt.config import Config, MeshConfig, override
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer import report


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_without_a_mesh_the_record_is_that_of_the_default_device(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert get_backend() is BACKENDS[platform]


def test_an_unknown_platform_has_the_defaults(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "neuron")
    assert get_backend() == backend.Backend()


@pytest.mark.parametrize(("count", "name"), [(1, "cpu"), (2, "cpus")])
def test_the_active_mesh_decides_whatever_the_default_device(count, name, monkeypatch):
    mesh = make_mesh(MeshConfig(data=count), jax.devices()[:count])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.set_mesh(mesh):
        assert get_backend() is BACKENDS[name]


@pytest.mark.parametrize(
    ("kind", "platform"),
    [
        ("cpu", "cpu"),
        ("TPU v5 lite", "tpu"),
        ("Tesla T4", "gpu"),
        ("NVIDIA H100 80GB HBM3", "gpu"),
    ],
)
def test_the_platform_of_an_abstract_device_that_has_only_a_kind(kind, platform):
    assert backend.find_device_platform(SimpleNamespace(device_kind=kind)) == platform
    newer = SimpleNamespace(device_kind="anything", platform=platform)
    assert backend.find_device_platform(newer) == platform


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (dict(platform="cpu"), "float32"),
        (dict(platform="tpu"), "bfloat16"),
        (dict(platform="gpu", compute_capability="7.5"), "float32"),  # T4
        (dict(platform="gpu", compute_capability="8.0"), "bfloat16"),
        (dict(platform="gpu", compute_capability="10.0"), "bfloat16"),
        (dict(platform="gpu", compute_capability="gfx942"), "bfloat16"),  # AMD
    ],
)
def test_the_dtype_that_a_device_computes_fastest_in(device, dtype):
    assert backend.choose_dtype(SimpleNamespace(**device)) == dtype


def test_a_run_in_bfloat16_on_a_gpu_that_emulates_it_is_warned(monkeypatch):
    gpu = dict(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
    devices = np.array([SimpleNamespace(**gpu)])
    mesh = SimpleNamespace(devices=devices, size=1)
    run = SimpleNamespace(mesh=mesh, cfg=None, progress=SimpleNamespace(step=0))
    monkeypatch.setattr(report, "count_epochs", lambda run: 1)
    monkeypatch.setattr(report, "estimate_seconds", lambda run: 1)
    monkeypatch.setattr(report, "estimate_memory_of", lambda run: (0, None))
    run.cfg = override(Config(), ["model.dtype=bfloat16"])
    (line,) = report.list_warnings(run)
    assert line == ("warning: Tesla T4 only emulates bfloat16: model.dtype=float32 is faster.")
    run.cfg = Config()
    assert not report.list_warnings(run)


def test_the_platform_is_compared_in_backend_and_by_kernels_that_need_hardware_only():
    package = pathlib.Path(jaxgpt.__file__).parent
    files = {
        file.relative_to(package).as_posix(): file.read_text() for file in package.rglob("*.py")
    }
    users = {name for name, text in files.items() if "get_platform" in text}
    assert users == {"backend.py", "model/kernels/cudnn.py", "model/kernels/splash.py"}
