"""Mamba: a selective state space, whose step sizes depend on the token.

In each of I inner channels, with u the output of a short convolution, each of the Z state variables
decays at its own rate A < 0 over a step Δ computed from the token, which also adds its input:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,    y_t = C_t·h_t + skip u_t

The recurrence is linear, and two steps compose to one step of the same kind; so the tokens of a
chunk are computed in parallel, and chunks sequentially: [B T I Z] is never materialized.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import DTYPES, Linear, make_residual_init, normal, ones, zeros
from jaxgpt.model.mixers.mixer import LayerContext, Mixer
from jaxgpt.model.mixers.recurrent import TokenFlags, flag_tokens, log_uniform, scan_in_chunks
from jaxgpt.model.taps import is_tapped, store, tap
from jaxgpt.sharding import constrain


class MambaState(NamedTuple):
    """The state of one layer."""

    tail: jax.Array  # [B W-1 I], the last tokens, for the convolution
    h: jax.Array  # float32 [B I Z]


class Mamba(Mixer):
    """o(scan(silu(conv(in(x)))) * silu(gate(x))): the whole block, without a feed-forward.

    Source: Gu & Dao 2023, arXiv:2312.00752, algorithm 2 (the scan), section 3.4 and figure 3 (the
    block), section 3.6 (initialization of Δ and A).
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> MambaState:
        I, Z, W = (cfg.sizes[letter] for letter in "IZW")
        tail = jnp.zeros((batch, W - 1, I), DTYPES[cfg.dtype])
        return MambaState(tail, jnp.zeros((batch, I, Z)))

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: MambaState | None):
        c, coords = self.cfg, layer_context.q_coords
        flags = flag_tokens(coords)
        old = self.init_state(c, len(x), 0) if state is None else state
        u = constrain(Linear(c, "D>I", name="in")(x), "BSI")
        gate = tap(self, "gate", constrain(Linear(c, "D>I", name="gate")(x), "BSI"))
        u = jnp.where(flags.is_token[..., None], u, 0)
        past = jnp.concatenate([old.tail.astype(u.dtype), u], axis=1)  # [B W-1+T I]
        w = declare_param(self, "conv_w", "WI", c.sizes, _init_uniform_fan_in).astype(u.dtype)
        b = declare_param(self, "conv_b", "I", c.sizes, zeros).astype(u.dtype)
        u = tap(self, "u", jax.nn.silu(convolve_depthwise(past, w, coords.positions) + b))
        h, y = self.scan(u, flags, old.h)
        y = tap(self, "y", y).astype(x.dtype) * jax.nn.silu(gate)
        y = Linear(c, "I>D", make_residual_init(c), name="o")(y)
        return y, None if state is None else MambaState(select_last_tokens(past, flags.is_token), h)

    def scan(self, u: jax.Array, flags: TokenFlags, h: jax.Array):
        """Scan u [B T I] from h [B I Z]: (h after the last token, y float32 [B T I])."""
        sizes = self.cfg.sizes
        rank = u @ declare_param(self, "rank", "I>R", sizes, normal).astype(u.dtype)
        B = u @ declare_param(self, "B", "I>Z", sizes, normal).astype(u.dtype)
        C = u @ declare_param(self, "C", "I>Z", sizes, normal).astype(u.dtype)
        step = rank @ declare_param(self, "step_w", "R>I", sizes, _init_uniform_fan_in).astype(
            u.dtype
        )
        step = step.astype(jnp.float32) + declare_param(self, "step_b", "I", sizes, _init_step_bias)
        A = -jnp.exp(declare_param(self, "log_A", "IZ", sizes, _init_log_rates))
        skip = declare_param(self, "skip", "I", sizes, ones)
        # A step of size 0 leaves the state unchanged.
        step = jnp.where(flags.is_token[..., None], jax.nn.softplus(step), 0)
        step, B, C = tap(self, "step", step), tap(self, "B", B), tap(self, "C", C)
        u, B, C = (x.astype(jnp.float32) for x in (u, B, C))
        has_states = is_tapped(self, "h")

        def scan_chunk(h, xs):
            states, y = selective_scan(A, h, *xs)
            return states[:, -1], (y, states) if has_states else y

        h, y = scan_in_chunks(scan_chunk, h, (u, step, B, C, flags.is_first), self.cfg.mixer.chunk)
        if has_states:
            y, states = y
            store(self, "h", states)
        return h, y + skip * u


def selective_scan(A, h, u, step, B, C, is_first):
    """Run the state space on one chunk, all tokens in parallel.

    Args:
        A: [I Z] < 0. h: [B I Z], the state before the chunk.
        u, step: [B Q I]. B, C: [B Q Z]. begins: bool [B Q], where the state is reset to 0.

    Returns:
        h [B Q I Z] after each token, and y [B Q I].
    """
    decay = jnp.where(is_first[..., None, None], 0, jnp.exp(step[..., None] * A))
    update = (step * u)[..., None] * B[:, :, None]  # [B Q I Z]

    def compose(first, second):
        (decay, update), (next_decay, next_update) = first, second
        return decay * next_decay, next_decay * update + next_update

    decay, update = jax.lax.associative_scan(compose, (decay, update), axis=1)
    h = decay * h[:, None] + update
    return h, jnp.einsum("bqiz,bqz->bqi", h, C)


def convolve_depthwise(past: jax.Array, w: jax.Array, positions: jax.Array) -> jax.Array:
    """Compute a causal depthwise convolution within each document.

    Args:
        past: [B W-1+T I], the tokens, preceded by the W-1 before them.
        w: [W I], the last tap is for the token itself.
        positions: [B T], of the tokens in their documents.
    """
    W, T = len(w), positions.shape[1]
    y = past[:, W - 1 :] * w[-1]
    for lag in range(1, W):
        tap = past[:, W - 1 - lag :][:, :T] * w[-1 - lag]
        y += jnp.where((positions >= lag)[..., None], tap, 0)
    return y


def select_last_tokens(past: jax.Array, is_token: jax.Array) -> jax.Array:
    """Select the last W-1 entries of past [B W-1+T I] that are tokens, by is_token [B T]."""
    T = is_token.shape[1]
    is_token = jnp.pad(is_token, [(0, 0), (past.shape[1] - T, 0)], constant_values=True)
    last = jnp.argsort(is_token, axis=1, stable=True)[
        :, T:
    ]  # a stable sort moves tokens to the end, in order
    return jnp.take_along_axis(past, last[..., None], axis=1)


# --- initializers ---


def _init_uniform_fan_in(key, shape):
    """Draw uniformly within ± 1 / √fan_in."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _init_step_bias(key, shape):
    """Draw softplus⁻¹(Δ), with Δ log-uniform between 0.001 and 0.1."""
    step = jnp.exp(log_uniform(1e-3, 0.1)(key, shape))
    return step + jnp.log(-jnp.expm1(-step))


def _init_log_rates(key, shape):
    """Compute log(-A), A = -1 ... -Z (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1)), shape)
