"""How tokens know where they stand.

Every scheme acts in exactly one of three places, so every scheme overrides one of three hooks:

    embed     adds to the residual stream, once       (sinusoidal, learned)
    rotation  turns queries and keys, in every layer  (rope)
    bias      adds to the attention logits

The base class is the identity in all three, which is the scheme "none".
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.layers import normal


def sinusoidal(position: jax.Array, width: int) -> jax.Array:
    """[B T] -> float32 [B T D]: sines in the even channels, cosines in the odd ones.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    chex.assert_rank(position, 2)
    chex.assert_is_divisible(width, 2)
    rate = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = position[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*position.shape, width)


def rope(theta: float, x: jax.Array, position: jax.Array) -> jax.Array:
    """Turns each pair of channels (i, i + K/2) by position * theta^(-2i/K).

    Args:
        theta: base of the wavelengths.
        x: [B T H K] queries or keys.
        position: [B T].

    Source: Su et al. 2021, arXiv:2104.09864, equation 34 (pairs laid out as in GPT-NeoX).
    """
    chex.assert_rank(x, 4)
    chex.assert_shape(position, x.shape[:2])
    chex.assert_is_divisible(x.shape[-1], 2)
    half = x.shape[-1] // 2
    rate = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[:, :, None, None].astype(jnp.float32) * rate  # [B T 1 K/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Position(nn.Module):
    """No positions: the identity in all three places."""

    cfg: ModelConfig

    def embed(self, x: jax.Array, position: jax.Array) -> jax.Array:
        """x [B T D], position [B T] -> [B T D]."""
        return x

    def rotation(self) -> Partial | None:
        """(x [B T H K], position [B T]) -> [B T H K]."""
        return None

    def bias(self) -> Partial | None:
        """(q at [B T], k at [B S]) -> [B H T S]."""
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
    def rotation(self):
        return Partial(rope, self.cfg.rope_theta)


POSITIONS = {"none": Position, "sinusoidal": Sinusoidal, "learned": Learned, "rope": Rope}
