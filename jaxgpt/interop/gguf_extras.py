"""What is particular to an architecture of llama.cpp: settings beyond the table of keys.

A `read_` function completes a config of transformers from the settings of a GGUF file; a `write_`
function returns settings to write, and refuses a model that llama.cpp would compute otherwise.
Where llama.cpp derives a value that transformers stores, reading gives the value that it derives,
and writing refuses others.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxgpt.interop.gguf_format import Header, Value, read_tensor
from jaxgpt.settings import ConfigError

Config = dict[str, Any]
ROPE_FACTORS = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0  # Llama 3's low_freq_factor and high_freq_factor
_POOLING_CLASSES = 4  # the pooling type of llama.cpp that computes classes
# Layers of the models for which llama.cpp divides logits by another number than √K.
_WIDE_QUERIES = {"gemma2": 46, "gemma3_text": 62, "gemma3": 62}
_WINDOW_PERIODS = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6}


class Settings:
    """The settings of one architecture in a header, by their keys without its name."""

    def __init__(self, header: Header, path: str):
        self.header, self.path = header, path
        self.architecture = self._find_architecture()
        self._prefix = f"{self.architecture}."
        self._read: set[str] = set()

    def _find_architecture(self) -> str:
        name = self.header.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ConfigError(f"{self.path}: it has no general.architecture: it holds no model.")
        return name

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a setting, or the default if the file does not have it.

        Raises:
            ConfigError: it is of another type, or it is missing and there is no default.
        """
        self._read.add(key)
        value = self.header.metadata.get(self._prefix + key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.path}: the setting {self._prefix + key} is missing.")
            return default
        if kind is float and isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        if kind in (list, float) and isinstance(value, int) and not isinstance(value, bool):
            return value
        if type(value) is not kind:
            shown = value if not isinstance(value, np.ndarray) else f"one per layer, {value!s:.60}"
            raise ConfigError(
                f"{self.path}: {self._prefix + key}={shown!r} is not of the type {kind.__name__}, "
                "as it must be here."
            )
        if kind is int and not 0 <= value < 1 << 31:
            raise ConfigError(f"{self.path}: {self._prefix + key}={value} is not 0 to 2**31.")
        return value

    def require(self, key: str, expected: Iterable[Any], default: Any) -> None:
        """Refuse a value of a setting that is not one of the expected ones."""
        self._read.add(key)
        value = self.header.metadata.get(self._prefix + key, default)
        if not any(value is x or (not isinstance(value, np.ndarray) and value == x)
                   for x in expected):  # fmt: skip
            raise ConfigError(
                f"{self.path}: {self._prefix + key}={value!r} is not supported: it must be "
                f"{' or '.join(map(repr, expected))}."
            )

    def ignore(self, *keys: str) -> None:
        self._read |= set(keys)

    def check_all_read(self) -> None:
        """Refuse settings of the architecture that nothing here knows."""
        found = {key for key in self.header.metadata if key.startswith(self._prefix)}
        if unknown := sorted(found - {self._prefix + key for key in self._read}):
            raise ConfigError(
                f"{self.path}: the setting {unknown[0]}="
                f"{self.header.metadata[unknown[0]]!s:.60} is not supported."
            )


def count_heads(config: Config, name: str = "num_attention_heads") -> int:
    """Return the number of query heads, or of key/value heads."""
    for key in (name, "num_attention_heads", "n_head"):
        if config.get(key):
            return config[key]
    raise ConfigError(f"the config has no {name}.")


def _uint(value: int) -> Value:
    return Value(int(value), "uint32")


def _float(value: float) -> Value:
    return Value(float(value), "float32")


# --- RoPE --------------------------------------------------------------------------------------


def read_rotary(config: Config, settings: Settings) -> None:
    """Read the settings of RoPE, which are the same in all architectures that rotate."""
    width = config["head_dim"]
    settings.require("attention.value_length", [width], width)
    settings.require("rope.dimension_count", [width], width)
    settings.ignore("rope.scaling.finetuned")
    config["rope_theta"] = float(settings.get("rope.freq_base", float, 10000.0))
    config["rope_scaling"] = _read_scaling(config, settings)
    config["attention_bias"] = "blk.0.attn_q.bias" in settings.header.tensors
    if settings.architecture == "qwen2":  # its biases are not a setting
        del config["attention_bias"]


def _read_scaling(config: Config, settings: Settings) -> Config | None:
    if ROPE_FACTORS in settings.header.tensors:
        return _read_llama3_scaling(config, settings)
    kind = settings.get("rope.scaling.type", str, "linear")  # what llama.cpp takes it for
    old = settings.get("rope.scale_linear", float, 0.0)
    factor = float(settings.get("rope.scaling.factor", float, old))
    for key, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0),
                         ("yarn_log_multiplier", 0.0), ("alpha", 0.0)):  # fmt: skip
        settings.require(f"rope.scaling.{key}", [neutral], neutral)
    original = settings.get("rope.scaling.original_context_length", int, 0)
    fast = settings.get("rope.scaling.yarn_beta_fast", float, 32.0)
    slow = settings.get("rope.scaling.yarn_beta_slow", float, 1.0)
    settings.require("rope.scaling.yarn_ext_factor", [-1.0, 1.0], -1.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": factor}
        yarn["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        return yarn | {"beta_fast": float(fast), "beta_slow": float(slow)}
    raise ConfigError(
        f"{settings.path}: {settings.architecture}.rope.scaling.type={kind!r} is not supported: "
        "none, linear and yarn are."
    )


def _read_llama3_scaling(config: Config, settings: Settings) -> Config | None:
    """Find the scaling that the stored divisors of RoPE's frequencies come from."""
    divisors = read_tensor(settings.header.tensors[ROPE_FACTORS]).astype(np.float64)
    waves = _wavelengths(config["rope_theta"], config["head_dim"])
    if divisors.shape != waves.shape:
        raise ConfigError(
            f"{settings.path}: {ROPE_FACTORS} has {divisors.shape}, not {waves.shape}, values."
        )
    if (divisors == 1).all():
        return None
    for factor, original in _guess_llama3(divisors, waves):
        if np.allclose(_llama3_divisors(waves, factor, original), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            }
    raise ConfigError(
        f"{settings.path}: {ROPE_FACTORS} is no scaling of Llama 3 with low_freq_factor {LOW} and "
        f"high_freq_factor {HIGH}; others are not supported."
    )


def _guess_llama3(divisors: np.ndarray, waves: np.ndarray):
    """Yield (factor, original context): solved from a channel between both limits, then usual."""
    factor = float(str(np.float32(divisors.max())))
    if factor <= 1:
        return
    between = (divisors > 1.001) & (divisors < factor * 0.999)
    if between.any():
        i = int(np.argmax(between))
        smooth = (1 / divisors[i] - 1 / factor) / (1 - 1 / factor)
        yield factor, round(waves[i] * (LOW + smooth * (HIGH - LOW)))
    yield from ((factor, 1 << power) for power in (13, *range(1, 24)))


def _wavelengths(theta: float, width: int) -> np.ndarray:
    return 2 * math.pi * theta ** (np.arange(0, width, 2) / width)  # [K/2], in tokens


def _llama3_divisors(waves: np.ndarray, factor: float, original: float) -> np.ndarray:
    """Return what divides each frequency: 1 for short waves, `factor` for long ones.

    Source: Llama 3's apply_scaling, with a linear transition in original / wavelength.
    """
    smooth = np.clip((original / waves - LOW) / (HIGH - LOW), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def make_rope_factors(config: Config) -> np.ndarray | None:
    """Return the tensor with the divisors of RoPE's frequencies, float32 [K/2], or None."""
    rope = _rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    found = rope.get("low_freq_factor", LOW), rope.get("high_freq_factor", HIGH)
    if found != (LOW, HIGH):
        raise ConfigError(f"low_freq_factor, high_freq_factor={found} are not {LOW}, {HIGH}.")
    original = rope.get("original_max_position_embeddings") or 8192
    waves = _wavelengths(rope["rope_theta"], config["head_dim"])
    return _llama3_divisors(waves, rope["factor"], original).astype(np.float32)


def _rope_parameters(config: Config, layers: str = "full_attention") -> Config:
    """Return the settings of RoPE in the form of version 5, from either form."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        rope = rope.get(layers) or {}
    elif layers == "sliding_attention":
        rope = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    elif not rope:
        rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope | {"rope_type": kind, "rope_theta": float(theta)}


def write_rotary(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    """Write the settings of RoPE."""
    rope, width = _rope_parameters(config), config["head_dim"]
    written = {
        "attention.value_length": _uint(width),
        "rope.dimension_count": _uint(width),
        "rope.freq_base": _float(rope["rope_theta"]),
        **_write_scaling(rope, config),
    }
    window = config.get("sliding_window")
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    has_windows = config["model_type"] not in _WINDOW_PERIODS
    if has_windows and window and window < config["max_position_embeddings"]:
        warnings.warn(
            f"llama.cpp has no sliding window for {config['model_type']}: the file's context ends "
            f"at {window} tokens, up to which the window makes no difference.",
            stacklevel=2,
        )
        written["context_length"] = _uint(window)
    return written


def _write_scaling(rope: Config, config: Config) -> dict[str, Value]:
    kind = rope["rope_type"]
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: llama.cpp rotates whole "
            f"heads in {config['model_type']}."
        )
    if kind == "default":
        return {}
    if kind == "llama3" and config["model_type"] in ("llama", "mistral", "mixtral"):
        return {}  # in a tensor: see make_rope_factors
    if kind not in ("linear", "yarn"):
        raise ConfigError(
            f"RoPE scaling {kind!r} has no counterpart in llama.cpp's {config['model_type']}: "
            "use linear, yarn or, in Llama, llama3."
        )
    written = {
        "rope.scaling.type": Value(kind, "string"),
        "rope.scaling.factor": _float(rope["factor"]),
    }
    if kind == "linear":
        return written
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ConfigError(f"YaRN with {key}={rope[key]} has no counterpart in llama.cpp.")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return written | {
        "rope.scaling.original_context_length": _uint(original),
        "rope.scaling.yarn_beta_fast": _float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": _float(rope.get("beta_slow") or 1.0),
    }


# --- Llama and Gemma ---------------------------------------------------------------------------


def read_llama(config: Config, settings: Settings) -> None:
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
    written = write_rotary(config, tensors)
    if config["model_type"] == "mixtral":
        written["expert_count"] = _uint(config["num_local_experts"])
        written["expert_used_count"] = _uint(config["num_experts_per_tok"])
    return written


def read_gemma(config: Config, settings: Settings) -> None:
    read_rotary(config, settings)
    if config["model_type"] == "gemma":
        return
    config["query_pre_attn_scalar"] = _find_query_scalar(config)
    config["layer_types"] = _make_layer_types(config)
    if config["model_type"] == "gemma3_text":
        cap = settings.get("final_logit_softcapping", float, 0.0)
        config["final_logit_softcapping"] = cap or None
        config["attn_logit_softcapping"] = None
        config["sliding_window_pattern"] = _WINDOW_PERIODS["gemma3_text"]
        config["rope_local_base_freq"] = float(settings.get("rope.freq_base_swa", float, 10000.0))


def write_gemma(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    written = write_rotary(config, tensors)
    if "lm_head.weight" in tensors:
        raise ConfigError("llama.cpp's Gemma has no head of its own: it must be tied.")
    kind = config["model_type"]
    if kind == "gemma":
        return written
    if (config.get("layer_types") or _make_layer_types(config)) != _make_layer_types(config):
        raise ConfigError(
            f"layer_types: in llama.cpp every layer of {kind} has a window but every "
            f"{_WINDOW_PERIODS[kind]}th."
        )
    if kind != "gemma2":
        local = _rope_parameters(config, "sliding_attention")
        written["rope.freq_base_swa"] = _float(local["rope_theta"])
        if local["rope_type"] != "default":
            raise ConfigError("llama.cpp does not scale RoPE in the window layers of Gemma 3.")
        if config.get("attn_logit_softcapping"):
            raise ConfigError("attn_logit_softcapping: llama.cpp's Gemma 3 has none.")
        if cap := config.get("final_logit_softcapping"):
            written["final_logit_softcapping"] = _float(cap)
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
    period = _WINDOW_PERIODS[config["model_type"]]
    return [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]


# --- others ------------------------------------------------------------------------------------


def read_gpt_neox(config: Config, settings: Settings) -> None:
    width = config["hidden_size"] // config["num_attention_heads"]
    config["rotary_pct"] = settings.get("rope.dimension_count", int, width) / width
    config["rotary_emb_base"] = float(settings.get("rope.freq_base", float, 10000.0))
    config["head_dim"] = width
    if scaling := _read_scaling(config, settings):
        raise ConfigError(f"{settings.path}: RoPE scaling {scaling} is not supported in GPT-NeoX.")
    del config["head_dim"]


def write_gpt_neox(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    rope = _rope_parameters(config)
    if rope["rope_type"] != "default":
        raise ConfigError(f"RoPE scaling {rope['rope_type']!r} has no counterpart in gptneox.")
    share = rope.get("partial_rotary_factor") or config.get("rotary_pct") or 0.25
    theta = config.get("rotary_emb_base") or rope["rope_theta"]
    width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "rope.dimension_count": _uint(int(share * width)),
        "rope.freq_base": _float(theta),
    }


def read_bloom(config: Config, settings: Settings) -> None:
    wide = 4 * config["hidden_size"]
    settings.require("feed_forward_length", [wide], wide)
    settings.require("attention.head_count_kv", [config["n_head"]], config["n_head"])


def write_bloom(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    return {
        "feed_forward_length": _uint(4 * config["hidden_size"]),
        "attention.head_count_kv": _uint(config["n_head"]),
    }


def read_mpt(config: Config, settings: Settings) -> None:
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
    attention = config.get("attn_config") or {}
    for key, neutral in (("alibi", True), ("clip_qkv", None), ("qk_ln", False),
                         ("prefix_lm", False), ("softmax_scale", None)):  # fmt: skip
        if attention.get(key, neutral) != neutral:
            raise ConfigError(f"attn_config.{key}={attention[key]} is not {neutral}.")
    return {
        "feed_forward_length": _uint(config["expansion_ratio"] * config["d_model"]),
        "attention.max_alibi_bias": _float(attention.get("alibi_bias_max", 8)),
    }


def read_bert(config: Config, settings: Settings) -> None:
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
    written = {"attention.causal": Value(False, "bool")}
    if "classifier.weight" not in tensors:
        return written
    count = tensors["classifier.weight"].shape[0]
    names = {str(index): name for index, name in (config.get("id2label") or {}).items()}
    labels = [names.get(str(i), f"LABEL_{i}") for i in range(count)]
    written["pooling_type"] = _uint(_POOLING_CLASSES)
    written["classifier.output_labels"] = Value(labels, "string", is_array=True)
    return written


def read_t5(config: Config, settings: Settings) -> None:
    width, heads = config["d_kv"], config["num_heads"]
    is_gated = "enc.blk.0.ffn_gate.weight" in settings.header.tensors
    config["feed_forward_proj"] = "gated-gelu" if is_gated else "relu"
    config["is_encoder_decoder"] = True
    settings.require("attention.value_length", [width], width)
    settings.require("attention.head_count_kv", [heads], heads)
    settings.ignore("attention.layer_norm_epsilon")


def skip_t5(config: Config) -> str:
    """Return the part of the names of tensors that a T5 of this kind does not have."""
    return ".wi_1." if config["feed_forward_proj"] == "relu" else ".wi."


def write_t5(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    if config.get("feed_forward_proj", "relu") not in ("relu", "gated-gelu"):
        raise ConfigError(
            f"feed_forward_proj={config['feed_forward_proj']!r}: llama.cpp's T5 has 'relu' and "
            "'gated-gelu'."
        )
    return {
        "attention.value_length": _uint(config["d_kv"]),
        "attention.layer_norm_epsilon": _float(config["layer_norm_epsilon"]),
    }


def read_mamba(config: Config, settings: Settings) -> None:
    settings.ignore("context_length")
    settings.require("ssm.dt_b_c_rms", [False], False)
    settings.require("ssm.group_count", [0], 0)
    settings.require("feed_forward_length", [0], 0)
    settings.require("attention.head_count", [0], 0)
    config["expand"] = config["intermediate_size"] // config["hidden_size"]


def write_mamba(config: Config, tensors: Mapping[str, Any]) -> dict[str, Value]:
    if config["intermediate_size"] != 2 * config["hidden_size"]:
        raise ConfigError(
            f"intermediate_size={config['intermediate_size']}: in llama.cpp a Mamba is twice as "
            f"wide inside, {2 * config['hidden_size']}."
        )
    return {
        "context_length": _uint(1 << 20),  # it has no limit
        "feed_forward_length": _uint(0),
        "attention.head_count": _uint(0),
        "ssm.dt_b_c_rms": Value(False, "bool"),
    }
