"""The Transformer: a handful of pure functions on arrays whose dimensions have letters.

A block is wiring around two mixers: attention mixes tokens, the feed-forward mixes channels.
Every variant is one function chosen by a name in `ModelConfig`, from the registry at the foot of
its file.
"""

from jaxgpt.model.masks import Coords
from jaxgpt.model.transformer import (
    Cache,
    abstract_params,
    build,
    count_params,
    init_cache,
    init_params,
    logits,
    unembedding,
)

__all__ = [
    "Cache",
    "Coords",
    "abstract_params",
    "build",
    "count_params",
    "init_cache",
    "init_params",
    "logits",
    "unembedding",
]
