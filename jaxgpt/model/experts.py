"""A mixture of experts, on one device or divided over many.

Routing is a matter of each token on its own, and so is what an expert does; all that the tokens of
a batch decide together is who is left out where experts have a capacity. So a device works on the
tokens that it has, and the devices among which the experts are divided show each other their
tokens, compute what is for their own experts, and add up what comes of it. On one device the same
code runs, over no mesh axes: a collective over () does nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import all_gather, axis_index, psum, psum_scatter
from jax.sharding import PartitionSpec

from jaxgpt.config import ModelConfig
from jaxgpt.dims import Letters, split, weight
from jaxgpt.model.layers import normal
from jaxgpt.model.masks import Coords
from jaxgpt.sharding import constrain, mesh_in_force, named, on_parts, spec

BLOCK = 64  # tokens of one expert computed at once

Axes = dict[Letters, tuple[str, ...]]  # the mesh axes that divide B, T, E, D and F


class Experts(nn.Module):
    """Each token goes to the few of E feed-forwards that a router likes best for it.

    y = Σ_e share_e(x) expert_e(x) over the `moe.active` likeliest experts e, the shares being their
    probabilities, made to sum to 1. With `moe.capacity` > 0 an expert takes at most that many times
    its fair share of the batch, first choices first, and those beyond it pass by; so what a token
    gets depends on the others in its batch, though not on the devices. Without, all are taken.

    Under a mesh, of P devices along `expert` with n tokens each, every one receives (P - 1) n D
    numbers (all-gather) and as many on the way back (reduce-scatter). An all-to-all would need room
    for all n tokens of a device going to the same other one: (P - 1) n D as well, and with a
    capacity too, for that is counted over the whole batch. Weights are gathered over fsdp only.

    The loss that keeps the load even (`balance`) is left in the collection "losses".

    Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2022 (Switch), arXiv:2101.03961,
    sections 2.1 and 2.2; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """

    cfg: ModelConfig
    expert: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, at: Coords) -> jax.Array:
        c, mesh = self.cfg, mesh_in_force()
        scores = constrain(Router(c, name="router")(x), "BT.")  # [B T E]
        if self.is_initializing():
            self.declare(x)
            return x
        # Cast before they are gathered: half the bytes where the compute dtype is half as wide.
        weights = self.variables["params"]["experts"]
        weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
        letters = self.letters(x)
        sizes = c.sizes | dict(B=x.shape[0], T=x.shape[1])
        axes = {d: named(mesh and spec((sizes[d],), d, mesh)[0]) for d in "BTEDF"}
        run: Callable = partial(mix, c, self.expert, axes, letters)
        if mesh:
            places = jax.tree.map(lambda w, d: spec(w.shape, d, mesh), weights, letters)
            rows = PartitionSpec(axes["B"], axes["T"])
            sums = PartitionSpec(in_sum(axes), *rows)
            run = on_parts(run, (places, rows, rows, rows), (sums, PartitionSpec()))
        out, uneven = run(weights, x, scores, at.document > 0)
        self.sow("losses", "balance", uneven)
        # Added up out here, where the derivative of a sum over devices needs no talk among them.
        return constrain(jax.lax.reduce_sum(out, axes=(0,)), "BT.")

    def declare(self, x: jax.Array):
        """Makes the parameters of the experts: those of one, stacked along E."""
        every = nn.vmap(
            self.expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={"letter": "E"},
        )(self.cfg, name="experts")
        every(jnp.zeros((self.cfg.moe.experts, 1, x.shape[-1]), x.dtype))

    def letters(self, x: jax.Array):
        """The letters of the experts' parameters, which these no longer have when in use."""
        one = self.expert(self.cfg, parent=None)
        made = jax.eval_shape(lambda: one.init(jax.random.key(0), x[0, :1])["params"])
        return jax.tree.map(lambda letters: "E" + letters, split(made)[1])


class Router(nn.Module):
    """Scores of the experts, in float32 and without a bias whatever the model's."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> float32 [... E]
        return x.astype(jnp.float32) @ weight(self, "w", "D>E", self.cfg.sizes, normal)


def mix(cfg: ModelConfig, expert, axes: Axes, letters, weights, x, scores, is_real):
    """The part of one device in a mixture of experts.

    Args:
        expert: the class of the module that each expert is.
        letters: of weights, which are divided over axes["E"], ["D"] and ["F"].
        x: [b t D], scores: float32 [b t E], is_real: bool [b t], divided over ["B"] and ["T"].

    Returns:
        ([1 b t D], to be added up along the axes `in_sum`; the balance loss of the batch []).
    """
    moe = cfg.moe
    probability = jax.nn.softmax(scores)
    share, chosen = jax.lax.top_k(probability, moe.active)  # [b t active]
    share = share / jnp.sum(share, axis=-1, keepdims=True)
    taken = jnp.broadcast_to(is_real[..., None], chosen.shape)
    picked = jax.nn.one_hot(chosen, moe.experts, dtype=jnp.int32) * taken[..., None]
    uneven = balance(probability, picked, is_real, axes["B"] + axes["T"])
    if moe.capacity:
        taken &= in_time(picked, moe.capacity, axes)

    parts = psum(1, axes["F"])
    weights = jax.tree.map(partial(gathered, axes, parts), weights, letters)
    chosen = jnp.where(taken, chosen, moe.experts)  # one that nobody has
    # A few tokens, when decoding, may not be divided among the experts' devices: all have them.
    shown = tuple(axis for axis in axes["E"] if axis in axes["B"])
    flat = (v.reshape(-1, v.shape[-1]) for v in (x, share, chosen))
    tokens, share, chosen = (all_gather(v, shown, tiled=True) for v in flat)
    own = moe.experts // psum(1, axes["E"])
    number = (chosen - axis_index(axes["E"]) * own).reshape(-1)  # of the expert among those here
    number = jnp.where((number >= 0) & (number < own), number, own)

    module = expert(dataclasses.replace(cfg, ffn=cfg.ffn // parts), parent=None)
    order = jnp.argsort(number)  # picks, expert after expert
    starts = jnp.searchsorted(number[order], jnp.arange(own + 1))
    out = through(module, weights, tokens, share, order, starts).astype(x.dtype)
    out = psum_scatter(out, shown, tiled=True)
    return out.reshape(1, *x.shape), uneven


def in_sum(axes: Axes) -> tuple[str, ...]:
    """The mesh axes along which devices have parts of the sum for the same tokens."""
    return tuple(axis for axis in axes["E"] + axes["F"] if axis not in axes["B"])


def gathered(axes: Axes, parts: int, w: jax.Array, letters: Letters) -> jax.Array:
    """A weight of the experts here as one of `parts` devices uses it that divide F."""
    letters = letters.replace(">", "")
    if "D" in letters:
        w = all_gather(w, axes["D"], axis=letters.index("D"), tiled=True)
    # Devices add up what their parts of F give: what is not divided each of them adds in part.
    return w if "F" in letters else w / parts


def balance(probability, picked, is_real, axes=()) -> jax.Array:
    """E Σ_e f_e P_e: 1 where every expert gets as much as every other, E where one gets all.

    Args:
        probability: [... E], whose mean over tokens is P.
        picked: [... E], 1 where a token goes to an expert; f are the shares of the picks.
        is_real: bool [...], which tokens count.
        axes: the mesh axes that divide the tokens.
    """

    def total(x):
        return psum(jnp.sum(x.reshape(-1, x.shape[-1]), axis=0), axes)

    mean = total(probability * is_real[..., None]) / jnp.maximum(total(is_real[..., None]), 1)
    f = total(picked) / jnp.maximum(jnp.sum(total(picked)), 1)
    return probability.shape[-1] * jnp.sum(f * mean)


def in_time(picked: jax.Array, capacity: float, axes: Axes) -> jax.Array:
    """Which picks come before their expert is full: first choices first, then row by row.

    Args:
        picked: int [b t active E], the part of this device of the picks of the whole batch.

    Returns:
        bool [b t active].
    """
    b, t, active, E = picked.shape
    within = jnp.cumsum(picked, axis=1)  # in the part of a row that is here
    counts = all_gather(within[:, -1:], axes["B"], axis=0, tiled=True)
    counts = all_gather(counts, axes["T"], axis=1, tiled=True)  # [B parts active E]
    counts = jnp.moveaxis(counts, 2, 0)
    before = jnp.cumsum(counts.reshape(-1, E), axis=0).reshape(counts.shape) - counts
    here = (0, axis_index(axes["B"]) * b, axis_index(axes["T"]), 0)
    before = jnp.moveaxis(jax.lax.dynamic_slice(before, here, (active, b, 1, E)), 0, 2)
    tokens = t * counts.shape[1] * counts.shape[2]
    size = math.ceil(tokens * active / E * capacity)
    return jnp.any((picked > 0) & (before + within <= size), axis=-1)


# How many blocks there are is known only at run time, and a loop of such a length has no derivative
# of its own. The one given here computes a block anew and adds to the gradient of one expert while
# it is at that expert; as the derivative of a scan over blocks, every block would add to all.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def through(module: nn.Module, weights, tokens, share, order, starts) -> jax.Array:
    """Sends tokens through experts, in blocks, and adds up what comes out by shares.

    Args:
        module: an expert, applied with the parameters of each in turn.
        weights: of e experts, leaves [e ...].
        tokens: [N D]. share: float32 [N active].
        order: int [N*active], picks (token * active + choice), so that those of expert i lie from
            starts[i] up to starts[i + 1].

    Returns:
        float32 [N D].
    """

    def expert(out, this):
        w, start, end = this
        count, inside = blocks(order, share, start, end)

        def block(i, out):
            pick, token = inside(i)
            y = shared(module, w, at(tokens, token), at(share.reshape(-1), pick))
            return out.at[token].add(y, mode="drop")

        return jax.lax.fori_loop(0, count, block, out), None

    out = jnp.zeros(tokens.shape, jnp.float32)
    return jax.lax.scan(expert, out, (weights, starts[:-1], starts[1:]))[0]


def _forward(module, *given):
    return through(module, *given), given


def _backward(module, given, d_out):
    weights, tokens, share, order, starts = given

    def expert(sums, this):
        w, start, end = this
        count, inside = blocks(order, share, start, end)
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape), w)  # float32, whatever the weights

        def block(i, sums):
            d_w, d_tokens, d_share = sums
            pick, token = inside(i)
            here = w, at(tokens, token), at(share.reshape(-1), pick)
            _, pull = jax.vjp(partial(shared, module), *here)
            more_w, more_tokens, more_share = pull(at(d_out, token))
            d_tokens = d_tokens.at[token].add(more_tokens, mode="drop")
            d_share = d_share.at[pick].set(more_share, mode="drop")
            return jax.tree.map(jnp.add, d_w, more_w), d_tokens, d_share

        d_w, *sums = jax.lax.fori_loop(0, count, block, (zeros, *sums))
        return sums, jax.tree.map(lambda d, w: d.astype(w.dtype), d_w, w)

    sums = [jnp.zeros(tokens.shape), jnp.zeros(share.size)]
    (d_tokens, d_share), d_w = jax.lax.scan(expert, sums, (weights, starts[:-1], starts[1:]))
    return d_w, d_tokens.astype(tokens.dtype), d_share.reshape(share.shape), None, None


through.defvjp(_forward, _backward)


def shared(module: nn.Module, w, x: jax.Array, share: jax.Array) -> jax.Array:
    """x [block D] through one expert, by share [block]."""
    y: Any = module.apply({"params": w}, x)
    return share[:, None] * y.astype(jnp.float32)


def blocks(order: jax.Array, share: jax.Array, start: jax.Array, end: jax.Array):
    """How many blocks the picks from `start` up to `end` fill, and the picks and tokens of each."""
    N, active = share.shape
    size = min(BLOCK, N)  # an expert is picked by a token once at most

    def inside(i):
        place = start + i * size + jnp.arange(size)
        pick = jnp.where(place < end, at(order, place), order.size)  # beyond the end: nobody
        return pick, pick // active

    return -(-(end - start) // size), inside


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], and 0 where that is beyond the end."""
    return x.at[index].get(mode="fill", fill_value=0)
