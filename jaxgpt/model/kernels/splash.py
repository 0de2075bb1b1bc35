"""Splash attention, the Pallas kernel for TPUs that comes with JAX.

It keeps blocks of weights in on-chip memory, as `blockwise` does in blocks, and skips blocks that a
static mask hides: causal masks and windows are passed as masks over row indices, documents as
segment ids. JAX's kernel is imported where it is used: Pallas takes a twentieth of the time of all
imports.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.backend import get_platform
from jaxgpt.model.kernels.score import ScoreMod, find_lookback, select_windows, split_conjunction
from jaxgpt.model.layers import ATTENTION_OUTPUT
from jaxgpt.model.masks import DOCUMENT_MASKS, Causal, Coords, Mask, OneSegment

LANES = 128  # of a TPU's vector registers; the number of tokens per block is a multiple of it


def explain_unavailable(q, k, score_mod: ScoreMod) -> str | None:
    """Return why `splash` cannot run here, or None."""
    if get_platform() != "tpu":
        return "there is no TPU here"
    return explain_unsupported(q, k, score_mod)


def explain_unsupported(q, k, score_mod: ScoreMod) -> str | None:
    """Return why `splash` does not support this on a TPU either, or None."""
    if score_mod.bias is not None:
        return UNSUPPORTED_BIAS
    if score_mod.sinks is not None:
        return UNSUPPORTED_SINKS
    if not score_mod.is_self:
        return "queries and keys are not the same tokens, as when decoding"
    masks = score_mod.index_masks
    if not masks or not masks <= {*DOCUMENT_MASKS.values(), Causal(), *select_windows(masks)}:
        return "it supports the patterns full and window only"
    return None


UNSUPPORTED_BIAS = "the TPU's kernel supports no bias"
UNSUPPORTED_SINKS = "the TPU's kernel supports no attention sinks in every version of JAX"


def splash(
    q, k, v, q_coords: Coords, k_coords: Coords, score_mod: ScoreMod, interpret: bool = False
) -> jax.Array:
    """As `dense` for queries with a visible key. Returns [B T H K].

    Args:
        interpret: emulate the kernel on any device, for tests.
    """
    T = q.shape[1]
    fill = [(0, 0), (0, -T % LANES)]  # to whole blocks; the padding has segment id 0
    q, k, v = (jnp.pad(x, [*fill, (0, 0), (0, 0)]) for x in (score_mod.scale_queries(q), k, v))
    is_one_causal_segment = score_mod.index_masks >= {OneSegment(), Causal()}
    segment_ids = None if is_one_causal_segment else jnp.pad(q_coords.segment_ids, fill)
    return _attend_rows(q, k, v, segment_ids, score_mod, interpret)[:, :T]


def _attend_rows(q, k, v, segment_ids, score_mod: ScoreMod, interpret: bool) -> jax.Array:
    """q [B T H K], k and v [B T G K], segment_ids [B T] or None -> [B T H K]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, H = q.shape[1:3]
    masks = pallas.MultiHeadMask([_make_pallas_mask(score_mod.mask, T)] * H)
    # Larger blocks are fewer, but T must be a multiple of their size.
    block = next(size for size in (512, 256, LANES) if T % size == 0)
    kernel = pallas.make_splash_mha_single_device(
        masks,
        block_sizes=pallas.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=score_mod.softcap,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )

    def attend_row(q, k, v, segment_ids):  # [H T K], [G T K], [G T K], [T]
        segments = None if segment_ids is None else pallas.SegmentIds(segment_ids, segment_ids)
        return kernel(q, k, v, segment_ids=segments)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(attend_row)(q, k, v, segment_ids).swapaxes(1, 2)


def _make_pallas_mask(mask: Mask, T: int) -> Any:
    """Return the same mask over row indices, without documents."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    lookback = find_lookback(split_conjunction(mask))
    if Causal() in split_conjunction(mask):
        if lookback is None:
            return pallas.CausalMask((T, T))
        return pallas.LocalMask((T, T), (lookback, 0), 0)
    if lookback is None:
        return pallas.FullMask((T, T))
    return pallas.LocalMask((T, T), (lookback, lookback), 0)
