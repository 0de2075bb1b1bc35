"""The command `jaxgpt`: which subcommand runs, and what is answered without jax."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest
from tiny_runs import alone

import jaxgpt
from jaxgpt import cli, settings
from jaxgpt.config import Config

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "jaxgpt" / "cli"


def call(*arguments):
    """Runs the command in a process of its own; its last line is whether it imported jax."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('jax' in sys.modules))\n"
        "from jaxgpt import cli\ncli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=alone(),
    )


def test_every_subcommand_is_a_module_and_a_row():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert files == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        assert callable(importlib.import_module(f"jaxgpt.cli.{name}").main)


def test_help_names_every_subcommand():
    done = call("--help")
    assert done.returncode == 0
    for name, meaning in cli.COMMANDS.items():
        assert f"  {name:10} {meaning}\n" in done.stdout
    assert call().stdout == done.stdout


def test_the_version_is_the_packages():
    done = call("--version")
    assert done.stdout.splitlines()[0] == f"jaxgpt {jaxgpt.__version__}"
    assert done.returncode == 0


def test_a_misspelled_subcommand_is_answered_with_the_nearest():
    done = call("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("jaxgpt: command='trian' is not known. Did you mean 'train'?")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "jaxgpt COMMAND"),
        (["--version"], 0, "jaxgpt "),
        (["train", "--help"], 0, "adamw | "),
        (["sample", "--help"], 0, "sample.temperature=0.8"),
        (["sample"], 2, "usage: jaxgpt sample"),
        (["trian"], 2, "jaxgpt: "),
        (["train", "--config", "nope"], 2, "jaxgpt train: --config nope: no such file"),
        (["train", "model.widht=3"], 2, "jaxgpt train: there is no setting 'model.widht'"),
        (["train", "model.width=x"], 2, "jaxgpt train: model.width='x' is not a whole number"),
        (["sample", "nope"], 2, "jaxgpt sample: nope is not a run"),
    ],
)
def test_help_and_refusals_do_not_wait_for_jax(arguments, status, text):
    done = call(*arguments)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == f"jaxgpt {jaxgpt.__version__}\n"


@pytest.mark.parametrize("script", ["train", "sample"])
def test_a_script_is_the_subcommand_under_its_own_name(script):
    path = str(ROOT / f"{script}.py")
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    mine, theirs = done.stdout, call(script, "--help").stdout.removesuffix("False\n")
    assert mine.startswith(f"usage: {script}.py ")
    assert mine.partition("options:")[2] == theirs.partition("options:")[2]


# --- names of choices without the modules that have them ---


def tables():
    fields = settings.flat_fields(Config).values()
    return sorted({f.metadata["table"] for f in fields if f.metadata["table"]})


@pytest.mark.parametrize("pointer", tables())
def test_the_choices_read_from_the_source_are_those_of_the_registry(pointer):
    assert settings.list_choices(pointer) == list(settings.resolve_table(pointer))


def test_a_registry_that_is_not_written_as_a_dict_is_imported(monkeypatch):
    monkeypatch.setattr(cli, "MADE", dict.fromkeys("ab"), raising=False)  # in no source
    assert settings.list_choices("jaxgpt.cli:MADE") == ["a", "b"]


# --- import jaxgpt ---


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout


def test_importing_jaxgpt_imports_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import jaxgpt\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert python(code) == "['jaxgpt']\n"


def test_lazy_names_are_what_their_modules_define():
    for name, module in jaxgpt.LAZY.items():
        assert getattr(jaxgpt, name) is getattr(importlib.import_module(module), name)
        assert name in dir(jaxgpt)
        assert name in jaxgpt.__all__


def test_lazy_names_are_known_to_type_checkers():
    tree = ast.parse((ROOT / "jaxgpt" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == jaxgpt.LAZY


def test_a_name_that_jaxgpt_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxgpt.nothing  # noqa: B018
