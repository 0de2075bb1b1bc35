"""How the arrays of transformers are laid out, against jaxgpt's: pairs of inverse functions.

Linear maps of torch are [out in], and GPT-2's Conv1D are [in out] as in jaxgpt; heads are separate
dimensions here. The halves that RoPE rotates have the same layout in both. Every function takes a
weight or its bias, (array, config) -> array, of NumPy or JAX. All are affine, so that they map
gradients as well (without their constants).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import ModelConfig

Rearrange = Callable[[Any, ModelConfig], Any]


class Layout(NamedTuple):
    """One rearrangement in both directions."""

    read: Rearrange  # transformers -> jaxgpt
    write: Rearrange  # jaxgpt -> transformers


class Fusion(NamedTuple):
    """How several arrays of jaxgpt lie in one of transformers; each has a layout of its own."""

    take: Callable[[Any, int, ModelConfig], Any]
    join: Callable[[Sequence[Any], ModelConfig], Any]


# --- of one array ------------------------------------------------------------------------------

KEEP = Layout(lambda x, cfg: x, lambda x, cfg: x)
TRANSPOSE = Layout(lambda x, cfg: x.T, lambda x, cfg: x.T)  # "D>F", and "F" unchanged
TRANSPOSE_EXPERTS = Layout(lambda x, cfg: x.swapaxes(1, 2), lambda x, cfg: x.swapaxes(1, 2))


def _split_columns(x, cfg: ModelConfig):  # [in HK] -> "D>HK"; [HK] -> "HK"
    return x.reshape(*x.shape[:-1], -1, cfg.sizes["K"])


def _merge_columns(x, cfg: ModelConfig):
    return x.reshape(*x.shape[:-2], -1)


def _split_rows(x, cfg: ModelConfig):  # [HK out] -> "HK>D"; "D" unchanged
    return x if x.ndim == 1 else x.reshape(-1, cfg.sizes["K"], x.shape[-1])


def _merge_rows(x, cfg: ModelConfig):
    return x if x.ndim == 1 else x.reshape(-1, x.shape[-1])


SPLIT_HEADS_CONV1D = Layout(_split_columns, _merge_columns)
SPLIT_HEADS = Layout(
    lambda x, cfg: _split_columns(x.T, cfg), lambda x, cfg: _merge_columns(x, cfg).T
)
MERGE_HEADS_CONV1D = Layout(_split_rows, _merge_rows)
MERGE_HEADS = Layout(lambda x, cfg: _split_rows(x.T, cfg), lambda x, cfg: _merge_rows(x, cfg).T)


def _read_pairs(x, cfg: ModelConfig):
    y = _split_columns(x.T, cfg)
    return np.concatenate([y[..., ::2], y[..., 1::2]], axis=-1)


def _write_pairs(x, cfg: ModelConfig):
    halves = np.split(np.asarray(x), 2, axis=-1)
    return _merge_columns(np.stack(halves, axis=-1).reshape(x.shape), cfg).T


# Where RoPE rotates the channels (2i, 2i + 1) and not (i, i + K/2): Llama 4.
SPLIT_HEADS_OF_PAIRS = Layout(_read_pairs, _write_pairs)


def _has_whole_scales(cfg: ModelConfig) -> bool:
    return cfg.norm == "rms"


# Gemma stores scales minus 1, as the norm "rms_plus_one"; the norm "rms" has the whole scale.
GEMMA_SCALE = Layout(
    lambda x, cfg: x + 1 if _has_whole_scales(cfg) else x,
    lambda x, cfg: x - 1 if _has_whole_scales(cfg) else x,
)


def _write_after_two_rows(x, cfg: ModelConfig):
    return np.concatenate([np.zeros((2, x.shape[1]), x.dtype), x])


# BART does not use the first two of its positions.
SKIP_TWO_ROWS = Layout(lambda x, cfg: x[2:], _write_after_two_rows)

# A depthwise Conv1d, [I 1 W] -> "WI".
TRANSPOSE_TAPS = Layout(lambda x, cfg: x[:, 0].T, lambda x, cfg: x.T[:, None])


# --- of several in one -------------------------------------------------------------------------


def _make_fusion(count: int, axis: int) -> Fusion:
    def take(x, i, cfg: ModelConfig):
        return np.split(x, count, axis=axis)[i]

    return Fusion(take, lambda parts, cfg: np.concatenate(parts, axis=axis))


THIRDS = _make_fusion(3, 0)  # q, k, v in [3HK in]
THIRDS_CONV1D = _make_fusion(3, -1)  # [in 3HK]
HALVES = _make_fusion(2, 0)  # [2I in]
HALVES_OF_EXPERTS = _make_fusion(2, 1)  # gate, up in [E 2F D]
HALVES_OF_COLUMNS = _make_fusion(2, 2)  # gate, up in [E D 2F]


def _take_third_of_heads(x, i, cfg: ModelConfig):
    rest = x.shape[1:]
    return x.reshape(-1, 3, cfg.sizes["K"], *rest)[:, i].reshape(-1, *rest)


def _join_thirds_of_heads(parts, cfg: ModelConfig):
    rest = parts[0].shape[1:]
    heads = [x.reshape(-1, cfg.sizes["K"], *rest) for x in parts]
    return np.stack(heads, axis=1).reshape(-1, *rest)


THIRDS_OF_HEADS = Fusion(_take_third_of_heads, _join_thirds_of_heads)  # [H3K in]


def _take_rank_B_C(x, i, cfg: ModelConfig):  # noqa: N802
    R, Z = cfg.sizes["R"], cfg.sizes["Z"]
    return np.split(x, [R, R + Z])[i]


RANK_B_C = Fusion(_take_rank_B_C, lambda parts, cfg: np.concatenate(parts))  # [R+Z+Z in]
