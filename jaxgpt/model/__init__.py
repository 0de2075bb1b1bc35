"""The Transformer: a handful of pure functions on arrays whose dimensions have letters.

A block is wiring around two mixers: attention (or another of `mixers`) mixes tokens, the
feed-forward mixes channels. Families put blocks together: decoder, encoder, encoder-decoder.
Every variant is one function chosen by a name in `ModelConfig`, from the registry at the foot of
its file.
"""

from jaxgpt.model.heads import Head, head
from jaxgpt.model.masks import Coords
from jaxgpt.model.transformer import (
    Cache,
    Source,
    abstract_params,
    build,
    count_params,
    init_cache,
    init_params,
    layer_by_layer,
    logits,
)

__all__ = [
    "Cache",
    "Coords",
    "Head",
    "Source",
    "abstract_params",
    "build",
    "count_params",
    "head",
    "init_cache",
    "init_params",
    "layer_by_layer",
    "logits",
]
