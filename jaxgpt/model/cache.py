"""The decoding cache of a model, or KV cache."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.architecture import LayerSpec
from jaxgpt.config import ModelConfig
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.mixer import init_mixer_state


class Cache(struct.PyTreeNode):
    """Decoding cache, or KV cache. Empty slots have segment id 0: no query attends to them."""

    states: tuple[dict[str, Any], ...]  # per layer, by sublayer; each is updated in place
    coords: Coords  # [B S] each
    cursor: jax.Array  # int32 [] or [B], the next free slot, of all rows or of each
    memory_coords: Coords | None = None  # of the encoder input, [B S] each


def find_reach(cfg: ModelConfig, spec: LayerSpec) -> int | None:
    """Return how many tokens a query of a layer attends to, itself among them; None = no limit."""
    reaches = {"window": cfg.sparse.window, "chunked": cfg.sparse.chunk}
    return reaches.get(spec.pattern) if spec.mixer == "attention" else None


def init_cache(
    cfg: ModelConfig,
    batch: int,
    slots: int,
    source: int = 0,
    kind: str = "model",
    chunk: int | None = None,
) -> Cache:
    """Return an empty cache for `batch` rows of `slots` tokens, with `source` encoder tokens.

    Args:
        kind: a value of `sample.cache`; see `init_mixer_state`.
        chunk: None for a cache with one cursor, which all rows share. Otherwise each row has its
            own, token p of a row is in slot p, and a call has at most so many tokens. Then a layer
            that attends to the last W tokens keeps a ring of W + chunk slots.
    """
    chex.assert_scalar_positive(batch)
    chex.assert_scalar_positive(slots)

    def count_slots(spec: LayerSpec) -> int:
        reach = find_reach(cfg, spec)
        return slots if chunk is None or reach is None else min(slots, reach + chunk)

    def init_layer(spec: LayerSpec) -> dict[str, Any]:
        cross = {}
        if source:
            cross["cross"] = init_mixer_state("attention", Attention, cfg, batch, source, kind)
        mixer = MIXERS[spec.mixer]
        state = init_mixer_state(spec.mixer, mixer, cfg, batch, count_slots(spec), kind)
        return {"mixer": state} | cross

    no_tokens = jnp.zeros((batch, slots), jnp.int32)
    prefix = no_tokens if "prefix" in cfg.pattern else None
    no_source = jnp.zeros((batch, source), jnp.int32)
    return Cache(
        states=tuple(init_layer(spec) for spec in cfg.list_layers(cfg.layers)),
        coords=Coords(no_tokens, no_tokens, prefix),
        cursor=jnp.int32(0) if chunk is None else jnp.zeros(batch, jnp.int32),
        memory_coords=Coords(no_source, no_source) if source else None,
    )
