"""Recurrent mixers: a state of fixed size summarizes the tokens before.

    state_t = cell(x_t, state_{t-1})

A document begins with a state of zeros, and where there is no token the state is unchanged. States
are float32 whatever the compute dtype. This module has what all recurrent mixers share, and the
gated cells; Mamba and S4, whose recurrences are linear, have modules of their own.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import Linear, make_residual_init, normal, ones, zeros
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers.chunks import join_chunks, split_chunks
from jaxgpt.model.mixers.mixer import LayerContext, Mixer
from jaxgpt.model.taps import is_tapped, store, tap

# --- shared by all recurrent mixers ---


class TokenFlags(NamedTuple):
    """How slots affect the state: a first token resets it, a slot without a token does nothing."""

    is_first: jax.Array  # bool [B T], whether it is the first of its document
    is_token: jax.Array  # bool [B T]


def flag_tokens(coords: Coords) -> TokenFlags:
    """Compute the flags of tokens from their coordinates [B T]."""
    is_token = coords.segment_ids > 0
    return TokenFlags(is_token & (coords.positions == 0), is_token)


def scan_tokens(cell, state, xs, flags: TokenFlags):
    """Scan over tokens, resetting the state at first tokens.

    Args:
        cell: (state, x [B ...]) -> (state, y [B ...]).
        state: arrays [B ...], zeros when empty.
        xs: arrays [B T ...]. flags: [B T].

    Returns:
        The last state, and y [B T ...].
    """

    def select(condition, a, b):
        def select_leaf(a, b):
            return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return jax.tree.map(select_leaf, a, b)

    def step(old, x_and_flags):
        x, flags = x_and_flags
        new, y = cell(select(flags.is_first, jax.tree.map(jnp.zeros_like, old), old), x)
        return select(flags.is_token, new, old), y

    state, y = jax.lax.scan(step, state, jax.tree.map(_swap_time_axis, (xs, flags)))
    return state, jax.tree.map(_swap_time_axis, y)


def scan_in_chunks(scan_chunk, state, xs, size: int):
    """Scan over chunks of tokens; the backward pass stores only the states between them.

    Args:
        piece: (state, xs [B Q ...]) -> (state, y [B Q ...]). Where all of xs are zero and False it
            must leave the state unchanged: the last chunk is padded this way.
        xs: arrays [B T ...].
        size: Q, tokens of a chunk.

    Returns:
        The last state, and y [B T ...].
    """
    T = jax.tree.leaves(xs)[0].shape[1]
    chunks = jax.tree.map(_swap_time_axis, split_chunks(xs, min(size, T)))
    # CSE cannot merge forward and backward passes of a scan, so its prevention is not needed.
    state, y = jax.lax.scan(jax.checkpoint(scan_chunk, prevent_cse=False), state, chunks)
    return state, jax.tree.map(lambda y: join_chunks(_swap_time_axis(y), T), y)


def _swap_time_axis(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def log_uniform(low: float, high: float):
    """Return an initializer that draws log x, with x log-uniform between low and high."""

    def init(key, shape):
        return jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high))

    return init


# --- gated cells ---


class GatedCell(Mixer):
    """A gated recurrent cell as wide as the residual stream, and an output projection.

    Each gate is an activation of W x + b and U h. W x + b does not depend on the state, so it is
    one product for all gates of all tokens, and only U h remains in the loop. The biases exist
    whatever `model.bias` is: they determine how much is forgotten at the beginning of training.
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False
    STATE: ClassVar[Any]  # a NamedTuple of arrays [B D], with h
    GATES: ClassVar[str]  # one letter each, in the order of `update_state`
    OPEN_GATES: ClassVar[str] = ""  # the gates whose biases are initialized to 1

    @classmethod
    def init_state(cls, cfg: ModelConfig, batch: int, slots: int):
        return cls.STATE(*(jnp.zeros((batch, cfg.width)) for _ in cls.STATE._fields))

    @staticmethod
    def update_state(old, input_proj: jax.Array, recurrent_proj: jax.Array):
        """Compute the next state from W x + b and U h, each [B nD] for n gates."""
        raise NotImplementedError

    def make_gate_params(self, name: str, letters: str, make_init: Callable) -> jax.Array:
        """Create the parameters of all gates, one per gate, and concatenate them: [... nD]."""
        parts = [
            declare_param(self, f"{name}_{gate}", letters, self.cfg.sizes, make_init(gate))
            for gate in self.GATES
        ]
        return jnp.concatenate(parts, axis=-1)

    def make_state_projection(self, u: jax.Array) -> Callable:
        """Return the function h [B D] -> U h [B nD]."""
        return lambda h: h @ u

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state):
        c, (B, T, D) = self.cfg, x.shape
        w = self.make_gate_params("w", "D>D", lambda _: normal).astype(x.dtype)
        b = self.make_gate_params("b", "D", lambda gate: ones if gate in self.OPEN_GATES else zeros)
        project_state = self.make_state_projection(
            self.make_gate_params("u", "D>D", lambda _: normal)
        )
        input_proj = jnp.dot(x.reshape(B * T, D), w, preferred_element_type=jnp.float32) + b

        inner = [name for name in self.STATE._fields if name != "h"]
        has_inner = is_tapped(self, *inner)

        def cell(old, input_proj):
            new = self.update_state(old, input_proj, project_state(old.h))
            return new, new if has_inner else new.h

        initial = self.init_state(c, B, T) if state is None else state
        final, out = scan_tokens(
            cell, initial, input_proj.reshape(B, T, -1), flag_tokens(layer_context.q_coords)
        )
        for name in inner if has_inner else ():
            store(self, name, getattr(out, name))
        h = tap(self, "h", out.h if has_inner else out)
        y = Linear(c, "D>D", make_residual_init(c), name="o")(h.astype(x.dtype))
        return y, None if state is None else final


class LSTMState(NamedTuple):
    """Hidden and cell state, float32."""

    h: jax.Array  # [B D], the hidden state
    c: jax.Array  # [B D], the cell state


class LSTM(GatedCell):
    """Long short-term memory with a forget gate, initialized open.

        i, f, o = σ(W x + b + U h),    g = tanh(W x + b + U h)
        c' = f c + i g,    h' = o tanh(c')

    Source: Hochreiter & Schmidhuber 1997, Neural Computation 9(8), section 4; Gers et al. 2000,
    Neural Computation 12(10), equations 1 to 8 (the forget gate), without peepholes; Jozefowicz et
    al. 2015, section 5, for its bias of 1.
    """

    STATE = LSTMState
    GATES = "ifgo"
    OPEN_GATES = "f"

    @staticmethod
    def update_state(old: LSTMState, input_proj: jax.Array, recurrent_proj: jax.Array) -> LSTMState:
        i, f, g, o = jnp.split(input_proj + recurrent_proj, 4, axis=-1)
        c = jax.nn.sigmoid(f) * old.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class GRUState(NamedTuple):
    """Hidden state, float32."""

    h: jax.Array  # [B D]


class GRU(GatedCell):
    """A gated recurrent unit, whose reset gate acts on the product with the state.

        r, z = σ(W x + b + U h),    n = tanh(W x + b + r (U h + c))
        h' = (1 - z) n + z h

    Source: Cho et al. 2014, arXiv:1406.1078, section 2.3; with the reset after the product, as in
    cuDNN and torch, all of U h is one product.
    """

    STATE = GRUState
    GATES = "rzn"

    def make_state_projection(self, u: jax.Array) -> Callable:
        c = declare_param(self, "c_n", "D", self.cfg.sizes, zeros)
        c = jnp.pad(c, (2 * c.size, 0))  # a second bias of r and z would be redundant
        return lambda h: h @ u + c

    @staticmethod
    def update_state(old: GRUState, input_proj: jax.Array, recurrent_proj: jax.Array) -> GRUState:
        (r, z, n), (r_h, z_h, n_h) = (
            jnp.split(x, 3, axis=-1) for x in (input_proj, recurrent_proj)
        )
        r, z = jax.nn.sigmoid(r + r_h), jax.nn.sigmoid(z + z_h)
        return GRUState((1 - z) * jnp.tanh(n + r * n_h) + z * old.h)
