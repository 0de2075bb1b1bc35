"""Optional packages: imported where they are used; error messages name the extra to install."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.settings import ConfigError


class Extra(NamedTuple):
    """What to install for a module: the package, and the extra in pyproject.toml with it."""

    package: str
    name: str


EXTRAS = {
    "datasets": Extra("datasets", "hub"),
    "gguf": Extra("gguf", "gguf"),
    "grain": Extra("grain", "grain"),
    "lm_eval": Extra("lm-eval", "eval"),
    "huggingface_hub": Extra("huggingface_hub", "hub"),
    "jinja2": Extra("Jinja2", "chat"),
    "llguidance": Extra("llguidance", "constraints"),
    "matplotlib": Extra("matplotlib", "plots"),
    "prometheus_client": Extra("prometheus_client", "serve"),
    "sacrebleu": Extra("sacrebleu", "measure"),
    "sklearn": Extra("scikit-learn", "inspect"),
    "safetensors": Extra("safetensors", "interop"),
    "starlette": Extra("starlette", "serve"),
    "tensorboardX": Extra("tensorboardX", "tensorboard"),
    "tensorflow_datasets": Extra("tensorflow-datasets", "tfds"),
    "uvicorn": Extra("uvicorn", "serve"),
    "zstandard": Extra("zstandard", "zstd"),
}


def require(module: str, user: str) -> Any:
    """Import an optional module.

    Args:
        module: a row of EXTRAS.
        user: the setting or file that needs it, for the message: "data.source=tfds:lm1b".

    Raises:
        ConfigError: the package, or one that it imports, is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, extra = EXTRAS[module]
        cause = "" if error.name == module else f" ({error})"
        raise ConfigError(
            f"{user} needs {package}{cause}: pip install 'jaxgpt[{extra}]'"
        ) from error


def is_installed(module: str) -> bool:
    """Return whether an optional module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def describe_missing(uses: Mapping[str, str]) -> str:
    """Return one line that lists the missing packages and their extras; "" if none is missing.

    Args:
        uses: what is disabled if a module is missing, by module: {"matplotlib": "plots/*.png"}.
    """
    missing = {module: use for module, use in uses.items() if not is_installed(module)}
    if not missing:
        return ""
    without = ", ".join(f"{use} ({EXTRAS[module].package})" for module, use in missing.items())
    extras = ",".join(EXTRAS[module].name for module in missing)
    return f"not installed: {without}: pip install 'jaxgpt[{extras}]'"


def import_board_writer() -> Any:
    """Import tensorboardX's writer without torch.

    It would import torch if that is installed, for one name of a type, which takes seconds.
    """
    is_hidden = "torch" not in sys.modules
    if is_hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if is_hidden:
            del sys.modules["torch"]
    return SummaryWriter
