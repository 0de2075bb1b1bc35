"""Without optional packages the core works, and messages name the extra to install."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_runs import run_config, single_device_env

from jaxgpt.config import to_json
from jaxgpt.optional import EXTRAS, describe_missing, is_installed, require
from jaxgpt.settings import ConfigError

ROOT = Path(__file__).parent.parent


class Blocker:
    """An import hook that raises ModuleNotFoundError for some modules."""

    def __init__(self, *modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def block(monkeypatch):
    def block(*modules):
        loaded = [name for name in sys.modules if name.partition(".")[0] in modules]
        for name in loaded:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Blocker(*modules), *sys.meta_path])

    return block


@pytest.mark.parametrize("module", EXTRAS)
def test_the_error_for_a_missing_module_names_its_extra(module, block):
    block(module)
    package, extra = EXTRAS[module]
    with pytest.raises(ConfigError) as error:
        require(module, "data.source=x")
    assert str(error.value) == f"data.source=x needs {package}: pip install 'jaxgpt[{extra}]'"
    assert not is_installed(module)


def test_an_installed_module_is_imported():
    assert require("zstandard", "data.source=x") is importlib.import_module("zstandard")
    assert is_installed("zstandard")


def test_the_error_names_a_missing_dependency_of_the_package(block, monkeypatch):
    block("etils")
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorflow_datasets"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"needs tensorflow-datasets \(.*etils.*\): pip"):
        require("tensorflow_datasets", "data.source=x")


def test_missing_packages_are_listed_in_one_line(block):
    uses = {"matplotlib": "plots", "grain": "prefetching", "zstandard": "text"}
    assert describe_missing(uses) == ""
    block("matplotlib", "grain")
    assert describe_missing(uses) == (
        "not installed: plots (matplotlib), prefetching (grain): pip install 'jaxgpt[plots,grain]'"
    )


def test_every_optional_package_is_in_its_extra_and_in_the_constraints():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split("\n")}
    for package, extra in EXTRAS.values():
        assert any(need.startswith(package) for need in extras[extra]), extra
        assert package in pins
        assert extra in extras["all"][0]


# In a process of its own, so that nothing is imported yet.
BLOCKED = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from importlib.machinery import PathFinder

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {list(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=single_device_env(),
    )


def test_every_module_can_be_imported_without_optional_packages():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "jaxgpt").rglob("*.py"))
    ]
    result = run_blocked(
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint('all')"
    )
    assert result.stdout == "all\n", result.stderr


def test_a_run_without_optional_packages_completes_and_lists_them_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(to_json(run_config(tmp_path, "train.steps=4")))
    result = run_blocked(
        "from jaxgpt.config import from_json\nfrom jaxgpt.trainer import train\n"
        "train(from_json(open(sys.argv[1]).read()))",
        str(tmp_path / "config.json"),
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "not installed" in line]
    assert line.endswith("pip install 'jaxgpt[plots,tensorboard,grain]'")
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").read_text().count("\n") > 1
    assert not (run / "plots").exists()
    assert not (run / "tensorboard").exists()
    assert "loss.png" not in result.stdout
