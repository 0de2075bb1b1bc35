"""The command `jaxgpt`: its subcommands, and what it prints without importing jax."""

import argparse
import ast
import importlib
import pathlib
import subprocess
import sys

import pytest
from tiny_runs import single_device_env

import jaxgpt
from jaxgpt import cli, script, settings
from jaxgpt.config import Config
from jaxgpt.settings import ConfigError
from jaxgpt.suggestions import check_options

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "jaxgpt" / "cli"
RUN = ROOT / "tests" / "data" / "old_run"


def run_command(*arguments):
    """Run the command in its own process; the last line of output is whether it imported jax."""
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
        env=single_device_env(),
    )


def test_every_subcommand_is_a_module_and_a_row():
    files = {path.stem.removesuffix("_") for path in FOLDER.glob("*.py")} - {"__init_"}
    assert files == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        assert callable(cli.find_module(name).main)


def test_help_names_every_subcommand():
    result = run_command("--help")
    assert result.returncode == 0
    for name, meaning in cli.COMMANDS.items():
        assert f"  {name:10} {meaning}\n" in result.stdout
    assert run_command().stdout == result.stdout


def test_the_version_is_that_of_the_package():
    result = run_command("--version")
    assert result.stdout.splitlines()[0] == f"jaxgpt {jaxgpt.__version__}"
    assert result.returncode == 0


def test_a_misspelled_subcommand_suggests_the_nearest():
    result = run_command("trian")
    assert result.returncode == 2
    assert result.stderr.startswith("jaxgpt: command='trian' is not known. Did you mean 'train'?")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "jaxgpt COMMAND"),
        (["--version"], 0, "jaxgpt "),
        (["train", "--help"], 0, "adamw | "),
        (["sample", "--help"], 0, "sample.temperature=0.5"),
        (["sample"], 2, "usage: jaxgpt sample"),
        (["trian"], 2, "jaxgpt: "),
        (["train", "--config", "nope"], 2, "jaxgpt train: --config nope: no such file"),
        (["train", "model.widht=3"], 2, "jaxgpt train: there is no setting 'model.widht'"),
        (["train", "model.width=x"], 2, "jaxgpt train: model.width='x' is not a whole number"),
        (["train", "model.layers=2.5"], 2, "jaxgpt train: model.layers=2.5 is not a whole number"),
        (["train", "model.width=-3"], 2, "jaxgpt train: model.width=-3 must be at least 1"),
        (["sample", RUN, "top_k=-1"], 2, "jaxgpt sample: sample.top_k=-1 must be at least 0"),
        (["sample", RUN, "tokns=3"], 2, "Did you mean sample.tokens?"),
        (["sample", "nope"], 2, "jaxgpt sample: nope is not a run"),
    ],
)
def test_help_and_errors_do_not_import_jax(arguments, status, text):
    result = run_command(*arguments)
    assert result.returncode == status
    assert text in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "False"


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "jaxgpt", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == f"jaxgpt {jaxgpt.__version__}\n"


@pytest.mark.parametrize("name", ["train", "sample"])
def test_a_script_is_the_subcommand_under_its_own_name(name):
    path = str(ROOT / f"{name}.py")
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    subcommand = run_command(name, "--help").stdout.removesuffix("False\n")
    assert result.stdout.startswith(f"usage: {name}.py ")
    assert result.stdout.partition("options:")[2] == subcommand.partition("options:")[2]


def test_a_script_without_a_name_prints_its_file_name(monkeypatch, capsys):
    def fail():
        raise settings.ConfigError("wrong.")

    monkeypatch.setattr(sys, "argv", ["benchmarks/speed.py"])
    with pytest.raises(SystemExit, match="2"):
        script.run(fail)
    assert capsys.readouterr().err == "speed.py: wrong.\n"


# --- the choices of a registry without importing its module ---


def list_tables():
    fields = settings.list_fields(Config).values()
    return sorted({f.metadata["table"] for f in fields if f.metadata["table"]})


@pytest.mark.parametrize("pointer", list_tables())
def test_the_choices_read_from_the_source_are_those_of_the_registry(pointer):
    assert settings.list_choices(pointer) == list(settings.resolve_table(pointer))


def test_a_registry_that_is_not_written_as_a_dict_is_imported(monkeypatch):
    monkeypatch.setattr(cli, "MADE", dict.fromkeys("ab"), raising=False)  # in no source
    assert settings.list_choices("jaxgpt.cli:MADE") == ["a", "b"]


# --- import jaxgpt ---


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout


def test_importing_jaxgpt_imports_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import jaxgpt\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert run_python(code) == "['jaxgpt']\n"


def test_lazy_names_are_what_their_modules_define():
    for name, module in jaxgpt.LAZY.items():
        assert getattr(jaxgpt, name) is getattr(importlib.import_module(module), name)
        assert name in dir(jaxgpt)
        assert name in jaxgpt.__all__


def test_lazy_names_are_visible_to_type_checkers():
    tree = ast.parse((ROOT / "jaxgpt" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == jaxgpt.LAZY


def test_an_undefined_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxgpt.nothing  # noqa: B018


def test_the_options_of_the_parser_are_known():
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", action="store_true")
    parser.add_argument("--name")
    check_options(["--flag", "--name", "--x", "a=1"], parser, ["x"])
    with pytest.raises(ConfigError, match=r"there is no option --flug\. Did you mean --flag"):
        check_options(["--flug"], parser, ["x"])
    with pytest.raises(ConfigError, match="written without dashes, as x=1"):
        check_options(["--flag", "--x", "1"], parser, ["x"])
