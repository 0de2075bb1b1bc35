"""Transformer families built from one block, their parameters and their decoding cache.

    model = build(cfg)                       a Flax module: names and creates the parameters
    params, letters = init_params(cfg, key)  plain pytrees of the same structure
    hidden, cache = model.apply({"params": params}, tokens, coords, cache)

Training, prefill and decoding are this one call; they differ in whether a cache is given. The
output projection is not part of it: `compute_logits` (sampling) and `objectives` (training) score
the hidden states, so that [B T V] is allocated only where it is needed.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.architecture import LayerSpec
from jaxgpt.backend import get_backend
from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param, split
from jaxgpt.model.block import REMAT_POLICIES, WIRINGS_WITHOUT_FINAL_NORM, Dropout, LayerGroup
from jaxgpt.model.cache import Cache
from jaxgpt.model.heads import HEADS, ClassifierHead, make_head
from jaxgpt.model.layers import DTYPES, check_indices, prevent_cse
from jaxgpt.model.lowrank import find_adapter
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers.mixer import LayerContext, make_slot_coords, update_slots
from jaxgpt.model.norms import NORMS
from jaxgpt.model.pipeline import count_stages, run_pipeline
from jaxgpt.model.positions import POSITION_ENCODINGS, PositionEncoding
from jaxgpt.model.taps import CAPTURED, LAYER_INDEX, is_capturing, tap
from jaxgpt.quantized_array import is_quantized
from jaxgpt.sharding import constrain, gather_param


class EncoderInput(NamedTuple):
    """The source sequence of an encoder-decoder."""

    tokens: jax.Array  # int32 [B S]
    coords: Coords  # [B S]


def count_unrolled(cfg: ModelConfig, repeats: int) -> int:
    """Return how many layer groups are unrolled per iteration of the loop in a training step."""
    backend = get_backend()
    is_worthwhile = repeats <= backend.max_unrolled_layers
    is_effective = cfg.remat == "none" or backend.use_unrolled_remat
    return cfg.unroll or (repeats if is_worthwhile and is_effective else 1)


class Stack(nn.Module):
    """Map embedded tokens to hidden states."""

    cfg: ModelConfig
    direction: str = "causal"
    layers: int | None = None  # None = cfg.layers

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        coords: Coords,
        cache: Cache | None = None,
        memory: jax.Array | None = None,
        memory_coords: Coords | None = None,
    ):
        """x [B T D], coords [B T], memory [B S D] of the encoder -> (hidden [B T D], cache)."""
        c = self.cfg
        encodings = self.make_position_encodings()
        if c.has_embed_scale:
            x = x * c.width**0.5
        x = encodings[0].embed(x, coords.positions)  # with others, none adds to the embedding
        if c.embed_norm:
            x = NORMS[c.norm](c, name="embed_norm")(x)
        x = tap(self, "embedding", constrain(Dropout(c.dropout)(x), "BTD"))
        k_coords, cursor, lengths = coords, None, None
        if cache is not None:
            cursor = cache.cursor
            if cursor.ndim:
                lengths = cursor + (coords.segment_ids > 0).sum(axis=1)
                slots = cache.coords.positions.shape[1]
                k_coords = make_slot_coords(lengths, slots, coords.prefix)
            else:
                k_coords = update_slots(cache.coords, coords, cursor)
            memory_coords = cache.memory_coords if memory is None else memory_coords
        layer_context = LayerContext(
            coords,
            k_coords,
            rotations=tuple(e.make_rotation(coords.positions) for e in encodings),
            biases=tuple(e.make_bias() for e in encodings),
            query_scales=tuple(e.make_query_scale(coords.positions) for e in encodings),
            cursor=cursor,
            lengths=lengths,
            memory=memory,
            memory_coords=memory_coords,
        )
        x, states = self.apply_layers(x, None if cache is None else cache.states, layer_context)
        if c.wiring not in WIRINGS_WITHOUT_FINAL_NORM:
            x = NORMS[c.norm](c, name="norm")(x)
        x = tap(self, "final_norm", x)
        if cache is not None and states is not None:
            end = cache.cursor + x.shape[1] if lengths is None else lengths
            cache = Cache(states, k_coords, end, memory_coords)
        return x, cache

    def make_position_encodings(self) -> list[PositionEncoding]:
        """Return one encoding per position scheme of the layers."""
        encodings = []
        for i, (position, rope) in enumerate(self.cfg.position_schemes):
            cfg = dataclasses.replace(self.cfg, position=position, rope=rope, unroll=0)
            name = f"position_{i}" if i else "position"
            encodings.append(POSITION_ENCODINGS[position](cfg, self.direction, name=name))
        return encodings

    @property
    def has_unstacked_params(self) -> bool:
        """Whether the parameters are those of `unstack_layers`."""
        return "0" in self.variables.get("params", {}).get("layers", {})

    @property
    def groups(self) -> list[tuple[str, tuple[LayerSpec, ...], int]]:
        """(name, specs, repeats) of the layers that repeat and, if the cycle leaves one, a tail."""
        cycle, repeats, tail = self.cfg.group_layers(self.layers or self.cfg.layers)
        return [("layers", cycle, repeats)] + ([("tail", tail, 1)] if tail else [])

    def apply_layers(self, x: jax.Array, states: tuple | None, layer_context: LayerContext):
        """Apply all layers: see `apply_group`, or `decode_blocks` with a cache."""
        if states is not None and (x.shape[1] == 1 or self.has_unstacked_params):
            return self.decode_blocks(x, states, layer_context)
        new_states: tuple = ()
        for name, specs, repeats in self.groups:
            start = len(new_states)
            part = states and states[start : start + repeats * len(specs)]
            x, new = self.apply_group(name, specs, repeats, x, part, layer_context)
            new_states += new or ()
        return x, states and new_states

    def apply_group(
        self,
        name: str,
        specs: tuple[LayerSpec, ...],
        repeats: int,
        x: jax.Array,
        states: tuple | None,
        layer_context: LayerContext,
    ):
        """Apply a group of layers as a scan over its repeats, with parameters stacked along L."""
        c = self.cfg
        # Initialization and prefill have no backward pass, so a loop costs them nothing.
        is_training = states is None and not self.is_initializing()
        count = min(count_unrolled(c, repeats), repeats) if is_training else 1
        group = REMAT_POLICIES[c.remat](LayerGroup, prevent_cse=count == repeats)
        if is_training and count_stages(repeats) > 1 and not is_capturing():
            key = self.make_rng("dropout") if self.has_rng("dropout") else None

            def layer(params, x, layer_context, number):
                rngs = {} if key is None else {"dropout": jax.random.fold_in(key, number)}
                module = group(c, specs, self.direction, parent=None)
                return module.apply({"params": params}, x, None, layer_context, rngs=rngs)[0]

            params = self.variables["params"][name]
            return run_pipeline(layer, params, x, layer_context, count_stages(repeats)), None
        scanned = nn.scan(
            group,
            variable_axes={"params": 0, "losses": 0, CAPTURED: 0, LAYER_INDEX: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=repeats,
            unroll=count,
            metadata_params={"letter": "L"},
        )
        stacked = states and _stack_states(states, len(specs))
        with prevent_cse(is_training and count == repeats and get_backend().use_cse_guard):
            x, stacked = scanned(c, specs, self.direction, name=name)(x, stacked, layer_context)
        return x, stacked and _unstack_states(stacked)

    def decode_blocks(self, x: jax.Array, states: tuple, layer_context: LayerContext):
        """As `apply_layers`, for a few tokens: a scan would copy each layer's weights and state."""
        new_states: tuple = ()
        for name, specs, repeats in self.groups:
            group: Any = LayerGroup(self.cfg, specs, self.direction, parent=None)
            layers = self.variables["params"][name]
            layers = layers if "0" in layers else _index_layers(layers)
            for n in range(repeats):
                state = states[len(new_states) : len(new_states) + len(specs)]
                x, new = group.apply({"params": layers[str(n)]}, x, state, layer_context)
                new_states += new
        return x, new_states


def _split_layers(stacked) -> tuple:
    """Split leaves [L ...] into a tuple of L trees."""
    leaves, tree = jax.tree.flatten(stacked)
    return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*leaves, strict=True))


def _index_layers(stacked) -> dict:
    """Return the layers by key "0", "1", ...: JAX sorts the keys of a dict, "10" before "2"."""
    return {str(n): layer for n, layer in enumerate(_split_layers(stacked))}


@jax.jit
def unstack_layers(params):
    """Return parameters for decoding: stack/layers/0, 1, ... in place of leaves [L ...].

    From stacked leaves, every token would copy the parameters of each layer. A tail, stack/tail, is
    stacked too, with L = 1.
    """
    stack = params["stack"]
    groups = {name: _index_layers(stack[name]) for name in ("layers", "tail") if name in stack}
    return params | {"stack": stack | groups}


def _stack_states(states: tuple, size: int) -> tuple:
    """Stack the states of all layers: per block of a group of `size`, with leaves [L ...]."""
    return tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[i::size]) for i in range(size)
    )


def _unstack_states(stacked: tuple) -> tuple:
    """Invert `_stack_states`."""
    return tuple(block for group in _split_layers(stacked) for block in group)


class Embedding(nn.Module):
    """Embedding table: one row [D] per token id."""

    cfg: ModelConfig
    letters: str = "V>D"
    std: float = 0.02  # initially

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B T] -> [B T D]
        initial = nn.initializers.normal(self.std)
        table = declare_param(self, "table", self.letters, self.cfg.sizes, initial)
        check_indices(
            tokens, table.shape[0], "token id" if self.letters[0] == "V" else "token type"
        )
        adapter, dtype = find_adapter(self), DTYPES[self.cfg.dtype]
        if is_quantized(table):
            x = table.take_rows(tokens, dtype)
        else:
            # All-gather the width before the lookup, else the partitioner replicates the lookup.
            table = gather_param(table.astype(dtype), self.letters)
            x = constrain(table, f"{self.letters[0]}.")[tokens]
        if adapter is not None:
            x = x + adapter.look_up(tokens).astype(x.dtype)
        return constrain(x, "BTD")


class Family(nn.Module):
    """Base of all families: the embedding and, if untied, the output embedding."""

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("causal",)  # attention directions of its stacks

    cfg: ModelConfig

    def setup(self):
        c = self.cfg
        self.embed = Embedding(c, std=c.embed_init_std)
        if not c.tie:
            self.head = Embedding(c)
        if HEADS[c.head] is not None:
            self.transform = HEADS[c.head](c)

    def transform_hidden(self, tokens: jax.Array, hidden: jax.Array) -> jax.Array:
        """Return the hidden states [B T D] that the head scores."""
        if not self.cfg.tie and self.is_initializing():
            self.head(tokens[:, :1])  # only creates its parameters; see heads.make_head
        return hidden if HEADS[self.cfg.head] is None else self.transform(hidden)


class Decoder(Family):
    """GPT: causal attention within each document."""

    def setup(self):
        super().setup()
        self.stack = Stack(self.cfg)

    def encode(self, tokens: jax.Array, coords: Coords) -> jax.Array:
        """Return the hidden states [B T D] of tokens [B T], before the head transforms them."""
        coords.check(tokens)
        return self.stack(self.embed(tokens), coords)[0]

    def __call__(self, tokens: jax.Array, coords: Coords, cache: Cache | None = None):
        """tokens int32 [B T], coords [B T] -> (hidden [B T D] in the compute dtype, cache)."""
        coords.check(tokens)
        hidden, cache = self.stack(self.embed(tokens), coords, cache)
        return self.transform_hidden(tokens, hidden), cache


class Encoder(Family):
    """BERT: bidirectional attention within each document."""

    DIRECTIONS = ("both",)

    def setup(self):
        super().setup()
        c = self.cfg
        self.stack = Stack(c, "both")
        if c.types:
            self.types = Embedding(c, "Y>D", c.embed_init_std)
        if c.classes:
            self.classes = ClassifierHead(c)

    def encode(self, tokens: jax.Array, coords: Coords, types: jax.Array | None = None):
        """tokens, coords, types [B T] -> hidden [B T D]. Token types default to 0."""
        coords.check(tokens)
        x = self.embed(tokens)
        if self.cfg.types:
            x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
        return self.stack(x, coords)[0]

    def classify(self, tokens: jax.Array, coords: Coords, types: jax.Array | None = None):
        """Return class logits, float32 [B A], of rows that hold one text each."""
        return self.classes(self.encode(tokens, coords, types))

    def __call__(self, tokens: jax.Array, coords: Coords, types: jax.Array | None = None):
        """Return (hidden [B T D], None)."""
        hidden = self.encode(tokens, coords, types)
        if self.cfg.classes and self.is_initializing():
            self.classes(hidden)
        return self.transform_hidden(tokens, hidden), None


class EncoderDecoder(Family):
    """The original Transformer, T5, BART: a decoder with cross-attention to an encoder."""

    DIRECTIONS = ("both", "causal")

    def setup(self):
        super().setup()
        self.encoder = Stack(self.cfg, "both", self.cfg.encoder_layers)
        self.stack = Stack(self.cfg)

    def encode(self, tokens: jax.Array, coords: Coords) -> jax.Array:
        """Return the hidden states [B S D] of the source, tokens [B S]."""
        coords.check(tokens)
        return self.encoder(self.embed(tokens), coords)[0]

    def __call__(
        self,
        tokens: jax.Array,
        coords: Coords,
        cache: Cache | None = None,
        source: EncoderInput | None = None,
    ):
        """tokens, coords [B T] -> (hidden [B T D], cache).

        The source is encoded once: a cache keeps its cross-attention keys and values.
        """
        coords.check(tokens)
        if source is None and self.is_initializing():
            source = EncoderInput(tokens, coords)
        memory, memory_coords = None, None
        if source is not None:
            memory, memory_coords = self.encode(*source), source.coords
        elif cache is None:
            raise ValueError(
                "an encoder_decoder needs a source, or a cache that was filled from one."
            )
        hidden, cache = self.stack(self.embed(tokens), coords, cache, memory, memory_coords)
        return self.transform_hidden(tokens, hidden), cache


FAMILIES = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def build(cfg: ModelConfig) -> Any:
    """Return the module of a config. It holds no arrays: parameters are passed to `apply`."""
    return FAMILIES[cfg.family](cfg)


def compute_logits(cfg: ModelConfig, params, hidden: jax.Array) -> jax.Array:
    """Return the logits, float32 [... V], of hidden states [... D]."""
    return make_head(cfg, params)(hidden)


def _init(cfg: ModelConfig, key: jax.Array):
    token = jnp.zeros((1, 1), jnp.int32)
    prefix = token if "prefix" in cfg.pattern else None
    return build(cfg).init({"params": key}, token, Coords(token, token + 1, prefix))["params"]


def init_params(cfg: ModelConfig, key: jax.Array) -> tuple:
    """Return initial float32 parameters and, in a tree of the same structure, their letters."""
    return split(_init(cfg, key))


@functools.cache
def abstract_params(cfg: ModelConfig) -> tuple:
    """As `init_params`, with shapes in place of arrays: nothing is allocated."""
    return split(jax.eval_shape(lambda key: _init(cfg, key), jax.random.key(0)))


# Component of the model by the first of these keys in a parameter's path.
COMPONENTS = {
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


def find_component(path) -> str:
    """Return the component of the model that a path in the parameter tree belongs to."""
    keys = [key.key.rstrip("_0123456789") for key in path]  # "position_1" is a position as well
    return next((COMPONENTS[key] for key in keys if key in COMPONENTS), "norms")


def count_params(cfg: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by component, and in "total". Nothing is allocated."""
    shapes, _ = abstract_params(cfg)
    names = ("embedding", "position", "attention", "feedforward", "norms", "head")
    count = dict.fromkeys(names, 0)
    for path, x in jax.tree.leaves_with_path(shapes):
        count[find_component(path)] += math.prod(x.shape)
    return count | {"total": sum(count.values())}


def count_expert_params(cfg: ModelConfig) -> int:
    """Return the number of parameters of all experts that tokens are routed to."""
    leaves = jax.tree.leaves_with_path(abstract_params(cfg)[0])
    return sum(x.size for path, x in leaves if "experts" in [key.key for key in path])
