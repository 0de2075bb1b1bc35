"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

It knows causality and windows by place in the row and then computes half, or a band, of the
blocks. All other masks are given to it as an array of 0 and -2^41, which it adds to the logits:
documents too, unless a row is one (`model.documents=joined`).
"""

from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model.kernels.score import Score, behind, windows
from jaxgpt.model.masks import Causal, Coords, Mask, OneDocument
from jaxgpt.sharding import platform

MODERN = 9.0  # compute capability of Hopper
LIMIT = "cuDNN's kernel has no soft cap"


def obstacle(q, k, score: Score) -> str | None:
    """Why `cudnn` can not do it here, or None."""
    device = jax.devices()[0]
    is_other = device.platform == "gpu" and "cuda" not in device.client.platform_version
    if platform() != "gpu" or is_other:
        return "there is no NVIDIA GPU here"
    # A program may be traced for a GPU that is not here, of which nothing is known.
    return misfit(q, k, score, float(getattr(device, "compute_capability", MODERN)))


def misfit(q, k, score: Score, capability: float) -> str | None:
    """Why `cudnn` could not do it on a GPU of this compute capability, or None.

    Source: jax/_src/cudnn/fused_attention_stablehlo.py, check_layout, check_is_flash_attention.
    """
    T, S, K = q.shape[1], k.shape[1], q.shape[3]
    widest = 256 if capability >= 9.0 else 128
    reasons = {
        LIMIT: score.softcap is not None,
        "it needs compute capability 8.0 (Ampere) or later": capability < 8.0,
        f"it computes in bfloat16, not in {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"head width {K} is no multiple of 8 up to {widest}": K % 8 != 0 or widest < K,
        f"it needs even numbers of queries and keys, not {T} and {S}": (T % 2 or S % 2) != 0,
    }
    return next((why for why, is_so in reasons.items() if is_so), None)


def cudnn(q, k, v, q_at: Coords, k_at: Coords, score: Score) -> jax.Array:
    """As `dense`, with masks and biases rounded to the dtype of q. Returns [B T H K]."""
    known, rest = _by_place(score)
    bias = None if score.bias is None else score.bias(q_at, k_at).astype(q.dtype)
    mask = rest(q_at, k_at)[:, None] if rest else None
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=score.scale, implementation="cudnn", **known
    )


def _by_place(score: Score) -> tuple[dict, Mask | None]:
    """What can be said by places in the row, and the mask that is left."""
    masks = score.by_place
    if Causal() not in masks:
        return {}, score.mask
    known: dict[str, Any] = dict(is_causal=True)
    back = behind(masks)
    if back is not None:
        # (before, after); cuDNN has no window that looks ahead.
        known["local_window_size"] = (back, 0)
    rest = masks - windows(masks) - {Causal(), OneDocument()}
    return known, reduce(and_, rest) if rest else None
