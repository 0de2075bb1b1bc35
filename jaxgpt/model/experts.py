"""A mixture of experts, on one device or with expert parallelism.

Routing and the experts treat each token independently; tokens of a batch interact only through the
capacity of an expert, which decides which of them are dropped. So a device routes its own tokens,
and the devices that share the experts all-gather their tokens, compute those of their own experts
and sum the outputs by a reduce-scatter. On one device the same code runs over no mesh axes: a
collective over () is the identity.
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
from jaxgpt.dims import Letters, declare_param, split
from jaxgpt.model.layers import normal
from jaxgpt.model.lowrank import add_letters
from jaxgpt.model.masks import Coords
from jaxgpt.model.taps import tap
from jaxgpt.quantized_array import is_quantized
from jaxgpt.sharding import constrain, get_active_mesh, get_axis_names, make_spec, map_shards

MAX_BLOCK_TOKENS = 64  # tokens that an expert computes at once

Axes = dict[Letters, tuple[str, ...]]  # the mesh axes that shard B, T, E, D and F


class Experts(nn.Module):
    """Top-k routing of each token to `moe.active` of E feed-forward experts.

    y = Σ_e gate_e(x) expert_e(x) over the `moe.active` most probable experts e; the gates are their
    router probabilities, normalized to sum to 1. Llama 4 has shared(x) + Σ_e expert_e(gate_e(x) x)
    instead, with sigmoids as gates: see `moe.shared`, `moe.gated` and `moe.scoring`.

    With `moe.capacity` > 0 an expert takes at most that many times its fair share of the batch,
    first choices first, and drops the rest; so a token's output depends on the others in its batch,
    though not on the devices. Without a capacity no token is dropped.

    On a mesh of P devices along `expert` with n tokens each, every one receives (P - 1) n D numbers
    (all-gather) and as many on the way back (reduce-scatter). An all-to-all would need buffers for
    all n tokens of a device going to the same other one: (P - 1) n D as well, and with a capacity
    too, since that is counted over the whole batch. Weights are gathered over fsdp only.

    The load-balancing loss is stored as "balance" in the collection "losses".

    Source: Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2022 (Switch), arXiv:2101.03961,
    sections 2.1 and 2.2; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """

    cfg: ModelConfig
    expert: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, coords: Coords) -> jax.Array:
        c, mesh = self.cfg, get_active_mesh()
        scores = constrain(Router(c, name="router")(x), "BT.")  # [B T E]
        scores = tap(self, "router", scores)
        if c.moe.shared:
            shared_cfg = dataclasses.replace(c, ffn=c.sizes["F"] * c.moe.shared)
            shared = self.expert(shared_cfg, name="shared")(x)
        if self.is_initializing():
            self.init_experts(x)
            return x
        # Cast before the all-gather: half the bytes if the compute dtype is half as wide.
        weights = self.variables["params"]["experts"]
        weights = jax.tree.map(lambda w: w.astype(x.dtype), weights, is_leaf=is_quantized)
        letters = add_letters(self.expert_letters(x), weights)
        sizes = c.sizes | dict(B=x.shape[0], T=x.shape[1])
        axes = {d: get_axis_names(mesh and make_spec((sizes[d],), d, mesh)[0]) for d in "BTEDF"}
        run: Callable = partial(compute_device_part, c, self.expert, axes, letters)
        if mesh:
            specs = jax.tree.map(lambda w, d: make_spec(w.shape, d, mesh), weights, letters)
            row_spec = PartitionSpec(axes["B"], axes["T"])
            sums = PartitionSpec(find_partial_sum_axes(axes), *row_spec)
            run = map_shards(run, (specs, row_spec, row_spec, row_spec), (sums, PartitionSpec()))
        out, balance_loss = run(weights, x, scores, coords.segment_ids > 0)
        self.sow("losses", "balance", balance_loss)
        # Summed outside of `map_shards`, so that the gradient of the sum needs no collective.
        out = constrain(jax.lax.reduce_sum(out, axes=(0,)), "BT.")
        return out + shared if c.moe.shared else out

    def init_experts(self, x: jax.Array):
        """Create the parameters of the experts, stacked along E."""
        stacked = nn.vmap(
            self.expert,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={"letter": "E"},
        )(self.cfg, name="experts")
        stacked(jnp.zeros((self.cfg.moe.experts, 1, x.shape[-1]), x.dtype))

    def expert_letters(self, x: jax.Array):
        """Return the letters of the experts' parameters, which are stripped after init."""
        expert = self.expert(self.cfg, parent=None)
        shapes = jax.eval_shape(lambda: expert.init(jax.random.key(0), x[0, :1])["params"])
        return jax.tree.map(lambda letters: "E" + letters, split(shapes)[1])


class Router(nn.Module):
    """Router logits over the experts, in float32 and without a bias whatever the model has."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [... D] -> float32 [... E]
        return x.astype(jnp.float32) @ declare_param(self, "w", "D>E", self.cfg.sizes, normal)


def score_softmax(scores: jax.Array, active: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose experts by their probabilities, and normalize the gates to sum to 1.

    Args:
        scores: router logits [... E].

    Returns:
        (probability [... E] of the balance loss, gate [... active], expert ids [... active]).
    """
    probability = jax.nn.softmax(scores)
    gate, expert_ids = jax.lax.top_k(probability, active)
    return probability, gate / jnp.sum(gate, axis=-1, keepdims=True), expert_ids


def score_sigmoid(scores: jax.Array, active: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `score_softmax`, with gates that do not depend on the other experts.

    Source: Llama 4 (Meta 2025), in its code; the probability of the balance loss is that of
    DeepSeek-V3 (2024, arXiv:2412.19437, equation 19).
    """
    affinity = jax.nn.sigmoid(scores)
    gate, expert_ids = jax.lax.top_k(affinity, active)
    return affinity / jnp.sum(affinity, axis=-1, keepdims=True), gate, expert_ids


SCORINGS = {"softmax": score_softmax, "sigmoid": score_sigmoid}
GATED_SIDES = {"outputs": "gate * expert(x)", "inputs": "expert(gate * x)"}


def compute_device_part(cfg: ModelConfig, expert, axes: Axes, letters, weights, x, scores, is_real):
    """Compute one device's part of a mixture of experts.

    Args:
        expert: the module class of an expert.
        letters: of weights, which are sharded over axes["E"], ["D"] and ["F"].
        x: [b t D], scores: float32 [b t E], is_real: bool [b t], sharded over ["B"] and ["T"].

    Returns:
        ([1 b t D], to be summed over the axes of `find_partial_sum_axes`; the balance loss of the
        batch []).
    """
    moe = cfg.moe
    probability, gate, expert_ids = SCORINGS[moe.scoring](scores, moe.active)
    is_taken = jnp.broadcast_to(is_real[..., None], expert_ids.shape)
    one_hot = jax.nn.one_hot(expert_ids, moe.experts, dtype=jnp.int32) * is_taken[..., None]
    balance_loss = compute_balance_loss(probability, one_hot, is_real, axes["B"] + axes["T"])
    if moe.capacity:
        is_taken &= find_within_capacity(one_hot, moe.capacity, axes)

    parts = psum(1, axes["F"])
    weights = jax.tree.map(partial(gather_weight, axes, parts), weights, letters)
    expert_ids = jnp.where(is_taken, expert_ids, moe.experts)  # no such expert
    # When decoding, the few tokens may not be sharded over the experts' devices: all have them.
    gather_axes = tuple(axis for axis in axes["E"] if axis in axes["B"])
    flat = (v.reshape(-1, v.shape[-1]) for v in (x, gate, expert_ids))
    tokens, gate, expert_ids = (all_gather(v, gather_axes, tiled=True) for v in flat)
    local = moe.experts // psum(1, axes["E"])
    local_ids = (expert_ids - axis_index(axes["E"]) * local).reshape(-1)
    local_ids = jnp.where((local_ids >= 0) & (local_ids < local), local_ids, local)

    module = expert(dataclasses.replace(cfg, ffn=cfg.ffn // parts), parent=None)
    order = jnp.argsort(local_ids)  # choices, sorted by expert
    starts = jnp.searchsorted(local_ids[order], jnp.arange(local + 1))
    out = apply_experts(module, weights, tokens, gate, order, starts).astype(x.dtype)
    out = psum_scatter(out, gather_axes, tiled=True)
    return out.reshape(1, *x.shape), balance_loss


def find_partial_sum_axes(axes: Axes) -> tuple[str, ...]:
    """Return the mesh axes along which devices hold partial sums for the same tokens."""
    return tuple(axis for axis in axes["E"] + axes["F"] if axis not in axes["B"])


def gather_weight(axes: Axes, parts: int, w: jax.Array, letters: Letters) -> jax.Array:
    """All-gather a local expert weight over D, for one of the `parts` devices that shard F."""
    dims = letters.replace(">", "")
    if "D" in dims:
        w = all_gather(w, axes["D"], axis=dims.index("D"), tiled=True)
    # Outputs are summed over the shards of F, so a bias without F contributes its fraction. Of an
    # adapter, one factor has F.
    return w if "F" in dims or ">" in letters else w / parts


def compute_balance_loss(probability, one_hot, is_real, axes=()) -> jax.Array:
    """Compute E Σ_e f_e P_e: 1 if the load is even, E if one expert gets all tokens.

    Args:
        probability: [... E], whose mean over tokens is P.
        one_hot: [... E], 1 where a token is routed to an expert; f are fractions of these.
        is_real: bool [...], False at padding.
        axes: the mesh axes that shard the tokens.
    """

    def total(x):
        return psum(jnp.sum(x.reshape(-1, x.shape[-1]), axis=0), axes)

    mean = total(probability * is_real[..., None]) / jnp.maximum(total(is_real[..., None]), 1)
    f = total(one_hot) / jnp.maximum(jnp.sum(total(one_hot)), 1)
    return probability.shape[-1] * jnp.sum(f * mean)


def find_within_capacity(one_hot: jax.Array, capacity: float, axes: Axes) -> jax.Array:
    """Return which choices fit their expert's capacity: first choices first, then row by row.

    Args:
        one_hot: int [b t active E], this device's part of the choices of the whole batch.

    Returns:
        bool [b t active].
    """
    b, t, active, E = one_hot.shape
    within = jnp.cumsum(one_hot, axis=1)  # within this device's part of a row
    counts = all_gather(within[:, -1:], axes["B"], axis=0, tiled=True)
    counts = all_gather(counts, axes["T"], axis=1, tiled=True)  # [B parts active E]
    counts = jnp.moveaxis(counts, 2, 0)
    before = jnp.cumsum(counts.reshape(-1, E), axis=0).reshape(counts.shape) - counts
    start = (0, axis_index(axes["B"]) * b, axis_index(axes["T"]), 0)
    before = jnp.moveaxis(jax.lax.dynamic_slice(before, start, (active, b, 1, E)), 0, 2)
    tokens = t * counts.shape[1] * counts.shape[2]
    limit = math.ceil(tokens * active / E * capacity)
    return jnp.any((one_hot > 0) & (before + within <= limit), axis=-1)


# The number of blocks is known only at run time, and JAX cannot differentiate a loop of dynamic
# length. The gradient below recomputes each block and accumulates into one expert at a time; the
# gradient of a scan over blocks would accumulate into all experts in every block.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_experts(module: nn.Module, weights, tokens, gate, order, starts) -> jax.Array:
    """Apply experts to their tokens, in blocks, and sum the outputs weighted by the gates.

    Args:
        module: an expert, applied with the parameters of each in turn.
        weights: of e experts, leaves [e ...].
        tokens: [N D]. gate: float32 [N active].
        order: int [N*active], choices (token * active + rank), those of expert i from starts[i] up
            to starts[i + 1].

    Returns:
        float32 [N D].
    """

    def expert(out, expert_inputs):
        w, start, end = expert_inputs
        count, select_block = split_into_blocks(order, gate, start, end)

        def block(i, out):
            choice, token = select_block(i)
            x, g = take_or_zero(tokens, token), take_or_zero(gate.reshape(-1), choice)
            y = apply_gated_expert(module, w, x, g)
            return out.at[token].add(y, mode="drop")

        return jax.lax.fori_loop(0, count, block, out), None

    out = jnp.zeros(tokens.shape, jnp.float32)
    return jax.lax.scan(expert, out, (weights, starts[:-1], starts[1:]))[0]


def _forward(module, *inputs):
    return apply_experts(module, *inputs), inputs


def _backward(module, inputs, d_out):
    weights, tokens, gate, order, starts = inputs

    def expert(sums, expert_inputs):
        w, start, end = expert_inputs
        count, select_block = split_into_blocks(order, gate, start, end)
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape), w)  # float32, whatever the weights

        def block(i, sums):
            d_w, d_tokens, d_gate = sums
            choice, token = select_block(i)
            x, g = take_or_zero(tokens, token), take_or_zero(gate.reshape(-1), choice)
            _, pull = jax.vjp(partial(apply_gated_expert, module), w, x, g)
            block_d_w, block_d_tokens, block_d_gate = pull(take_or_zero(d_out, token))
            d_tokens = d_tokens.at[token].add(block_d_tokens, mode="drop")
            d_gate = d_gate.at[choice].set(block_d_gate, mode="drop")
            return jax.tree.map(jnp.add, d_w, block_d_w), d_tokens, d_gate

        d_w, *sums = jax.lax.fori_loop(0, count, block, (zeros, *sums))
        return sums, jax.tree.map(lambda d, w: d.astype(w.dtype), d_w, w)

    sums = [jnp.zeros(tokens.shape), jnp.zeros(gate.size)]
    (d_tokens, d_gate), d_w = jax.lax.scan(expert, sums, (weights, starts[:-1], starts[1:]))
    return d_w, d_tokens.astype(tokens.dtype), d_gate.reshape(gate.shape), None, None


apply_experts.defvjp(_forward, _backward)


def apply_gated_expert(module: nn.Module, w, x: jax.Array, gate: jax.Array) -> jax.Array:
    """Apply one expert to x [block D], its output or input multiplied by its gate [block]."""
    if module.cfg.moe.gated == "inputs":  # type: ignore[attr-defined]
        x, gate = (gate[:, None] * x).astype(x.dtype), jnp.ones_like(gate)
    y: Any = module.apply({"params": w}, x)
    return gate[:, None] * y.astype(jnp.float32)


def split_into_blocks(order: jax.Array, gate: jax.Array, start: jax.Array, end: jax.Array):
    """Split choices from `start` up to `end`: (number of blocks, i -> (choices, tokens) of one)."""
    N, active = gate.shape
    size = min(MAX_BLOCK_TOKENS, N)  # a token chooses an expert at most once

    def select_block(i):
        index = start + i * size + jnp.arange(size)
        choice = jnp.where(
            index < end, take_or_zero(order, index), order.size
        )  # past the end: none
        return choice, choice // active

    return -(-(end - start) // size), select_block


def take_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return x[index], and 0 where the index is past the end."""
    return x.at[index].get(mode="fill", fill_value=0)
