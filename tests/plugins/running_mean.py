"""A token mixer without weights between tokens: the mean of the values so far."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.model.layers import Linear, make_residual_init
from jaxgpt.model.mixers import MIXERS, Mixer
from jaxgpt.model.mixers.recurrent import flag_tokens, scan_tokens
from jaxgpt.model.taps import tap


class MeanState(NamedTuple):
    """float32."""

    total: jax.Array  # [B D], of the values of the document so far
    count: jax.Array  # [B 1], of its tokens


class RunningMean(Mixer):
    """o(mean of v(x) over the document's tokens up to this one)."""

    DIRECTIONS = ("causal",)
    HAS_HEADS = False

    @staticmethod
    def init_state(cfg, batch, slots):
        return MeanState(jnp.zeros((batch, cfg.width)), jnp.zeros((batch, 1)))

    @nn.compact
    def __call__(self, x, layer_context, state):
        c = self.cfg
        v = tap(self, "v", Linear(c, "D>D", name="v")(x))

        def cell(old, v):
            new = MeanState(old.total + v, old.count + 1)
            return new, new.total / new.count

        start = self.init_state(c, len(x), 0) if state is None else state
        flags = flag_tokens(layer_context.q_coords)
        final, mean = scan_tokens(cell, start, v.astype(jnp.float32), flags)
        y = Linear(c, "D>D", make_residual_init(c), name="o")(mean.astype(x.dtype))
        return y, None if state is None else final


MIXERS["running_mean"] = RunningMean
