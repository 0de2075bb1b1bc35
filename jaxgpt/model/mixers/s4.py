"""S4: a linear state space of its own for each channel, which remembers a long past.

    x' = A x + B u,    y = 2 Re(C x) + skip u,    A = Λ - P P*,

made discrete by the bilinear rule, with a step Δ that each channel learns:

    x_t = Ā x_{t-1} + B̄ u_t,    Ā = (1 - Δ/2 A)⁻¹ (1 + Δ/2 A),    B̄ = (1 - Δ/2 A)⁻¹ Δ B

A row that is one document is a convolution with K_l = 2 Re(C Ā^l B̄), made by FFT. Where documents
follow each other, or with a state, the same system goes token by token. A begins as HiPPO-LegS,
whose state holds the coefficients of the past in Legendre polynomials.

The numbers come in conjugate pairs, of which one each is kept: Z complex numbers stand for 2Z.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.layers import Linear, into_residual, ones
from jaxgpt.model.mixers.mixer import Mixer, Sight
from jaxgpt.model.mixers.recurrent import Moment, in_chunks, log_uniform, moments, remember


class S4State(NamedTuple):
    """float32; complex numbers are kept as two real ones."""

    re: jax.Array  # [B D Z]
    im: jax.Array  # [B D Z]


class System(NamedTuple):
    """A state space per channel. complex64 [D Z], but for the step."""

    rates: jax.Array  # Λ
    P: jax.Array
    B: jax.Array
    C: jax.Array
    step: jax.Array  # Δ, float32 [D 1]


class S4(Mixer):
    """o(gelu(y)), y the outcome of the state space.

    Source: Gu et al. 2022, arXiv:2111.00396, sections 2 and 3, algorithm 1, appendix C.3; Goel et
    al. 2022 (SaShiMi), arXiv:2202.09729, section 4.1, for Q = P and Re Λ < 0, with which the state
    can not grow.
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> S4State:
        empty = jnp.zeros((batch, cfg.sizes["D"], cfg.sizes["Z"]))
        return S4State(empty, empty)

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: S4State | None):
        c, when = self.cfg, moments(sight.q_at)
        u = jnp.where(when.is_token[..., None], x, 0).astype(jnp.float32)
        system = self.system()
        if state is None:
            first = self.state(c, len(x), 0)
            y = jax.lax.cond(
                several(when),
                lambda: recur(system, first, u, when, c.mixer.chunk)[1],
                lambda: convolve(u, kernel(system, x.shape[1], c.mixer.chunk)),
            )
        else:
            state, y = recur(system, state, u, when, c.mixer.chunk)
        y = y + u * weight(self, "skip", "D", c.sizes, ones)
        y = jax.nn.gelu(y, approximate=False).astype(x.dtype)
        return Linear(c, "D>D", into_residual(c), name="o")(y), state

    def system(self) -> System:
        sizes, begin = self.cfg.sizes, hippo(self.cfg.sizes["Z"])

        def real(name, initial):
            return weight(self, name, "DZ", sizes, initial)

        def like(x):
            return lambda key, shape: jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)

        def number(name, re, im):
            return jax.lax.complex(real(f"{name}_re", re), real(f"{name}_im", im))

        rates, P, B = begin
        fall = -jnp.exp(real("log_fall", like(np.log(-rates.real))))
        half = nn.initializers.normal(0.5**0.5)  # of each part, so that |C|² is 1
        return System(
            jax.lax.complex(fall, real("turn", like(rates.imag))),
            number("P", like(P.real), like(P.imag)),
            number("B", like(B.real), like(B.imag)),
            number("C", half, half),
            jnp.exp(weight(self, "log_step", "D", sizes, log_uniform(1e-3, 0.1)))[:, None],
        )


def hippo(Z: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS of order 2Z as Λ, P, B of one of each conjugate pair: complex128 [Z].

    A_nk = -√(2n+1)√(2k+1) below the diagonal and -(n+1) on it. With P_n = √(n+1/2), A + P Pᵀ is
    -1/2 and something skew-symmetric, so that unitary vectors make it diagonal.

    Source: Gu et al. 2022, arXiv:2111.00396, equation 2 and appendix C.1.
    """
    n = np.arange(2 * Z)
    P, B = np.sqrt(n + 0.5), np.sqrt(2 * n + 1.0)
    outer = np.sqrt(np.outer(2 * n + 1, 2 * n + 1)) / 2
    skew = np.triu(outer, 1) - np.tril(outer, -1)
    turn, V = np.linalg.eigh(-1j * skew)  # ascending, and as many below 0 as above
    V = V[:, Z:]
    return -0.5 + 1j * turn[Z:], V.conj().T @ P, V.conj().T @ B


def several(when: Moment) -> jax.Array:
    """Whether in any row a document begins after another one: bool []."""
    is_after = jnp.cumsum(when.is_token, axis=1) - when.is_token > 0
    return jnp.any(when.begins & is_after)


# --- token by token ---


def recur(s: System, state: S4State, u: jax.Array, when: Moment, size: int):
    """u float32 [B T D] -> (the last state, 2 Re(C x) float32 [B T D]).

    (1 - Δ/2 A)⁻¹ = (1 - Δ/2 Λ + Δ/2 P P*)⁻¹ is the inverse of a diagonal and, by Woodbury's
    identity, something of rank 1; so a token costs Z and not Z².

    Source: Gu et al. 2022, arXiv:2111.00396, appendix C.2.
    """
    half = s.step / 2
    D = 1 / (1 - half * s.rates)
    low = half * D * s.P / (1 + half * pair(s.P.conj() * D * s.P)[:, None])

    def cell(old, u):
        x = jax.lax.complex(*old)
        # (1 + Δ/2 A) x + Δ B u; P* x is of all 2Z numbers
        x = x + half * (s.rates * x - s.P * pair(s.P.conj() * x)[..., None])
        x = D * (x + s.step * s.B * u[..., None])
        x = x - low * pair(s.P.conj() * x)[..., None]
        return S4State(x.real, x.imag), pair(s.C * x)

    def piece(state, given):
        return remember(cell, state, *given)

    return in_chunks(piece, state, (u, when), size)


def pair(x: jax.Array) -> jax.Array:
    """The sum of [... Z] and its conjugates, [...]."""
    return 2 * jnp.sum(x.real, axis=-1)


# --- all tokens at once ---


def convolve(u: jax.Array, k: jax.Array) -> jax.Array:
    """y_t = Σ_l k_l u_{t-l}, of u [B T D] and k [T D]."""
    T = u.shape[1]
    y = jnp.fft.rfft(u, 2 * T, axis=1) * jnp.fft.rfft(k, 2 * T, axis=0)
    return jnp.fft.irfft(y, 2 * T, axis=1)[:, :T]


LEFT = 1.5e-6  # see `kernel`


def kernel(s: System, T: int, size: int) -> jax.Array:
    """K float32 [T D], through its generating function.

    Σ_l K_l z^l = C (1 - Ā z)⁻¹ B̄ is known at any z, and at the M-th roots of unity it is the
    Fourier transform of K, but for what lies beyond M, which comes back from the start. The paper
    takes that away with Ā^M, a dense matrix. Here the roots lie on a circle of radius r < 1: then
    the transform is that of K_l r^l, and what comes back is r^M = LEFT of K_{l+M}, as little as
    float32 tells; dividing by r^l costs no more than r^-T = LEFT^-1/4 = 29 roundings at M = 4T.

    Args:
        size: nodes computed at once, [size D 2Z].

    Source: Gu et al. 2022, arXiv:2111.00396, algorithm 1 and appendix C.3; Abate & Whitt 1992,
    Operations Research Letters 12(4), for the circle.
    """
    M = 4 * T
    decay = np.log(LEFT) / M  # of a token
    nodes = np.exp(decay - 2j * np.pi * np.arange(M // 2 + 1) / M).astype(np.complex64)
    values = jax.lax.map(jax.checkpoint(lambda z: generate(s, z)), nodes, batch_size=size)
    grow = np.exp(-decay * np.arange(T))[:, None].astype(np.float32)
    return jnp.fft.irfft(values, M, axis=0)[:T] * grow


def generate(s: System, z: jax.Array) -> jax.Array:
    """Σ_l K_l z^l, complex [D], at one complex z.

    With Ā and B̄ written out this is C ((1 - z) - (1 + z) Δ/2 A)⁻¹ Δ B, again a diagonal and a
    product of two vectors.
    """
    rates, P, B, C, P_ = (_whole(x) for x in (s.rates, s.P, s.B, s.C, s.P.conj()))
    half = (1 + z) * s.step / 2  # [D 1]
    cauchy = 1 / (1 - z - half * rates)  # [D 2Z]

    def dot(a, b):
        return jnp.sum(a * cauchy * b, axis=-1)

    low = half[:, 0] * dot(C, P) * dot(P_, B) / (1 + half[:, 0] * dot(P_, P))
    return s.step[:, 0] * (dot(C, B) - low)


def _whole(x: jax.Array) -> jax.Array:
    """Both of each conjugate pair: [D Z] -> [D 2Z]."""
    return jnp.concatenate([x, x.conj()], axis=-1)
