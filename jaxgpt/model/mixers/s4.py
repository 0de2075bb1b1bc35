"""S4: a linear state space per channel, for long-range dependencies.

    x' = A x + B u,    y = 2 Re(C x) + skip u,    A = Λ - P P*,

discretized by the bilinear rule, with a learned step size Δ per channel:

    x_t = Ā x_{t-1} + B̄ u_t,    Ā = (1 - Δ/2 A)⁻¹ (1 + Δ/2 A),    B̄ = (1 - Δ/2 A)⁻¹ Δ B

For a row of one document y is a convolution with K_l = 2 Re(C Ā^l B̄), computed by FFT. For packed
documents, or with a state, the same system runs token by token. A is initialized as HiPPO-LegS,
whose state holds the coefficients of the past in Legendre polynomials.

The complex numbers come in conjugate pairs, of which only one is stored: Z numbers represent 2Z.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import Linear, make_residual_init, ones
from jaxgpt.model.mixers.mixer import LayerContext, Mixer
from jaxgpt.model.mixers.recurrent import (
    TokenFlags,
    flag_tokens,
    log_uniform,
    scan_in_chunks,
    scan_tokens,
)
from jaxgpt.model.taps import is_tapped, store, tap


class S4State(NamedTuple):
    """The state of one layer, float32: real and imaginary parts."""

    re: jax.Array  # [B D Z]
    im: jax.Array  # [B D Z]


class System(NamedTuple):
    """A state space per channel, complex64 [D Z] except for the step."""

    rates: jax.Array  # Λ
    P: jax.Array
    B: jax.Array
    C: jax.Array
    step: jax.Array  # Δ, float32 [D 1]


class S4(Mixer):
    """o(gelu(y)), with y the output of the state space.

    As in the paper, one linear layer mixes the channels; the authors' later code has a GLU there.

    Source: Gu et al. 2022, arXiv:2111.00396, sections 2 and 3, algorithm 1, appendix C.3; Goel et
    al. 2022 (SaShiMi), arXiv:2202.09729, section 4.1, for Q = P and Re Λ < 0, with which the state
    cannot grow.
    """

    DIRECTIONS = ("causal",)
    HAS_HEADS = False

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> S4State:
        empty = jnp.zeros((batch, cfg.sizes["D"], cfg.sizes["Z"]))
        return S4State(empty, empty)

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: S4State | None):
        c, flags = self.cfg, flag_tokens(layer_context.q_coords)
        u = jnp.where(flags.is_token[..., None], x, 0).astype(jnp.float32)
        system = self.make_system()
        if is_tapped(self, "re", "im"):
            start = self.init_state(c, len(x), 0) if state is None else state
            states = run_recurrence(system, start, u, flags, c.mixer.chunk, is_output=False)[1]
            store(self, "re", states.re)
            store(self, "im", states.im)
        if state is None:
            first = self.init_state(c, len(x), 0)
            y = jax.lax.cond(
                has_packed_documents(flags),
                lambda: run_recurrence(system, first, u, flags, c.mixer.chunk)[1],
                lambda: convolve(u, compute_kernel(system, x.shape[1], c.mixer.chunk)),
            )
        else:
            state, y = run_recurrence(system, state, u, flags, c.mixer.chunk)
        y = tap(self, "y", y + u * declare_param(self, "skip", "D", c.sizes, ones))
        y = jax.nn.gelu(y, approximate=False).astype(x.dtype)
        return Linear(c, "D>D", make_residual_init(c), name="o")(y), state

    def make_system(self) -> System:
        """Create the parameters of the state space."""
        sizes = self.cfg.sizes
        rates, P, B = make_hippo(sizes["Z"])

        def declare_real(name, init):
            return declare_param(self, name, "DZ", sizes, init)

        def constant(x):
            return lambda key, shape: jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)

        def declare_complex(name, re, im):
            return jax.lax.complex(declare_real(f"{name}_re", re), declare_real(f"{name}_im", im))

        decay = -jnp.exp(declare_real("log_fall", constant(np.log(-rates.real))))
        half = nn.initializers.normal(0.5**0.5)  # per part, so that E|C|² = 1
        return System(
            jax.lax.complex(decay, declare_real("turn", constant(rates.imag))),
            declare_complex("P", constant(P.real), constant(P.imag)),
            declare_complex("B", constant(B.real), constant(B.imag)),
            declare_complex("C", half, half),
            jnp.exp(declare_param(self, "log_step", "D", sizes, log_uniform(1e-3, 0.1)))[:, None],
        )


def make_hippo(Z: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute HiPPO-LegS of order 2Z as Λ, P, B, one of each conjugate pair: complex128 [Z].

    A_nk = -√(2n+1)√(2k+1) below the diagonal and -(n+1) on it. With P_n = √(n+1/2), A + P Pᵀ is
    -1/2 plus a skew-symmetric matrix, which a unitary basis makes diagonal.

    Source: Gu et al. 2022, arXiv:2111.00396, equation 2 and appendix C.1.
    """
    n = np.arange(2 * Z)
    P, B = np.sqrt(n + 0.5), np.sqrt(2 * n + 1.0)
    outer = np.sqrt(np.outer(2 * n + 1, 2 * n + 1)) / 2
    skew = np.triu(outer, 1) - np.tril(outer, -1)
    frequencies, V = np.linalg.eigh(-1j * skew)  # ascending, half of them below 0
    V = V[:, Z:]
    # The phase of an eigenvector is free, and differs by processor: here P is real and positive.
    phase = V.conj().T @ P
    V = V * (phase / np.abs(phase))
    return -0.5 + 1j * frequencies[Z:], V.conj().T @ P, V.conj().T @ B


def has_packed_documents(flags: TokenFlags) -> jax.Array:
    """Return whether in any row a document begins after another one: bool []."""
    is_after = jnp.cumsum(flags.is_token, axis=1) - flags.is_token > 0
    return jnp.any(flags.is_first & is_after)


# --- token by token ---


def run_recurrence(
    s: System, state: S4State, u: jax.Array, flags: TokenFlags, size: int, is_output: bool = True
):
    """Run the system token by token on u float32 [B T D]: (last state, 2 Re(C x) [B T D]).

    Without `is_output`, the states after each token, [B T D Z], take the place of 2 Re(C x).

    (1 - Δ/2 A)⁻¹ = (1 - Δ/2 Λ + Δ/2 P P*)⁻¹ is the inverse of a diagonal matrix plus, by
    Woodbury's identity, a matrix of rank 1; so a token costs Z and not Z².

    Source: Gu et al. 2022, arXiv:2111.00396, appendix C.2.
    """
    half = s.step / 2
    D = 1 / (1 - half * s.rates)
    low_rank = half * D * s.P / (1 + half * sum_conjugates(s.P.conj() * D * s.P)[:, None])

    def cell(old, u):
        x = jax.lax.complex(*old)
        # (1 + Δ/2 A) x + Δ B u; P* x sums over all 2Z numbers
        x = x + half * (s.rates * x - s.P * sum_conjugates(s.P.conj() * x)[..., None])
        x = D * (x + s.step * s.B * u[..., None])
        x = x - low_rank * sum_conjugates(s.P.conj() * x)[..., None]
        new = S4State(x.real, x.imag)
        return new, sum_conjugates(s.C * x) if is_output else new

    def scan_chunk(state, xs):
        return scan_tokens(cell, state, *xs)

    return scan_in_chunks(scan_chunk, state, (u, flags), size)


def sum_conjugates(x: jax.Array) -> jax.Array:
    """Sum [... Z] and its conjugates: [...]."""
    return 2 * jnp.sum(x.real, axis=-1)


# --- all tokens at once ---


def convolve(u: jax.Array, k: jax.Array) -> jax.Array:
    """Compute y_t = Σ_l k_l u_{t-l} by FFT, of u [B T D] and k [T D]."""
    T = u.shape[1]
    y = jnp.fft.rfft(u, 2 * T, axis=1) * jnp.fft.rfft(k, 2 * T, axis=0)
    return jnp.fft.irfft(y, 2 * T, axis=1)[:, :T]


ALIASING_FACTOR = 1.5e-6  # r^M, see `compute_kernel`


def compute_kernel(s: System, T: int, size: int) -> jax.Array:
    """Compute K, float32 [T D], from its generating function.

    Σ_l K_l z^l = C (1 - Ā z)⁻¹ B̄ has a closed form, and at the M-th roots of unity it is the
    Fourier transform of K, except that terms beyond M alias to the beginning. The paper removes
    these with Ā^M, a dense matrix. Here the nodes lie on a circle of radius r < 1: then the
    transform is that of K_l r^l, and K_{l+M} aliases with the factor r^M = ALIASING_FACTOR, near
    float32's precision. Dividing by r^l magnifies rounding by at most r^-T: 29 at M = 4T.

    Args:
        size: nodes computed at once, [size D 2Z].

    Source: Gu et al. 2022, arXiv:2111.00396, algorithm 1 and appendix C.3; Abate & Whitt 1992,
    Operations Research Letters 12(4), for the circle.
    """
    M = 4 * T
    decay = np.log(ALIASING_FACTOR) / M  # per token
    nodes = np.exp(decay - 2j * np.pi * np.arange(M // 2 + 1) / M).astype(np.complex64)
    values = jax.lax.map(
        jax.checkpoint(lambda z: evaluate_generating_function(s, z)), nodes, batch_size=size
    )
    growth = np.exp(-decay * np.arange(T))[:, None].astype(np.float32)
    return jnp.fft.irfft(values, M, axis=0)[:T] * growth


def evaluate_generating_function(s: System, z: jax.Array) -> jax.Array:
    """Evaluate the generating function Σ_l K_l z^l, complex [D], at one complex z.

    With Ā and B̄ substituted it is C ((1 - z) - (1 + z) Δ/2 A)⁻¹ Δ B, again the inverse of a
    diagonal matrix plus one of rank 1.
    """
    rates, P, B, C, P_ = (_append_conjugates(x) for x in (s.rates, s.P, s.B, s.C, s.P.conj()))
    half = (1 + z) * s.step / 2  # [D 1]
    cauchy = 1 / (1 - z - half * rates)  # [D 2Z]

    def dot(a, b):
        return jnp.sum(a * cauchy * b, axis=-1)

    low_rank = half[:, 0] * dot(C, P) * dot(P_, B) / (1 + half[:, 0] * dot(P_, P))
    return s.step[:, 0] * (dot(C, B) - low_rank)


def _append_conjugates(x: jax.Array) -> jax.Array:
    """Append the conjugates: [D Z] -> [D 2Z]."""
    return jnp.concatenate([x, x.conj()], axis=-1)
