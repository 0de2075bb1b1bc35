"""A model as other libraries store it: what every foreign format is read into and written from.

The names and layouts are those of transformers' files: RoPE rotates halves, Gemma stores norm
scales minus 1, linear maps are [out in]. Tensors are read one at a time, when they are needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.tokenizer import Tokenizer


class Stored(NamedTuple):
    """One tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: str  # of `read()`, as numpy names it: "float32", "bfloat16", ...
    read: Callable[[], np.ndarray]
    kind: str = ""  # how the file has it, if not in `dtype`: "Q4_1"


@dataclass(frozen=True)
class Archive:
    """A model in the terms of transformers.

    Attributes:
        config: as in its config.json: model_type, hidden_size, ...
        tensors: by their names in its files.
        tokenizer: None if the model comes without one.
        generation: as in its generation_config.json: eos_token_id, ...
        origin: the path that it was read from, for messages.
    """

    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    tokenizer: Tokenizer | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    origin: str = ""


def store(array: np.ndarray) -> Stored:
    """Return an array in memory as a `Stored`."""
    return Stored(array.shape, array.dtype.name, lambda: array)
