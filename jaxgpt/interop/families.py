"""The models of transformers that this library has: one row a `model_type`.

A row reads a config.json into the settings of a model, and writes it. Writing is checked by reading
back: a model is exported as the first family whose config says all that its own says, so that
nothing that changes what is computed gets lost.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from jaxgpt.architecture import ModelConfig
from jaxgpt.interop import aliases, decoders, encoders, llamas, names
from jaxgpt.interop.aliases import Aliases
from jaxgpt.interop.keys import Keys
from jaxgpt.interop.rope import write_rope
from jaxgpt.interop.rows import Row
from jaxgpt.sections import ExpertsConfig, MixerConfig, RopeConfig, SparseConfig
from jaxgpt.settings import ConfigError, choose


class Family(NamedTuple):
    """A kind of model of transformers."""

    title: str
    architecture: str  # the class with a head
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: list[Row]
    aliases: Aliases
    embedding: str  # the tensor that a tied head is


_LLAMA = (names.LLAMA, aliases.LLAMA, "model.embed_tokens.weight")
_GEMMA2 = (names.GEMMA2, aliases.GEMMA, "model.embed_tokens.weight")

# By `model_type`. A model is exported as the first one that fits.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama 1-3, SmolLM, TinyLlama", "LlamaForCausalLM", llamas.read_llama,
        llamas.write_llama, *_LLAMA,
    ),
    "mistral": Family(
        "Mistral", "MistralForCausalLM", llamas.read_mistral, llamas.write_mistral, *_LLAMA
    ),
    "mixtral": Family(
        "Mixtral", "MixtralForCausalLM", llamas.read_mixtral, llamas.write_mixtral, *_LLAMA
    ),
    "qwen2": Family("Qwen 2", "Qwen2ForCausalLM", llamas.read_qwen2, llamas.write_qwen2, *_LLAMA),
    "qwen3": Family("Qwen 3", "Qwen3ForCausalLM", llamas.read_qwen3, llamas.write_qwen3, *_LLAMA),
    "olmo2": Family(
        "OLMo 2", "Olmo2ForCausalLM", llamas.read_olmo2, llamas.write_olmo2, names.OLMO2,
        aliases.LLAMA, "model.embed_tokens.weight",
    ),
    "gemma": Family(
        "Gemma", "GemmaForCausalLM", llamas.read_gemma, llamas.write_gemma, names.GEMMA,
        aliases.GEMMA, "model.embed_tokens.weight",
    ),
    "gemma2": Family(
        "Gemma 2", "Gemma2ForCausalLM", llamas.read_gemma2, llamas.write_gemma2, *_GEMMA2
    ),
    "gemma3_text": Family(
        "Gemma 3 (text)", "Gemma3ForCausalLM", llamas.read_gemma3, llamas.write_gemma3, *_GEMMA2
    ),
    "gpt2": Family(
        "GPT-2", "GPT2LMHeadModel", decoders.read_gpt2, decoders.write_gpt2, names.GPT2,
        aliases.GPT2, "transformer.wte.weight",
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia", "GPTNeoXForCausalLM", decoders.read_gpt_neox,
        decoders.write_gpt_neox, names.GPT_NEOX, aliases.GPT_NEOX, "gpt_neox.embed_in.weight",
    ),
    "bloom": Family(
        "BLOOM", "BloomForCausalLM", decoders.read_bloom, decoders.write_bloom, names.BLOOM,
        aliases.BLOOM, "transformer.word_embeddings.weight",
    ),
    "mpt": Family(
        "MPT", "MptForCausalLM", decoders.read_mpt, decoders.write_mpt, names.MPT, aliases.MPT,
        "transformer.wte.weight",
    ),
    "mamba": Family(
        "Mamba", "MambaForCausalLM", decoders.read_mamba, decoders.write_mamba, names.MAMBA,
        aliases.MAMBA, "backbone.embeddings.weight",
    ),
    "bert": Family(
        "BERT", "BertForMaskedLM", encoders.read_bert, encoders.write_bert, names.BERT,
        aliases.BERT, "bert.embeddings.word_embeddings.weight",
    ),
    "t5": Family(
        "T5 v1.0, v1.1", "T5ForConditionalGeneration", encoders.read_t5, encoders.write_t5,
        names.T5, aliases.T5, "shared.weight",
    ),
    "bart": Family(
        "BART", "BartForConditionalGeneration", encoders.read_bart, encoders.write_bart,
        names.BART, aliases.BART, "model.shared.weight",
    ),
}  # fmt: skip

# The classes of BERT by what its head is for.
BERT_ARCHITECTURES = {
    "classes": "BertForSequenceClassification",
    "mlm": "BertForMaskedLM",
    "": "BertModel",
}
_SECTIONS = {
    "rope": RopeConfig, "sparse": SparseConfig, "moe": ExpertsConfig, "mixer": MixerConfig
}  # fmt: skip


def get_family(config: Mapping[str, Any], where: str) -> tuple[str, Family]:
    """Return the `model_type` of a config.json and its row.

    Raises:
        ConfigError: it is not one that this library has.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: model_type is missing: it names the architecture.")
    return kind, choose(FAMILIES, kind, f"{where}: model_type")


def select_text_model(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the config of the text model of one that also reads images, and a message if so."""
    text = config.get("text_config")
    if config.get("model_type") == "gemma3" and isinstance(text, dict):
        top = {k: v for k, v in config.items() if k in ("eos_token_id", "dtype", "torch_dtype")}
        return top | text | {"model_type": "gemma3_text"}, ["only the text model is read"]
    return dict(config), []


def read_config(config: Mapping[str, Any], tensors: Container[str], where: str) -> ModelConfig:
    """Return the settings of the model that a config.json describes.

    Args:
        tensors: the names of its tensors, which tell the head of an encoder.
        where: the path of the file, for messages.

    Raises:
        ConfigError: a key is missing, unknown, or has a value that is not supported.
    """
    kind, family = get_family(config, where)
    keys = Keys(config, where)
    settings = family.read(keys)
    if kind == "bert":
        settings |= _read_bert_head(keys, tensors)
    keys.check_all_read()
    try:
        return make_config(settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def make_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return a `ModelConfig` of settings whose groups may be dicts."""
    groups = {
        name: kind(**settings[name])
        for name, kind in _SECTIONS.items()
        if isinstance(settings.get(name), dict)
    }
    return ModelConfig(**{**settings, **groups})


def _read_bert_head(keys: Keys, tensors: Container[str]) -> dict[str, Any]:
    """Return what a BERT is for: classes, masked words, or vectors alone."""
    if "classifier.weight" in tensors:
        return {"classes": count_labels(keys.values, keys.where)}
    return {"head": "mlm" if "cls.predictions.transform.dense.weight" in tensors else "linear"}


def count_labels(config: Mapping[str, Any], where: str) -> int:
    """Return the number of classes of a classifier, at least 2."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    problem = config.get("problem_type")
    if (
        not isinstance(count, int)
        or count < 2
        or problem not in (None, "single_label_classification")
    ):
        raise ConfigError(
            f"{where}: num_labels={count!r} with problem_type={problem!r} is not supported: a "
            "classifier has at least 2 classes, of which one is right."
        )
    return count


def list_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes, in order."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or {*labels} != {str(i) for i in range(len(labels))}:
        return ()
    return tuple(str(labels[str(i)]) for i in range(len(labels)))


# --- export --------------------------------------------------------------------------------------


def find_family(cfg: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Return the `model_type` and the config.json that a model is exported with.

    Raises:
        ConfigError: transformers has no such model; the message names the settings.
    """
    differences: list[dict[str, str]] = []
    for kind, family in FAMILIES.items():
        try:
            config = {"model_type": kind} | family.write(cfg)
            found = _compare(cfg, _read_back(kind, config, cfg))
        except (ConfigError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
            continue  # the family does not have such settings at all
        if not found:
            architecture = BERT_ARCHITECTURES[_name_head(cfg)] if kind == "bert" else (
                family.architecture
            )  # fmt: skip
            return kind, {"architectures": [architecture]} | config
        differences.append(found)
    differences.sort(key=lambda found: ("family" in found, len(found)))
    nearest = [*differences, {"mixers": f"model.mixers={cfg.mixers!r}"}][0]
    raise ConfigError(
        "the model has no counterpart in transformers: the nearest one differs in "
        f"{', '.join(nearest.values())}."
    )


def _name_head(cfg: ModelConfig) -> str:
    return "classes" if cfg.classes else "mlm" if cfg.head == "mlm" else ""


def _read_back(kind: str, config: dict[str, Any], cfg: ModelConfig) -> ModelConfig:
    keys = Keys(config, "config.json")
    settings = FAMILIES[kind].read(keys)
    if kind == "bert":
        settings |= {"classes": cfg.classes, "head": cfg.head}
    return make_config(settings)


# Settings that change nothing in a forward pass, or are compared by what they stand for.
_NOT_COMPARED = {
    "dropout", "attention_dropout", "kernel", "dtype", "products", "remat", "unroll", "documents",
    "embed_std", "embed_scale", "query_scale", "kv_heads", "head_width", "layers", "encoder_layers",
    "tie", "start_token", "mask_token", "mixers", "pattern", "feedforward", "ffn", "position",
    "rope", "sparse", "moe", "mixer", "heads", "position_buckets", "position_reach",
    "temperature_scale", "temperature_floor", "activation", "norm",
}  # fmt: skip


def _compare(cfg: ModelConfig, other: ModelConfig) -> dict[str, str]:
    """Return the settings in which two models differ, as "model.x=1 (2 there)" by name."""
    a, b = _describe(cfg), _describe(other)
    return {
        name: f"model.{name}={_shorten(a.get(name))!r} ({_shorten(b.get(name))!r} there)"
        for name in a | b
        if a.get(name) != b.get(name)
    }


def _shorten(value: Any) -> Any:
    """Return what a cycle of layers repeats."""
    if not isinstance(value, tuple):
        return value
    cycle = llamas.shorten_cycle(list(value))
    return cycle[0] if len(cycle) == 1 else cycle


def _describe(cfg: ModelConfig) -> dict[str, Any]:
    """Return all that a model computes with, in settings that are equal if models are."""
    specs = cfg.list_layers(cfg.layers)
    names = {spec.mixer for spec in specs}, {spec.position for spec in specs}
    has_attention = names[0] != {"mamba"}
    kinds = {spec.feedforward for spec in specs}
    # Gemma's scales are converted between the two.
    norm = "rms" if cfg.norm == "rms_plus_one" and not _is_gemma(cfg) else cfg.norm
    norm = "rms_plus_one" if cfg.norm == "rms" and _is_gemma(cfg) else norm
    found: dict[str, Any] = {
        f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in _NOT_COMPARED
    }
    found |= dict(
        norm=norm,
        embed_scale=cfg.has_embed_scale,
        layers=len(specs),
        mixers=tuple(spec.mixer for spec in specs),
        pattern=tuple(spec.pattern for spec in specs),
        feedforward=tuple(spec.feedforward for spec in specs),
        position=tuple(spec.position for spec in specs),
        rope=tuple(_describe_rope(cfg, spec.rope) for spec in specs),
    )
    if cfg.family == "encoder":
        found["types"] = max(1, cfg.types)  # BERT has at least one, which may be zero
    if cfg.family == "encoder_decoder":
        found["encoder_layers"] = cfg.encoder_layers or cfg.layers
    if has_attention:
        found |= dict(heads=cfg.heads, kv_heads=cfg.sizes["G"], head_width=cfg.sizes["K"])
        found["query_scale"] = round(cfg.attention_scale, 9)
    if kinds != {"none"}:
        found |= dict(ffn=tuple(spec.ffn for spec in specs), activation=cfg.activation)
    if any(kind.startswith("moe") for kind in kinds):
        found["moe"] = cfg.moe
    if "t5" in names[1]:
        found |= dict(position_buckets=cfg.position_buckets, position_reach=cfg.position_reach)
    if "temperature" in names[1]:
        found["temperature"] = (cfg.temperature_scale, cfg.temperature_floor)
    if {spec.pattern for spec in specs} != {"full"}:
        found["window"] = cfg.sparse.window
    if names[0] - {"attention"}:
        m = cfg.mixer
        found["mixer"] = (m.state, m.expand, m.conv) if names[0] == {"mamba"} else m
    return found


def _is_gemma(cfg: ModelConfig) -> bool:
    return bool(cfg.embed_scale) and cfg.family == "decoder"


def _describe_rope(cfg: ModelConfig, rope: RopeConfig) -> tuple:
    return tuple(sorted((k, str(v)) for k, v in write_rope(cfg, rope).items()))
