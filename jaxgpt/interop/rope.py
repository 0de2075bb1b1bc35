"""RoPE in config.json <-> `model.rope`.

transformers 4 writes rope_theta and rope_scaling beside other keys, transformers 5 an object
rope_parameters, or one for each kind of layer. Both are read, and both are written.
"""

import math
from typing import Any

from jaxgpt.architecture import ModelConfig
from jaxgpt.interop.keys import Keys
from jaxgpt.sections import RopeConfig
from jaxgpt.settings import ConfigError

KINDS = ("default", "linear", "yarn", "llama3")


def read_rope(keys: Keys, theta: float = 10_000.0, share: float = 1.0) -> dict[str, Any]:
    """Return the settings of `model.rope` of a model whose layers all have the same.

    Args:
        theta, share: the defaults of the model's family.
    """
    top = {
        "rope_theta": keys.take("rope_theta", "rotary_emb_base", default=theta),
        "partial_rotary_factor": keys.take("partial_rotary_factor", "rotary_pct", default=share),
    }
    scaling = keys.group("rope_scaling") or keys.group("rope_parameters")
    keys.ignore("rope_parameters")
    return parse_rope(keys, top | scaling)


def parse_rope(keys: Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `model.rope` from one object of transformers' RoPE parameters."""
    rope = Keys(values, f"{keys.where}: rope_scaling")
    kind = rope.take("rope_type", "type", default="default")
    rope.ignore("type")
    settings: dict[str, Any] = {"theta": rope.number("rope_theta")}
    share = rope.number("partial_rotary_factor", default=1.0)
    if share != 1:
        settings["share"] = share
    context = keys.values.get("max_position_embeddings")
    if kind not in KINDS:
        raise ConfigError(
            f"{keys.where}: rope_type={kind!r} is not supported; {', '.join(KINDS)} are."
        )
    if kind != "default":
        settings["scaling"], settings["factor"] = kind, rope.number("factor")
    if kind in ("yarn", "llama3"):
        settings["original"] = rope.size("original_max_position_embeddings", default=context)
    if kind == "llama3":
        rope.expect("low_freq_factor", 1)
        rope.expect("high_freq_factor", 4)
    if kind == "yarn":
        rope.expect("beta_fast", 32)
        rope.expect("beta_slow", 1)
        rope.expect("truncate", True)
        rope.expect("mscale", None)
        rope.expect("mscale_all_dim", None)
        _check_attention_factor(rope, settings["factor"])
    rope.check_all_read()
    return settings


def _check_attention_factor(rope: Keys, factor: float):
    found, right = rope.take("attention_factor", default=None), 0.1 * math.log(factor) + 1
    if found is not None and not math.isclose(found, right, rel_tol=1e-6):
        raise ConfigError(
            f"{rope.where}: attention_factor={found!r} is not supported with factor={factor:g}; "
            f"{right:.6g} is."
        )


def write_rope(cfg: ModelConfig, rope: RopeConfig) -> dict[str, Any]:
    """Return an object of transformers' RoPE parameters for a layer, the inverse of `parse_rope`.

    A raised base ("ntk") is written as what it is: another base.
    """
    theta, factor = float(rope.theta), float(rope.factor)  # type: ignore[arg-type]
    if rope.scaling == "ntk":
        size = round(cfg.sizes["K"] * rope.share)
        theta, factor = theta * factor ** (size / max(size - 2, 1)), 1.0
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if rope.share != 1:
        values["partial_rotary_factor"] = rope.share
    if rope.scaling not in ("none", "ntk"):
        values |= {"rope_type": rope.scaling, "factor": factor}
    if rope.scaling in ("yarn", "llama3"):
        original = rope.original or cfg.context / factor
        values["original_max_position_embeddings"] = int(original)
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return values


def write_rope_keys(cfg: ModelConfig) -> dict[str, Any]:
    """Return the keys of RoPE of a model whose layers all have the same, in both versions."""
    values = write_rope(cfg, cfg.layer_cycle[0].rope)
    return {
        "rope_parameters": values,
        "rope_theta": values["rope_theta"],
        "rope_scaling": values if values["rope_type"] != "default" else None,
    }
