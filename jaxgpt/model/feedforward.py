"""Channel mixers: what happens to each token on its own."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.model.layers import Linear, into_residual
from jaxgpt.sharding import constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),  # GPT-2's
    "silu": jax.nn.silu,
}


class Plain(nn.Module):
    """down(activation(up(x))): the original feed-forward (Vaswani et al. 2017, equation 2)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B T D] -> [B T D]
        act = ACTIVATIONS[self.cfg.activation]
        h = constrain(act(Linear(self.cfg, "D>F", name="up")(x)), "BTF")
        return Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")(h)


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B T D] -> [B T D]
        act = ACTIVATIONS[self.cfg.activation]
        h = act(Linear(self.cfg, "D>F", name="gate")(x)) * Linear(self.cfg, "D>F", name="up")(x)
        h = constrain(h, "BTF")
        return Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")(h)


FEEDFORWARDS = {"plain": Plain, "gated": Gated}
