"""Splash attention, the Pallas kernel for TPUs that comes with JAX.

It keeps weights in the chip's own memory as `blockwise` does in blocks, and does not visit blocks
that a mask known beforehand hides: causality and windows are told to it as masks over the places in
the row, documents as segments. JAX's kernel is imported where it is used: Pallas takes a twentieth
of the time of all imports.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model.kernels.score import Score, behind, parts, windows
from jaxgpt.model.layers import ATTENDED
from jaxgpt.model.masks import DOCUMENTS, Causal, Coords, Mask, OneDocument
from jaxgpt.sharding import platform

LANES = 128  # a block of tokens is a multiple of a TPU's vector registers


def obstacle(q, k, score: Score) -> str | None:
    """Why `splash` can not do it here, or None."""
    if platform() != "tpu":
        return "there is no TPU here"
    return misfit(q, k, score)


def misfit(q, k, score: Score) -> str | None:
    """Why `splash` could not do it on a TPU either, or None."""
    if score.bias is not None:
        return LIMIT
    if not score.is_self:
        return "queries and keys are not the same tokens, as when decoding"
    masks = score.by_place
    if not masks or not masks <= {*DOCUMENTS.values(), Causal(), *windows(masks)}:
        return "it knows the patterns full and window only"
    return None


LIMIT = "the TPU's kernel takes no bias"


def splash(q, k, v, q_at: Coords, k_at: Coords, score: Score, interpret: bool = False) -> jax.Array:
    """As `dense` for tokens that see something. Returns [B T H K].

    Args:
        interpret: run step by step on any device, for tests.
    """
    T = q.shape[1]
    fill = [(0, 0), (0, -T % LANES)]  # whole blocks; what is appended is in document 0
    q, k, v = (jnp.pad(x, [*fill, (0, 0), (0, 0)]) for x in (score.queries(q), k, v))
    document = None if score.by_place >= {OneDocument(), Causal()} else jnp.pad(q_at.document, fill)
    return _rows(q, k, v, document, score, interpret)[:, :T]


def _rows(q, k, v, document, score: Score, interpret: bool) -> jax.Array:
    """q [B T H K], k and v [B T G K], document [B T] or None -> [B T H K]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, H = q.shape[1:3]
    masks = pallas.MultiHeadMask([_mask(score.mask, T)] * H)
    # Larger blocks are fewer, but there must be a whole number of them.
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
        attn_logits_soft_cap=score.softcap,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )

    def row(q, k, v, document):  # [H T K], [G T K], [G T K], [T]
        segments = None if document is None else pallas.SegmentIds(document, document)
        return kernel(q, k, v, segment_ids=segments)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, document).swapaxes(1, 2)


def _mask(mask: Mask, T: int) -> Any:
    """The same mask over places in a row, without documents."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    back = behind(parts(mask))
    if Causal() in parts(mask):
        if back is None:
            return pallas.CausalMask((T, T))
        return pallas.LocalMask((T, T), (back, 0), 0)
    if back is None:
        return pallas.FullMask((T, T))
    return pallas.LocalMask((T, T), (back, back), 0)
