"""Transformers out of one block, their parameters, and the cache they decode with.

    model = build(cfg)                       a Flax module: names and makes the parameters
    params, letters = init_params(cfg, key)  plain pytrees of the same structure
    hidden, cache = model.apply({"params": params}, tokens, at, cache)

Training, prefill and decoding are this one call; they differ in whether a cache is given. The
vocabulary is not part of it: `logits` (sampling) and `objectives` (training) score the hidden
states, so that nobody holds [B T V] who does not need it.
"""

import functools
import math
from typing import Any, ClassVar, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.dims import split, weight
from jaxgpt.model.block import NORMED, REMATS, Dropout, Unit
from jaxgpt.model.heads import HEADS, Classes, head
from jaxgpt.model.layers import DTYPES, guarding, normal
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.attention import Attention
from jaxgpt.model.mixers.mixer import Sight, write
from jaxgpt.model.norms import NORMS
from jaxgpt.model.pipeline import pipeline, stages
from jaxgpt.model.positions import POSITIONS
from jaxgpt.sharding import constrain, is_one_cpu, platform

FEW, MANY = 8, 48  # repeats on a CPU, on a GPU; see `unrolled`


class Source(NamedTuple):
    """What an encoder-decoder reads before it writes."""

    tokens: jax.Array  # int32 [B S]
    at: Coords  # [B S]


@struct.dataclass
class Cache:
    """What was seen so far. Slots not yet written have document 0: nobody looks there."""

    states: tuple[dict[str, Any], ...]  # of each layer, its sites: written in place, one by one
    at: Coords  # [B S] each
    cursor: jax.Array  # int32 [], the next free slot
    memory_at: Coords | None = None  # of the source, [B S] each


def unrolled(cfg: ModelConfig, repeats: int) -> int:
    """How many repeats of the unit stand one by one in the program of a training step.

    A loop keeps what the backward pass needs in stacks. To fill them with zeros, write them and cut
    them takes a CPU 3 to 9% of a step. More than a `FEW` would take long to compile, and without a
    loop the compiler for CPUs undoes `model.remat`.
    """
    if platform() == "gpu":
        suits = repeats <= MANY
    else:
        suits = is_one_cpu() and cfg.remat == "none" and repeats <= FEW
    return cfg.unroll or (repeats if suits else 1)


class Stack(nn.Module):
    """Embedded tokens in, hidden states out."""

    cfg: ModelConfig
    direction: str = "causal"
    layers: int | None = None  # None = cfg.layers

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        at: Coords,
        cache: Cache | None = None,
        memory: jax.Array | None = None,
        memory_at: Coords | None = None,
    ):
        """x [B T D], at [B T], memory [B S D] of a source -> (hidden [B T D], cache)."""
        c = self.cfg
        place = POSITIONS[c.position](c, self.direction, name="position")
        if c.embed_scale:
            x = x * c.width**0.5
        x = place.embed(x, at.position)
        if c.embed_norm:
            x = NORMS[c.norm](c, name="embed_norm")(x)
        x = constrain(Dropout(c.dropout)(x), "BTD")
        k_at, cursor = at, None
        if cache is not None:
            k_at, cursor = write(cache.at, at, cache.cursor), cache.cursor
            memory_at = cache.memory_at if memory is None else memory_at
        rotate, bias = place.rotation(at.position), place.bias()
        sight = Sight(at, k_at, rotate, bias, cursor, memory, memory_at)
        x, states = self.blocks(x, None if cache is None else cache.states, sight)
        if c.wiring not in NORMED:
            x = NORMS[c.norm](c, name="norm")(x)
        if cache is not None and states is not None:
            cache = Cache(states, k_at, cache.cursor + x.shape[1], memory_at)
        return x, cache

    def blocks(self, x: jax.Array, states: tuple | None, sight: Sight):
        """All layers: one compiled unit whatever the depth, its parameters stacked along L."""
        c = self.cfg
        repeats = (self.layers or c.layers) // len(c.unit)
        if states is not None and x.shape[1] == 1:
            return self.one_by_one(x, states, sight)
        # Making parameters and reading prompts have no backward pass, so a loop costs them nothing.
        is_pass = states is None and not self.is_initializing()
        count = unrolled(c, repeats) if is_pass else 1
        unit = REMATS[c.remat](Unit, prevent_cse=count == repeats)
        if is_pass and stages(repeats) > 1:
            key = self.make_rng("dropout") if self.has_rng("dropout") else None

            def layer(params, x, sight, number):
                rngs = {} if key is None else {"dropout": jax.random.fold_in(key, number)}
                one = unit(c, self.direction, parent=None)
                return one.apply({"params": params}, x, None, sight, rngs=rngs)[0]

            params = self.variables["params"]["layers"]
            return pipeline(layer, params, x, sight, stages(repeats)), None
        scanned = nn.scan(
            unit,
            variable_axes={"params": 0, "losses": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=repeats,
            unroll=count,
            metadata_params={"letter": "L"},
        )
        stacked = states and _stacked(states, len(c.unit))
        # A GPU gains 7% by computing again what takes the time of its bytes; a CPU ignores it.
        with guarding(is_pass and count == repeats and platform() == "gpu"):
            x, stacked = scanned(c, self.direction, name="layers")(x, stacked, sight)
        return x, stacked and _apart(stacked)

    def one_by_one(self, x: jax.Array, states: tuple, sight: Sight):
        """As `blocks`, for one token: a scan would copy a layer's weights and state to use them."""
        unit: Any = Unit(self.cfg, self.direction, parent=None)
        size, after = len(self.cfg.unit), ()
        layers = self.variables["params"]["layers"]
        layers = layers if "0" in layers else _by_number(layers)
        for n in range(len(layers)):
            state = states[n * size : (n + 1) * size]
            x, new = unit.apply({"params": layers[str(n)]}, x, state, sight)
            after += new
        return x, after


def _layers(stacked) -> tuple:
    """Of leaves [L ...], each of the L."""
    leaves, tree = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(tree, one) for one in zip(*leaves, strict=True))


def _by_number(stacked) -> dict:
    """The layers as "0", "1", ...: jax sorts the keys of a dict, "10" before "2"."""
    return {str(n): layer for n, layer in enumerate(_layers(stacked))}


@jax.jit
def layer_by_layer(params):
    """Parameters for decoding: stack/layers/0, 1, ... in place of leaves [L ...], from which every
    token would copy each layer's."""
    stack = params["stack"]
    return params | {"stack": stack | {"layers": _by_number(stack["layers"])}}


def _stacked(states: tuple, size: int) -> tuple:
    """States of all layers -> of the blocks of a unit of so many, their leaves [L ...]."""
    return tuple(jax.tree.map(lambda *one: jnp.stack(one), *states[i::size]) for i in range(size))


def _apart(stacked: tuple) -> tuple:
    """Undoes `_stacked`."""
    return tuple(block for unit in _layers(stacked) for block in unit)


class Table(nn.Module):
    """A row of D numbers for every token."""

    cfg: ModelConfig
    letters: str = "V>D"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B T] -> [B T D]
        table = weight(self, "table", self.letters, self.cfg.sizes, normal)
        # Gather the width before looking up, else the partitioner replicates the lookup.
        table = constrain(table.astype(DTYPES[self.cfg.dtype]), f"{self.letters[0]}.")
        return constrain(table[tokens], "BTD")


class Family(nn.Module):
    """What all families have: tables that embed tokens and score them."""

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("causal",)  # in which its stacks look

    cfg: ModelConfig

    def setup(self):
        c = self.cfg
        self.embed = Table(c)
        if not c.tie:
            self.head = Table(c)
        if HEADS[c.head] is not None:
            self.transform = HEADS[c.head](c)

    def out(self, tokens: jax.Array, hidden: jax.Array) -> jax.Array:
        """Hidden states [B T D] as they are scored."""
        if not self.cfg.tie and self.is_initializing():
            self.head(tokens[:, :1])  # the head is only declared here; see heads.head
        return hidden if HEADS[self.cfg.head] is None else self.transform(hidden)


class Decoder(Family):
    """The GPT: every token sees itself and what came before in its document."""

    def setup(self):
        super().setup()
        self.stack = Stack(self.cfg)

    def __call__(self, tokens: jax.Array, at: Coords, cache: Cache | None = None):
        """tokens int32 [B T], at [B T] -> (hidden [B T D] in the compute dtype, cache)."""
        at.check(tokens)
        hidden, cache = self.stack(self.embed(tokens), at, cache)
        return self.out(tokens, hidden), cache


class Encoder(Family):
    """BERT: every token sees its whole document."""

    DIRECTIONS = ("both",)

    def setup(self):
        super().setup()
        c = self.cfg
        self.stack = Stack(c, "both")
        if c.types:
            self.types = Table(c, "Y>D")
        if c.classes:
            self.classes = Classes(c)

    def encode(self, tokens: jax.Array, at: Coords, types: jax.Array | None = None):
        """tokens, at, types [B T] -> hidden [B T D]. Without types, all are of kind 0."""
        at.check(tokens)
        x = self.embed(tokens)
        if self.cfg.types:
            x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
        return self.stack(x, at)[0]

    def classify(self, tokens: jax.Array, at: Coords, types: jax.Array | None = None):
        """-> scores of classes, float32 [B A], of rows that are one text each."""
        return self.classes(self.encode(tokens, at, types))

    def __call__(self, tokens: jax.Array, at: Coords, types: jax.Array | None = None):
        """-> (hidden [B T D], None)."""
        hidden = self.encode(tokens, at, types)
        if self.cfg.classes and self.is_initializing():
            self.classes(hidden)
        return self.out(tokens, hidden), None


class EncoderDecoder(Family):
    """The original Transformer, T5, BART: a decoder that also sees what an encoder made."""

    DIRECTIONS = ("both", "causal")

    def setup(self):
        super().setup()
        self.encoder = Stack(self.cfg, "both", self.cfg.encoder_layers)
        self.stack = Stack(self.cfg)

    def __call__(
        self,
        tokens: jax.Array,
        at: Coords,
        cache: Cache | None = None,
        source: Source | None = None,
    ):
        """tokens, at [B T] -> (hidden [B T D], cache).

        The source is read once: a cache keeps what the decoder needs of it.
        """
        at.check(tokens)
        if source is None and self.is_initializing():
            source = Source(tokens, at)
        memory, memory_at = None, None
        if source is not None:
            memory_at = source.at.check(source.tokens)
            memory, _ = self.encoder(self.embed(source.tokens), memory_at)
        elif cache is None:
            raise ValueError("an encoder_decoder needs a source, or a cache that has read one.")
        hidden, cache = self.stack(self.embed(tokens), at, cache, memory, memory_at)
        return self.out(tokens, hidden), cache


FAMILIES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def build(cfg: ModelConfig) -> Any:
    """The module of a config. It holds no arrays: parameters are passed to `apply`."""
    return FAMILIES[cfg.family](cfg)


def logits(cfg: ModelConfig, params, hidden: jax.Array) -> jax.Array:
    """hidden [... D] -> float32 [... V]."""
    return head(cfg, params)(hidden)


def _init(cfg: ModelConfig, key: jax.Array):
    one = jnp.zeros((1, 1), jnp.int32)
    prefix = one if "prefix" in cfg.pattern else None
    return build(cfg).init({"params": key}, one, Coords(one, one + 1, prefix))["params"]


def init_params(cfg: ModelConfig, key: jax.Array) -> tuple:
    """Fresh float32 parameters and, in a tree of the same structure, their letters."""
    return split(_init(cfg, key))


@functools.cache
def abstract_params(cfg: ModelConfig) -> tuple:
    """As `init_params`, with shapes in place of arrays: nothing is allocated."""
    return split(jax.eval_shape(lambda key: _init(cfg, key), jax.random.key(0)))


# The first of these words in a parameter's path says which part it belongs to.
PARTS = {
    "position": "position",
    "types": "position",
    "head": "head",
    "transform": "head",
    "classes": "head",
    "embed": "embedding",
    "mixer": "attention",
    "cross": "attention",
    "ffn": "feedforward",
}


def part_of(path) -> str:
    """The part of the model that a path in the tree of parameters leads to."""
    words = [key.key for key in path]
    return next((PARTS[word] for word in words if word in PARTS), "norms")


def count_params(cfg: ModelConfig) -> dict[str, int]:
    """Number of parameters by part, and their "total". Nothing is allocated."""
    shapes, _ = abstract_params(cfg)
    names = ("embedding", "position", "attention", "feedforward", "norms", "head")
    count = dict.fromkeys(names, 0)
    for path, x in jax.tree.leaves_with_path(shapes):
        count[part_of(path)] += math.prod(x.shape)
    return count | {"total": sum(count.values())}


def init_cache(cfg: ModelConfig, batch: int, slots: int, source: int = 0) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens, and `source` tokens of a source."""
    chex.assert_scalar_positive(batch)
    chex.assert_scalar_positive(slots)

    def state(mixer: str):
        cross = {"cross": Attention.state(cfg, batch, source)} if source else {}
        return {"mixer": MIXERS[mixer].state(cfg, batch, slots)} | cross

    nowhere = jnp.zeros((batch, slots), jnp.int32)
    prefix = nowhere if "prefix" in cfg.pattern else None
    beyond = jnp.zeros((batch, source), jnp.int32)
    return Cache(
        states=tuple(state(mixer) for mixer, _ in cfg.unit * (cfg.layers // len(cfg.unit))),
        at=Coords(nowhere, nowhere, prefix),
        cursor=jnp.int32(0),
        memory_at=Coords(beyond, beyond) if source else None,
    )
