"""Linear maps. The one place that decides how a matrix product is laid out."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.sharding import is_divided

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros
ones = nn.initializers.ones


def into_residual(cfg: ModelConfig):
    """Maps back into the residual stream start smaller the deeper the model.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return nn.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)


class Linear(nn.Module):
    """A linear map spelled by its letters: Linear(cfg, "D>HK") maps [B T D] to [B T H K]."""

    cfg: ModelConfig
    letters: str
    initial: nn.initializers.Initializer = normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, outputs = self.letters.split(">")
        w = weight(self, "w", self.letters, self.cfg.sizes, self.initial).astype(x.dtype)
        lead = x.shape[: x.ndim - len(inputs)]
        chex.assert_shape(x, (*lead, *w.shape[: len(inputs)]))
        # Two plain dimensions on either side: on CPU the same product on [B T D] costs 1.8 times
        # as much as on [B*T D], and other backends do not mind. But B and T that are both divided
        # among devices can not be made one dimension without moving tokens about.
        rows = math.prod(x.shape[len(lead) :])
        is_one = len(lead) < 2 or not is_divided("T", x.shape[1])
        y = x.reshape(*((-1,) if is_one else lead), rows) @ w.reshape(rows, -1)
        y = y.reshape(*lead, *w.shape[len(inputs) :])
        if self.cfg.bias:
            y = y + weight(self, "b", outputs, self.cfg.sizes, zeros).astype(x.dtype)
        return y
