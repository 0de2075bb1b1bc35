"""What is particular to an architecture of llama.cpp: settings beyond the table of keys.

A `read_` function completes a config of transformers from the settings of a GGUF file; a `write_`
function returns settings to write, and refuses a model that llama.cpp would compute otherwise.
Where llama.cpp derives a value that transformers stores, reading gives the value that it derives,
and writing refuses others.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxgpt.interop.gguf_format import Value
from jaxgpt.interop.gguf_rope import (
    WINDOW_PERIODS,
    find_rope_parameters,
    read_rotary,
    read_scaling,
    write_rotary,
)
from jaxgpt.interop.gguf_settings import Config, Settings, make_float, make_uint
from jaxgpt.settings import ConfigError

_POOLING_CLASSES = 4  # the pooling type of llama.cpp that computes classes
# Layers of the models for which llama.cpp divides logits by another number than √K.
_WIDE_QUERIES = {"gemma2": 46, "gemma3_text": 62, "gemma3": 62}


# --- Llama and Gemma ---------------------------------------------------------------------------


def read_llama(config: Config, settings: Settings) -> None:
    """Read a Llama, or a Mixtral if it has experts."""
    read_rotary(config, settings)
    config["mlp_bias"] = "blk.0.ffn_up.bias" in settings.header.tensors
    experts = settings.get("expert_count", int, 0)
    active = settings.get("expert_used_count", int, 0)
    if experts:
        del config["mlp_bias"], config["attention_bias"]
        config |= dict(model_type="mixtral", architectures=["MixtralForCausalLM"])
        config |= dict(num_local_experts=experts, num_experts_per_tok=active)
        config["sliding_window"] = None


def write_llama(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write a Llama, a Mistral or a Mixtral."""
    written = write_rotary(config, tensors)
    if config["model_type"] == "mixtral":
        written["expert_count"] = make_uint(config["num_local_experts"])
        written["expert_used_count"] = make_uint(config["num_experts_per_tok"])
    return written


def read_gemma(config: Config, settings: Settings) -> None:
    """Read a Gemma of version 1, 2 or 3."""
    read_rotary(config, settings)
    if config["model_type"] == "gemma":
        return
    config["query_pre_attn_scalar"] = _find_query_scalar(config)
    config["layer_types"] = _make_layer_types(config)
    if config["model_type"] == "gemma3_text":
        cap = settings.get("final_logit_softcapping", float, 0.0)
        config["final_logit_softcapping"] = cap or None
        config["attn_logit_softcapping"] = None
        config["sliding_window_pattern"] = WINDOW_PERIODS["gemma3_text"]
        config["rope_local_base_freq"] = float(settings.get("rope.freq_base_swa", float, 10000.0))


def write_gemma(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write a Gemma of version 1, 2 or 3."""
    written = write_rotary(config, tensors)
    if "lm_head.weight" in tensors:
        raise ConfigError("llama.cpp's Gemma has no head of its own: it must be tied.")
    kind = config["model_type"]
    if kind == "gemma":
        return written
    if (config.get("layer_types") or _make_layer_types(config)) != _make_layer_types(config):
        raise ConfigError(
            f"layer_types: in llama.cpp every layer of {kind} has a window but every "
            f"{WINDOW_PERIODS[kind]}th."
        )
    if kind != "gemma2":
        local = find_rope_parameters(config, "sliding_attention")
        written["rope.freq_base_swa"] = make_float(local["rope_theta"])
        if local["rope_type"] != "default":
            raise ConfigError("llama.cpp does not scale RoPE in the window layers of Gemma 3.")
        if config.get("attn_logit_softcapping"):
            raise ConfigError("attn_logit_softcapping: llama.cpp's Gemma 3 has none.")
        if cap := config.get("final_logit_softcapping"):
            written["final_logit_softcapping"] = make_float(cap)
    return written


def scale_gemma_queries(config: Config, name: str) -> float:
    """Return the factor of what makes queries, where llama.cpp divides logits by another number."""
    maker = "attn_q.weight" if config["model_type"] == "gemma2" else "attn_q_norm.weight"
    if not name.endswith(maker):
        return 1.0
    expected = _find_query_scalar(config)
    return math.sqrt(expected / (config.get("query_pre_attn_scalar") or expected))


def _find_query_scalar(config: Config) -> int:
    if config["num_hidden_layers"] == _WIDE_QUERIES[config["model_type"]]:  # the models of 27B
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _make_layer_types(config: Config) -> list[str]:
    period = WINDOW_PERIODS[config["model_type"]]
    return [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]


# --- others ------------------------------------------------------------------------------------


def read_gpt_neox(config: Config, settings: Settings) -> None:
    """Read the RoPE of a GPT-NeoX, which turns a part of each head."""
    width = config["hidden_size"] // config["num_attention_heads"]
    config["rotary_pct"] = settings.get("rope.dimension_count", int, width) / width
    config["rotary_emb_base"] = float(settings.get("rope.freq_base", float, 10000.0))
    config["head_dim"] = width
    if scaling := read_scaling(config, settings):
        raise ConfigError(f"{settings.path}: RoPE scaling {scaling} is not supported in GPT-NeoX.")
    del config["head_dim"]


def write_gpt_neox(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write the RoPE of a GPT-NeoX."""
    rope = find_rope_parameters(config)
    if rope["rope_type"] != "default":
        raise ConfigError(f"RoPE scaling {rope['rope_type']!r} has no counterpart in gptneox.")
    share = rope.get("partial_rotary_factor") or config.get("rotary_pct") or 0.25
    theta = config.get("rotary_emb_base") or rope["rope_theta"]
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope.dimension_count": make_uint(int(share * width)),
        "rope.freq_base": make_float(theta),
    }


def read_bloom(config: Config, settings: Settings) -> None:
    """Check what is fixed in a BLOOM."""
    wide = 4 * config["hidden_size"]
    settings.require("feed_forward_length", [wide], wide)
    settings.require("attention.head_count_kv", [config["n_head"]], config["n_head"])


def write_bloom(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write what is fixed in a BLOOM."""
    return {
        "feed_forward_length": make_uint(4 * config["hidden_size"]),
        "attention.head_count_kv": make_uint(config["n_head"]),
    }


def read_mpt(config: Config, settings: Settings) -> None:
    """Read the attention of an MPT, which must have ALiBi."""
    wide = settings.get("feed_forward_length", int)
    config["expansion_ratio"] = wide // config["d_model"]
    settings.require("attention.head_count_kv", [config["n_heads"]], config["n_heads"])
    settings.require("attention.clamp_kqv", [0.0], 0.0)
    slope = settings.get("attention.max_alibi_bias", float, 0.0)
    if not slope:
        raise ConfigError(f"{settings.path}: an MPT without ALiBi is not supported.")
    config["attn_config"] = {
        "alibi": True, "alibi_bias_max": int(slope), "attn_type": "multihead_attention",
        "clip_qkv": None, "qk_ln": False, "prefix_lm": False, "softmax_scale": None,
    }  # fmt: skip


def write_mpt(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write the attention of an MPT."""
    attention = config.get("attn_config") or {}
    for key, neutral in (("alibi", True), ("clip_qkv", None), ("qk_ln", False),
                         ("prefix_lm", False), ("softmax_scale", None)):  # fmt: skip
        if attention.get(key, neutral) != neutral:
            raise ConfigError(f"attn_config.{key}={attention[key]} is not {neutral}.")
    return {
        "feed_forward_length": make_uint(config["expansion_ratio"] * config["d_model"]),
        "attention.max_alibi_bias": make_float(attention.get("alibi_bias_max", 8)),
    }


def read_bert(config: Config, settings: Settings) -> None:
    """Read a BERT, a classifier if it has that head."""
    tensors = settings.header.tensors
    settings.require("attention.causal", [False], True)
    settings.ignore("pooling_type")
    if "token_types.weight" in tensors:
        config["type_vocab_size"] = tensors["token_types.weight"].shape[0]
    labels = settings.get("classifier.output_labels", list, [])
    if "cls.output.weight" in tensors:
        count = tensors["cls.output.weight"].shape[0]
        labels = labels or [f"LABEL_{i}" for i in range(count)]
        config["architectures"] = ["BertForSequenceClassification"]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}


def write_bert(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write a BERT, with the names of its classes."""
    written = {"attention.causal": Value(False, "bool")}
    if "classifier.weight" not in tensors:
        return written
    count = tensors["classifier.weight"].shape[0]
    names = {str(index): name for index, name in (config.get("id2label") or {}).items()}
    labels = [names.get(str(i), f"LABEL_{i}") for i in range(count)]
    written["pooling_type"] = make_uint(_POOLING_CLASSES)
    written["classifier.output_labels"] = Value(labels, "string", is_array=True)
    return written


def read_t5(config: Config, settings: Settings) -> None:
    """Read a T5 of version 1.0 or 1.1."""
    width, heads = config["d_kv"], config["num_heads"]
    is_gated = "enc.blk.0.ffn_gate.weight" in settings.header.tensors
    config["feed_forward_proj"] = "gated-gelu" if is_gated else "relu"
    config["is_encoder_decoder"] = True
    config["scale_decoder_outputs"] = config["tie_word_embeddings"]
    settings.require("attention.value_length", [width], width)
    settings.require("attention.head_count_kv", [heads], heads)
    settings.ignore("attention.layer_norm_epsilon")


def skip_t5(config: Config) -> str:
    """Return the part of the names of tensors that a T5 of this kind does not have."""
    return ".wi_1." if config["feed_forward_proj"] == "relu" else ".wi."


def _scales_outputs(config: Config) -> bool:
    """Return whether logits are multiplied by 1/√D, as where a T5 of version 1.0 ties its head."""
    return bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)))


def add_t5_head(config: Config, tensors: dict[str, Any]) -> None:
    """Give a head of its own to a T5 that ties it without scaling: a tied one is read as scaled."""
    if "lm_head.weight" not in tensors and not _scales_outputs(config):
        tensors["lm_head.weight"] = tensors["shared.weight"]


def scale_t5_head(config: Config, name: str) -> float:
    """Return the factor of a head of its own whose logits are scaled, which llama.cpp does not."""
    is_scaled = name == "output.weight" and _scales_outputs(config)
    return config["d_model"] ** -0.5 if is_scaled else 1.0


def write_t5(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write a T5 of version 1.0 or 1.1."""
    if config.get("feed_forward_proj", "relu") not in ("relu", "gated-gelu"):
        raise ConfigError(
            f"feed_forward_proj={config['feed_forward_proj']!r}: llama.cpp's T5 has 'relu' and "
            "'gated-gelu'."
        )
    return {
        "attention.value_length": make_uint(config["d_kv"]),
        "attention.layer_norm_epsilon": make_float(config["layer_norm_epsilon"]),
    }


def read_mamba(config: Config, settings: Settings) -> None:
    """Read a Mamba, and refuse the variants with more norms."""
    settings.ignore("context_length")
    settings.require("ssm.dt_b_c_rms", [False], False)
    settings.require("ssm.group_count", [0], 0)
    settings.require("feed_forward_length", [0], 0)
    settings.require("attention.head_count", [0], 0)
    config["expand"] = config["intermediate_size"] // config["hidden_size"]


def write_mamba(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write a Mamba."""
    if config["intermediate_size"] != 2 * config["hidden_size"]:
        raise ConfigError(
            f"intermediate_size={config['intermediate_size']}: in llama.cpp a Mamba is twice as "
            f"wide inside, {2 * config['hidden_size']}."
        )
    return {
        "context_length": make_uint(1 << 20),  # it has no limit
        "feed_forward_length": make_uint(0),
        "attention.head_count": make_uint(0),
        "ssm.dt_b_c_rms": Value(False, "bool"),
    }
