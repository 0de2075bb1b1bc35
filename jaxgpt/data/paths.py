"""Find the files that a path, a folder or a glob names; each real folder is entered once."""

import fnmatch
import glob
import os
from collections.abc import Iterator

from jaxgpt.settings import ConfigError

# Of the system, not of data: endless, or made when they are read.
PSEUDO_FOLDERS = ("/proc", "/sys", "/dev")


def find_files(source: str) -> list[str]:
    """Return the files of a file, a folder (at any depth) or a glob (`**`: any depth), sorted.

    Links to folders are followed, but a folder that was entered by another path is not entered
    again. Hidden files and folders are skipped unless the source names them.

    Raises:
        ConfigError: a folder cannot be read, or is one of PSEUDO_FOLDERS.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [path]
    is_folder = os.path.isdir(path)
    drive, inner = os.path.splitdrive(path)
    top = path if is_folder else drive + (os.sep if inner.startswith(os.sep) else "")
    parts = ["**"] if is_folder else [part for part in inner.split(os.sep) if part]
    return sorted(set(_expand(source, top, parts, set())))


def exists(path: str) -> bool:
    """Return whether a path, or a match of a pattern without `**`, exists."""
    path = os.path.expanduser(path)
    return os.path.exists(path) or ("**" not in path and next(glob.iglob(path), None) is not None)


def _expand(
    source: str, folder: str, parts: list[str], entered: set[tuple[str, int]]
) -> Iterator[str]:
    """Yield the files below a folder that match the parts of a pattern.

    Args:
        source: names the pattern in errors.
        folder: "" for the current one.
        parts: the pattern, divided at the separators.
        entered: real folders that `**` has entered, and the number of parts then left.
    """
    part, *rest = parts
    if part == "**":
        key = (os.path.realpath(folder or "."), len(parts))
        if key in entered:
            return
        entered.add(key)
        if rest:
            yield from _expand(source, folder, rest, entered)
    elif not glob.has_magic(part):
        path = os.path.join(folder, part)
        if rest and os.path.isdir(path):
            yield from _expand(source, path, rest, entered)
        elif not rest and os.path.isfile(path):
            yield path
        return
    # Real folders first: a link to one of them is then the path that is not entered.
    entries = sorted(_scan(source, folder), key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if part == "**":
            if entry.is_dir():
                yield from _expand(source, path, parts, entered)
            elif not rest and entry.is_file():
                yield path
        elif fnmatch.fnmatchcase(os.path.normcase(entry.name), os.path.normcase(part)):
            if rest and entry.is_dir():
                yield from _expand(source, path, rest, entered)
            elif not rest and entry.is_file():
                yield path


def _scan(source: str, folder: str) -> list[os.DirEntry]:
    real = os.path.realpath(folder or ".")
    if any(os.path.commonpath([real, pseudo]) == pseudo for pseudo in PSEUDO_FOLDERS):
        raise ConfigError(
            f"data.source={source!r} leads to {real}, a folder of the operating system and not of "
            "text: name the folder with the text."
        )
    if not os.access(folder or ".", os.R_OK | os.X_OK):
        raise ConfigError(f"data.source={source!r}: the folder {folder} cannot be read.")
    try:
        with os.scandir(folder or ".") as found:
            return list(found)
    except OSError as error:
        raise ConfigError(
            f"data.source={source!r}: the folder {folder} cannot be read: {error.strerror}."
        ) from error
