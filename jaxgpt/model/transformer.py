"""Transformers out of one block, their parameters, and the cache they decode with.

    model = build(cfg)                       a Flax module: names and makes the parameters
    params, letters = init_params(cfg, key)  plain pytrees of the same structure
    hidden, cache = model.apply({"params": params}, tokens, at, cache)

Training, prefill and decoding are this one call; they differ in whether a cache is given. The
vocabulary is not part of it: `logits` (sampling) and `objectives` (training) score the hidden
states, so that nobody holds [B T V] who does not need it.
"""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.dims import split, weight
from jaxgpt.model import masks
from jaxgpt.model.attention import KV, Sight, write
from jaxgpt.model.block import REMATS, Block, Dropout
from jaxgpt.model.layers import DTYPES, normal
from jaxgpt.model.masks import Coords
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITIONS
from jaxgpt.sharding import constrain


@struct.dataclass
class Cache:
    """Keys and values seen so far. Slots not yet written have document 0: nobody looks there."""

    kv: KV  # [L B S G K] each
    at: Coords  # [B S] each
    cursor: jax.Array  # int32 [], the next free slot


class Stack(nn.Module):
    """Embedded tokens in, normed hidden states out."""

    cfg: ModelConfig
    mask: masks.Mask

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords, cache: Cache | None):
        """x [B T D], at [B T] -> (hidden [B T D], cache)."""
        c = self.cfg
        place = POSITIONS[c.position](c, name="position")
        x = constrain(Dropout(c.dropout)(place.embed(x, at.position)), "BTD")
        k_at, cursor = at, None
        if cache is not None:
            k_at, cursor = write(cache.at, at, cache.cursor), cache.cursor
        sight = Sight(at, k_at, place.rotation(), place.bias(), cursor)
        # One compiled block whatever the depth; its parameters are stacked along L.
        blocks = nn.scan(
            REMATS[c.remat](Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
        )(c, self.mask, name="layers")
        x, kv = blocks(x, None if cache is None else cache.kv, sight)
        x = NORMS[c.norm](c, name="norm")(x)
        if cache is not None:
            cache = Cache(kv, k_at, cache.cursor + x.shape[1])
        return x, cache


class Table(nn.Module):
    """A row of D numbers for every token."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B T] -> [B T D]
        table = weight(self, "table", "V>D", self.cfg.sizes, normal)
        # Gather the width before looking up, else the partitioner replicates the lookup.
        table = constrain(table.astype(DTYPES[self.cfg.dtype]), "V.")
        return constrain(table[tokens], "BTD")


class Decoder(nn.Module):
    """The GPT: every token sees itself and what came before in its document."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, at: Coords, cache: Cache | None = None):
        """tokens int32 [B T], at [B T] -> (hidden [B T D] in the compute dtype, cache)."""
        at.check(tokens)
        x = Table(self.cfg, name="embed")(tokens)
        sees = masks.all_of(masks.same_document, masks.causal)
        x, cache = Stack(self.cfg, sees, name="stack")(x, at, cache)
        if not self.cfg.tie and self.is_initializing():
            # The head is only declared here; `unembedding` is who reads it.
            Table(self.cfg, name="head")(tokens[:, :1])
        return x, cache


FAMILIES = {"decoder": Decoder}


def build(cfg: ModelConfig) -> nn.Module:
    """The module of a config. It holds no arrays: parameters are passed to `apply`."""
    return FAMILIES[cfg.family](cfg)


def unembedding(params) -> jax.Array:
    """The table [V D] that scores hidden states: the embedding itself when it is tied."""
    return params.get("head", params["embed"])["table"]


def logits(params, hidden: jax.Array) -> jax.Array:
    """hidden [... D] -> float32 [... V]."""
    table = unembedding(params).astype(hidden.dtype)
    chex.assert_axis_dimension(hidden, -1, table.shape[1])
    return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)


def _init(cfg: ModelConfig, key: jax.Array):
    one = jnp.zeros((1, 1), jnp.int32)
    return build(cfg).init({"params": key}, one, Coords(one, one + 1))["params"]


def init_params(cfg: ModelConfig, key: jax.Array) -> tuple:
    """Fresh float32 parameters and, in a tree of the same structure, their letters."""
    return split(_init(cfg, key))


def abstract_params(cfg: ModelConfig) -> tuple:
    """As `init_params`, with shapes in place of arrays: nothing is allocated."""
    return split(jax.eval_shape(lambda key: _init(cfg, key), jax.random.key(0)))


def count_params(cfg: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, and their "total". Nothing is allocated."""
    shapes, _ = abstract_params(cfg)
    layers = shapes["stack"]["layers"]
    rest = {name: part for name, part in shapes["stack"].items() if name != "layers"}
    parts = {
        "embedding": shapes["embed"],
        "position": rest.pop("position", {}),
        "attention": layers["attn"],
        "feedforward": layers["ffn"],
        "norms": [rest, {name: part for name, part in layers.items() if "norm" in name}],
        "head": shapes.get("head", {}),
    }
    count = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in parts.items()}
    return count | {"total": sum(count.values())}


def init_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens."""
    chex.assert_scalar_positive(batch)
    chex.assert_scalar_positive(slots)
    shape = (cfg.layers, batch, slots, cfg.sizes["G"], cfg.sizes["K"])
    empty = jnp.zeros(shape, DTYPES[cfg.dtype])
    nowhere = jnp.zeros((batch, slots), jnp.int32)
    return Cache(KV(empty, empty), Coords(nowhere, nowhere), jnp.int32(0))
