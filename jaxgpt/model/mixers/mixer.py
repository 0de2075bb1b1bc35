"""The interface of a token mixer: the part of a block that moves information between tokens."""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxgpt.config import ModelConfig
from jaxgpt.model.masks import Coords
from jaxgpt.quantized_array import SCALE_DTYPE, quantize_last
from jaxgpt.settings import ConfigError


class LayerContext(NamedTuple):
    """The inputs that all layers of a stack share and no layer changes."""

    q_coords: Coords  # of the current tokens, [B T]
    k_coords: Coords  # of the tokens in the cache, [B S]; without a cache, the same as q_coords
    # Of the layer at hand, by `select_position`.
    rotate: Partial | None = None  # rotary embedding of queries or keys, [B T H K] -> [B T H K]
    bias: Partial | None = None  # (q_coords [B T], k_coords [B S]) -> float32 [B H T S]
    query_scale: jax.Array | None = None  # float32 [B T]
    # Of all layers, in the order of `ModelConfig.position_schemes`.
    rotations: tuple[Partial | None, ...] = ()
    biases: tuple[Partial | None, ...] = ()
    query_scales: tuple[jax.Array | None, ...] = ()
    cursor: Any = None  # int32 [] or [B], the next free slot of the cache, of all rows or of each
    lengths: Any = None  # int32 [B], tokens of each row with the current ones, where cursor is [B]
    memory: jax.Array | None = None  # hidden states of the encoder, [B S D]
    memory_coords: Coords | None = None  # [B S]

    def select_position(self, i: int) -> "LayerContext":
        """Return the context of a layer with position scheme i."""
        return self._replace(
            rotate=self.rotations[i], bias=self.biases[i], query_scale=self.query_scales[i]
        )

    def get_key_coords(self, slots: int) -> Coords:
        """Return the coordinates of the keys of a layer with so many slots: see `is_ring`."""
        if not self.is_ring(slots):
            return self.k_coords
        return make_slot_coords(self.lengths, slots, self.k_coords.prefix)

    def is_ring(self, slots: int) -> bool:
        """Return whether a layer keeps fewer slots than the cache: the last tokens of each row."""
        return self.lengths is not None and slots < self.k_coords.positions.shape[1]

    def apply_rotation(self, x: jax.Array) -> jax.Array:
        """Rotate queries or keys x [B T H K] if the position encoding is rotary."""
        return x if self.rotate is None else self.rotate(x)

    def scale_queries(self, q: jax.Array) -> jax.Array:
        """Scale queries [B T H K] by position if the position encoding does so."""
        if self.query_scale is None:
            return q
        return (q * self.query_scale[:, :, None, None]).astype(q.dtype)


class Mixer(nn.Module):
    """A token mixer: (x [B T D], layer_context, state) -> (y [B T D], state).

    A new document begins where `layer_context.q_coords.positions` is 0; its output must not depend
    on the document before it. Where `layer_context.q_coords.segment_ids` is 0 there is no token: no
    output depends on it, and the output there is arbitrary.

    `state` holds the earlier tokens, for decoding. It is None in training, where a row begins with
    no earlier tokens; otherwise it comes from `init_state` and is passed on from call to call. A
    call with a state accepts any number of tokens.
    """

    # The optional features that the mixer supports: "rotation", "bias" and "query_scale" (position
    # encodings), "pattern" (of the attention mask), and the settings of attention: "softcap",
    # "qk_norm", "attention_bias", "sinks", "attention_dropout".
    USES: ClassVar[tuple[str, ...]] = ()
    DIRECTIONS: ClassVar[tuple[str, ...]] = ("causal", "both")
    HAS_HEADS: ClassVar[bool] = True
    # Whether a row may be sharded over devices (context parallelism); else each gets the whole row.
    HAS_SEQUENCE_SHARDING: ClassVar[bool] = False
    HAS_QUANTIZED_CACHE: ClassVar[bool] = False  # whether its state may be a `QuantizedKV`
    HAS_LOGIT_TABLE: ClassVar[bool] = False  # which learns at a rate of its own
    # Whether a state holds the tokens themselves, so that the last of them can be taken back by
    # moving the cursor. A state that summarizes them cannot forget one.
    HAS_TOKEN_STATE: ClassVar[bool] = False

    cfg: ModelConfig
    pattern: str = "full"
    direction: str = "causal"

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> Any:
        """Return the empty state of one layer for `batch` rows of up to `slots` tokens."""
        raise NotImplementedError

    def __call__(
        self, x: jax.Array, layer_context: LayerContext, state: Any
    ) -> tuple[jax.Array, Any]:
        raise NotImplementedError


class KV(NamedTuple):
    """Keys and values of one layer, [B S G K]; as a state [B G S K].

    In this layout a state is multiplied by one token without a transposition. For 8 rows of 192
    slots, 6 heads of width 64, attention takes a CPU 90 us, and 1,430 us if it must transpose
    [B S G K] first.
    """

    k: jax.Array
    v: jax.Array

    def transposed(self) -> "KV":
        """Swap the axes of heads and tokens."""
        return KV(self.k.swapaxes(1, 2), self.v.swapaxes(1, 2))


class QuantizedKV(NamedTuple):
    """A state `KV` of integers, with one scale for each token and head.

    With K = 64 it has 0.52 times the bytes of bfloat16. Keys and values are rounded when they are
    written, so the attention of a token sees its own as later tokens do.
    """

    k: jax.Array  # int8 [B G S K]
    v: jax.Array  # int8 [B G S K]
    k_scale: jax.Array  # bfloat16 [B G S]
    v_scale: jax.Array  # bfloat16 [B G S]


def make_quantized_kv(state: KV) -> QuantizedKV:
    """Return an empty state like an empty one [B G S K]."""
    values = (jnp.zeros(x.shape, jnp.int8) for x in state)
    return QuantizedKV(*values, *(jnp.zeros(x.shape[:3], SCALE_DTYPE) for x in state))


def init_mixer_state(name: str, mixer: Any, cfg: ModelConfig, batch: int, slots: int, kind: str):
    """Return the empty state of a layer, for a `sample.cache` of "model" or "int8".

    Args:
        name, mixer: of a row of MIXERS.

    Raises:
        ConfigError: the mixer has no keys and values that could be integers.
    """
    if kind == "int8" and not getattr(mixer, "HAS_QUANTIZED_CACHE", False):
        raise ConfigError(
            f"sample.cache='int8': the state of model.mixers={name!r} is not the keys and values "
            "of attention: use sample.cache=model."
        )
    state = mixer.init_state(cfg, batch, slots)
    return make_quantized_kv(state) if kind == "int8" else state


def store_kv(state: KV | QuantizedKV, new: KV) -> KV | QuantizedKV:
    """Return new keys and values [B G T K] as a state of this kind and dtype holds them."""
    if isinstance(state, KV):
        return KV(*(x.astype(old.dtype) for x, old in zip(new, state, strict=True)))
    (k, k_scale), (v, v_scale) = (quantize_last(x) for x in new)
    return QuantizedKV(k, v, k_scale, v_scale)


def load_kv(state: KV | QuantizedKV, dtype) -> KV:
    """Return the keys and values [B S G K] of a state, of integers in a dtype."""
    if isinstance(state, QuantizedKV):
        k = state.k.astype(dtype) * state.k_scale[..., None].astype(dtype)
        v = state.v.astype(dtype) * state.v_scale[..., None].astype(dtype)
        state = KV(k, v)
    return state.transposed()


def make_slot_coords(lengths: jax.Array, slots: int, prefix: jax.Array | None = None) -> Coords:
    """Return the coordinates [B S] of slots that are derived from the tokens of each row alone.

    Token p of a row is in slot p mod S, so slot s has the last of its tokens for which p mod S = s.
    A slot that no token of the row was written to is empty, whatever an earlier row left in it.

    Args:
        lengths: int32 [B], tokens of each row.
        slots: S.
        prefix: int32 [B ...], the same along every row, or None.
    """
    last = lengths[:, None] - 1
    positions = last - (last - jnp.arange(slots)) % slots
    if prefix is not None:
        prefix = jnp.broadcast_to(prefix[:, :1], positions.shape)
    return Coords(jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32), prefix)


def locate_slots(cursor: jax.Array, tokens: int) -> jax.Array:
    """Return the slots [B T] of the next tokens of rows with cursors [B]."""
    return cursor[:, None] + jnp.arange(tokens)


def update_slots(old, new, cursor: jax.Array, axis: int = 1, is_ring: bool = False):
    """Write new entries [B T ...] into old ones [B S ...] from slot `cursor` on, leaf by leaf.

    Args:
        cursor: int32 [], or [B] for slots of each row: what lies beyond the last is dropped.
        axis: of the slots, 1 or 2.
        is_ring: whether slot S is slot 0 again.
    """

    def write(old, new):
        new = new.astype(old.dtype)
        if cursor.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(old, new, cursor, axis)
        slots = locate_slots(cursor, new.shape[axis])
        slots = slots % old.shape[axis] if is_ring else slots
        rows = jnp.arange(len(old))[:, None]
        if axis == 2:
            return old.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop")
        return old.at[rows, slots].set(new, mode="drop")

    return jax.tree.map(write, old, new)


def update_kv_cache(
    state: Any, new: KV, cursor: jax.Array, is_ring: bool = False
) -> tuple[KV, Any]:
    """Write new keys and values [B T G K] into the state [B G S K]; see `update_slots`.

    Returns:
        The keys and values of all slots [B S G K], and the new state.
    """
    new_state = store_kv(state, new.transposed())
    state = update_slots(state, new_state, cursor, axis=2, is_ring=is_ring)
    return load_kv(state, new.k.dtype), state
