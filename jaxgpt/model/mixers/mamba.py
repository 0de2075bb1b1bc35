"""Mamba: a linear state space whose steps depend on the token.

For each of I inner channels, u being what came out of a short convolution, the Z numbers of state
fall each at its own rate A < 0 for a time Δ that the token chooses, and take in what it brings:

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,    y_t = C_t·h_t + skip u_t

The state moves linearly, and two steps in a row are again a step of this kind; so the tokens of a
chunk are computed together, and chunks one after another: [B T I Z] is never held.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.layers import DTYPES, Linear, into_residual, normal, ones, zeros
from jaxgpt.model.mixers.mixer import Mixer, Sight
from jaxgpt.model.mixers.recurrent import Moment, in_chunks, log_uniform, moments
from jaxgpt.sharding import constrain


class MambaState(NamedTuple):
    """What a layer remembers."""

    tail: jax.Array  # [B W-1 I], the last tokens, for the convolution
    h: jax.Array  # float32 [B I Z]


class Mamba(Mixer):
    """o(scan(silu(conv(in(x)))) * silu(gate(x))): the whole block, which needs no feed-forward.

    Source: Gu & Dao 2023, arXiv:2312.00752, algorithm 2 (the scan), section 3.4 and figure 3 (the
    block), section 3.6 (how Δ and A begin).
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> MambaState:
        I, Z, W = (cfg.sizes[letter] for letter in "IZW")
        tail = jnp.zeros((batch, W - 1, I), DTYPES[cfg.dtype])
        return MambaState(tail, jnp.zeros((batch, I, Z)))

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: MambaState | None):
        c, at = self.cfg, sight.q_at
        when = moments(at)
        old = self.state(c, len(x), 0) if state is None else state
        u = constrain(Linear(c, "D>I", name="in")(x), "BSI")
        gate = constrain(Linear(c, "D>I", name="gate")(x), "BSI")
        u = jnp.where(when.is_token[..., None], u, 0)
        past = jnp.concatenate([old.tail.astype(u.dtype), u], axis=1)  # [B W-1+T I]
        w = weight(self, "conv_w", "WI", c.sizes, _by_inputs).astype(u.dtype)
        b = weight(self, "conv_b", "I", c.sizes, zeros).astype(u.dtype)
        u = jax.nn.silu(convolve(past, w, at.position) + b)
        h, y = self.scan(u, when, old.h)
        y = y.astype(x.dtype) * jax.nn.silu(gate)
        y = Linear(c, "I>D", into_residual(c), name="o")(y)
        return y, None if state is None else MambaState(last_tokens(past, when.is_token), h)

    def scan(self, u: jax.Array, when: Moment, h: jax.Array):
        """u [B T I], h [B I Z] -> (h after the last token, y float32 [B T I])."""
        sizes = self.cfg.sizes
        rank = u @ weight(self, "rank", "I>R", sizes, normal).astype(u.dtype)
        B = u @ weight(self, "B", "I>Z", sizes, normal).astype(u.dtype)
        C = u @ weight(self, "C", "I>Z", sizes, normal).astype(u.dtype)
        step = rank @ weight(self, "step_w", "R>I", sizes, _by_inputs).astype(u.dtype)
        step = step.astype(jnp.float32) + weight(self, "step_b", "I", sizes, _step_bias_begin)
        A = -jnp.exp(weight(self, "log_A", "IZ", sizes, _rates_begin))
        skip = weight(self, "skip", "I", sizes, ones)
        # A step of no time changes nothing.
        step = jnp.where(when.is_token[..., None], jax.nn.softplus(step), 0)
        u, B, C = (x.astype(jnp.float32) for x in (u, B, C))

        def piece(h, xs):
            return selective_scan(A, h, *xs)

        h, y = in_chunks(piece, h, (u, step, B, C, when.begins), self.cfg.mixer.chunk)
        return h, y + skip * u


def selective_scan(A, h, u, step, B, C, begins):
    """The state space on a few tokens, all at once.

    Args:
        A: [I Z] < 0. h: [B I Z], the state before.
        u, step: [B Q I]. B, C: [B Q Z]. begins: bool [B Q], nothing before counts.

    Returns:
        h [B I Z] after the last token, and y [B Q I].
    """
    fall = jnp.where(begins[..., None, None], 0, jnp.exp(step[..., None] * A))
    rise = (step * u)[..., None] * B[:, :, None]  # [B Q I Z]

    def then(first, second):
        (fall, rise), (more_fall, more_rise) = first, second
        return fall * more_fall, more_fall * rise + more_rise

    fall, rise = jax.lax.associative_scan(then, (fall, rise), axis=1)
    h = fall * h[:, None] + rise
    return h[:, -1], jnp.einsum("bqiz,bqz->bqi", h, C)


def convolve(past: jax.Array, w: jax.Array, position: jax.Array) -> jax.Array:
    """Each channel's own convolution with the tokens before, of the same document.

    Args:
        past: [B W-1+T I], the tokens with those before them.
        w: [W I], the last tap is the token itself.
        position: [B T], how many tokens of its document stand before each.
    """
    W, T = len(w), position.shape[1]
    y = past[:, W - 1 :] * w[-1]
    for back in range(1, W):
        tap = past[:, W - 1 - back :][:, :T] * w[-1 - back]
        y += jnp.where((position >= back)[..., None], tap, 0)
    return y


def last_tokens(past: jax.Array, is_token: jax.Array) -> jax.Array:
    """The W-1 last ones of past [B W-1+T I] that are tokens, is_token [B T] saying which."""
    T = is_token.shape[1]
    is_token = jnp.pad(is_token, [(0, 0), (past.shape[1] - T, 0)], constant_values=True)
    last = jnp.argsort(is_token, axis=1, stable=True)[:, T:]  # tokens stay in order, behind others
    return jnp.take_along_axis(past, last[..., None], axis=1)


# --- how it begins ---


def _by_inputs(key, shape):
    """Uniform within ± 1 / sqrt(inputs)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _step_bias_begin(key, shape):
    """softplus⁻¹(Δ), Δ between 0.001 and 0.1."""
    step = jnp.exp(log_uniform(1e-3, 0.1)(key, shape))
    return step + jnp.log(-jnp.expm1(-step))


def _rates_begin(key, shape):
    """log -A, A = -1 ... -Z (S4D-Real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1)), shape)
