"""Attention kernels: the same mathematics, computed in different ways.

    q: [B T H K]   queries; M = H / G of them share a key
    k: [B S G K]   keys: G = H is MHA, G = 1 is MQA, between is GQA
    v: [B S G K]   values

`dense` is the truth: the others must equal it for every query that sees something.

On a mesh a kernel runs on every device for itself, on whole rows of some heads if heads can be
divided over `context` as well as over `tensor`, and otherwise on some tokens of a row and the keys
and values of all of it. The first way swaps what a device holds, tokens of all heads for heads of
all tokens (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509): it sends less from 4 devices
on, divides the work of a causal mask evenly, and lets every kernel work. The second gathers keys
and values (as Llama 3: Dubey et al. 2024, arXiv:2407.21783, section 3.3.2).
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

from jaxgpt.model.kernels import cudnn, splash
from jaxgpt.model.kernels.blockwise import blockwise
from jaxgpt.model.kernels.dense import dense
from jaxgpt.model.kernels.score import NEVER, Kernel, Score
from jaxgpt.model.kernels.strips import strips
from jaxgpt.model.layers import RECEIVED
from jaxgpt.model.masks import Coords
from jaxgpt.sharding import constrain, is_divided, mesh_in_force, on_parts, platform, spec

__all__ = ["KERNELS", "LIMITS", "NEVER", "Score", "attend"]

# Forward and backward on a CPU with two cores, in ms, by (dense, strips, blockwise): 64 rows of 16
# and 4 heads of width 32 take (1.5, 1.7, 2.2), 12 rows of 64 (3.9, 2.5, 3.5); 6 heads of width 64
# take (203, 123, 171) for 16 rows of 256, (-, 304, 254) for one of 2048.
FEW = 32  # queries; decoding has one
WHOLE = 1024 * 1024  # T·S that strips are good for
# Elsewhere a turn of a loop is a few launches, so that the whole is left only for want of memory.
# Not measured yet.
WHOLE_ELSEWHERE = 2048 * 2048
WORTHWHILE = 256 * 256  # T·S from which on an accelerated kernel is taken

HEADS = ("tensor", "context")  # mesh axes that heads are divided over

Obstacle = Callable[[jax.Array, jax.Array, Score], str | None]

# Kernels of one kind of device, and why they can not do what is asked, if they can not.
ACCELERATED: dict[str, tuple[Kernel, Obstacle]] = {
    "cudnn": (cudnn.cudnn, cudnn.obstacle),
    "splash": (splash.splash, splash.obstacle),
}


def attend(name: str, q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """Runs the kernel called `name`. Arrays as above; returns [B T H K]."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    chex.assert_shape([k, v], (B, S, G, K))
    chex.assert_is_divisible(H, G)
    chex.assert_shape([q_at.position, q_at.document], (B, T))
    chex.assert_shape([k_at.position, k_at.document], (B, S))
    mesh = mesh_in_force()
    if mesh is None:
        return KERNELS[name](q, k, v, q_at, k_at, score)
    return over_devices(mesh, KERNELS[name], q, k, v, q_at, k_at, score)


def over_devices(
    mesh, kernel: Kernel, q, k, v, q_at: Coords, k_at: Coords, score: Score
) -> jax.Array:
    """Runs the kernel on every device of the mesh, on its part of q."""
    (B, T, H, _), G = q.shape, k.shape[2]
    rows, tokens = spec((B, T), "BT", mesh)

    def keys(axes) -> int:  # a key serves heads of one device only: else it is repeated
        return math.lcm(G, math.prod(mesh.shape[axis] for axis in axes))

    ways = [HEADS, HEADS[:1]] if tokens else [HEADS[:1]]
    fit: tuple[str, ...] = next((axes for axes in ways if H % keys(axes) == 0), ())
    heads = tuple(axis for axis in fit if mesh.shape[axis] > 1)
    k, v = (jnp.repeat(x, keys(heads) // G, axis=2) for x in (k, v))
    if tokens in heads:
        tokens = None
    elif tokens:
        score = replace(score, is_self=False)
    ours, theirs = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, None, heads)
    by_head = jax.tree.map(lambda x: PartitionSpec(*[None] * (x.ndim - 1), heads), score)
    at = PartitionSpec(rows, tokens), PartitionSpec(rows)

    # What was received is kept by name: it need not be sent again for the backward pass.
    def here(q, k, v, *rest):
        return kernel(*(checkpoint_name(x, RECEIVED) for x in (q, k, v)), *rest)

    run = on_parts(here, (ours, theirs, theirs, *at, by_head), ours, has_kernel=True)
    out = constrain(run(q, k, v, q_at, k_at, score), "BTHK")
    return checkpoint_name(out, RECEIVED) if is_divided("T", T) else out


def anywhere(q, k) -> str:
    """The fastest of the kernels that run on every device."""
    T, S = q.shape[1], k.shape[1]
    if platform() != "cpu":
        return "dense" if T * S < WHOLE_ELSEWHERE else "blockwise"
    if T < FEW:
        return "dense"
    return "strips" if T * S <= WHOLE else "blockwise"


def auto(q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """The fastest that this device has for the shapes at hand."""
    accelerated = ACCELERATED.values() if q.shape[1] * k.shape[1] >= WORTHWHILE else ()
    fit = (kernel for kernel, obstacle in accelerated if not obstacle(q, k, score))
    kernel = next(fit, None) or KERNELS[anywhere(q, k)]
    return kernel(q, k, v, q_at, k_at, score)


def asked_for(name: str) -> Kernel:
    """The accelerated kernel of this name; where it can not be, another one, and a line says so."""
    kernel, obstacle = ACCELERATED[name]

    def run(q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
        why = obstacle(q, k, score)
        if why is None:
            return kernel(q, k, v, q_at, k_at, score)
        instead = anywhere(q, k)
        say(f"model.kernel={name}: {why}; using {instead} instead.")
        return KERNELS[instead](q, k, v, q_at, k_at, score)

    return run


@functools.cache
def say(line: str) -> None:
    """Every line once."""
    logging.getLogger(__name__).warning(line)


KERNELS: dict[str, Kernel] = {
    "auto": auto,
    "dense": dense,
    "strips": strips,
    "blockwise": blockwise,
    "cudnn": asked_for("cudnn"),
    "splash": asked_for("splash"),
}

# What a kernel can never do, and why; asking for it is refused when the config is read.
LIMITS: dict[str, dict[str, str]] = {
    "cudnn": {"softcap": cudnn.LIMIT},
    "splash": {"bias": splash.LIMIT},
}
