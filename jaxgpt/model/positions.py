"""How tokens know where they stand.

Every scheme acts in exactly one of three places, so every scheme overrides one of three hooks:

    embed     adds to the residual stream, once       (sinusoidal, learned)
    rotation  turns queries and keys, in every layer  (rope)
    bias      adds to the attention logits            (alibi, t5)

The base class is the identity in all three, which is the scheme "none".
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
from jaxgpt.dims import weight
from jaxgpt.model.layers import normal
from jaxgpt.model.masks import Coords, apart
from jaxgpt.sharding import platform

# --- pure functions --------------------------------------------------------------------------


def sinusoidal(position: jax.Array, width: int) -> jax.Array:
    """[B T] -> float32 [B T D]: sines in the even channels, cosines in the odd ones.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    chex.assert_rank(position, 2)
    chex.assert_is_divisible(width, 2)
    rate = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = position[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position.shape, width)


def sines(rates: np.ndarray, loudness: float, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sines and cosines of position * rates, times `loudness`: float32 [B T R/2] each.

    Args:
        rates: [R/2] radians per token.
        position: [B T].
    """
    chex.assert_rank(position, 2)
    angle = position[..., None].astype(jnp.float32) * rates

    def wave(is_sine):
        return loudness * jnp.where(is_sine, jnp.sin(angle), jnp.cos(angle))

    if platform() == "cpu":
        # Else the compiler computes them anew wherever they are used, for each head of each layer.
        # Out of a loop it moves nothing.
        sin, cos = jax.lax.map(wave, jnp.array([True, False]))
        return sin, cos
    return wave(True), wave(False)


def rope(sin: jax.Array, cos: jax.Array, x: jax.Array) -> jax.Array:
    """Turns each pair of channels (i, i + R/2) of the first R by the angle with this sine, cosine.

    Args:
        sin, cos: [B T R/2], see `sines`.
        x: [B T H K] queries or keys; the channels from R on stay as they are.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34 (pairs laid out as in GPT-NeoX).
    """
    chex.assert_rank(x, 4)
    chex.assert_shape((sin, cos), (*x.shape[:2], None))
    half = sin.shape[-1]
    sin, cos = sin[:, :, None], cos[:, :, None]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes, float32 [H]: 2^(-8 i / H), interpolated where H is no power of two.

    Source: Press et al. 2022, arXiv:2108.12409, section 3, and its code for other H.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, between]).astype(np.float32)


def alibi(slope: jax.Array, q: Coords, k: Coords) -> jax.Array:
    """A penalty that grows with the distance: float32 [B H T S].

    Source: Press et al. 2022, arXiv:2108.12409, section 3; both ways alike in an encoder.
    """
    return -slope[None, :, None, None] * jnp.abs(apart(q, k))[:, None].astype(jnp.float32)


def bucket(behind: jax.Array, buckets: int, reach: int, is_causal: bool) -> jax.Array:
    """Which of T5's distances a key is at, int32 in [0, buckets).

    Half of the buckets are single distances, the others grow with the logarithm up to `reach`. In
    an encoder, half of all are for keys that come after.

    Args:
        behind: how far a key lies behind its query; negative if it comes after.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, and its code.
    """
    after = jnp.int32(0)
    if not is_causal:
        buckets //= 2
        after = jnp.where(behind < 0, buckets, 0)
    distance = jnp.maximum(behind, 0) if is_causal else jnp.abs(behind)
    exact = buckets // 2
    # Clipped below, since the logarithm of 0 would be cast to a whole number.
    far = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact)
    far = exact + (far / math.log(reach / exact) * (buckets - exact)).astype(jnp.int32)
    return after + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def t5(buckets: int, reach: int, is_causal: bool, table: jax.Array, q: Coords, k: Coords):
    """A learned number for every distance and head: [B H T S] from table [U H]."""
    place = bucket(apart(q, k), buckets, reach, is_causal)
    return jnp.moveaxis(table[place], -1, 1)


# --- RoPE's wavelengths, and how they are stretched ------------------------------------------
# Each takes the rates [R/2] in radians per token and gives those of the longer context, and how
# much louder queries and keys become.

Stretched = tuple[np.ndarray, float]


def unscaled(cfg: ModelConfig, rates: np.ndarray) -> Stretched:
    """As trained."""
    return rates, 1.0


def linear(cfg: ModelConfig, rates: np.ndarray) -> Stretched:
    """Positions are divided by the factor.

    Source: Chen et al. 2023, arXiv:2306.15595, equation 4.
    """
    return rates / cfg.rope.factor, 1.0


def ntk(cfg: ModelConfig, rates: np.ndarray) -> Stretched:
    """A larger base: the longest wavelength grows by the factor, the shortest not at all.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023, arXiv:2309.00071, equation 16.
    """
    size = 2 * len(rates)
    stretch = cfg.rope.factor ** (size / max(size - 2, 1))
    return rates * stretch ** (-np.arange(len(rates)) / len(rates)), 1.0


def yarn(cfg: ModelConfig, rates: np.ndarray) -> Stretched:
    """Short wavelengths stay, long ones are divided, a ramp between; and everything is louder.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 and equation 21, with its α = 1 and
    β = 32.
    """
    r, size = cfg.rope, 2 * len(rates)

    def channel(turns):  # where a wavelength fits `turns` times in the original context
        return size * math.log(_original(cfg) / (turns * 2 * math.pi)) / (2 * math.log(r.theta))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), size - 1)
    ramp = np.clip((np.arange(len(rates)) - low) / max(high - low, 1e-3), 0, 1)
    return rates * (1 - ramp) + rates / r.factor * ramp, 0.1 * math.log(r.factor) + 1


def llama3(cfg: ModelConfig, rates: np.ndarray) -> Stretched:
    """As YaRN without the loudness, and with a ramp in wavelengths between 1/4 and 1 of a context.

    Source: the model code of Llama 3.1 (Dubey et al. 2024, arXiv:2407.21783).
    """
    turns = _original(cfg) * rates / (2 * math.pi)  # of a channel in the original context
    ramp = np.clip((turns - 1) / (4 - 1), 0, 1)
    return rates / cfg.rope.factor * (1 - ramp) + rates * ramp, 1.0


def _original(cfg: ModelConfig) -> float:
    return cfg.rope.original or cfg.context / cfg.rope.factor


SCALINGS: dict[str, Callable[[ModelConfig, np.ndarray], Stretched]] = {
    "none": unscaled,
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "llama3": llama3,
}


# --- the schemes -----------------------------------------------------------------------------


class Position(nn.Module):
    """No positions: the identity in all three places."""

    PLACE: ClassVar[str] = ""  # what the layers must do: "rotation", "bias" or nothing

    cfg: ModelConfig
    direction: str = "causal"

    def embed(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """x [B T D], position [B T] -> [B T D]."""
        return x

    def rotation(self, position: jax.Array) -> Partial | None:
        """position [B T] -> what turns x [B T H K] of these tokens."""
        return None

    def bias(self) -> Partial | None:
        """(q at [B T], k at [B S]) -> float32 [B H T S]."""
        return None


class Sinusoidal(Position):
    def embed(self, x, position):
        return x + sinusoidal(position, self.cfg.width).astype(x.dtype)


class Learned(Position):
    def setup(self):
        self.table = weight(self, "table", "C>D", self.cfg.sizes, normal)

    def embed(self, x, position):
        return x + self.table[position].astype(x.dtype)


class Rope(Position):
    PLACE = "rotation"

    def rotation(self, position):
        size = round(self.cfg.sizes["K"] * self.cfg.rope.share)
        rates = self.cfg.rope.theta ** (-np.arange(0, size, 2) / size)
        rates, loudness = SCALINGS[self.cfg.rope.scaling](self.cfg, rates)
        return Partial(rope, *sines(rates.astype(np.float32), loudness, position))


class Alibi(Position):
    PLACE = "bias"

    def bias(self):
        return Partial(alibi, slopes(self.cfg.heads))


class T5(Position):
    PLACE = "bias"

    def setup(self):
        self.table = weight(self, "table", "U>H", self.cfg.sizes, normal)

    def bias(self):
        c = self.cfg
        fixed = (c.position_buckets, c.position_reach, self.direction == "causal")
        return Partial(Partial(t5, *fixed), self.table.astype(jnp.float32))


POSITIONS = {
    "none": Position,
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rope": Rope,
    "alibi": Alibi,
    "t5": T5,
}
