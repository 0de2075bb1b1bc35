"""Kernelized relative positions: a bias of -slope log(1 + distance), learned per head.

Source: Chi et al. 2022 (KERPLE), arXiv:2205.09921, section 3.2, the logarithmic kernel.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxgpt.dims import declare_param
from jaxgpt.model.layers import ones
from jaxgpt.model.masks import Coords, relative_position
from jaxgpt.model.positions import POSITION_ENCODINGS, PositionEncoding


class Kerple(PositionEncoding):
    """A bias on the attention logits, logarithmic in the distance."""

    ATTENTION_HOOK = "bias"

    def setup(self):
        self.slope = declare_param(self, "slope", "H", self.cfg.sizes, ones)

    def make_bias(self):
        return Partial(compute_kerple_bias, self.slope)


def compute_kerple_bias(slope: jax.Array, q: Coords, k: Coords) -> jax.Array:
    """Return the bias, float32 [B H T S], for slopes [H]."""
    distance = jnp.abs(relative_position(q, k))[:, None]  # [B 1 T S]
    return -slope[:, None, None] * jnp.log1p(distance.astype(jnp.float32))


POSITION_ENCODINGS["kerple"] = Kerple
