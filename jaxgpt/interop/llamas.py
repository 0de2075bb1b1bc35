"""config.json of Llama and its successors <-> the settings of a model: two functions a family.

`read_x(keys)` returns settings of `ModelConfig`, with the defaults of transformers for keys that
are not there. `write_x(cfg)` returns a config.json; it may assume that the model is of the family:
what it has written is read back and compared (see families.py).
"""

from typing import Any

from jaxgpt.architecture import ModelConfig
from jaxgpt.interop.keys import Keys, name_activation
from jaxgpt.interop.rope import parse_rope, read_rope, write_rope, write_rope_keys
from jaxgpt.settings import ConfigError

Settings = dict[str, Any]

# --- layers of several kinds ---------------------------------------------------------------------

_PATTERNS = {"full_attention": "full", "sliding_attention": "window"}


def shorten_cycle(values: list) -> tuple:
    """Return the shortest cycle that gives these values.

    >>> shorten_cycle(["a", "b", "a", "b", "a"])
    ('a', 'b')
    """
    fits = (
        n for n in range(1, len(values) + 1) if values == (values[:n] * len(values))[: len(values)]
    )
    return tuple(values[: next(fits)])


def read_layer_types(keys: Keys, layers: int, default: list[str]) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer."""
    types = keys.take("layer_types", default=default)
    if not isinstance(types, list) or len(types) != layers or not {*types} <= _PATTERNS.keys():
        raise keys.fail("layer_types", f"a list of {layers} of {', '.join(_PATTERNS)}")
    return types


def make_window(types: list[str], window: int) -> Settings:
    """Return the attention patterns of layers of these types."""
    if "sliding_attention" not in types:
        return {}
    pattern = shorten_cycle([_PATTERNS[name] for name in types])
    return {"pattern": pattern, "sparse": {"window": window}}


def list_layer_types(cfg: ModelConfig) -> list[str]:
    """Return the type in transformers of each layer of a model."""
    names = {ours: theirs for theirs, ours in _PATTERNS.items()}
    return [names.get(spec.pattern, "full_attention") for spec in cfg.list_layers(cfg.layers)]


# --- Llama and its successors --------------------------------------------------------------------


def _read_llama_sizes(keys: Keys, **defaults) -> Settings:
    """Return what all successors of Llama have in common; `defaults` are of keys not there."""
    d = dict(context=2048, kv_heads=None, head_dim=None, eps=1e-6, tie=False, theta=1e4) | defaults
    heads, width = keys.size("num_attention_heads", default=d.get("heads", 32)), keys.size(
        "hidden_size", default=d.get("width", 4096)
    )  # fmt: skip
    head_dim = keys.size("head_dim", default=d["head_dim"] or width // heads or 1)
    kv_heads = keys.size("num_key_value_heads", default=d["kv_heads"] or heads)
    keys.ignore("attention_dropout")
    return dict(
        vocab=keys.size("vocab_size", default=d.get("vocab", 32000)),
        context=keys.size("max_position_embeddings", default=d["context"]),
        width=width,
        layers=keys.size("num_hidden_layers", default=d.get("layers", 32)),
        heads=heads,
        kv_heads=None if kv_heads == heads else kv_heads,
        head_width=None if head_dim * heads == width else head_dim,
        ffn=keys.size("intermediate_size", default=d.get("ffn", 11008)),
        norm_eps=keys.number("rms_norm_eps", default=d["eps"]),
        tie=keys.flag("tie_word_embeddings", default=d["tie"]),
    )


def _write_llama_sizes(cfg: ModelConfig) -> Settings:
    sizes = cfg.sizes
    return dict(
        vocab_size=cfg.vocab,
        max_position_embeddings=cfg.context,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=sizes["G"],
        head_dim=sizes["K"],
        intermediate_size=sizes["F"],
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie,
        attention_dropout=cfg.attention_dropout,
    )


def _read_biases(keys: Keys) -> str | None:
    has_attention, has_ffn = (
        keys.flag(name, default=False) for name in ("attention_bias", "mlp_bias")
    )
    if has_ffn and not has_attention:
        raise ConfigError(
            f"{keys.where}: mlp_bias=true with attention_bias=false is not supported; both or "
            "attention_bias alone are."
        )
    return "all" if has_ffn else "attention" if has_attention else None


def _write_biases(cfg: ModelConfig) -> Settings:
    return {"attention_bias": cfg.bias is not None, "mlp_bias": cfg.bias == "all"}


def read_llama(keys: Keys) -> Settings:
    """Read a Llama."""
    return _read_llama_sizes(keys) | dict(
        activation=keys.activation("hidden_act", default="silu"),
        bias=_read_biases(keys),
        rope=read_rope(keys),
    )


def write_llama(cfg: ModelConfig) -> Settings:
    """Write a Llama."""
    act = {"hidden_act": name_activation(cfg.activation)}
    return _write_llama_sizes(cfg) | act | _write_biases(cfg) | write_rope_keys(cfg)


def _read_one_window(keys: Keys, layers: int, default: int | None) -> Settings:
    """Return the pattern of a model whose layers all have a window, or none has."""
    window = keys.maybe_number("sliding_window", default=default)
    kind = "sliding_attention" if window else "full_attention"
    types = read_layer_types(keys, layers, [kind] * layers)
    return make_window(types, int(window or 1))


def read_mistral(keys: Keys) -> Settings:
    """Read a Mistral."""
    sizes = _read_llama_sizes(keys, context=131072, kv_heads=8, ffn=14336)
    return sizes | _read_one_window(keys, sizes["layers"], 4096) | dict(
        activation=keys.activation("hidden_act", default="silu"), rope=read_rope(keys)
    )  # fmt: skip


def write_mistral(cfg: ModelConfig) -> Settings:
    """Write a Mistral."""
    window = cfg.sparse.window if "window" in cfg.pattern else None
    act = {"hidden_act": name_activation(cfg.activation), "sliding_window": window}
    return _write_llama_sizes(cfg) | act | write_rope_keys(cfg)


def read_mixtral(keys: Keys) -> Settings:
    """Read a Mixtral."""
    sizes = _read_llama_sizes(keys, context=131072, kv_heads=8, ffn=14336, eps=1e-5)
    experts = keys.size("num_local_experts", "num_experts", default=8)
    active = keys.size("num_experts_per_tok", default=2)
    return sizes | _read_one_window(keys, sizes["layers"], None) | dict(
        activation=keys.activation("hidden_act", default="silu"),
        feedforward="moe_gated",
        moe=dict(experts=experts, active=active),
        rope=read_rope(keys, theta=1e6),
    )  # fmt: skip


def write_mixtral(cfg: ModelConfig) -> Settings:
    """Write a Mixtral."""
    moe = dict(num_local_experts=cfg.moe.experts, num_experts_per_tok=cfg.moe.active)
    return write_mistral(cfg) | moe


def _read_qwen(keys: Keys, **defaults) -> Settings:
    sizes = _read_llama_sizes(keys, vocab=151936, context=32768, kv_heads=32, ffn=22016, **defaults)
    layers = sizes["layers"]
    is_used = keys.flag("use_sliding_window", default=False)
    first = keys.take("max_window_layers", default=28)
    if not isinstance(first, int):
        raise keys.fail("max_window_layers", "a whole number")
    window = keys.maybe_number("sliding_window", default=4096)
    default = [
        "sliding_attention" if is_used and window and i >= first else "full_attention"
        for i in range(layers)
    ]
    types = read_layer_types(keys, layers, default)
    return sizes | make_window(types, int(window or 1)) | dict(
        activation=keys.activation("hidden_act", default="silu"), rope=read_rope(keys)
    )  # fmt: skip


def _write_qwen(cfg: ModelConfig) -> Settings:
    types = list_layer_types(cfg)
    has_window = "sliding_attention" in types
    first = types.index("sliding_attention") if has_window else cfg.layers
    return _write_llama_sizes(cfg) | write_rope_keys(cfg) | dict(
        hidden_act=name_activation(cfg.activation),
        use_sliding_window=has_window,
        sliding_window=cfg.sparse.window if has_window else None,
        max_window_layers=first,
        layer_types=types,
    )  # fmt: skip


def read_qwen2(keys: Keys) -> Settings:
    """Read a Qwen 2."""
    keys.expect("attention_bias", True)
    return _read_qwen(keys) | {"bias": "qkv"}


def write_qwen2(cfg: ModelConfig) -> Settings:
    """Write a Qwen 2."""
    values = _write_qwen(cfg)
    if values["head_dim"] * cfg.heads == cfg.width:
        del values["head_dim"]
    return values


def read_qwen3(keys: Keys) -> Settings:
    """Read a Qwen 3."""
    has_bias = keys.flag("attention_bias", default=False)
    bias = {"bias": "attention"} if has_bias else {}
    return _read_qwen(keys, head_dim=128) | {"qk_norm": "head"} | bias


def write_qwen3(cfg: ModelConfig) -> Settings:
    """Write a Qwen 3."""
    return _write_qwen(cfg) | {"attention_bias": cfg.bias is not None}


def read_olmo2(keys: Keys) -> Settings:
    """Read an OLMo 2."""
    keys.expect("clip_qkv", None)
    has_bias = keys.flag("attention_bias", default=False)
    return _read_llama_sizes(keys, vocab=50304, eps=1e-5) | dict(
        activation=keys.activation("hidden_act", default="silu"),
        wiring="reordered",
        qk_norm="width",
        bias="attention" if has_bias else None,
        rope=read_rope(keys),
    )


def write_olmo2(cfg: ModelConfig) -> Settings:
    """Write an OLMo 2."""
    values = write_llama(cfg)
    if values["head_dim"] * cfg.heads == cfg.width:
        del values["head_dim"]
    del values["mlp_bias"]
    return values


# --- Gemma ---------------------------------------------------------------------------------------


def _read_gemma(keys: Keys, **defaults) -> Settings:
    keys.expect("use_bidirectional_attention", None, False)
    has_bias = keys.flag("attention_bias", default=False)
    return _read_llama_sizes(keys, head_dim=256, tie=True, **defaults) | dict(
        norm="rms_plus_one", embed_scale=True, bias="attention" if has_bias else None
    )


def read_gemma(keys: Keys) -> Settings:
    """Read a Gemma."""
    sizes = dict(vocab=256000, context=8192, width=3072, layers=28, heads=16, ffn=24576)
    settings = _read_gemma(keys, kv_heads=16, **sizes)
    activation = keys.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    # The first files of Gemma say "gelu" and mean the one with a tanh.
    activation = "gelu_tanh" if activation == "gelu" else activation
    return settings | dict(activation=activation, rope=read_rope(keys))


def write_gemma(cfg: ModelConfig) -> Settings:
    """Write a Gemma."""
    name = name_activation(cfg.activation)
    more = dict(hidden_act=name, hidden_activation=name, attention_bias=cfg.bias is not None)
    return _write_llama_sizes(cfg) | more | write_rope_keys(cfg)


def _read_gemma_attention(keys: Keys, softcap: float | None, final: float | None) -> Settings:
    scalar = keys.number("query_pre_attn_scalar", default=256)
    return dict(
        query_scale=scalar**-0.5,
        wiring="sandwich",
        softcap=keys.maybe_number("attn_logit_softcapping", default=softcap),
        final_softcap=keys.maybe_number("final_logit_softcapping", default=final),
        activation=keys.activation("hidden_activation", default="gelu_pytorch_tanh"),
    )


def _read_gemma_windows(keys: Keys, layers: int, period: int) -> tuple[list[str], Settings]:
    period = keys.size("sliding_window_pattern", "_sliding_window_pattern", default=period)
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    types = read_layer_types(keys, layers, default)
    return types, make_window(types, keys.size("sliding_window", default=4096))


def read_gemma2(keys: Keys) -> Settings:
    """Read a Gemma 2."""
    keys.ignore("cache_implementation", "hidden_act")
    sizes = dict(vocab=256000, context=8192, width=2304, layers=26, heads=8, ffn=9216)
    settings = _read_gemma(keys, kv_heads=4, **sizes)
    _, window = _read_gemma_windows(keys, settings["layers"], 2)
    attention = _read_gemma_attention(keys, 50.0, 30.0)
    return settings | window | attention | {"rope": read_rope(keys)}


def _write_gemma_attention(cfg: ModelConfig) -> Settings:
    scalar = cfg.attention_scale**-2
    return dict(
        hidden_activation=name_activation(cfg.activation),
        query_pre_attn_scalar=round(scalar),
        sliding_window=cfg.sparse.window,
        layer_types=list_layer_types(cfg),
        attn_logit_softcapping=cfg.softcap,
        final_logit_softcapping=cfg.final_softcap,
        attention_bias=cfg.bias is not None,
    )


def write_gemma2(cfg: ModelConfig) -> Settings:
    """Write a Gemma 2."""
    return _write_llama_sizes(cfg) | _write_gemma_attention(cfg) | write_rope_keys(cfg)


def read_gemma3(keys: Keys) -> Settings:
    """Read a Gemma 3 (its text model)."""
    keys.ignore("cache_implementation", "hidden_act")
    sizes = dict(vocab=262208, context=131072, width=2304, layers=26, heads=8, ffn=9216)
    settings = _read_gemma(keys, kv_heads=4, **sizes)
    types, window = _read_gemma_windows(keys, settings["layers"], 6)
    attention = _read_gemma_attention(keys, None, None)
    return (
        settings | window | attention | dict(qk_norm="head", rope=_read_rope_by_type(keys, types))
    )


def _read_rope_by_type(keys: Keys, types: list[str]) -> Settings:
    """Return `model.rope` of a model whose window layers have another base than its full ones."""
    nested = keys.group("rope_parameters")
    full = {"rope_theta": keys.take("rope_theta", default=1e6)}
    full |= nested.get("full_attention") or {}
    full |= keys.group("rope_scaling")
    local = {"rope_theta": keys.take("rope_local_base_freq", default=1e4)}
    local |= nested.get("sliding_attention") or {}
    if unknown := nested.keys() - {"full_attention", "sliding_attention"}:
        raise keys.fail("rope_parameters", f"by layer type; {min(unknown)!r} is none")
    by_type = {
        "full_attention": parse_rope(keys, full), "sliding_attention": parse_rope(keys, local)
    }  # fmt: skip
    cycle = [by_type[name] for name in shorten_cycle(types)]
    names = ("theta", "scaling", "factor")
    defaults = {"scaling": "none", "factor": 1.0}
    rope: Settings = {}
    for name in names:
        values = tuple(x.get(name, defaults.get(name)) for x in cycle)
        rope[name] = values[0] if len({*values}) == 1 else values
    originals = {x["original"] for x in by_type.values() if "original" in x}
    return rope | ({"original": min(originals)} if originals else {})


def write_gemma3(cfg: ModelConfig) -> Settings:
    """Write a Gemma 3 (its text model)."""
    types = list_layer_types(cfg)
    ropes = dict(zip(types, (s.rope for s in cfg.list_layers(cfg.layers)), strict=True))
    full, local = (
        ropes.get(name, next(iter(ropes.values())))
        for name in ("full_attention", "sliding_attention")
    )
    nested = {
        name: write_rope(cfg, rope)
        for name, rope in (("full_attention", full), ("sliding_attention", local))
    }
    scaled = {k: v for k, v in nested["full_attention"].items() if k != "rope_theta"}
    return _write_llama_sizes(cfg) | _write_gemma_attention(cfg) | dict(
        rope_parameters=nested,
        rope_theta=nested["full_attention"]["rope_theta"],
        rope_scaling=scaled if scaled["rope_type"] != "default" else None,
        rope_local_base_freq=nested["sliding_attention"]["rope_theta"],
        use_bidirectional_attention=False,
    )  # fmt: skip
