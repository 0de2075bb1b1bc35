"""Recurrent mixers: what a token hears of those before it is a state of fixed size.

    state_t = cell(x_t, state_{t-1})

A document begins with an empty state, and where there is no token the state stays as it is. States
are float32 whatever the compute dtype. Here are what all such mixers share, and the gated cells of
old; Mamba and S4, whose states move linearly, have modules of their own.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.layers import Linear, into_residual, normal, ones, zeros
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers.chunks import cut, join
from jaxgpt.model.mixers.mixer import Mixer, Sight

# --- what all mixers with a state share ---


class Moment(NamedTuple):
    """What a token does to the state."""

    begins: jax.Array  # bool [B T], it is the first of a document
    is_token: jax.Array  # bool [B T]


def moments(at: Coords) -> Moment:
    is_token = at.document > 0
    return Moment(is_token & (at.position == 0), is_token)


def remember(cell, state, xs, when: Moment):
    """Token after token.

    Args:
        cell: (state, x [B ...]) -> (state, y [B ...]).
        state: arrays [B ...], zero when empty.
        xs: arrays [B T ...]. when: [B T].

    Returns:
        The last state, and y [B T ...].
    """

    def choose(condition, a, b):
        def pick(a, b):
            return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        return jax.tree.map(pick, a, b)

    def step(old, given):
        x, when = given
        new, y = cell(choose(when.begins, jax.tree.map(jnp.zeros_like, old), old), x)
        return choose(when.is_token, new, old), y

    state, y = jax.lax.scan(step, state, jax.tree.map(_time_first, (xs, when)))
    return state, _time_first(y)


def in_chunks(piece, state, xs, size: int):
    """Some tokens after some tokens; the backward pass keeps only the states between them.

    Args:
        piece: (state, xs [B Q ...]) -> (state, y [B Q ...]). Where all of xs are zero and False it
            is to leave the state as it is: the last chunk is filled up so.
        xs: arrays [B T ...].
        size: Q, tokens of a chunk.

    Returns:
        The last state, and y [B T ...].
    """
    T = jax.tree.leaves(xs)[0].shape[1]
    chunks = jax.tree.map(_time_first, cut(xs, min(size, T)))
    # Inside a scan nothing can be merged across iterations, so the guard against it is not needed.
    state, y = jax.lax.scan(jax.checkpoint(piece, prevent_cse=False), state, chunks)
    return state, join(_time_first(y), T)


def _time_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def log_uniform(low: float, high: float):
    """An initializer: logarithms of numbers between low and high, every magnitude as likely."""

    def init(key, shape):
        return jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high))

    return init


# --- gated cells ---


class GatedCell(Mixer):
    """A cell with gates, as wide as the stream, and a map of what it shows back into the stream.

    Each gate is an activation of W x + b and U h. What x gives does not wait for the state, so it
    is one product for all gates of all tokens, and only U h is left for the loop. The biases are
    there whatever `model.bias` says: they decide how much is forgotten at the start.
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False
    STATE: ClassVar[Any]  # a NamedTuple of arrays [B D], with h
    GATES: ClassVar[str]  # a letter each, in the order of `cell`
    OPEN: ClassVar[str] = ""  # the gates whose biases begin at 1

    @classmethod
    def state(cls, cfg: ModelConfig, batch: int, slots: int):
        return cls.STATE(*(jnp.zeros((batch, cfg.width)) for _ in cls.STATE._fields))

    @staticmethod
    def cell(old, given: jax.Array, heard: jax.Array):
        """(state, W x + b, U h: each [B nD] for n gates) -> state."""
        raise NotImplementedError

    def gates(self, name: str, letters: str, initial: Callable) -> jax.Array:
        """Parameters of all gates side by side, [... nD]; each is a parameter of its own."""
        parts = [
            weight(self, f"{name}_{gate}", letters, self.cfg.sizes, initial(gate))
            for gate in self.GATES
        ]
        return jnp.concatenate(parts, axis=-1)

    def heard(self, u: jax.Array) -> Callable:
        """h [B D] -> U h [B nD]."""
        return lambda h: h @ u

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state):
        c, (B, T, D) = self.cfg, x.shape
        w = self.gates("w", "D>D", lambda _: normal).astype(x.dtype)
        b = self.gates("b", "D", lambda gate: ones if gate in self.OPEN else zeros)
        heard = self.heard(self.gates("u", "D>D", lambda _: normal))
        given = jnp.dot(x.reshape(B * T, D), w, preferred_element_type=jnp.float32) + b

        def cell(old, given):
            new = self.cell(old, given, heard(old.h))
            return new, new.h

        begin = self.state(c, B, T) if state is None else state
        end, h = remember(cell, begin, given.reshape(B, T, -1), moments(sight.q_at))
        y = Linear(c, "D>D", into_residual(c), name="o")(h.astype(x.dtype))
        return y, None if state is None else end


class LSTMState(NamedTuple):
    """float32."""

    h: jax.Array  # [B D], what is shown
    c: jax.Array  # [B D], what is kept


class LSTM(GatedCell):
    """Long short-term memory with a forget gate, which begins open.

        i, f, o = σ(W x + b + U h),    g = tanh(W x + b + U h)
        c' = f c + i g,    h' = o tanh(c')

    Source: Hochreiter & Schmidhuber 1997, Neural Computation 9(8), section 4; Gers et al. 2000,
    Neural Computation 12(10), equations 1 to 8 (the forget gate), without peepholes; Jozefowicz et
    al. 2015, section 5, for its bias of 1.
    """

    STATE = LSTMState
    GATES = "ifgo"
    OPEN = "f"

    @staticmethod
    def cell(old: LSTMState, given: jax.Array, heard: jax.Array) -> LSTMState:
        i, f, g, o = jnp.split(given + heard, 4, axis=-1)
        c = jax.nn.sigmoid(f) * old.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(c), c)


class GRUState(NamedTuple):
    """float32."""

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

    def heard(self, u: jax.Array) -> Callable:
        c = weight(self, "c_n", "D", self.cfg.sizes, zeros)
        c = jnp.pad(c, (2 * c.size, 0))  # r and z have no use for a second bias
        return lambda h: h @ u + c

    @staticmethod
    def cell(old: GRUState, given: jax.Array, heard: jax.Array) -> GRUState:
        (r, z, n), (r_h, z_h, n_h) = (jnp.split(x, 3, axis=-1) for x in (given, heard))
        r, z = jax.nn.sigmoid(r + r_h), jax.nn.sigmoid(z + z_h)
        return GRUState((1 - z) * jnp.tanh(n + r * n_h) + z * old.h)
