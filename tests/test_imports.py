"""The import layers of the package: a module imports only from lower layers, and nothing heavy."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    {"interrupts", "settings"},
    {"sections"},
    {"architecture", "config_files", "optional", "plugins", "roll_call", "script", "text"},
    {"measure", "prompts", "quantized_array", "rewards", "suggestions"},
    {"config"},
    {"backend", "dims", "seeds", "timing", "tokenizer"},
    {"sharding"},
    {"compile_cache", "hosts", "moments", "selection"},
    {"checksums"},
    {"saved_arrays"},
    {"data", "model"},
    {"tuning_losses"},
    {"objectives", "optimizer", "quantization", "sampling"},
    {"engine", "lora"},
    {"adapters", "generate"},
    {"score"},
    {"predict"},
    {"language_model"},
    {"adapter_loading"},
    {"interop"},
    {"loading"},
    {"console", "evaluate", "verification"},
    {"interactive", "trainer"},
    {"chat", "evaluation", "inspect", "planning", "scaling"},
    {"visualize"},
    {"report", "serve"},
    {"cli"},
    {"__main__"},
]


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted((ROOT / "jaxgpt").rglob("*.py"))}


class RuntimeCode(ast.NodeTransformer):
    """Remove `if TYPE_CHECKING:`."""

    def visit_If(self, node):
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_typing else self.generic_visit(node)


def find_imports(module: str) -> set[str]:
    """Return the modules of the package that a module imports, also inside functions.

    Imports for type checkers alone are not counted.
    """
    found = set()
    for node in ast.walk(RuntimeCode().visit(ast.parse(MODULES[module].read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & MODULES.keys()


def get_package(module: str) -> str:
    """Map jaxgpt.model.kernels to model."""
    return module.split(".")[1]


def find_layer(module: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if get_package(module) in packages)


def test_every_module_has_an_import_layer():
    assert {get_package(module) for module in MODULES if "." in module} == set().union(*LAYERS)


@pytest.mark.parametrize("module", [module for module in MODULES if "." in module])
def test_a_module_imports_only_from_lower_layers(module):
    others = {name for name in find_imports(module) if name != "jaxgpt"}
    others = {name for name in others if get_package(name) != get_package(module)}
    assert not {name for name in others if find_layer(name) >= find_layer(module)}


def test_there_are_no_import_cycles():
    # static_order raises CycleError, whose message has the cycle.
    list(graphlib.TopologicalSorter({m: find_imports(m) - {m} for m in MODULES}).static_order())


def test_training_imports_no_other_framework():
    heavy = ["torch", "transformers", "tensorflow", "tensorflow_datasets", "matplotlib"]
    code = (
        "import sys, jaxgpt, jaxgpt.trainer\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
