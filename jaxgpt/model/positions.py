"""Position encodings.

Every encoding acts in exactly one of four places, so every class overrides one of four hooks:

    embed             adds to the residual stream, once         (sinusoidal, learned)
    make_rotation     rotates queries and keys, in every layer  (rope)
    make_bias         adds to the attention logits              (alibi, t5)
    make_query_scale  scales queries                            (temperature)

The base class is the identity in all four: the encoding "none".
"""

import math
from collections.abc import Callable
from typing import ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import check_indices, compute_once, glorot, normal
from jaxgpt.model.masks import Coords, relative_position

# --- pure functions --------------------------------------------------------------------------


def encode_sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """Encode positions [B T] -> float32 [B T D]: even channels are sines, odd ones cosines.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    chex.assert_rank(positions, 2)
    chex.assert_is_divisible(width, 2)
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = positions[..., None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, width)


def compute_sin_cos(
    frequencies: np.ndarray, attention_factor: float, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return attention_factor * sin and cos of positions * frequencies: float32 [B T R/2] each.

    Args:
        frequencies: [R/2] in radians per token.
        positions: [B T].
    """
    chex.assert_rank(positions, 2)
    angle = positions[..., None].astype(jnp.float32) * frequencies
    sin, cos = compute_once(jnp.sin, jnp.cos, angle)
    return attention_factor * sin, attention_factor * cos


def apply_rope(sin: jax.Array, cos: jax.Array, x: jax.Array) -> jax.Array:
    """Apply RoPE: rotate each pair of channels (i, i + R/2) of the first R by its angle.

    Args:
        sin, cos: [B T R/2], see `compute_sin_cos`.
        x: [B T H K] queries or keys; channels from R on are not rotated.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34 (pairs laid out as in GPT-NeoX).
    """
    chex.assert_rank(x, 4)
    chex.assert_shape((sin, cos), (*x.shape[:2], None))
    half = sin.shape[-1]
    sin, cos = sin[:, :, None], cos[:, :, None]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def compute_alibi_slopes(heads: int) -> np.ndarray:
    """Return ALiBi's slopes, float32 [H]: 2^(-8 i / H), interpolated if H is no power of two.

    Source: Press et al. 2022, arXiv:2108.12409, section 3, and its code for other H.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, between]).astype(np.float32)


def compute_alibi_bias(slope: jax.Array, q: Coords, k: Coords) -> jax.Array:
    """Return a penalty linear in the distance: float32 [B H T S].

    Source: Press et al. 2022, arXiv:2108.12409, section 3; symmetric in an encoder.
    """
    return -slope[None, :, None, None] * jnp.abs(relative_position(q, k))[:, None].astype(
        jnp.float32
    )


def assign_bucket(
    relative: jax.Array, buckets: int, max_distance: int, is_causal: bool
) -> jax.Array:
    """Return T5's bucket of a relative position, int32 in [0, buckets).

    Half of the buckets are single distances, the others are logarithmic up to `max_distance`. In an
    encoder, half of all are for keys after the query.

    Args:
        relative: by how much a key precedes its query; negative if it follows.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and its code.
    """
    after = jnp.int32(0)
    if not is_causal:
        buckets //= 2
        after = jnp.where(relative < 0, buckets, 0)
    distance = jnp.maximum(relative, 0) if is_causal else jnp.abs(relative)
    exact = buckets // 2
    # Clipped below, since the logarithm of 0 would be cast to an integer.
    far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact)
    far = exact + (far / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return after + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def compute_t5_bias(
    buckets: int, max_distance: int, is_causal: bool, table: jax.Array, q: Coords, k: Coords
):
    """Look up the learned bias of each distance and head: [B H T S] from table [U H]."""
    index = assign_bucket(relative_position(q, k), buckets, max_distance, is_causal)
    return jnp.moveaxis(table[index], -1, 1)


# --- scaling of RoPE to longer contexts ------------------------------------------------------
# Each takes the frequencies [R/2] in radians per token and returns those for the longer context,
# and the attention factor by which queries and keys are multiplied.

ScaledFrequencies = tuple[np.ndarray, float]


def keep_unscaled(cfg: ModelConfig, frequencies: np.ndarray) -> ScaledFrequencies:
    """Return the frequencies of training."""
    return frequencies, 1.0


def get_factor(cfg: ModelConfig) -> float:
    """Return `rope.factor` of a layer, whose config has one."""
    assert isinstance(cfg.rope.factor, float)
    return cfg.rope.factor


def scale_linear(cfg: ModelConfig, frequencies: np.ndarray) -> ScaledFrequencies:
    """Divide positions by the factor (position interpolation).

    Source: Chen et al. 2023, arXiv:2306.15595, equation 4.
    """
    return frequencies / get_factor(cfg), 1.0


def scale_ntk(cfg: ModelConfig, frequencies: np.ndarray) -> ScaledFrequencies:
    """Raise the base: the longest wavelength grows by the factor, the shortest not at all.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023, arXiv:2309.00071, equation 16.
    """
    size = 2 * len(frequencies)
    base_scale = get_factor(cfg) ** (size / max(size - 2, 1))
    return frequencies * base_scale ** (-np.arange(len(frequencies)) / len(frequencies)), 1.0


def scale_yarn(cfg: ModelConfig, frequencies: np.ndarray) -> ScaledFrequencies:
    """Keep short wavelengths, scale long ones, with a ramp between; and scale the attention.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 21, with its α = 1 and
    β = 32.
    """
    factor, size = get_factor(cfg), 2 * len(frequencies)

    def find_channel(turns):  # where a wavelength fits `turns` times in the original context
        ratio = _original_context(cfg) / (turns * 2 * math.pi)
        return size * math.log(ratio) / (2 * math.log(cfg.rope.theta))

    low, high = max(math.floor(find_channel(32)), 0), min(math.ceil(find_channel(1)), size - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 1e-3), 0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1


def scale_llama3(cfg: ModelConfig, frequencies: np.ndarray) -> ScaledFrequencies:
    """Scale as YaRN, without its attention factor, with a ramp at 1/4 to 1 context per turn.

    Source: the model code of Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783).
    """
    turns = _original_context(cfg) * frequencies / (2 * math.pi)  # in the original context
    ramp = np.clip((turns - 1) / (4 - 1), 0, 1)
    return frequencies / get_factor(cfg) * (1 - ramp) + frequencies * ramp, 1.0


def _original_context(cfg: ModelConfig) -> float:
    return cfg.rope.original or cfg.context / get_factor(cfg)


SCALINGS: dict[str, Callable[[ModelConfig, np.ndarray], ScaledFrequencies]] = {
    "none": keep_unscaled,
    "linear": scale_linear,
    "ntk": scale_ntk,
    "yarn": scale_yarn,
    "llama3": scale_llama3,
}


# --- the encodings ---------------------------------------------------------------------------


class PositionEncoding(nn.Module):
    """No position encoding: the identity in all four places."""

    # What attention must apply: "rotation", "bias", "query_scale" or nothing.
    ATTENTION_HOOK: ClassVar[str] = ""
    ADDS_TO_EMBEDDING: ClassVar[bool] = False  # then all layers share it
    ADDS_UNIT_SIZE: ClassVar[bool] = False  # then embeddings are scaled to size 1 as well
    HAS_LOGIT_TABLE: ClassVar[bool] = False  # which learns at a rate of its own

    cfg: ModelConfig
    direction: str = "causal"

    def embed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Add to embeddings: x [B T D], positions [B T] -> [B T D]."""
        return x

    def make_rotation(self, positions: jax.Array) -> Partial | None:
        """Return the rotation of queries or keys [B T H K] at positions [B T], or None."""
        return None

    def make_bias(self) -> Partial | None:
        """Return the bias (q coords [B T], k coords [B S]) -> float32 [B H T S], or None."""
        return None

    def make_query_scale(self, positions: jax.Array) -> jax.Array | None:
        """Return the factor of the queries at positions [B T], float32 [B T], or None."""
        return None


class Sinusoidal(PositionEncoding):
    """Fixed sines and cosines, added to the embedding, which is scaled by sqrt(D).

    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 and 3.5.
    """

    ADDS_TO_EMBEDDING = True
    ADDS_UNIT_SIZE = True

    def embed(self, x, positions):
        return x + encode_sinusoidal(positions, self.cfg.width).astype(x.dtype)


class Learned(PositionEncoding):
    """A learned row per position, added to the embedding."""

    ADDS_TO_EMBEDDING = True

    def setup(self):
        self.table = declare_param(self, "table", "C>D", self.cfg.sizes, normal)

    def embed(self, x, positions):
        check_indices(positions, self.table.shape[0], "position")
        return x + self.table[positions].astype(x.dtype)


class Rope(PositionEncoding):
    """RoPE: rotary position embedding of queries and keys."""

    ATTENTION_HOOK = "rotation"

    def make_rotation(self, positions):
        size = round(self.cfg.sizes["K"] * self.cfg.rope.share)
        frequencies = self.cfg.rope.theta ** (-np.arange(0, size, 2) / size)
        frequencies, attention_factor = SCALINGS[self.cfg.rope.scaling](self.cfg, frequencies)
        sin_cos = compute_sin_cos(frequencies.astype(np.float32), attention_factor, positions)
        return Partial(apply_rope, *sin_cos)


class Alibi(PositionEncoding):
    """A bias on the attention logits, linear in the distance."""

    ATTENTION_HOOK = "bias"

    def make_bias(self):
        return Partial(compute_alibi_bias, compute_alibi_slopes(self.cfg.heads))


class T5(PositionEncoding):
    """A learned bias on the attention logits per bucket of distances.

    It begins as in the code of T5, about ten times as large as the weights in blocks.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and its code.
    """

    ATTENTION_HOOK = "bias"
    HAS_LOGIT_TABLE = True

    def setup(self):
        self.table = declare_param(self, "table", "U>H", self.cfg.sizes, glorot)

    def make_bias(self):
        c = self.cfg
        static_args = (c.position_buckets, c.position_reach, self.direction == "causal")
        return Partial(Partial(compute_t5_bias, *static_args), self.table.astype(jnp.float32))


class Temperature(PositionEncoding):
    """No encoding but an attention temperature: queries grow with the logarithm of the position.

    Source: Nakanishi 2025, arXiv:2501.19399, as Llama 4 uses it in its layers without RoPE.
    """

    ATTENTION_HOOK = "query_scale"

    def make_query_scale(self, positions):
        c = self.cfg
        return 1 + c.temperature_scale * jnp.log1p((positions + 1) // c.temperature_floor)


POSITION_ENCODINGS = {
    "none": PositionEncoding,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rope": Rope,
    "alibi": Alibi,
    "t5": T5,
    "temperature": Temperature,
}
