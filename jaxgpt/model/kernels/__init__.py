"""Attention kernels: the same mathematics, computed in different ways.

    q: [B T H K]   queries; M = H / G of them share a key
    k: [B S G K]   keys: G = H is MHA, G = 1 is MQA, between is GQA
    v: [B S G K]   values

`dense` is the reference: the others must equal it for every query with a visible key.

On a mesh a kernel runs independently on every device: on whole rows of some heads if heads can be
sharded over `context` as well as over `tensor`, otherwise on some query tokens and the keys and
values of the whole row. The first way is an all-to-all from tokens of all heads to heads of all
tokens (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): it sends less from 4 devices on,
balances the work of a causal mask, and supports every kernel. The second all-gathers keys and
values (as Llama 3: Dubey et al. 2024, arXiv:2407.21783, section 3.3.2).
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxgpt.backend import get_backend
from jaxgpt.model.kernels import cudnn, splash
from jaxgpt.model.kernels.blockwise import blockwise
from jaxgpt.model.kernels.dense import dense
from jaxgpt.model.kernels.score import MASKED_LOGIT, Kernel, ScoreMod
from jaxgpt.model.kernels.strips import strips
from jaxgpt.model.layers import COMMUNICATED
from jaxgpt.model.masks import Coords
from jaxgpt.sharding import (
    constrain,
    get_active_mesh,
    is_sharded,
    make_spec,
    map_shards,
)

__all__ = ["KERNELS", "LIMITS", "MASKED_LOGIT", "ScoreMod", "attend"]

HEAD_AXES = ("tensor", "context")  # mesh axes that heads are sharded over

ExplainUnavailable = Callable[[jax.Array, jax.Array, ScoreMod], str | None]

# Kernels for one kind of device, each with a function that explains why it is unavailable, if so.
ACCELERATED: dict[str, tuple[Kernel, ExplainUnavailable]] = {
    "cudnn": (cudnn.cudnn, cudnn.explain_unavailable),
    "splash": (splash.splash, splash.explain_unavailable),
}


def attend(
    name: str, q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod
) -> jax.Array:
    """Run the kernel `name` on arrays as above, or `dense` for dropout. Returns [B T H K]."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    chex.assert_shape([k, v], (B, S, G, K))
    chex.assert_is_divisible(H, G)
    chex.assert_shape([q_coords.positions, q_coords.segment_ids], (B, T))
    chex.assert_shape([k_coords.positions, k_coords.segment_ids], (B, S))
    mesh = get_active_mesh()
    if score_mod.dropout:
        # Partitioned by the compiler, so that the draws do not depend on the devices.
        return dense(q, k, v, q_coords, k_coords, score_mod)
    if mesh is None:
        return KERNELS[name](q, k, v, q_coords, k_coords, score_mod)
    return attend_on_mesh(mesh, KERNELS[name], q, k, v, q_coords, k_coords, score_mod)


def attend_on_mesh(
    mesh, kernel: Kernel, q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod
) -> jax.Array:
    """Run the kernel on every device of the mesh, on its shard of q. Returns [B T H K]."""
    (B, T, H, _), G = q.shape, k.shape[2]
    rows, tokens = make_spec((B, T), "BT", mesh)

    def count_kv_heads(
        axes,
    ) -> int:  # a key head is repeated if query heads of several devices use it
        return math.lcm(G, math.prod(mesh.shape[axis] for axis in axes))

    candidates = [HEAD_AXES, HEAD_AXES[:1]] if tokens else [HEAD_AXES[:1]]
    fitting = (axes for axes in candidates if H % count_kv_heads(axes) == 0)
    usable: tuple[str, ...] = next(fitting, ())
    heads = tuple(axis for axis in usable if mesh.shape[axis] > 1)
    k, v = (jnp.repeat(x, count_kv_heads(heads) // G, axis=2) for x in (k, v))
    if tokens in heads:
        tokens = None
    elif tokens:
        score_mod = replace(score_mod, is_self=False)
    q_spec, kv_spec = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, None, heads)
    score_spec = jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 1), heads), score_mod)
    coords_specs = PartitionSpec(rows, tokens), PartitionSpec(rows)

    # Saved by name, so that the backward pass does not repeat the communication.
    def run_local(q, k, v, *rest):
        return kernel(*(checkpoint_name(x, COMMUNICATED) for x in (q, k, v)), *rest)

    in_specs = (q_spec, kv_spec, kv_spec, *coords_specs, score_spec)
    run = map_shards(run_local, in_specs, q_spec, has_kernel=True)
    out = constrain(run(q, k, v, q_coords, k_coords, score_mod), "BTHK")
    return checkpoint_name(out, COMMUNICATED) if is_sharded("T", T) else out


def choose_portable(q, k) -> str:
    """Return the name of the fastest kernel that runs on every kind of device."""
    backend, queries, scores = get_backend(), q.shape[1], q.shape[1] * k.shape[1]
    if queries < backend.min_strip_queries or scores < backend.max_dense_scores:
        return "dense"
    return "strips" if scores <= backend.max_strip_scores else "blockwise"


def run_auto(q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod) -> jax.Array:
    """Run the fastest kernel available for these shapes on this device."""
    is_large = q.shape[1] * k.shape[1] >= get_backend().min_accelerated_scores
    accelerated = ACCELERATED.values() if is_large else ()
    usable = (kernel for kernel, explain in accelerated if not explain(q, k, score_mod))
    kernel = next(usable, None) or KERNELS[choose_portable(q, k)]
    return kernel(q, k, v, q_coords, k_coords, score_mod)


def make_accelerated(name: str) -> Kernel:
    """Return the accelerated kernel, with a portable fallback and a warning if unavailable."""
    kernel, explain_unavailable = ACCELERATED[name]

    def run(q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod) -> jax.Array:
        reason = explain_unavailable(q, k, score_mod)
        if reason is None:
            return kernel(q, k, v, q_coords, k_coords, score_mod)
        portable = choose_portable(q, k)
        warn_once(f"model.kernel={name}: {reason}; using {portable} instead.")
        return KERNELS[portable](q, k, v, q_coords, k_coords, score_mod)

    return run


@functools.cache
def warn_once(line: str) -> None:
    """Log a warning, each distinct line once."""
    logging.getLogger(__name__).warning(line)


KERNELS: dict[str, Kernel] = {
    "auto": run_auto,
    "dense": dense,
    "strips": strips,
    "blockwise": blockwise,
    "cudnn": make_accelerated("cudnn"),
    "splash": make_accelerated("splash"),
}

# What a kernel never supports, and why; such a config is refused when it is read.
UNSUPPORTED_DROPOUT = "dropout on attention weights needs all of them in memory"
LIMITS: dict[str, dict[str, str]] = {
    "strips": {},
    "blockwise": {},
    "cudnn": {"softcap": cudnn.UNSUPPORTED_SOFTCAP, "sinks": cudnn.UNSUPPORTED_SINKS},
    "splash": {"bias": splash.UNSUPPORTED_BIAS, "sinks": splash.UNSUPPORTED_SINKS},
}
LIMITS = {
    name: limits | {"attention_dropout": UNSUPPORTED_DROPOUT} for name, limits in LIMITS.items()
}
