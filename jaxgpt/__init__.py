"""jaxgpt: a Transformer library to read in an afternoon and to train anywhere JAX runs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in LAZY, for type checkers
    from jaxgpt.config import Config as Config
    from jaxgpt.language_model import LanguageModel as LanguageModel
    from jaxgpt.loading import load as load
    from jaxgpt.loading import save as save
    from jaxgpt.planning.plan import plan as plan
    from jaxgpt.trainer import train as train

__version__ = "0.1.0"

# The names of `jaxgpt.NAME` and the modules that define them. A module is imported when one of its
# names is first used (PEP 562), so that `import jaxgpt` does not wait for jax.
LAZY = {
    "Config": "jaxgpt.config",
    "LanguageModel": "jaxgpt.language_model",
    "load": "jaxgpt.loading",
    "plan": "jaxgpt.planning.plan",
    "save": "jaxgpt.loading",
    "train": "jaxgpt.trainer",
}

__all__ = ["Config", "LanguageModel", "__version__", "load", "plan", "save", "train"]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
