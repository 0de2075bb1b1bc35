"""The record of the platform in force, and that nothing but the records depends on the platform."""

import pathlib

import jax
import pytest

import jaxgpt
from jaxgpt import backend
from jaxgpt.backend import BACKENDS, get_backend
from jaxgpt.config import MeshConfig
from jaxgpt.sharding import make_mesh


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


def test_the_platform_is_compared_in_backend_and_by_kernels_that_need_hardware_only():
    package = pathlib.Path(jaxgpt.__file__).parent
    files = {
        file.relative_to(package).as_posix(): file.read_text() for file in package.rglob("*.py")
    }
    users = {name for name, text in files.items() if "get_platform" in text}
    assert users == {"backend.py", "model/kernels/cudnn.py", "model/kernels/splash.py"}
