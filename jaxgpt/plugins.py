"""Plugins: a user's modules that add rows to registries before a config is checked.

    # my_mixer.py
    from jaxgpt.model.mixers import MIXERS, Mixer

    class Mean(Mixer): ...

    MIXERS["mean"] = Mean

    jaxgpt train plugins=my_mixer.py model.mixers=mean name=mine
    jaxgpt sample runs/mine plugins=my_mixer.py

A plugin is a module that Python can import (`plugins=my_package.mixers`) or the path of a .py file,
relative to the config file that names it or to the current folder.

A plugin is code, and a run folder may come from someone else. So the plugins that a config.json
names are imported without asking only if they are modules that are installed or on Python's path,
outside of the run folder. A file is imported only if the user gives it: in a config file, on the
command line, or as an argument.
"""

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxgpt.settings import ConfigError, import_lock, parse, resolve_table

# Registries that plugins may add rows to and that no setting names directly.
OTHER_TABLES = (
    "jaxgpt.data.sources:SOURCES",
    "jaxgpt.language_model:ABILITIES",
    "jaxgpt.predict:ENCODERS",
    "jaxgpt.rewards:REWARDS",
    "jaxgpt.tokenizer:TOKENIZER_KINDS",
)


_loaded: set[str] = set()  # names of imported plugin modules


def read_plugins(file: str) -> list[str]:
    """Return the plugins in the `Config(plugins=...)` of a config file, without running it."""
    with open(file, encoding="utf-8") as text:
        try:
            tree = ast.parse(text.read())
        except SyntaxError:
            return []  # reported when the file is run
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    given = [keyword.value for call in calls for keyword in call.keywords
             if keyword.arg == "plugins"]  # fmt: skip
    literals = [ast.literal_eval(value) for value in given
                if isinstance(value, (ast.Tuple, ast.List))]  # fmt: skip
    return [name for names in literals for name in names]


def parse_plugins(assignments: Iterable[str]) -> tuple[str, ...] | None:
    """Return the plugins among `path=value` assignments, None if they set none."""
    pairs = (assignment.removeprefix("--").partition("=") for assignment in assignments)
    given = [parse(text, tuple[str, ...], key) for key, _, text in pairs if key == "plugins"]
    return given[-1] if given else None


def import_plugins(names: Iterable[str], tables: Sequence[str], folder: str = "") -> None:
    """Import plugins that the user gave.

    Args:
        names: modules, or paths of .py files.
        tables: registries that no plugin may change rows of, as "module:NAME".
        folder: of the config file that names them, searched first.

    Raises:
        ConfigError: there is no such plugin, it fails, or it replaces a row of a registry.
    """
    with import_lock:
        _import_plugins(names, tables, folder)


def _import_plugins(names: Iterable[str], tables: Sequence[str], folder: str) -> None:
    for name in names:
        if _is_file(name):
            places = [os.path.join(place, name) for place in (folder, "")]
            path = next((place for place in places if os.path.isfile(place)), None)
            if path is None and _get_module_name(name) in _loaded:
                continue
            if path is None:
                raise ConfigError(f"plugins={name}: no such file. Give the path of a .py file.")
            _import_file(os.path.abspath(path), name, tables)
        else:
            _import_module(name, tables, [os.path.abspath(folder), os.getcwd()])


def find_function(name: str, setting: str) -> Any:
    """Return the function that a user names as "module:function" or "file.py:function".

    Raises:
        ConfigError: there is no such module or file, it fails, or it has no such function.
    """
    module, colon, function = name.rpartition(":")
    if not colon or not module or not function:
        raise ConfigError(f"{setting}={name!r} must be module:function or file.py:function.")
    try:
        import_plugins([module], ())
    except ConfigError as error:
        raise ConfigError(f"{setting}={name!r}: {str(error).partition(': ')[2]}") from error
    found = getattr(sys.modules[_get_module_name(module)], function, None)
    if not callable(found):
        raise ConfigError(f"{setting}={name!r}: {module} has no function {function!r}.")
    return found


def import_recorded_plugins(names: Iterable[str], tables: Sequence[str], run_folder: str) -> None:
    """Import the plugins that a run folder's config.json names, as far as that is safe.

    Raises:
        ConfigError: as for `import_plugins`; or a plugin is a file, or inside the run folder.
    """
    names = list(names)
    files = [name for name in names if _is_file(name) and _get_module_name(name) not in _loaded]
    if files:
        raise ConfigError(
            f"{run_folder} was trained with {', '.join(files)}, and a run folder does not decide "
            f"which files are run: if you trust them, add plugins={','.join(names)}"
        )
    for name in names:
        if _get_module_name(name) in _loaded:
            continue
        remedy = f"if you trust it, give its path: plugins=PATH/{_get_module_name(name)}.py"
        root = os.path.realpath(run_folder)
        found = [os.path.realpath(place) for place in _find_module(name)]
        if any(os.path.commonpath([root, place]) == root for place in found):
            raise ConfigError(
                f"{run_folder} names the plugin {name}, which is inside the run folder itself, "
                f"and a run folder does not decide which files are run: {remedy}"
            )
        if not found:
            raise ConfigError(
                f"{run_folder} was trained with the plugin {name}, and there is no module of this "
                "name: install it, or give where it is: plugins=PATH/"
                f"{name.replace('.', '/')}.py"
            )
        _import_module(name, tables, [])


def _is_file(name: str) -> bool:
    return name.endswith(".py") or os.sep in name


def _get_module_name(name: str) -> str:
    return os.path.basename(name).removesuffix(".py") if _is_file(name) else name


def _find_module(name: str) -> list[str]:
    """Return where the package or module of this name is. Nothing is imported."""
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return [place for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]


def _import_file(path: str, name: str, tables: Sequence[str]) -> None:
    """Import a file under its own name, so that what it defines can be pickled."""
    module_name = _get_module_name(name)
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    places = [getattr(sys.modules.get(module_name), "__file__", None) or ""]
    places = places if places[0] else _find_module(module_name)
    if not any(os.path.isfile(place) and os.path.samefile(place, path) for place in places):
        raise ConfigError(
            f"plugins={name}: another module is named {module_name!r} ({places[0]}): rename the "
            "plugin's file."
        )
    _import_module(module_name, tables, [])


def _import_module(name: str, tables: Sequence[str], folders: Sequence[str]) -> None:
    if name in _loaded:
        return
    before = {table: dict(resolve_table(table)) for table in tables}
    sys.path[:0] = folders
    try:
        importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        if is_missing:
            text = "no such module. Give one that Python can import, or the path of a .py file."
        else:
            text = f"the plugin itself fails{_find_line(error)}: {type(error).__name__}: {error}"
        raise ConfigError(f"plugins={name}: {text}") from error
    finally:
        del sys.path[: len(folders)]
    _check_no_replacement(name, before)
    _loaded.add(name)


def _find_line(error: Exception) -> str:
    """Return the file and line of an error, innermost; a module that cannot be parsed has none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _check_no_replacement(name: str, before: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore rows that a plugin replaced or removed, and raise ConfigError if there are any."""
    changed = []
    for table, rows in before.items():
        now: Any = resolve_table(table)
        replaced = [key for key, row in rows.items() if now.get(key, before) is not row]
        changed += [f"{table.partition(':')[2]}[{key!r}]" for key in replaced]
        now.update({key: rows[key] for key in replaced})
    if changed:
        sys.modules.pop(name, None)
        raise ConfigError(
            f"plugins={name}: it replaces {', '.join(changed)}, which exist: give its rows names "
            "of their own."
        )
