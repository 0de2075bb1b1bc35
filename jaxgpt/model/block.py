"""A block is wiring around mixers: where norm and residual stand, and what they surround."""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxgpt.config import ModelConfig
from jaxgpt.model.attention import KV, Attention, Sight
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.model.kernels import Score
from jaxgpt.model.masks import Mask
from jaxgpt.model.norms import NORMS
from jaxgpt.sharding import constrain

Mixer = Callable[[jax.Array], jax.Array]  # [B T D] -> [B T D]


def pre(x: jax.Array, mixer: Mixer, norm: Callable[[str], Mixer]) -> jax.Array:
    """x + mixer(norm(x)): GPT-2, Llama (Xiong et al. 2020, arXiv:2002.04745)."""
    return x + mixer(norm("in")(x))


def post(x: jax.Array, mixer: Mixer, norm: Callable[[str], Mixer]) -> jax.Array:
    """norm(x + mixer(x)): the original Transformer."""
    return norm("out")(x + mixer(x))


WIRINGS = {"pre": pre, "post": post}


class Dropout(nn.Module):
    """Drops a share of the activations when the caller gives a "dropout" key, else none."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Block(nn.Module):
    """Attention and a feed-forward, each wired to the residual stream x [B T D]."""

    cfg: ModelConfig
    mask: Mask

    @nn.compact
    def __call__(self, x: jax.Array, kv: KV | None, sight: Sight):
        c = self.cfg
        written = []

        def norm_of(site):
            return lambda end: NORMS[c.norm](c, name=f"{site}_norm_{end}")

        def attention(y):
            score = Score(self.mask, sight.bias)
            y, new = Attention(c, name="attn")(y, score, sight, kv)
            written.append(new)
            return Dropout(c.dropout)(y)

        def feedforward(y):
            return Dropout(c.dropout)(FEEDFORWARDS[c.feedforward](c, name="ffn")(y))

        wire = WIRINGS[c.wiring]
        x = wire(x, attention, norm_of("attn"))
        x = wire(x, feedforward, norm_of("ffn"))
        return constrain(x, "BTD"), written[0]


def keep_all(block):
    return block


def recompute(policy):
    """Recomputes a block in the backward pass, but for what `policy` saves."""
    # Inside a scan nothing can be merged across iterations, so the guard against it is not needed.
    return lambda block: nn.remat(block, prevent_cse=False, policy=policy)


REMATS = {
    "none": keep_all,
    "full": recompute(None),
    "dots": recompute(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
