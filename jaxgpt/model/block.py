"""A block is wiring around mixers: where norms and residuals stand, and what they surround."""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax

from jaxgpt.config import ModelConfig
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.model.layers import ATTENDED, keeping
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.attention import CrossAttention
from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.model.norms import NORMS
from jaxgpt.sharding import constrain

Part = Callable[[jax.Array], jax.Array]  # [B T D] -> [B T D]
Parts = Mapping[str, Part]  # by the name of the site, in order
Norm = Callable[[str, str], Part]  # (site, "in" or "out") -> a norm with its own parameters


def pre(x: jax.Array, parts: Parts, norm: Norm) -> jax.Array:
    """x + part(norm(x)): GPT-2, Llama (Xiong et al. 2020, arXiv:2002.04745)."""
    for site, part in parts.items():
        x = x + part(norm(site, "in")(x))
    return x


def post(x: jax.Array, parts: Parts, norm: Norm) -> jax.Array:
    """norm(x + part(x)): the original Transformer, BERT."""
    for site, part in parts.items():
        x = norm(site, "out")(x + part(x))
    return x


def sandwich(x: jax.Array, parts: Parts, norm: Norm) -> jax.Array:
    """x + norm(part(norm(x))): Gemma 2 (Ding et al. 2021, arXiv:2105.13290, section 3.2)."""
    for site, part in parts.items():
        x = x + norm(site, "out")(part(norm(site, "in")(x)))
    return x


def parallel(x: jax.Array, parts: Parts, norm: Norm) -> jax.Array:
    """x + a(norm(x)) + b(norm(x)): GPT-NeoX (Black et al. 2022, arXiv:2204.06745, section 2.1)."""
    return x + sum(part(norm(site, "in")(x)) for site, part in parts.items())


WIRINGS = {"pre": pre, "post": post, "sandwich": sandwich, "parallel": parallel}
NORMED = {"post"}  # wirings that need no norm after the last block


class Dropout(nn.Module):
    """Drops a share of the activations when the caller gives a "dropout" key, else none."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Block(nn.Module):
    """A token mixer, maybe cross-attention, and a channel mixer, wired to the stream x [B T D]."""

    cfg: ModelConfig
    mixer: str
    pattern: str
    direction: str

    @nn.compact
    def __call__(self, x: jax.Array, state: dict | None, sight: Sight):
        """`state` has that of each site which remembers something; None in training."""
        c = self.cfg
        after = {}

        def remembering(site: str, module: nn.Module) -> Part:
            def part(y):
                if not getattr(module, "DIVIDES_ROWS", True):
                    y = constrain(y, "BSD")
                y, new = module(y, sight, None if state is None else state[site])
                after[site] = new
                return Dropout(c.dropout)(y)

            return part

        parts = {}
        mixer = MIXERS[self.mixer](c, self.pattern, self.direction, name="mixer")
        parts["mixer"] = remembering("mixer", mixer)
        if sight.memory_at is not None:
            parts["cross"] = remembering("cross", CrossAttention(c, name="cross"))
        channels = FEEDFORWARDS[c.feedforward]
        if channels is not None:
            ffn = channels(c, name="ffn")
            parts["ffn"] = lambda y: Dropout(c.dropout)(ffn(y, sight.q_at))

        def norm(site: str, end: str) -> Part:
            return NORMS[c.norm](c, name=f"{site}_norm_{end}")

        x = WIRINGS[c.wiring](x, parts, norm)
        return constrain(x, "BTD"), None if state is None else after


class Unit(nn.Module):
    """The blocks that a stack repeats: one, or as many as `mixers` and `pattern` name in turn."""

    cfg: ModelConfig
    direction: str

    @nn.compact
    def __call__(self, x: jax.Array, states: tuple | None, sight: Sight):
        after = []
        for i, (mixer, pattern) in enumerate(self.cfg.unit):
            block = Block(self.cfg, mixer, pattern, self.direction, name=f"block_{i}")
            x, state = block(x, None if states is None else states[i], sight)
            after.append(state)
        return x, None if states is None else tuple(after)


def keep_all(block, prevent_cse: bool):
    return block


# What `dots` keeps: products with parameters, and what attention kernels make.
COSTLY = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keeping(ATTENDED)
)

# (block, prevent_cse) -> block. In a loop, what is computed again can not be merged with what was
# computed before, and needs no guard against it.
REMATS: dict[str, Callable] = {
    "none": keep_all,
    "full": nn.remat,
    "dots": partial(nn.remat, policy=COSTLY),
}
