"""Plugins: what CONTRIBUTING.md adds, trained, saved and loaded from outside of the package."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from helpers import forget_plugins
from tiny_runs import run_config, single_device_env

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import loading
from jaxgpt.config import ConfigError, from_json, load, override, to_json
from jaxgpt.console import sample_cli
from jaxgpt.settings import resolve_table
from jaxgpt.trainer import read_config, train

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "plugins"
EXAMPLES = {
    "kerple": ["model.position=kerple"],
    "running_mean": ["model.mixers=attention,running_mean"],
    "second_half": ["train.objective=second_half"],
    "by_row": ["model.kernel=by_row"],
    "squares": ["data.source=squares:200"],
    "characters": ["data.tokenizer=characters", "model.vocab=260"],
}


@pytest.fixture(autouse=True)
def without_plugins(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget_plugins()


def write_config(folder: pathlib.Path) -> pathlib.Path:
    """Write a config file of a tiny run."""
    cfg = run_config(folder, "train.steps=2", "train.log_every=1", "name=mine")
    tree = configs.to_dict(cfg)
    tree["plugins"] = ()
    (folder / "tiny.py").write_text(
        "from jaxgpt.config import Config\nfrom jaxgpt.settings import from_dict\n"
        f"config = from_dict(Config, {tree!r})\n"
    )
    return folder / "tiny.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_is_loaded_from_outside_of_the_package(name, tmp_path, capsys):
    plugin = f"plugins={FOLDER / name}.py"
    cfg = load(str(write_config(tmp_path)), [plugin, *EXAMPLES[name]])
    train(cfg, is_quiet=True)
    kinds = [json.loads(line)["kind"] for line in
             pathlib.Path(cfg.run_folder, "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert kinds.count("train") == 2
    assert "eval" in kinds
    assert read_config(cfg.run_folder) == cfg  # which resuming compares
    forget_plugins()
    with pytest.raises(
        ConfigError, match=rf"trained with \S*{name}\.py.*add plugins=\S*{name}\.py"
    ):
        sample_cli(cfg.run_folder, "best", ["the"], None, ["sample.tokens=3"])
    sample_cli(cfg.run_folder, "best", ["the"], None, ["sample.tokens=3", plugin])
    assert capsys.readouterr().out.startswith("the")
    model = loading.load(cfg.run_folder, plugins=[f"{FOLDER / name}.py"])
    config, step = model.config, model.step
    assert step == 2
    assert override(config, ["sample.tokens=1"]).plugins == (f"{FOLDER / name}.py",)


def test_all_examples_together_on_the_command_line(tmp_path):
    config = write_config(tmp_path)
    names = ",".join(f"{FOLDER / name}.py" for name in EXAMPLES)
    settings = [setting for settings in EXAMPLES.values() for setting in settings]

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
            env=single_device_env(),
        )  # fmt: skip

    trained = run("train.py", "--config", str(config), f"plugins={names}", *settings)
    assert trained.returncode == 0, trained.stderr
    folder = str(tmp_path / "runs" / "mine")
    refused = run("sample.py", folder)
    assert refused.returncode == 2
    assert f"plugins={names}" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    sampled = run("sample.py", folder, f"plugins={names}", "--prompt", "the square")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("the square")


def test_the_examples_in_the_contributing_guide_are_these_files():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name in EXAMPLES:
        source = (FOLDER / f"{name}.py").read_text()
        code = source[source.index('"""', 3) + 3 :].strip()
        assert any(block.strip() == code for block in blocks), f"{name}.py is not in the guide"
        assert f"tests/plugins/{name}.py" in text
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


LAWS = {
    "running_mean": ["tests/model/mixers/test_laws.py", "-k", "running_mean"],
    "by_row": [
        "tests/model/test_kernels.py",
        "-k",
        "by_row and (nan or masked_keys or gradients or bfloat16)",
    ],
    "kerple": ["tests/model/test_transformer.py", "-k", "kerple"],
}


@pytest.mark.parametrize("name", LAWS)
def test_the_tests_of_a_registry_run_on_the_row_of_a_plugin(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x",
         f"--plugins={FOLDER / name}.py", *LAWS[name]],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-2000:]
    assert passed
    assert int(passed[1]) >= 3


# --- which code runs ---


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with a plugin inside of it, as someone else might send it."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(FOLDER / "kerple.py", folder / "kerple.py")

    def write(*names):
        tree = json.loads(to_json(run_config(tmp_path)))
        tree["plugins"] = names
        tree["model"]["position"] = "kerple"
        (folder / "config.json").write_text(json.dumps(tree))
        return str(folder)

    return write


@pytest.mark.parametrize("name", ["kerple.py", "run/kerple.py", "/tmp/kerple.py", "./kerple.py"])
def test_a_file_that_a_run_folder_names_is_not_run(name, run_folder, tmp_path, monkeypatch):
    folder = run_folder(name)
    for place in (tmp_path, pathlib.Path(folder)):
        monkeypatch.chdir(place)
        with pytest.raises(ConfigError, match=r"does not decide which files are run.*plugins="):
            read_config(folder)
    assert "kerple" not in sys.modules


def test_a_module_inside_the_run_folder_is_not_run(run_folder, monkeypatch):
    folder = run_folder("kerple")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ConfigError, match="inside the run folder itself"):
        read_config(folder)
    assert "kerple" not in sys.modules
    assert read_config(folder, plugins=[f"{folder}/kerple.py"]).model.position == "kerple"


def test_a_module_on_the_path_is_imported(run_folder, monkeypatch):
    folder = run_folder("kerple")
    with pytest.raises(ConfigError, match="the plugin kerple, and there is no module of this name"):
        read_config(folder)
    monkeypatch.syspath_prepend(str(FOLDER))
    assert read_config(folder).model.position == "kerple"


def test_plugins_of_a_config_file_are_imported_first(tmp_path):
    shutil.copy(FOLDER / "kerple.py", tmp_path / "kerple.py")
    (tmp_path / "mine.py").write_text(
        "from jaxgpt.config import *\n"
        "config = Config(plugins=('kerple.py',), model=ModelConfig(position='kerple'))\n"
    )
    assert load(str(tmp_path / "mine.py")).plugins == ("kerple.py",)
    assert load(str(tmp_path / "mine.py"), ["model.width=768"]).model.width == 768


def test_help_lists_the_rows_of_a_plugin():
    override(configs.Config(), [f"plugins={FOLDER / 'kerple.py'}"])
    assert "| kerple" in configs.describe("model.position")


def test_plugins_may_differ_when_a_run_is_resumed():
    plain = configs.Config()
    given = override(plain, [f"plugins={FOLDER / 'kerple.py'}"])
    assert configs.list_differences(plain, given) == []


# --- errors ---


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "no such file"),
        (
            "import nothing_like_this",
            "fails .*line 1.*: ModuleNotFoundError: No module named 'nothing_like_this'$",
        ),
        (
            "x = 1\n1 / 0",
            r"the plugin itself fails \(.*broken_plugin.py, line 2\): ZeroDivisionError: division",
        ),
        (
            "from jaxgpt.model.norms import NORMS\nNORMS['rms'] = NORMS['layer']",
            r"it replaces NORMS\['rms'\]",
        ),
    ],
)
def test_a_plugin_that_does_not_work_is_refused(code, message, tmp_path):
    path = tmp_path / "broken_plugin.py"
    if code is not None:
        path.write_text(code)
    before = dict(resolve_table("jaxgpt.model.norms:NORMS"))
    with pytest.raises(ConfigError, match=message):
        override(configs.Config(), [f"plugins={path}"])
    assert resolve_table("jaxgpt.model.norms:NORMS") == before


def test_a_module_that_is_missing_is_refused():
    with pytest.raises(ConfigError, match="plugins=no_such_module_here: no such module"):
        override(configs.Config(), ["plugins=no_such_module_here"])


def test_a_file_named_like_another_module_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="another module is named 'json'"):
        override(configs.Config(), [f"plugins={tmp_path / 'json.py'}"])


# --- versions ---


def test_a_saved_config_records_the_versions():
    from importlib.metadata import version

    versions = json.loads(to_json(configs.Config()))["versions"]
    assert versions.pop("checksum")
    assert versions == {
        "format": configs.FORMAT, "jaxgpt": jaxgpt.__version__, "jax": version("jax"),
    }  # fmt: skip


def test_other_versions_of_the_same_format_and_none_are_read():
    tree = json.loads(to_json(configs.Config()))
    tree["versions"] |= {"jax": "0.1", "jaxgpt": "9.9", "numpy": "2"}
    assert from_json(json.dumps(tree)) == configs.Config()
    del tree["versions"]
    assert from_json(json.dumps(tree)) == configs.Config()


@pytest.mark.parametrize("versions", [{"format": 99, "jaxgpt": "9.9"}, {"format": "x"}, 7, None])
def test_a_newer_format_is_refused(versions):
    tree = json.loads(to_json(configs.Config())) | {"versions": versions}
    with pytest.raises(ConfigError, match=r"run/config.json: versions.*install a newer jaxgpt"):
        from_json(json.dumps(tree), "run/config.json")
