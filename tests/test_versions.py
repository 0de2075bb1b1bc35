"""The versions: lower bounds are those of the oldest tested set, Colab's are supported."""

import pathlib
import re
import tomllib

import jupytext
import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "colab.py"


def read_pins(path: str) -> dict[str, str]:
    """Return {package: version} of a file of lines NAME==VERSION."""
    lines = (ROOT / path).read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def read_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = map(Requirement, project["dependencies"])
    return {canonicalize_name(requirement.name): requirement for requirement in found}


REQUIREMENTS = read_requirements()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_lower_bound_is_the_version_of_the_oldest_set(name):
    (bound,) = [s.version for s in REQUIREMENTS[name].specifier if s.operator == ">="]
    pinned = read_pins("constraints-oldest.txt")[name]
    assert re.sub(r"(\.0)+$", "", pinned) == re.sub(r"(\.0)+$", "", bound)


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_versions_tested_together_and_those_of_colab_are_in_the_range(name):
    requirement = REQUIREMENTS[name]
    assert requirement.specifier.contains(read_pins("constraints.txt")[name])
    colab = read_pins("notebooks/colab-requirements.txt").get(name)
    assert colab is None or requirement.specifier.contains(colab)


def test_only_chex_is_added_to_what_colab_has():
    colab = read_pins("notebooks/colab-requirements.txt")
    assert [name for name in REQUIREMENTS if name not in colab] == ["chex"]


def test_the_notebook_and_its_text_are_the_same():
    text = jupytext.read(NOTEBOOK)
    notebook = nbformat.read(NOTEBOOK.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source, c.metadata) for c in notebook.cells] == [
        (c.cell_type, c.source, c.metadata) for c in text.cells
    ], "make it again: jupytext --to ipynb notebooks/colab.py"
    assert notebook.metadata["kernelspec"]["name"] == "python3"


def test_the_notebook_has_no_outputs_and_its_code_compiles():
    notebook = nbformat.read(NOTEBOOK.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            compile(cell.source, NOTEBOOK.name, "exec")


def test_the_workflow_runs_every_script_of_ci():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    scripts = sorted(path.name for path in (ROOT / ".ci").iterdir())
    assert sorted(re.findall(r"run: bash \.ci/(\w+)\n", workflow)) == scripts
