import sys

import pytest

from jaxgpt.config import ConfigError, load
from jaxgpt.config_files import find_config, find_run_config, list_configs, shipped_folder

MINE = "from jaxgpt.config import Config\nconfig = Config(name={name!r})\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make an empty folder the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_shipped_config_is_found_from_any_folder(folder):
    assert find_config("stdlib") == f"{shipped_folder()}/stdlib.py"
    assert load("stdlib").name == "stdlib"


def test_a_config_in_the_working_folder_comes_before_a_shipped_one(folder):
    write(folder / "configs" / "stdlib.py", MINE.format(name="mine"))
    assert load("stdlib").name == "mine"


def test_a_path_comes_before_a_config_in_configs(folder):
    write(folder / "configs" / "mine.py", MINE.format(name="in configs"))
    write(folder / "mine.py", MINE.format(name="path"))
    assert load("mine").name == "path"


def test_the_error_lists_own_and_shipped_configs_once(folder):
    write(folder / "configs" / "mine.py", MINE.format(name="mine"))
    write(folder / "configs" / "stdlib.py", MINE.format(name="mine"))
    with pytest.raises(
        ConfigError, match=r"--config min: no such file. Did you mean mine or"
    ) as error:
        find_config("min")
    assert str(error.value).count("mine") == 1
    assert list_configs().count("stdlib") == 1
    assert {"mine", "gpt_mini"} < set(list_configs())


def test_a_shipped_config_starts_from_another_one(folder):
    assert load("gpt2_355m").model.layers == 24  # from configs.gpt2_124m


def test_an_own_config_starts_from_a_shipped_one(folder):
    path = write(
        folder / "mine.py",
        "import dataclasses\nfrom configs.gpt2_124m import config as base\n"
        "config = dataclasses.replace(base, name='mine')\n",
    )
    assert load(path).model == load("gpt2_124m").model


def test_a_config_starts_from_its_neighbor_before_a_shipped_one_of_that_name(folder):
    write(folder / "configs" / "stdlib.py", MINE.format(name="neighbor"))
    path = write(folder / "configs" / "mine.py", "from configs.stdlib import config\n")
    assert load(path).name == "neighbor"


def test_configs_in_a_folder_of_another_name_import_each_other(folder):
    write(folder / "experiments" / "base.py", MINE.format(name="base"))
    path = write(folder / "experiments" / "mine.py", "from experiments.base import config\n")
    assert load(path).name == "base"


def test_loading_does_not_change_the_imported_modules_and_the_path(folder, monkeypatch):
    other = type(sys)("configs")
    monkeypatch.setitem(sys.modules, "configs", other)
    path = list(sys.path)
    load("gpt2_355m")
    assert sys.modules["configs"] is other
    assert "configs.gpt2_124m" not in sys.modules
    assert sys.path == path


def test_a_changed_base_is_read_anew(folder):
    write(folder / "configs" / "base.py", MINE.format(name="old"))
    path = write(folder / "configs" / "mine.py", "from configs.base import config\n")
    assert load(path).name == "old"
    write(folder / "configs" / "base.py", MINE.format(name="renamed"))
    assert load(path).name == "renamed"


def test_a_run_is_a_folder_with_a_config(folder):
    with pytest.raises(ConfigError, match=r"runs/no is not a run: it has no config\.json"):
        find_run_config("runs/no")
    path = write(folder / "config.json", "{}")
    assert find_run_config(str(folder)) == path
