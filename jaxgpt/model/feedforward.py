"""Feed-forward layers, which mix channels and treat each token independently.

Each is (x [B T D], coords [B T]) -> [B T D]; `coords` marks padding. A single expert of a mixture
(see experts.py) is one as well, on [N D] without padding.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.model.experts import Experts
from jaxgpt.model.layers import Linear, make_residual_init
from jaxgpt.model.masks import Coords
from jaxgpt.model.taps import tap, tap_input
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


class PlainFeedForward(nn.Module):
    """down(activation(up(x))): the original feed-forward (Vaswani et al. 2017, equation 2)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, coords: Coords | None = None) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        up = tap(self, "up", constrain_hidden(Linear(self.cfg, "D>F", name="up")(x)))
        act, inputs = tap_input(self, "hidden", act, up)
        down = Linear(self.cfg, "F>D", make_residual_init(self.cfg), name="down")
        return down(*inputs, input_fn=act)


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, coords: Coords | None = None) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        gate = tap(self, "gate", constrain_hidden(Linear(self.cfg, "D>F", name="gate")(x)))
        up = tap(self, "up", constrain_hidden(Linear(self.cfg, "D>F", name="up")(x)))
        multiply, inputs = tap_input(self, "hidden", lambda gate, up: act(gate) * up, gate, up)
        down = Linear(self.cfg, "F>D", make_residual_init(self.cfg), name="down")
        return down(*inputs, input_fn=multiply)


def constrain_hidden(x: jax.Array) -> jax.Array:
    """Constrain the sharding of hidden activations, [B T F] or [T F] of an expert."""
    return constrain(x, "BTF"[-x.ndim :])


FEEDFORWARDS: dict[str, Callable[..., nn.Module] | None] = {
    "plain": PlainFeedForward,
    "gated": GatedFeedForward,
    "moe_plain": partial(Experts, expert=PlainFeedForward),
    "moe_gated": partial(Experts, expert=GatedFeedForward),
    "none": None,  # a block without a feed-forward, as Mamba's
}
