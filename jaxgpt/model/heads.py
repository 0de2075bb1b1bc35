"""Output heads: from hidden states to logits over the vocabulary.

The model ends in hidden states [B T D]. A `Head` computes their logits; it is a pytree of its
parameters and constants, so that a loss can score a few tokens at a time.
"""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.dims import declare_param
from jaxgpt.model.feedforward import ACTIVATIONS
from jaxgpt.model.kernels.score import MASKED_LOGIT
from jaxgpt.model.layers import Linear, zeros
from jaxgpt.model.lowrank import KEY, LowRank
from jaxgpt.model.norms import NORMS
from jaxgpt.model.products import einsum_float32, score_quantized
from jaxgpt.quantized_array import QuantizedArray, is_quantized


@struct.dataclass
class Head:
    """Output projection: softcap(scale * h · table + bias), where an adapter is a part of table."""

    table: jax.Array | QuantizedArray  # float32 [V D], or in the order of `letters`
    bias: jax.Array | None = None  # float32 [V]
    scale: float | None = struct.field(pytree_node=False, default=None)
    softcap: float | None = struct.field(pytree_node=False, default=None)
    vocab: int | None = struct.field(pytree_node=False, default=None)  # None = all rows are tokens
    letters: str = struct.field(pytree_node=False, default="VD")
    adapter: LowRank | None = None  # with a [D R], b [R V]

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return the logits, float32 [... V], of hidden states [... D]; padding is MASKED_LOGIT."""
        chex.assert_axis_dimension(hidden, -1, self.table.shape[self.letters.index("D")])
        lead = "BT"[: hidden.ndim - 1]
        if is_quantized(self.table):
            scores = score_quantized(hidden, self.table)
        else:
            scores = einsum_float32(f"{lead}D,{self.letters}->{lead}V", hidden, self.table)
        if self.adapter is not None:
            scores = scores + self.adapter(hidden, 1).astype(jnp.float32)
        if self.scale is not None:
            scores = scores * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if self.vocab is not None:
            # Masked, not cut off: unaligned rows are read at half the speed.
            scores = jnp.where(jnp.arange(scores.shape[-1]) < self.vocab, scores, MASKED_LOGIT)
        return scores


class MaskedLMTransform(nn.Module):
    """norm(activation(dense(h))), and a bias per vocabulary entry, which `Head` adds.

    Source: the masked-language-model head of Devlin et al. 2019 (BERT), in its code.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:  # [B T D] -> [B T D]
        c = dataclasses.replace(self.cfg, products="plain")  # logits need full precision
        declare_param(self, "bias", "V", c.sizes, zeros)  # declared here, used in `Head`
        hidden = ACTIVATIONS[c.activation](Linear(c, "D>D", name="dense")(hidden))
        return NORMS[c.norm](c, name="norm")(hidden)


HEADS: dict[str, type[nn.Module] | None] = {"linear": None, "mlm": MaskedLMTransform}


def make_head(cfg: ModelConfig, params) -> Head:
    """Return the output head of a model with these parameters."""
    own = params.get("head", {})  # of a tied head at most its adapter
    table = own["table"] if "table" in own else params["embed"]["table"]
    bias = params.get("transform", {}).get("bias")
    head = Head(table, bias, cfg.head_scale, cfg.final_softcap)
    return dataclasses.replace(head, adapter=own[KEY]) if KEY in own else head


class ClassifierHead(nn.Module):
    """Class logits from the first token: dense(tanh(dense(h[0]))).

    Source: Devlin et al. 2019 (BERT), section 4.1, and its code.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:  # [B T D] -> float32 [B A]
        c = dataclasses.replace(self.cfg, products="plain")  # logits need full precision
        pooled = jnp.tanh(Linear(c, "D>D", name="pooler")(hidden[:, 0]))
        return Linear(c, "D>A", name="scores")(pooled).astype(jnp.float32)
