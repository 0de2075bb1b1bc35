"""Tensors of llama.cpp's architectures against those of transformers, and what lies between.

A `Row` is one tensor of both worlds, with the rearrangement between them; {} is the layer, and the
second {} the expert.

    llama            rotates neighbors (2i, 2i + 1) where transformers rotates halves: q and k are
                     permuted; the others rotate halves
    gemma 1, 2, 3    store norm scales, where transformers stores scales minus 1
    gptneox, bloom   fuse [3 H K], where transformers fuses [H 3 K]
    gpt2             has linear maps [out in], where transformers has [in out]
    mamba            stores A, where transformers stores log(-A)
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxgpt.interop.gguf_settings import Config, count_heads

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A rearrangement of one tensor and its inverse: (array, config) -> array.

    Attributes:
        read: from GGUF to transformers.
        write: from transformers to GGUF.
        read_shape, write_shape: what they do to the shape.
        is_exact: whether values stay as they are; others are computed in float32.
    """

    read: Callable[[np.ndarray, Config], np.ndarray]
    write: Callable[[np.ndarray, Config], np.ndarray]
    read_shape: Callable[[Shape], Shape] = lambda shape: shape
    write_shape: Callable[[Shape], Shape] = lambda shape: shape
    is_exact: bool = True


def _swap(x: np.ndarray, leading: tuple[int, int, int]) -> np.ndarray:
    """Split the first dimension and swap its outer two parts, or its inner two."""
    return x.reshape(*leading, *x.shape[1:])


def _permute(name: str) -> Layout:
    """Make the layout of q or k where RoPE rotates neighbors; `name` counts the heads."""

    def read(x: np.ndarray, config: Config) -> np.ndarray:  # [H K/2 2 in] -> [H 2 K/2 in]
        parts = _swap(x, (count_heads(config, name), -1, 2))
        return parts.swapaxes(1, 2).reshape(x.shape)

    def write(x: np.ndarray, config: Config) -> np.ndarray:
        heads = count_heads(config, name)
        parts = _swap(x, (heads, 2, x.shape[0] // heads // 2))
        return parts.swapaxes(1, 2).reshape(x.shape)

    return Layout(read, write)


def _read_fused(x: np.ndarray, config: Config) -> np.ndarray:  # [3 H K in] -> [H 3 K in]
    heads = count_heads(config)
    return _swap(x, (3, heads, x.shape[0] // heads // 3)).swapaxes(0, 1).reshape(x.shape)


def _write_fused(x: np.ndarray, config: Config) -> np.ndarray:
    heads = count_heads(config)
    return _swap(x, (heads, 3, x.shape[0] // heads // 3)).swapaxes(0, 1).reshape(x.shape)


def _flip(shape: Shape) -> Shape:
    return shape[::-1]


KEEP = Layout(lambda x, _: x, lambda x, _: x)
PERMUTE_Q = _permute("num_attention_heads")
PERMUTE_K = _permute("num_key_value_heads")
FUSED_QKV = Layout(_read_fused, _write_fused)
MINUS_ONE = Layout(lambda x, _: x - 1, lambda x, _: x + 1, is_exact=False)
TRANSPOSE = Layout(lambda x, _: x.T, lambda x, _: x.T, _flip, _flip)
LOG_A = Layout(lambda x, _: np.log(-x), lambda x, _: -np.exp(x), is_exact=False)
CONVOLUTION = Layout(  # [C 4] <-> [C 1 4]
    lambda x, _: x[:, None],
    lambda x, _: x[:, 0],
    lambda shape: (shape[0], 1, shape[1]),
    lambda shape: (shape[0], shape[2]),
)


class Row(NamedTuple):
    """One tensor: its names in GGUF and in transformers, and what lies between."""

    gguf: str
    hf: str
    layout: Layout


def make_linear(gguf: str, hf: str, layout: Layout = KEEP) -> list[Row]:
    """Make the rows of a weight and of a bias, which may be absent."""
    return [Row(f"{gguf}.{leaf}", f"{hf}.{leaf}", layout) for leaf in ("weight", "bias")]


def make_layers(
    hf: str, names: dict[str, str], layouts: dict[str, Layout], gguf: str = "blk"
) -> list[Row]:
    """Make the rows of what is in every layer: names of GGUF to names of transformers."""
    return [
        row
        for name, hf_name in names.items()
        for row in make_linear(f"{gguf}.{{}}.{name}", f"{hf}.{hf_name}", layouts.get(name, KEEP))
    ]


ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GATED = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **POST_NORM,
}


def make_decoder(*names: dict[str, str], norm: Layout = KEEP, **layouts: Layout) -> list[Row]:
    """Make the rows of a decoder that is named as Llama is."""
    names_of_layer = {gguf: hf for part in names for gguf, hf in part.items()}
    scales = {name: norm for name in names_of_layer if name.endswith("norm")}
    return [
        *make_linear("token_embd", "model.embed_tokens"),
        *make_linear("output_norm", "model.norm", norm),
        *make_linear("output", "lm_head"),
        *make_layers("model.layers.{}", names_of_layer, scales | layouts),
    ]


_EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}"
MIXTRAL = [
    Row("blk.{}.ffn_gate_inp.weight", "model.layers.{}.block_sparse_moe.gate.weight", KEEP),
    *(
        Row(f"blk.{{}}.ffn_{name}{ending}.weight", f"{_EXPERTS}.{hf_name}.weight", KEEP)
        for name, hf_name in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        for ending in ("_exps", ".{}")  # stacked, and in files of before April 2024 apart
    ),
]
FUSED_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
GPT2_MAPS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
BERT_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}


def _t5_layers(gguf: str, hf: str, feed_forward: int, **cross: str) -> list[Row]:
    own, wide = "layer.0.SelfAttention", f"layer.{feed_forward}.DenseReluDense"
    bias = f"{hf}.block.{{}}.{own}.relative_attention_bias"
    names = {
        "attn_norm": "layer.0.layer_norm",
        **{f"attn_{x}": f"{own}.{x}" for x in "qkvo"},
        **cross,
        "ffn_norm": f"layer.{feed_forward}.layer_norm",
        "ffn_gate": f"{wide}.wi_0",
        "ffn_down": f"{wide}.wo",
    }
    return [
        *make_linear(f"{gguf}.output_norm", f"{hf}.final_layer_norm"),
        *make_linear(f"{gguf}.blk.{{}}.attn_rel_b", bias),
        *make_layers(f"{hf}.block.{{}}", names, {}, f"{gguf}.blk"),
        # The only map of a plain feed-forward is "wi", and the second of a gated one "wi_1".
        *make_linear(f"{gguf}.blk.{{}}.ffn_up", f"{hf}.block.{{}}.{wide}.wi_1"),
        *make_linear(f"{gguf}.blk.{{}}.ffn_up", f"{hf}.block.{{}}.{wide}.wi"),
    ]


T5 = [
    *make_linear("token_embd", "shared"),
    *make_linear("output", "lm_head"),
    *_t5_layers("enc", "encoder", 1),
    *_t5_layers(
        "dec",
        "decoder",
        2,
        cross_attn_norm="layer.1.layer_norm",
        **{f"cross_attn_{x}": f"layer.1.EncDecAttention.{x}" for x in "qkvo"},
    ),
]
MAMBA_LAYER = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_out": "mixer.out_proj",
}
