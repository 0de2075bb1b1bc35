"""Channel mixers: what happens to each token on its own.

Each is (x [B T D], at [B T]) -> [B T D]; `at` tells which of the tokens are real. A single expert
of a mixture (see experts.py) is one as well, on [N D] and tokens that are all real.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.model.experts import Experts
from jaxgpt.model.layers import Linear, into_residual
from jaxgpt.model.masks import Coords
from jaxgpt.sharding import constrain


def gelu_tanh(x: jax.Array) -> jax.Array:
    """x/2 (1 + tanh u) with u = √(2/π) (x + 0.044715 x³), as x σ(2u): one exponential, no tanh.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": gelu_tanh,  # GPT-2's
    "silu": jax.nn.silu,
}


class Plain(nn.Module):
    """down(activation(up(x))): the original feed-forward (Vaswani et al. 2017, equation 2)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords | None = None) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        up = divided(Linear(self.cfg, "D>F", name="up")(x))
        return Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")(up, of=act)


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords | None = None) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        gate, up = (divided(Linear(self.cfg, "D>F", name=name)(x)) for name in ("gate", "up"))
        down = Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")
        return down(gate, up, of=lambda gate, up: act(gate) * up)


def divided(x: jax.Array) -> jax.Array:
    """[B T F], or [T F] of an expert, as it lies on the mesh."""
    return constrain(x, "BTF"[-x.ndim :])


FEEDFORWARDS: dict[str, Callable[..., nn.Module] | None] = {
    "plain": Plain,
    "gated": Gated,
    "moe_plain": partial(Experts, expert=Plain),
    "moe_gated": partial(Experts, expert=Gated),
    "none": None,  # a block that only mixes tokens, as Mamba's
}
