"""The settings of a GGUF file: typed, and all of them read, or refused."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxgpt.interop.gguf_format import Header, Value
from jaxgpt.settings import ConfigError

Config = dict[str, Any]  # as config.json of transformers


class Settings:
    """The settings of one architecture in a header, by their keys without its name."""

    def __init__(self, header: Header, path: str):
        self.header, self.path = header, path
        self.architecture = self._find_architecture()
        self._prefix = f"{self.architecture}."
        self._read: set[str] = set()

    def _find_architecture(self) -> str:
        name = self.header.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ConfigError(f"{self.path}: it has no general.architecture: it holds no model.")
        return name

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        """Return a setting, or the default if the file does not have it.

        Raises:
            ConfigError: it is of another type, or it is missing and there is no default.
        """
        self._read.add(key)
        value = self.header.metadata.get(self._prefix + key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.path}: the setting {self._prefix + key} is missing.")
            return default
        if kind is float and isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        if kind in (list, float) and isinstance(value, int) and not isinstance(value, bool):
            return value
        if type(value) is not kind:
            shown = value if not isinstance(value, np.ndarray) else f"one per layer, {value!s:.60}"
            raise ConfigError(
                f"{self.path}: {self._prefix + key}={shown!r} is not of the type {kind.__name__}, "
                "as it must be here."
            )
        if kind is int and not 0 <= value < 1 << 31:
            raise ConfigError(f"{self.path}: {self._prefix + key}={value} is not 0 to 2**31.")
        return value

    def require(self, key: str, expected: Iterable[Any], default: Any) -> None:
        """Refuse a value of a setting that is not one of the expected ones."""
        self._read.add(key)
        value = self.header.metadata.get(self._prefix + key, default)
        if not any(value is x or (not isinstance(value, np.ndarray) and value == x)
                   for x in expected):  # fmt: skip
            raise ConfigError(
                f"{self.path}: {self._prefix + key}={value!r} is not supported: it must be "
                f"{' or '.join(map(repr, expected))}."
            )

    def ignore(self, *keys: str) -> None:
        """Count settings as read that change nothing here."""
        self._read |= set(keys)

    def check_all_read(self) -> None:
        """Refuse settings of the architecture that nothing here knows."""
        found = {key for key in self.header.metadata if key.startswith(self._prefix)}
        if unknown := sorted(found - {self._prefix + key for key in self._read}):
            raise ConfigError(
                f"{self.path}: the setting {unknown[0]}="
                f"{self.header.metadata[unknown[0]]!s:.60} is not supported."
            )


def count_heads(config: Config, name: str = "num_attention_heads") -> int:
    """Return the number of query heads, or of key/value heads."""
    for key in (name, "num_attention_heads", "n_head"):
        if config.get(key):
            return config[key]
    raise ConfigError(f"the config has no {name}.")


def make_uint(value: int) -> Value:
    """Return an integer as a metadata value."""
    return Value(int(value), "uint32")


def make_float(value: float) -> Value:
    """Return a number as a metadata value."""
    return Value(float(value), "float32")
