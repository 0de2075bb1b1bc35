"""A Transformer block: norms and residual connections around its sublayers."""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax

from jaxgpt.architecture import LayerSpec
from jaxgpt.config import ModelConfig
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.model.layers import ATTENTION_OUTPUT, make_save_policy
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.attention import CrossAttention
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.norms import NORMS
from jaxgpt.model.taps import tap
from jaxgpt.sharding import constrain

Sublayer = Callable[[jax.Array], jax.Array]  # [B T D] -> [B T D]
Sublayers = Mapping[str, Sublayer]  # by sublayer name, in order
MakeNorm = Callable[[str, str], Sublayer]  # (sublayer name, "in" or "out") -> a norm
TapResidual = Callable[[str, jax.Array], jax.Array]  # (sublayer name, x before it) -> x

# Names of the residual stream before each sublayer, see capture.py.
RESIDUAL_NAMES = {"mixer": "residual_pre", "cross": "residual_cross", "ffn": "residual_mid"}


def apply_pre_norm(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """x + sublayer(norm(x)): GPT-2, Llama (Xiong et al. 2020, arXiv:2002.04745)."""
    for site, sublayer in sublayers.items():
        x = tap(site, x)
        x = x + sublayer(norm(site, "in")(x))
    return x


def apply_post_norm(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """norm(x + sublayer(x)): the original Transformer, BERT."""
    for site, sublayer in sublayers.items():
        x = tap(site, x)
        x = norm(site, "out")(x + sublayer(x))
    return x


def apply_sandwich_norm(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """x + norm(sublayer(norm(x))): Gemma 2 (Ding et al. 2021, arXiv:2105.13290, section 3.2)."""
    for site, sublayer in sublayers.items():
        x = tap(site, x)
        x = x + norm(site, "out")(sublayer(norm(site, "in")(x)))
    return x


def apply_reordered_norm(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """x + norm(sublayer(x)): OLMo 2 (2025, arXiv:2501.00656, section 3.2)."""
    for site, sublayer in sublayers.items():
        x = tap(site, x)
        x = x + norm(site, "out")(sublayer(x))
    return x


def apply_parallel(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """x + a(norm(x)) + b(norm(x)): GPT-NeoX (Black et al. 2022, arXiv:2204.06745, section 2.1)."""
    x = tap("mixer", x)
    return x + sum(sublayer(norm(site, "in")(x)) for site, sublayer in sublayers.items())


def apply_no_residual(
    x: jax.Array, sublayers: Sublayers, norm: MakeNorm, tap: TapResidual
) -> jax.Array:
    """sublayer(x): no residual connections, whose gradient vanishes with depth; to learn from.

    It has no norms either: they scale each sublayer's input up again, and the gradient with it.
    Source: He et al. 2015, arXiv:1512.03385, section 4.1 (plain networks), where batch
    normalization prevents what is to be seen here.
    """
    for site, sublayer in sublayers.items():
        x = sublayer(tap(site, x))
    return x


WIRINGS = {
    "pre": apply_pre_norm,
    "post": apply_post_norm,
    "sandwich": apply_sandwich_norm,
    "reordered": apply_reordered_norm,
    "parallel": apply_parallel,
    "no_residual": apply_no_residual,
}
WIRINGS_WITHOUT_FINAL_NORM = {"post"}


class Dropout(nn.Module):
    """Zero a fraction of the activations if the caller passes a "dropout" key, else none."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(x)


class Block(nn.Module):
    """A token mixer, optional cross-attention and a channel mixer on the residual stream."""

    cfg: ModelConfig
    spec: LayerSpec
    direction: str

    @nn.compact
    def __call__(self, x: jax.Array, state: dict | None, layer_context: LayerContext):
        """Return (x [B T D], new state). A state has one of each sublayer; None in training."""
        c = self.cfg.at_layer(self.spec)
        new_states = {}

        def wrap_sublayer(site: str, module: nn.Module) -> Sublayer:
            def sublayer(y):
                if not getattr(module, "HAS_SEQUENCE_SHARDING", True):
                    y = constrain(y, "BSD")
                y = tap(module, "in", y)
                y, new = module(y, layer_context, None if state is None else state[site])
                new_states[site] = new
                return Dropout(c.dropout)(tap(module, "out", y))

            return sublayer

        sublayers = {}
        mixer = MIXERS[self.spec.mixer](c, self.spec.pattern, self.direction, name="mixer")
        sublayers["mixer"] = wrap_sublayer("mixer", mixer)
        if layer_context.memory_coords is not None:
            sublayers["cross"] = wrap_sublayer("cross", CrossAttention(c, name="cross"))
        make_ffn = FEEDFORWARDS[self.spec.feedforward]
        if make_ffn is not None:
            ffn = make_ffn(c, name="ffn")

            def apply_ffn(y):
                y = ffn(tap(ffn, "in", y), layer_context.q_coords)
                return Dropout(c.dropout)(tap(ffn, "out", y))

            sublayers["ffn"] = apply_ffn

        def norm(site: str, end: str) -> Sublayer:
            return NORMS[c.norm](c, name=f"{site}_norm_{end}")

        def tap_residual(site: str, x: jax.Array) -> jax.Array:
            return tap(self, RESIDUAL_NAMES[site], x)

        x = WIRINGS[c.wiring](x, sublayers, norm, tap_residual)
        x = tap(self, "residual_post", x)
        return constrain(x, "BTD"), None if state is None else new_states


class LayerGroup(nn.Module):
    """The blocks that a stack repeats, or its tail: one block per spec."""

    cfg: ModelConfig
    specs: tuple[LayerSpec, ...]
    direction: str

    @nn.compact
    def __call__(self, x: jax.Array, states: tuple | None, layer_context: LayerContext):
        new_states, schemes = [], self.cfg.position_schemes
        for i, spec in enumerate(self.specs):
            block = Block(self.cfg, spec, self.direction, name=f"block_{i}")
            context = layer_context.select_position(schemes.index(spec.position_scheme))
            x, state = block(x, None if states is None else states[i], context)
            new_states.append(state)
        return x, None if states is None else tuple(new_states)


def skip_remat(block, prevent_cse: bool):
    """Return the block unchanged: all activations are saved."""
    return block


# What `dots` saves: products with parameters, and the outputs of attention kernels.
SAVE_DOTS_AND_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, make_save_policy(ATTENTION_OUTPUT)
)

# (block, prevent_cse) -> block. Inside a loop, common-subexpression elimination cannot merge the
# recomputation with the forward pass, so that no guard against it is needed.
REMAT_POLICIES: dict[str, Callable] = {
    "none": skip_remat,
    "full": nn.remat,
    "dots": partial(nn.remat, policy=SAVE_DOTS_AND_ATTENTION),
}
