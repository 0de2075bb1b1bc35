"""The run folder: what it must allow, checked before training."""

import os

from jaxgpt.config import Config
from jaxgpt.settings import ConfigError

FOLDERS = ("autopsy", "best", "checkpoints", "plots", "samples", "tensorboard")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "labels.json", "metrics.jsonl",
         "confusion.json")  # fmt: skip
# As long as the longest path that is written inside a run folder.
LONGEST_NAME = os.path.join(
    "checkpoints", "0000000.orbax-checkpoint-tmp", "params", "ocdbt.process_0", "d", "0" * 32
)


def check_run_folder(cfg: Config):
    """Check that a run can have its folder, before anything is written.

    Raises:
        ConfigError: a file has its name or that of one of its folders, or its path is too long or
            cannot be read.
    """
    folder = cfg.run_folder
    try:
        _check_path(os.path.join(folder, LONGEST_NAME))
        _check_path(folder, is_folder=True)
        for name in FOLDERS:
            _check_path(os.path.join(folder, name), is_folder=True)
        for name in FILES:
            _check_path(os.path.join(folder, name), is_folder=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"the run folder {folder} cannot be used ({reason}): set another name=... or "
            "folder=... ."
        ) from error


def _check_path(path: str, is_folder: bool | None = None):
    """Raise ConfigError if a path is of the wrong kind; OSError if it cannot be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        while not os.path.exists(path):
            path = os.path.dirname(path)
        raise ConfigError(
            f"{path} is a file, and the run writes a folder there: move it away, or set another "
            "name=... or folder=... ."
        ) from None
    if is_folder is not None and is_folder != os.path.isdir(path):
        found, wanted = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise ConfigError(
            f"{path} is {found}, and the run writes {wanted} there: move it away, or set another "
            "name=... or folder=... ."
        )


def is_writable(folder: str) -> bool:
    """Return whether files can be written in a folder, or in what it is to be created in."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "."
    inside = [os.path.join(folder, name) for name in (*FOLDERS, *FILES)]
    return all(os.access(path, os.W_OK) for path in (folder, *filter(os.path.exists, inside)))


def check_writable(cfg: Config):
    """Raise ConfigError if the run cannot write into its folder."""
    if not is_writable(cfg.run_folder):
        raise ConfigError(
            f"the run folder {cfg.run_folder} cannot be written: change its permissions, or copy "
            "it and continue the copy with folder=... ."
        )
