"""Normalizations, computed in float32 whatever the compute dtype."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import NORM_STATISTICS, ones, recompute, zeros


@recompute
def apply_rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Apply RMSNorm: x [... D], scale float32 [D] -> [... D]."""
    y = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * checkpoint_name(rate, NORM_STATISTICS) * scale).astype(x.dtype)


@recompute
def apply_layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | float, eps: float
) -> jax.Array:
    """Apply layer norm: x [... D], scale and bias float32 [D] -> [... D]."""
    y = x.astype(jnp.float32)
    y = y - checkpoint_name(jnp.mean(y, axis=-1, keepdims=True), NORM_STATISTICS)
    rate = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * checkpoint_name(rate, NORM_STATISTICS) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    cfg: ModelConfig
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
        chex.assert_axis_dimension(x, -1, self.cfg.sizes[self.letter])
        scale = declare_param(self, "scale", self.letter, self.cfg.sizes, ones)
        return apply_rms_norm(x, scale, self.cfg.norm_eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale, plus a bias if `cfg.bias`.

    Source: Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    cfg: ModelConfig
    letter: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
        chex.assert_axis_dimension(x, -1, self.cfg.sizes[self.letter])
        scale = declare_param(self, "scale", self.letter, self.cfg.sizes, ones)
        bias = (
            declare_param(self, "bias", self.letter, self.cfg.sizes, zeros)
            if self.cfg.bias
            else 0.0
        )
        return apply_layer_norm(x, scale, bias, self.cfg.norm_eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
