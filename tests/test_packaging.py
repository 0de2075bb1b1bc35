"""The wheel, installed in its own virtual environment and used from an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from tiny_runs import single_device_env

import jaxgpt

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "jaxgpt", "configs")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def run(*command, cwd, **environment):
    """Run a command without this checkout on its path."""
    kept = {
        key: value for key, value in single_device_env(is_fast=False).items() if key != "PYTHONPATH"
    }
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Copy the sources, so that no other file of the checkout gets into the wheel."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD.format("wheel"), folder, cwd=sources)
    (file,) = folder.glob("*.whl")
    return file


def make_environment(folder, package):
    """Make a virtual environment with `package`, and all others from the current environment."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(others))
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--no-build-isolation", "--ignore-installed", *package, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("installed") / "venv", [wheel])


def test_the_wheel_has_every_module_every_config_and_the_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxgpt").rglob("*.py")}
    configs = {f"jaxgpt/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    facts = {name for name in names if ".dist-info/" in name}
    others = {"jaxgpt/py.typed", "jaxgpt/visualize/page.html", "jaxgpt/serve/page.html"}
    assert names - facts == modules | configs | others
    assert any(name.endswith("licenses/LICENSE") for name in facts)


def test_the_metadata_names_license_and_authors(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(name).decode().splitlines()
    assert f"Version: {jaxgpt.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert "Author: The jaxgpt authors" in lines


def test_a_source_archive_includes_the_configs(sources, tmp_path):
    run(sys.executable, "-c", BUILD.format("sdist"), tmp_path, cwd=sources)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (folder / "configs" / "stdlib.py").exists()
    run(sys.executable, "-c", BUILD.format("wheel"), tmp_path, cwd=folder)
    (wheel,) = tmp_path.glob("*.whl")
    assert "jaxgpt/configs/stdlib.py" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_the_installed_command_trains_and_samples_in_a_folder_without_configs(bin_folder, tmp_path):
    jaxgpt = bin_folder / "jaxgpt"
    small = ["train.steps=20", "optimizer.warmup=5", "model.layers=1", "train.eval_batches=2"]
    out = run(jaxgpt, "train", "--config", "stdlib", *small, cwd=tmp_path)
    assert "step 20/20" in out
    assert out.endswith("  jaxgpt sample runs/stdlib\n")
    assert run(jaxgpt, "sample", "runs/stdlib", "tokens=5", cwd=tmp_path).startswith("def ")


def test_installed_configs_start_from_each_other(bin_folder, tmp_path):
    code = (
        "import jaxgpt, os; from jaxgpt.config_files import shipped_folder as f\n"
        "from jaxgpt.config import load; print(load('gpt2_355m').name)\n"
        "print(os.path.relpath(f(), os.path.dirname(jaxgpt.__file__)))"
    )
    out = run(bin_folder / "python", "-c", code, cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert out.splitlines() == ["gpt2_355m", "configs"]


def test_an_editable_install_uses_the_checkouts_configs(sources, tmp_path):
    folder = make_environment(tmp_path / "venv", ["--editable", sources])
    code = "from jaxgpt.config_files import find_config; print(find_config('stdlib'))"
    out = run(folder / "python", "-c", code, cwd=tmp_path)
    assert out.strip() == str(sources / "configs" / "stdlib.py")
    assert run(folder / "jaxgpt", "--version", cwd=tmp_path) == f"jaxgpt {jaxgpt.__version__}\n"


def test_the_citation_has_the_version_and_title_of_the_package():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {jaxgpt.__version__}" in lines
    assert f'title: "{jaxgpt.__doc__.rstrip(".")}"' in lines


def test_the_workflow_runs_the_ci_script():
    (workflow,) = (ROOT / ".github" / "workflows").iterdir()
    assert "run: bash .ci/run\n" in workflow.read_text()
    assert os.path.exists(ROOT / ".ci" / "run")
