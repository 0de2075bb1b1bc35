"""Normalizations, computed in float32 whatever the compute dtype."""

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.layers import NORM_STATISTICS, ones, recompute, zeros


@recompute
def apply_rms_norm(x: jax.Array, scale: jax.Array | float, eps: float) -> jax.Array:
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


def apply_flat(norm: Callable[..., jax.Array], x: jax.Array, *params: jax.Array) -> jax.Array:
    """Apply a norm over the trailing dimensions of x that its parameters have."""
    shape = params[0].shape
    chex.assert_shape(x, (..., *shape))
    if len(shape) == 1:
        return norm(x, *params)
    y = norm(x.reshape(*x.shape[: -len(shape)], -1), *(p.reshape(-1) for p in params))
    return y.reshape(x.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * scale.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    cfg: ModelConfig
    letters: str = "D"  # of the dimensions that are normalized together

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
        scale = declare_param(self, "scale", self.letters, self.cfg.sizes, ones)
        return apply_flat(lambda x, scale: apply_rms_norm(x, scale, self.cfg.norm_eps), x, scale)


class RMSNormPlusOne(nn.Module):
    """x / sqrt(mean(x²) + eps) * (1 + scale): RMSNorm whose scale begins at 0, as in Gemma.

    In bfloat16 the parameter keeps more digits than the whole scale would.

    Source: the model code of Gemma (Gemma Team 2024, arXiv:2403.08295).
    """

    cfg: ModelConfig
    letters: str = "D"  # of the dimensions that are normalized together

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
        scale = declare_param(self, "scale", self.letters, self.cfg.sizes, zeros)
        eps = self.cfg.norm_eps
        whole = 1 + scale.astype(jnp.float32)
        return apply_flat(lambda x, scale: apply_rms_norm(x, scale, eps), x, whole)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale, plus a bias if `cfg.bias` is "all".

    Source: Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    cfg: ModelConfig
    letters: str = "D"  # of the dimensions that are normalized together

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> [... D]
        names = {"scale": ones} | ({"bias": zeros} if "other" in self.cfg.bias_sites else {})
        scale, *bias = (
            declare_param(self, name, self.letters, self.cfg.sizes, init)
            for name, init in names.items()
        )
        eps = self.cfg.norm_eps

        def norm(x, scale, bias=0.0):
            return apply_layer_norm(x, scale, bias, eps)

        return apply_flat(norm, x, scale, *bias)


NORMS = {"rms": RMSNorm, "rms_plus_one": RMSNormPlusOne, "layer": LayerNorm}
