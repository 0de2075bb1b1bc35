"""The Transformer: pure functions on arrays whose dimensions are named by letters.

A block wires norms and residuals around two mixers: attention (or another of `mixers`) mixes
tokens, the feed-forward mixes channels. Families stack blocks: decoder, encoder, encoder-decoder.
Every variant is one function chosen by a name in `ModelConfig`, from the registry at the end of
its file.
"""

from jaxgpt.model.cache import Cache, init_cache
from jaxgpt.model.capture import capture, list_activations
from jaxgpt.model.heads import Head, make_head
from jaxgpt.model.masks import Coords
from jaxgpt.model.transformer import (
    EncoderInput,
    abstract_params,
    build,
    compute_logits,
    count_expert_params,
    count_params,
    init_params,
    unstack_layers,
)

__all__ = [
    "Cache",
    "Coords",
    "EncoderInput",
    "Head",
    "abstract_params",
    "build",
    "capture",
    "compute_logits",
    "count_expert_params",
    "count_params",
    "init_cache",
    "init_params",
    "list_activations",
    "make_head",
    "unstack_layers",
]
