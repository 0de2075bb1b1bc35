"""Channel mixers: what happens to each token on its own.

Each is (x [B T D], at [B T]) -> [B T D]; `at` tells which of the tokens are real.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.config import ModelConfig
from jaxgpt.dims import weight
from jaxgpt.model.layers import Linear, into_residual, normal
from jaxgpt.model.masks import Coords
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
    def __call__(self, x: jax.Array, at: Coords) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        h = act(Linear(self.cfg, "D>F", name="up")(x))
        h = constrain(h, "BTF"[-h.ndim :])
        return Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")(h)


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.

    Source: Shazeer 2020, arXiv:2002.05202, equation 6.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords) -> jax.Array:
        act = ACTIVATIONS[self.cfg.activation]
        h = act(Linear(self.cfg, "D>F", name="gate")(x)) * Linear(self.cfg, "D>F", name="up")(x)
        h = constrain(h, "BTF"[-h.ndim :])  # an expert has [T F]
        return Linear(self.cfg, "F>D", into_residual(self.cfg), name="down")(h)


BLOCK = 64  # tokens of one expert computed at once where none is dropped


class Experts(nn.Module):
    """Each token goes to the few of E feed-forwards that a router likes best for it.

    y = Σ_e share_e(x) expert_e(x) over the `moe.active` likeliest experts e, the shares being their
    probabilities, made to sum to 1. With `moe.capacity` > 0 an expert takes at most that many times
    its fair share of the tokens, first choices first, and those beyond it pass by; so what a token
    gets depends on the others in its batch. Without, all are taken: tokens are laid out expert
    after expert, in blocks that belong to one expert each, so that the work grows with the tokens
    and not with the number of experts.

    The loss that keeps the load even, E Σ_e f_e P_e with f the shares of the tokens and P the mean
    probabilities, is left in the collection "losses".

    Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2022 (Switch), arXiv:2101.03961,
    sections 2.1 and 2.2; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """

    cfg: ModelConfig
    expert: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords) -> jax.Array:
        moe, N = self.cfg.moe, math.prod(x.shape[:-1])
        tokens, is_real = x.reshape(N, -1), (at.document > 0).reshape(N)
        probability = jax.nn.softmax(Router(self.cfg, name="router")(tokens))  # [N E]
        share, chosen = jax.lax.top_k(probability, moe.active)  # [N active]
        share = share / jnp.sum(share, axis=-1, keepdims=True)
        picked = jax.nn.one_hot(chosen.T.reshape(-1), moe.experts, dtype=jnp.int32)
        picked = (
            picked * jnp.tile(is_real, moe.active)[:, None]
        )  # [active*N E], first choices first
        self.sow("losses", "balance", balance(probability, picked, is_real))

        place, blocks, size = (by_capacity if moe.capacity else in_blocks)(moe, picked)
        put = jnp.zeros((len(blocks) * size, x.shape[-1]), x.dtype)
        put = put.at[place].set(jnp.tile(tokens, (moe.active, 1)), mode="drop")
        out = self.each(put.reshape(len(blocks), size, -1), blocks, at)
        got = out.reshape(len(blocks) * size, -1).at[place].get(mode="fill", fill_value=0)
        got = got.reshape(moe.active, N, -1) * share.T[..., None].astype(x.dtype)
        return jnp.sum(got, axis=0).reshape(x.shape)

    def each(self, put: jax.Array, blocks: jax.Array, at: Coords) -> jax.Array:
        """put [blocks size D], each block through the expert of its number."""
        c = self.cfg
        every = nn.vmap(
            self.expert,
            in_axes=(0, None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={"letter": "E"},
        )(c, name="experts")
        if c.moe.capacity:  # there is one block for every expert
            return every(put, at)
        if self.is_initializing():
            every(jnp.zeros((c.moe.experts, 1, c.width), put.dtype), at)
            return put
        weights = self.variables["params"]["experts"]
        expert = self.expert(c, parent=None)

        def one(block):
            x, number = block
            return expert.apply({"params": jax.tree.map(lambda w: w[number], weights)}, x, at)

        return jax.lax.map(one, (put, blocks))


class Router(nn.Module):
    """Scores of the experts, in float32 and without a bias whatever the model's."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N D] -> float32 [N E]
        return x.astype(jnp.float32) @ weight(self, "w", "D>E", self.cfg.sizes, normal)


def balance(probability: jax.Array, picked: jax.Array, is_real: jax.Array) -> jax.Array:
    """1 where every expert gets as much as every other, up to E where one gets all.

    Args:
        probability: [N E]. picked: [active*N E], 1 where a token goes to an expert.
        is_real: bool [N], which tokens count.
    """
    mean = jnp.mean(probability, axis=0, where=is_real[:, None])
    f = jnp.sum(picked, axis=0) / jnp.maximum(jnp.sum(picked), 1)
    return jnp.where(jnp.any(is_real), probability.shape[-1] * jnp.sum(f * mean), 0.0)


# Where tokens go: picked [P E] -> (place of each pick [P], the expert of each block, its size).
# A place beyond the end is nowhere.


def by_capacity(moe: ExpertsConfig, picked: jax.Array):
    """One block for every expert; who comes when it is full is left out."""
    P, E = picked.shape
    size = math.ceil(P / E * moe.capacity)
    rank = jnp.cumsum(picked, axis=0) - 1  # [P E]: the how-manieth of its expert
    place = jnp.where((picked > 0) & (rank < size), jnp.arange(E) * size + rank, E * size)
    return jnp.min(place, axis=-1), jnp.arange(E), size


def in_blocks(moe: ExpertsConfig, picked: jax.Array):
    """As many blocks for every expert as it needs."""
    P, E = picked.shape
    size = min(BLOCK, math.ceil(P / E))
    total = math.ceil(P / size) + E  # each expert's last block may be almost empty
    ends = jnp.cumsum(-(-jnp.sum(picked, axis=0) // size))  # [E] blocks up to and with each expert
    first = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    rank = jnp.cumsum(picked, axis=0) - 1
    place = jnp.where(picked > 0, first * size + rank, total * size)
    blocks = jnp.searchsorted(ends, jnp.arange(total), side="right")
    return jnp.min(place, axis=-1), jnp.minimum(blocks, E - 1), size


FEEDFORWARDS: dict[str, Callable[..., nn.Module] | None] = {
    "plain": Plain,
    "gated": Gated,
    "moe_plain": partial(Experts, expert=Plain),
    "moe_gated": partial(Experts, expert=Gated),
    "none": None,  # a block that only mixes tokens, as Mamba's
}
