"""From hidden states to scores over the vocabulary.

The model ends in hidden states [B T D]. What scores them is a `Head`, a pytree of the parameters
and numbers that it takes, so that a loss can score a few tokens at a time.
"""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.feedforward import ACTIVATIONS
from jaxgpt.model.kernels.score import NEVER
from jaxgpt.model.layers import Linear, wide_product, zeros
from jaxgpt.model.norms import NORMS


@struct.dataclass
class Head:
    """Scores hidden states: cap(scale * h · table + bias)."""

    table: jax.Array  # float32 [V D], or as `letters` say
    bias: jax.Array | None = None  # float32 [V]
    scale: float | None = struct.field(pytree_node=False, default=None)
    softcap: float | None = struct.field(pytree_node=False, default=None)
    words: int | None = struct.field(pytree_node=False, default=None)  # None = all rows are words
    letters: str = struct.field(pytree_node=False, default="VD")

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [... D] -> float32 [... V]; rows that are no words score NEVER."""
        chex.assert_axis_dimension(hidden, -1, self.table.shape[self.letters.index("D")])
        lead = "BT"[: hidden.ndim - 1]
        scores = wide_product(f"{lead}D,{self.letters}->{lead}V", hidden, self.table)
        if self.scale is not None:
            scores = scores * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if self.words is not None:
            # Not cut off: rows of another length are not aligned, and are read at half the speed.
            scores = jnp.where(jnp.arange(scores.shape[-1]) < self.words, scores, NEVER)
        return scores


class Transform(nn.Module):
    """norm(activation(dense(h))), and a bias for every word, which `Head` adds.

    Source: the masked-language-model head of Devlin et al. 2019 (BERT), in its code.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:  # [B T D] -> [B T D]
        c = dataclasses.replace(self.cfg, products="plain")  # scores need their digits
        weight(self, "bias", "V", c.sizes, zeros)  # only declared here
        hidden = ACTIVATIONS[c.activation](Linear(c, "D>D", name="dense")(hidden))
        return NORMS[c.norm](c, name="norm")(hidden)


HEADS: dict[str, type[nn.Module] | None] = {"linear": None, "mlm": Transform}


def head(cfg: ModelConfig, params) -> Head:
    """What scores the hidden states of a model, out of its parameters."""
    table = params.get("head", params["embed"])["table"]  # the embedding itself if it is tied
    bias = params.get("transform", {}).get("bias")
    return Head(table, bias, cfg.head_scale, cfg.final_softcap)


class Classes(nn.Module):
    """Scores of classes from the first token: dense(tanh(dense(h[0]))).

    Source: Devlin et al. 2019 (BERT), section 4.1, and its code.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:  # [B T D] -> float32 [B A]
        c = dataclasses.replace(self.cfg, products="plain")  # scores need their digits
        pooled = jnp.tanh(Linear(c, "D>D", name="pooler")(hidden[:, 0]))
        return Linear(c, "D>A", name="scores")(pooled).astype(jnp.float32)
