"""RoPE in GGUF files: bases, and scaling of three kinds, against the settings of transformers.

Linear and YaRN are numbers in the metadata. Llama 3's is a tensor, rope_freqs.weight: what divides
the frequency of each pair of channels. From it the factor and the original context are found again.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgpt.interop.gguf_format import Value, read_tensor
from jaxgpt.interop.gguf_settings import Config, Settings, make_float, make_uint
from jaxgpt.settings import ConfigError

ROPE_FACTORS = "rope_freqs.weight"
LOW, HIGH = 1.0, 4.0  # Llama 3's low_freq_factor and high_freq_factor
WINDOW_PERIODS = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6}  # every so many layers have no window


def read_rotary(config: Config, settings: Settings) -> None:
    """Read the settings of RoPE, which are the same in all architectures that rotate."""
    width = config["head_dim"]
    settings.require("attention.value_length", [width], width)
    settings.require("rope.dimension_count", [width], width)
    settings.ignore("rope.scaling.finetuned")
    config["rope_theta"] = float(settings.get("rope.freq_base", float, 10000.0))
    config["rope_scaling"] = read_scaling(config, settings)
    config["attention_bias"] = "blk.0.attn_q.bias" in settings.header.tensors
    if settings.architecture == "qwen2":  # its biases are not a setting
        del config["attention_bias"]


def read_scaling(config: Config, settings: Settings) -> Config | None:
    """Read how RoPE is scaled, in the form of version 4 of transformers; None if it is not."""
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
    rope = find_rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    found = rope.get("low_freq_factor", LOW), rope.get("high_freq_factor", HIGH)
    if found != (LOW, HIGH):
        raise ConfigError(f"low_freq_factor, high_freq_factor={found} are not {LOW}, {HIGH}.")
    original = rope.get("original_max_position_embeddings") or 8192
    waves = _wavelengths(rope["rope_theta"], config["head_dim"])
    return _llama3_divisors(waves, rope["factor"], original).astype(np.float32)


def find_rope_parameters(config: Config, layers: str = "full_attention") -> Config:
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
    rope, width = find_rope_parameters(config), config["head_dim"]
    written = {
        "attention.value_length": make_uint(width),
        "rope.dimension_count": make_uint(width),
        "rope.freq_base": make_float(rope["rope_theta"]),
        **_write_scaling(rope, config),
    }
    window = config.get("sliding_window")
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    has_windows = config["model_type"] not in WINDOW_PERIODS
    if has_windows and window and window < config["max_position_embeddings"]:
        warnings.warn(
            f"llama.cpp has no sliding window for {config['model_type']}: the file's context ends "
            f"at {window} tokens, up to which the window makes no difference.",
            stacklevel=2,
        )
        written["context_length"] = make_uint(window)
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
        "rope.scaling.factor": make_float(rope["factor"]),
    }
    if kind == "linear":
        return written
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ConfigError(f"YaRN with {key}={rope[key]} has no counterpart in llama.cpp.")
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return written | {
        "rope.scaling.original_context_length": make_uint(original),
        "rope.scaling.yarn_beta_fast": make_float(rope.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": make_float(rope.get("beta_slow") or 1.0),
    }
