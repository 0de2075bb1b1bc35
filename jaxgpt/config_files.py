"""Find config files and run folders, without heavy imports, so that errors appear at once."""

import contextlib
import glob
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

from jaxgpt.settings import ConfigError, find_nearest

# Which parameters of a run are used: those of the lowest held-out loss, or the last ones.
CHECKPOINTS = ("best", "latest")


def shipped_folder() -> str:
    """Return the folder of the configs that come with jaxgpt.

    In an installed wheel it is inside the package, in a checkout beside it: see setup.py.
    """
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "configs")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "configs")


def find_config(path: str) -> str:
    """Return the config file that `path` names, with or without its ending.

    Args:
        path: a path, or the name of a file in ./configs or of one that comes with jaxgpt; they are
            searched in this order.

    Raises:
        ConfigError: there is no such file; the message gives the nearest names.
    """
    file = path.removesuffix(".py") + ".py"
    places = (path, *(os.path.join(folder, file) for folder in ("", "configs", shipped_folder())))
    found = next((place for place in places if os.path.isfile(place)), None)
    if found:
        return found
    near = find_nearest(os.path.basename(file).removesuffix(".py"), list_configs(), count=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"--config {path}: no such file.{hint} `jaxgpt train --help` lists all configs."
    )


def list_configs() -> list[str]:
    """Return the names of the configs in ./configs and of those that come with jaxgpt."""
    files = [
        file for folder in ("configs", shipped_folder()) for file in glob.glob(f"{folder}/*.py")
    ]
    return sorted({os.path.basename(file).removesuffix(".py") for file in files})


# sys.modules and sys.path are shared by all threads; a config file may load another one.
import_lock = threading.RLock()


@contextlib.contextmanager
def importable_configs(file: str) -> Iterator[None]:
    """Make `from configs.gpt2_124m import ...` work while a config file runs.

    The package `configs` has the files beside `file`, those in ./configs, and those that come with
    jaxgpt; of several with one name, the first is imported. It is created here because a wheel has
    it inside the package. A folder with another name is imported from its parent folder. Another
    thread waits until the first is done.
    """
    with import_lock:
        yield from _replace_configs(file)


def _replace_configs(file: str) -> Iterator[None]:
    folder = os.path.dirname(os.path.abspath(file))
    package = ModuleType("configs")
    package.__path__ = [folder, os.path.abspath("configs"), shipped_folder()]
    others = _pop_modules("configs")
    sys.modules["configs"] = package
    # In a wheel the parent of the shipped configs is the package: its modules are not top-level.
    parents = [] if folder == shipped_folder() else [os.path.dirname(folder)]
    sys.path[:0] = parents
    try:
        yield
    finally:
        for parent in parents:
            sys.path.remove(parent)
        _pop_modules("configs")
        sys.modules.update(others)


def _pop_modules(package: str) -> dict[str, ModuleType]:
    """Remove a package and its modules from the imported ones, and return them."""
    names = [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


def find_run_config(run_folder: str) -> str:
    """Return the path of a run's config.json.

    Raises:
        ConfigError: the folder is not a run.
    """
    path = os.path.join(run_folder, "config.json")
    if not os.path.isfile(path):
        raise ConfigError(
            f"{run_folder} is not a run: it has no config.json. {_suggest_run(run_folder)}"
        )
    return path


def _suggest_run(name: str) -> str:
    """Return which run a name that is none may stand for."""
    inside = sorted(glob.glob(os.path.join(glob.escape(name), "*", "config.json")))
    runs = inside or sorted(glob.glob(os.path.join("runs", "*", "config.json")))
    by_name = {os.path.basename(folder): folder for folder in map(os.path.dirname, runs)}
    near = list(by_name.values())[:3] if inside else [
        by_name[found] for found in find_nearest(os.path.basename(name), by_name)
    ]  # fmt: skip
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if name in list_configs():
        return f"It is a config: `jaxgpt train --config {name}` makes a run of it."
    return "Give a run folder of `jaxgpt train`, such as runs/stdlib."
