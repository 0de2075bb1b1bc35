"""The architectures of llama.cpp: their tensors (gguf_rows) and settings, against transformers.

A `Key` is one setting. What differs more than by its name is in `read_extra`, which completes a
config that was read, and `write_extra`, which completes metadata to write (gguf_extras).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxgpt.interop import gguf_extras as extras
from jaxgpt.interop.gguf_rope import read_rotary, write_rotary
from jaxgpt.interop.gguf_rows import (
    ATTENTION,
    BERT_LAYER,
    CONVOLUTION,
    FUSED_LAYER,
    FUSED_QKV,
    GATED,
    GPT2_MAPS,
    KEEP,
    LOG_A,
    MAMBA_LAYER,
    MINUS_ONE,
    MIXTRAL,
    PERMUTE_K,
    PERMUTE_Q,
    POST_NORM,
    PRE_NORM,
    QK_NORM,
    SANDWICH,
    T5,
    TRANSPOSE,
    Row,
    make_decoder,
    make_layers,
    make_linear,
)
from jaxgpt.interop.gguf_settings import Config


class Key(NamedTuple):
    """A setting: its key in GGUF without the architecture, in transformers, and its type."""

    gguf: str
    hf: str
    type: str = "uint32"
    default: Callable[[Config], Any] | None = None  # if it is not there, from the keys before it


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
        complete: (config, tensors) adds tensors that must be written.
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
    complete: Callable[[Config, dict[str, Any]], None] = lambda config, tensors: None
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


def _divide_width(config: Config) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


_LAYER_NORM = Key("attention.layer_norm_epsilon", "layer_norm_eps", "float32")
_ROTARY = (
    *_SIZES,
    Key(
        "attention.head_count_kv",
        "num_key_value_heads",
        default=lambda config: config["num_attention_heads"],
    ),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32"),
    Key("attention.key_length", "head_dim", default=_divide_width),
)
_GEMMA_ACTIVATION = ("gelu_pytorch_tanh", "gelu", None)  # Gemma 1's "gelu" meant tanh
_SILU = {"hidden_act": ("silu",)}

# --- architectures -----------------------------------------------------------------------------

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "llama",
            ("llama", "mistral", "mixtral"),
            "LlamaForCausalLM",
            make_decoder(PRE_NORM, ATTENTION, GATED, attn_q=PERMUTE_Q, attn_k=PERMUTE_K) + MIXTRAL,
            _ROTARY,
            _SILU,
            extras.read_llama,
            extras.write_llama,
        ),
        Architecture(
            "qwen2",
            ("qwen2",),
            "Qwen2ForCausalLM",
            make_decoder(PRE_NORM, ATTENTION, GATED),
            _ROTARY,
            _SILU,
            read_rotary,
            write_rotary,
        ),
        Architecture(
            "qwen3",
            ("qwen3",),
            "Qwen3ForCausalLM",
            make_decoder(PRE_NORM, ATTENTION, QK_NORM, GATED),
            _ROTARY,
            _SILU | {"attention_bias": (False,)},
            read_rotary,
            write_rotary,
        ),
        Architecture(
            "olmo2",
            ("olmo2",),
            "Olmo2ForCausalLM",
            make_decoder(POST_NORM, ATTENTION, QK_NORM, GATED),
            _ROTARY,
            _SILU | {"attention_bias": (False,)},
            read_rotary,
            write_rotary,
        ),
        Architecture(
            "gemma",
            ("gemma",),
            "GemmaForCausalLM",
            make_decoder(PRE_NORM, ATTENTION, GATED, norm=MINUS_ONE),
            _ROTARY,
            {"hidden_act": _GEMMA_ACTIVATION, "hidden_activation": _GEMMA_ACTIVATION},
            extras.read_gemma,
            extras.write_gemma,
        ),
        Architecture(
            "gemma2",
            ("gemma2",),
            "Gemma2ForCausalLM",
            make_decoder(SANDWICH, ATTENTION, GATED, norm=MINUS_ONE),
            (
                *_ROTARY,
                Key("attention.sliding_window", "sliding_window", default=lambda _: 4096),
                Key("attn_logit_softcapping", "attn_logit_softcapping", "float32", lambda _: 50.0),
                Key(
                    "final_logit_softcapping", "final_logit_softcapping", "float32", lambda _: 30.0
                ),
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
            make_decoder(SANDWICH, ATTENTION, QK_NORM, GATED, norm=MINUS_ONE),
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
                *make_linear("token_embd", "transformer.wte"),
                *make_linear("position_embd", "transformer.wpe"),
                *make_linear("output_norm", "transformer.ln_f"),
                *make_linear("output", "lm_head"),
                *make_layers(
                    "transformer.h.{}",
                    {"attn_norm": "ln_1", "ffn_norm": "ln_2", **GPT2_MAPS},
                    dict.fromkeys(GPT2_MAPS, TRANSPOSE),
                ),
            ],
            (
                Key("block_count", "n_layer"),
                Key("context_length", "n_positions"),
                Key("embedding_length", "n_embd"),
                Key("feed_forward_length", "n_inner", default=lambda config: 4 * config["n_embd"]),
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
                *make_linear("token_embd", "gpt_neox.embed_in"),
                *make_linear("output_norm", "gpt_neox.final_layer_norm"),
                *make_linear("output", "embed_out"),
                *make_layers(
                    "gpt_neox.layers.{}",
                    {
                        name: hf_name.replace("self_attention", "attention")
                        for name, hf_name in FUSED_LAYER.items()
                    },
                    {"attn_qkv": FUSED_QKV},
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
                *make_linear("token_embd", "transformer.word_embeddings"),
                *make_linear("token_embd_norm", "transformer.word_embeddings_layernorm"),
                *make_linear("output_norm", "transformer.ln_f"),
                *make_linear("output", "lm_head"),
                *make_layers("transformer.h.{}", FUSED_LAYER, {"attn_qkv": FUSED_QKV}),
            ],
            (
                Key("block_count", "n_layer"),
                Key("embedding_length", "hidden_size"),
                Key("attention.head_count", "n_head"),
                Key("attention.layer_norm_epsilon", "layer_norm_epsilon", "float32"),
                Key("context_length", "seq_length", default=lambda _: 2048),
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
                *make_linear("token_embd", "transformer.wte"),
                *make_linear("output_norm", "transformer.norm_f"),
                *make_linear("output", "lm_head"),
                *make_layers(
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
                Key(
                    "attention.layer_norm_epsilon", "layer_norm_epsilon", "float32", lambda _: 1e-5
                ),
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
                *make_linear("token_embd", "bert.embeddings.word_embeddings"),
                *make_linear("position_embd", "bert.embeddings.position_embeddings"),
                *make_linear("token_types", "bert.embeddings.token_type_embeddings"),
                *make_linear("token_embd_norm", "bert.embeddings.LayerNorm"),
                *make_layers("bert.encoder.layer.{}", BERT_LAYER, {}),
                *make_linear("cls", "bert.pooler.dense"),
                *make_linear("cls.output", "classifier"),
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
            T5,
            (
                Key("block_count", "num_layers"),
                Key(
                    "decoder_block_count",
                    "num_decoder_layers",
                    default=lambda config: config["num_layers"],
                ),
                Key("context_length", "n_positions", default=lambda _: 512),
                Key("embedding_length", "d_model"),
                Key("feed_forward_length", "d_ff"),
                Key("attention.head_count", "num_heads"),
                Key("attention.key_length", "d_kv"),
                Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", "float32"),
                Key("attention.relative_buckets_count", "relative_attention_num_buckets"),
                Key("decoder_start_token_id", "decoder_start_token_id", default=lambda _: 0),
            ),
            {"relative_attention_max_distance": (128,)},
            extras.read_t5,
            extras.write_t5,
            write_factor=extras.scale_t5_head,
            complete=extras.add_t5_head,
            skipped=extras.skip_t5,
        ),
        Architecture(
            "mamba",
            ("mamba",),
            "MambaForCausalLM",
            [
                *make_linear("token_embd", "backbone.embeddings"),
                *make_linear("output_norm", "backbone.norm_f"),
                *make_linear("output", "lm_head"),
                *make_layers("backbone.layers.{}", MAMBA_LAYER, {}),
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
