"""The floors of the house: a file imports only from below, and nothing heavy by the way."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = [
    {"settings"},
    {"architecture", "config_files", "optional", "script"},
    {"config"},
    {"dims", "tokenizer"},
    {"sharding"},
    {"hosts", "moments"},
    {"data", "model"},
    {"objectives", "optimizer", "generate"},
    {"predict"},
    {"trainer"},
    {"console"},
    {"cli"},
    {"__main__"},
]


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "jaxgpt").rglob("*.py"))}


class RuntimeCode(ast.NodeTransformer):
    """Removes `if TYPE_CHECKING:`."""

    def visit_If(self, node):
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_typing else self.generic_visit(node)


def imports(module: str) -> set[str]:
    """The modules of ours that a module names, also inside functions, but not for types alone."""
    found = set()
    for node in ast.walk(RuntimeCode().visit(ast.parse(MODULES[module].read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & MODULES.keys()


def room(module: str) -> str:
    """jaxgpt.model.kernels -> model."""
    return module.split(".")[1]


def floor(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES if "." in module} == set().union(*FLOORS)


@pytest.mark.parametrize("module", [module for module in MODULES if "." in module])
def test_a_file_imports_only_from_floors_below(module):
    others = {name for name in imports(module) if name != "jaxgpt" and room(name) != room(module)}
    assert not {name for name in others if floor(name) >= floor(module)}


def test_there_are_no_circles():
    # static_order raises CycleError, which tells the circle.
    list(graphlib.TopologicalSorter({m: imports(m) - {m} for m in MODULES}).static_order())


def test_training_imports_no_other_framework():
    heavy = ["torch", "transformers", "tensorflow", "tensorflow_datasets", "matplotlib"]
    code = (
        "import sys, jaxgpt, jaxgpt.trainer\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
