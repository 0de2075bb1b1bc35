"""The architectures of llama.cpp: how each names tensors and settings, against transformers.

A `Row` is one tensor of both worlds, with the rearrangement between them; {} is the layer, and the
second {} the expert. A `Key` is one setting. What differs more is in `read_extra`, which completes
a config that was read, and `write_extra`, which completes metadata to write (both in gguf_extras).

    llama            rotates neighbors (2i, 2i + 1) where transformers rotates halves: q and k are
                     permuted; the others rotate halves
    gemma 1, 2, 3    store norm scales, where transformers stores scales minus 1
    gptneox, bloom   fuse [3 H K], where transformers fuses [H 3 K]
    gpt2             has linear maps [out in], where transformers has [in out]
    mamba            stores A, where transformers stores log(-A)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.interop import gguf_extras as extras
from jaxgpt.interop.gguf_extras import Config, count_heads

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
FUSED = Layout(_read_fused, _write_fused)
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
    gguf: str
    hf: str
    layout: Layout


def _linear(gguf: str, hf: str, layout: Layout = KEEP) -> list[Row]:
    """Make the rows of a weight and of a bias, which may be absent."""
    return [Row(f"{gguf}.{leaf}", f"{hf}.{leaf}", layout) for leaf in ("weight", "bias")]


def _layers(hf: str, names: dict[str, str], layouts: dict[str, Layout], gguf: str = "blk") -> list:
    """Make the rows of what is in every layer: names of GGUF to names of transformers."""
    return [
        row
        for name, hf_name in names.items()
        for row in _linear(f"{gguf}.{{}}.{name}", f"{hf}.{hf_name}", layouts.get(name, KEEP))
    ]


class Key(NamedTuple):
    """A setting: its key in GGUF without the architecture, in transformers, and its type."""

    gguf: str
    hf: str
    type: str = "uint32"
    default: Any = None  # if the file does not have it; a str is the key that it follows


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        model_types: the ones of transformers that it computes; files are read as the first.
        kind: the class of transformers.
        rows: all tensors that it may have.
        keys: settings that are numbers of both worlds.
        fixed: settings that it computes in one way only: the values of transformers that mean so;
            the first is what reading gives.
        read_extra: (config, header) completes the config.
        write_extra: (config, tensors) gives more metadata.
        dropped: beginnings of the names of tensors that it has no place for.
        write_factor: (config, tensor) gives what to multiply values with when they are written.
        skipped: a part of the names in transformers that a model of this config does not have.
    """

    name: str
    model_types: tuple[str, ...]
    kind: str
    rows: list[Row]
    keys: tuple[Key, ...]
    fixed: dict[str, tuple] = field(default_factory=dict)
    read_extra: Callable[..., None] = lambda config, header: None
    write_extra: Callable[..., dict] = lambda config, tensors: {}
    dropped: tuple[str, ...] = ()
    write_factor: Callable[[Config, str], float] = lambda config, name: 1.0
    skipped: Callable[[Config], str] = lambda config: ""


def expand(architecture: Architecture, layers: int) -> Iterator[Row]:
    """Yield the rows of a model, with the number of the layer in place of the first {}."""
    for row in architecture.rows:
        if "{}" in row.gguf:
            for layer in map(str, range(layers)):
                yield Row(
                    row.gguf.replace("{}", layer, 1), row.hf.replace("{}", layer, 1), row.layout
                )
        else:
            yield row


# --- settings ----------------------------------------------------------------------------------

_SIZES = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
)
_LAYER_NORM = Key("attention.layer_norm_epsilon", "layer_norm_eps", "float32")
_ROTARY = (
    *_SIZES,
    Key("attention.head_count_kv", "num_key_value_heads", default="num_attention_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"),
    Key("attention.key_length", "head_dim", default="hidden_size/num_attention_heads"),
)
_GEMMA_ACTIVATION = ("gelu_pytorch_tanh", "gelu", None)  # Gemma 1's "gelu" meant tanh
_SILU = {"hidden_act": ("silu",)}

# --- tensors -----------------------------------------------------------------------------------

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    **_POST_NORM,
}


def _decoder(*names: dict[str, str], norm: Layout = KEEP, **layouts: Layout) -> list[Row]:
    """Make the rows of a decoder that is named as Llama is."""
    names_of_layer = {gguf: hf for part in names for gguf, hf in part.items()}
    scales = {name: norm for name in names_of_layer if name.endswith("norm")}
    return [
        *_linear("token_embd", "model.embed_tokens"),
        *_linear("output_norm", "model.norm", norm),
        *_linear("output", "lm_head"),
        *_layers("model.layers.{}", names_of_layer, scales | layouts),
    ]


_EXPERTS = "model.layers.{}.block_sparse_moe.experts.{}"
_MIXTRAL = [
    Row("blk.{}.ffn_gate_inp.weight", "model.layers.{}.block_sparse_moe.gate.weight", KEEP),
    *(
        Row(f"blk.{{}}.ffn_{name}{ending}.weight", f"{_EXPERTS}.{hf_name}.weight", KEEP)
        for name, hf_name in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        for ending in ("_exps", ".{}")  # stacked, and in files of before April 2024 apart
    ),
]
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GPT2_MAPS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_BERT_LAYER = {
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
        *_linear(f"{gguf}.output_norm", f"{hf}.final_layer_norm"),
        *_linear(f"{gguf}.blk.{{}}.attn_rel_b", bias),
        *_layers(f"{hf}.block.{{}}", names, {}, f"{gguf}.blk"),
        # The only map of a plain feed-forward is "wi", and the second of a gated one "wi_1".
        *_linear(f"{gguf}.blk.{{}}.ffn_up", f"{hf}.block.{{}}.{wide}.wi_1"),
        *_linear(f"{gguf}.blk.{{}}.ffn_up", f"{hf}.block.{{}}.{wide}.wi"),
    ]


_T5 = [
    *_linear("token_embd", "shared"),
    *_linear("output", "lm_head"),
    *_t5_layers("enc", "encoder", 1),
    *_t5_layers(
        "dec",
        "decoder",
        2,
        cross_attn_norm="layer.1.layer_norm",
        **{f"cross_attn_{x}": f"layer.1.EncDecAttention.{x}" for x in "qkvo"},
    ),
]
_MAMBA_LAYER = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_out": "mixer.out_proj",
}

# --- architectures -----------------------------------------------------------------------------

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            ("llama", "mistral", "mixtral"),
            "LlamaForCausalLM",
            _decoder(_PRE_NORM, _ATTENTION, _GATED, attn_q=PERMUTE_Q, attn_k=PERMUTE_K) + _MIXTRAL,
            _ROTARY,
            _SILU,
            extras.read_llama,
            extras.write_llama,
        ),
        Architecture(
            "qwen2",
            ("qwen2",),
            "Qwen2ForCausalLM",
            _decoder(_PRE_NORM, _ATTENTION, _GATED),
            _ROTARY,
            _SILU,
            extras.read_rotary,
            extras.write_rotary,
        ),
        Architecture(
            "qwen3",
            ("qwen3",),
            "Qwen3ForCausalLM",
            _decoder(_PRE_NORM, _ATTENTION, _QK_NORM, _GATED),
            _ROTARY,
            _SILU | {"attention_bias": (False,)},
            extras.read_rotary,
            extras.write_rotary,
        ),
        Architecture(
            "olmo2",
            ("olmo2",),
            "Olmo2ForCausalLM",
            _decoder(_POST_NORM, _ATTENTION, _QK_NORM, _GATED),
            _ROTARY,
            _SILU | {"attention_bias": (False,)},
            extras.read_rotary,
            extras.write_rotary,
        ),
        Architecture(
            "gemma",
            ("gemma",),
            "GemmaForCausalLM",
            _decoder(_PRE_NORM, _ATTENTION, _GATED, norm=MINUS_ONE),
            _ROTARY,
            {"hidden_act": _GEMMA_ACTIVATION, "hidden_activation": _GEMMA_ACTIVATION},
            extras.read_gemma,
            extras.write_gemma,
        ),
        Architecture(
            "gemma2",
            ("gemma2",),
            "Gemma2ForCausalLM",
            _decoder(_SANDWICH, _ATTENTION, _GATED, norm=MINUS_ONE),
            (
                *_ROTARY,
                Key("attention.sliding_window", "sliding_window", default=4096),
                Key("attn_logit_softcapping", "attn_logit_softcapping", "float32", 50.0),
                Key("final_logit_softcapping", "final_logit_softcapping", "float32", 30.0),
            ),
            {"hidden_activation": _GEMMA_ACTIVATION, "attention_bias": (False,)},
            extras.read_gemma,
            extras.write_gemma,
            write_factor=extras.scale_gemma_queries,
        ),
        Architecture(
            "gemma3",
            ("gemma3_text", "gemma3"),
            "Gemma3ForCausalLM",
            _decoder(_SANDWICH, _ATTENTION, _QK_NORM, _GATED, norm=MINUS_ONE),
            (*_ROTARY, Key("attention.sliding_window", "sliding_window")),
            {"hidden_activation": _GEMMA_ACTIVATION, "attention_bias": (False,)},
            extras.read_gemma,
            extras.write_gemma,
            write_factor=extras.scale_gemma_queries,
        ),
        Architecture(
            "gpt2",
            ("gpt2",),
            "GPT2LMHeadModel",
            [
                *_linear("token_embd", "transformer.wte"),
                *_linear("position_embd", "transformer.wpe"),
                *_linear("output_norm", "transformer.ln_f"),
                *_linear("output", "lm_head"),
                *_layers(
                    "transformer.h.{}",
                    {"attn_norm": "ln_1", "ffn_norm": "ln_2", **_GPT2_MAPS},
                    dict.fromkeys(_GPT2_MAPS, TRANSPOSE),
                ),
            ],
            (
                Key("block_count", "n_layer"),
                Key("context_length", "n_positions"),
                Key("embedding_length", "n_embd"),
                Key("feed_forward_length", "n_inner"),
                Key("attention.head_count", "n_head"),
                Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "float32"),
            ),
            {
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
        ),
        Architecture(
            "gptneox",
            ("gpt_neox",),
            "GPTNeoXForCausalLM",
            [
                *_linear("token_embd", "gpt_neox.embed_in"),
                *_linear("output_norm", "gpt_neox.final_layer_norm"),
                *_linear("output", "embed_out"),
                *_layers(
                    "gpt_neox.layers.{}",
                    {
                        name: hf_name.replace("self_attention", "attention")
                        for name, hf_name in _FUSED.items()
                    },
                    {"attn_qkv": FUSED},
                ),
            ],
            (*_SIZES, _LAYER_NORM, Key("use_parallel_residual", "use_parallel_residual", "bool")),
            {"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"), "attention_bias": (True,)},
            extras.read_gpt_neox,
            extras.write_gpt_neox,
        ),
        Architecture(
            "bloom",
            ("bloom",),
            "BloomForCausalLM",
            [
                *_linear("token_embd", "transformer.word_embeddings"),
                *_linear("token_embd_norm", "transformer.word_embeddings_layernorm"),
                *_linear("output_norm", "transformer.ln_f"),
                *_linear("output", "lm_head"),
                *_layers("transformer.h.{}", _FUSED, {"attn_qkv": FUSED}),
            ],
            (
                Key("block_count", "n_layer"),
                Key("embedding_length", "hidden_size"),
                Key("attention.head_count", "n_head"),
                Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "float32"),
                Key("context_length", "seq_length", default=2048),
            ),
            {"apply_residual_connection_post_layernorm": (False,)},
            extras.read_bloom,
            extras.write_bloom,
        ),
        Architecture(
            "mpt",
            ("mpt",),
            "MptForCausalLM",
            [
                *_linear("token_embd", "transformer.wte"),
                *_linear("output_norm", "transformer.norm_f"),
                *_linear("output", "lm_head"),
                *_layers(
                    "transformer.blocks.{}",
                    {
                        "attn_norm": "norm_1",
                        "attn_qkv": "attn.Wqkv",
                        "attn_output": "attn.out_proj",
                        "ffn_norm": "norm_2",
                        "ffn_up": "ffn.up_proj",
                        "ffn_down": "ffn.down_proj",
                    },
                    {},
                ),
            ],
            (
                Key("block_count", "n_layers"),
                Key("context_length", "max_seq_len"),
                Key("embedding_length", "d_model"),
                Key("attention.head_count", "n_heads"),
                Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "float32", 1e-5),
            ),
            {"no_bias": (True,), "logit_scale": (None,), "use_norm_bias": (False,)},
            extras.read_mpt,
            extras.write_mpt,
        ),
        Architecture(
            "bert",
            ("bert",),
            "BertModel",
            [
                *_linear("token_embd", "bert.embeddings.word_embeddings"),
                *_linear("position_embd", "bert.embeddings.position_embeddings"),
                *_linear("token_types", "bert.embeddings.token_type_embeddings"),
                *_linear("token_embd_norm", "bert.embeddings.LayerNorm"),
                *_layers("bert.encoder.layer.{}", _BERT_LAYER, {}),
                *_linear("cls", "bert.pooler.dense"),
                *_linear("cls.output", "classifier"),
            ],
            (*_SIZES, _LAYER_NORM),
            {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
            extras.read_bert,
            extras.write_bert,
            ("cls.predictions.", "cls.seq_relationship."),
        ),
        Architecture(
            "t5",
            ("t5",),
            "T5ForConditionalGeneration",
            _T5,
            (
                Key("block_count", "num_layers"),
                Key("decoder_block_count", "num_decoder_layers", default="num_layers"),
                Key("context_length", "n_positions", default=512),
                Key("embedding_length", "d_model"),
                Key("feed_forward_length", "d_ff"),
                Key("attention.head_count", "num_heads"),
                Key("attention.key_length", "d_kv"),
                Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", "float32"),
                Key("attention.relative_buckets_count", "relative_attention_num_buckets"),
                Key("decoder_start_token_id", "decoder_start_token_id", default=0),
            ),
            {"relative_attention_max_distance": (128,)},
            extras.read_t5,
            extras.write_t5,
            skipped=extras.skip_t5,
        ),
        Architecture(
            "mamba",
            ("mamba",),
            "MambaForCausalLM",
            [
                *_linear("token_embd", "backbone.embeddings"),
                *_linear("output_norm", "backbone.norm_f"),
                *_linear("output", "lm_head"),
                *_layers("backbone.layers.{}", _MAMBA_LAYER, {}),
                Row(
                    "blk.{}.ssm_conv1d.weight",
                    "backbone.layers.{}.mixer.conv1d.weight",
                    CONVOLUTION,
                ),
                Row("blk.{}.ssm_conv1d.bias", "backbone.layers.{}.mixer.conv1d.bias", KEEP),
                Row("blk.{}.ssm_a", "backbone.layers.{}.mixer.A_log", LOG_A),
                Row("blk.{}.ssm_d", "backbone.layers.{}.mixer.D", KEEP),
            ],
            (
                Key("block_count", "num_hidden_layers"),
                Key("embedding_length", "hidden_size"),
                Key("ssm.conv_kernel", "conv_kernel"),
                Key("ssm.inner_size", "intermediate_size"),
                Key("ssm.state_size", "state_size"),
                Key("ssm.time_step_rank", "time_step_rank"),
                Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", "float32"),
            ),
            {"hidden_act": ("silu",), "use_bias": (False,), "use_conv_bias": (True,)},
            extras.read_mamba,
            extras.write_mamba,
        ),
    )
}
