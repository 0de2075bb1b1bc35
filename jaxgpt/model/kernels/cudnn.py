"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

It supports causal masks and windows by row index, and then computes half, or a band, of the blocks.
All other masks are passed as an array of 0 and -2^41 that is added to the logits: documents too,
unless a row is one (`model.documents=joined`).
"""

from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.backend import get_platform
from jaxgpt.model.kernels.score import ScoreMod, find_lookback, select_windows
from jaxgpt.model.masks import Causal, Coords, Mask, OneSegment

ASSUMED_CAPABILITY = 9.0  # Hopper's, where the device does not report one
UNSUPPORTED_SOFTCAP = "cuDNN's kernel has no soft cap"
UNSUPPORTED_SINKS = "JAX's interface to cuDNN's kernel has no attention sinks"


def explain_unavailable(q, k, score_mod: ScoreMod) -> str | None:
    """Return why `cudnn` cannot run here, or None."""
    device = jax.devices()[0]
    is_not_cuda = device.platform == "gpu" and "cuda" not in device.client.platform_version
    if get_platform() != "gpu" or is_not_cuda:
        return "there is no NVIDIA GPU here"
    # A program may be traced for a GPU that is not present, whose capability is unknown.
    capability = float(getattr(device, "compute_capability", ASSUMED_CAPABILITY))
    return explain_unsupported(q, k, score_mod, capability)


def explain_unsupported(q, k, score_mod: ScoreMod, capability: float) -> str | None:
    """Return why `cudnn` does not support this on a GPU of this capability, or None.

    Source: jax/_src/cudnn/fused_attention_stablehlo.py, check_layout, check_is_flash_attention.
    """
    T, S, K = q.shape[1], k.shape[1], q.shape[3]
    max_head_width = 256 if capability >= 9.0 else 128
    reasons = {
        UNSUPPORTED_SOFTCAP: score_mod.softcap is not None,
        UNSUPPORTED_SINKS: score_mod.sinks is not None,
        "it needs compute capability 8.0 (Ampere) or later": capability < 8.0,
        f"it computes in bfloat16, not in {q.dtype}": q.dtype not in (jnp.bfloat16, jnp.float16),
        f"head width {K} is no multiple of 8 up to {max_head_width}": K % 8 != 0
        or max_head_width < K,
        f"it needs even numbers of queries and keys, not {T} and {S}": (T % 2 or S % 2) != 0,
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def cudnn(q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod) -> jax.Array:
    """As `dense`, with masks and biases rounded to the dtype of q. Returns [B T H K]."""
    kwargs, rest = _split_mask(score_mod)
    bias = None if score_mod.bias is None else score_mod.bias(q_coords, k_coords).astype(q.dtype)
    mask = rest(q_coords, k_coords)[:, None] if rest else None
    return jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=score_mod.scale, implementation="cudnn", **kwargs
    )


def _split_mask(score_mod: ScoreMod) -> tuple[dict, Mask | None]:
    """Split the mask: (keyword arguments for the part by row index, the remaining mask)."""
    masks = score_mod.index_masks
    if Causal() not in masks:
        return {}, score_mod.mask
    kwargs: dict[str, Any] = dict(is_causal=True)
    lookback = find_lookback(masks)
    if lookback is not None:
        # (before, after); cuDNN supports no window after the query.
        kwargs["local_window_size"] = (lookback, 0)
    rest = masks - select_windows(masks) - {Causal(), OneSegment()}
    return kwargs, reduce(and_, rest) if rest else None
