"""Models of transformers, saved as files in every form that is in use.

All are tiny; `oracles.models` has them with the settings of jaxgpt, which are not used here: they
come from the files.
"""

import json
import pathlib
import re
from collections.abc import Callable

import numpy as np
import torch
import transformers
from oracles import test_mamba_oracle
from oracles.models import CASES, EAGER_ATTENTION, F, V, make_llama_settings
from safetensors.torch import load_file, save_file


def make_gemma():
    config = transformers.GemmaConfig(**make_llama_settings(
        head_dim=16, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ))  # fmt: skip
    return transformers.GemmaForCausalLM(config)


def make_mamba():
    return transformers.MambaForCausalLM(test_mamba_oracle.HF_CONFIG)


def make_bare_bert():
    config = transformers.BertConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=F, pad_token_id=None, **EAGER_ATTENTION,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def _from_oracle(name: str) -> Callable:
    return lambda: CASES[name]()[1]


MODELS: dict[str, Callable] = {
    name: _from_oracle(name)
    for name in (
        "gpt2", "llama", "llama with yarn scaling", "llama with llama3 scaling", "mistral",
        "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "llama with attention biases", "olmo2",
        "gpt_neox", "bloom", "mpt", "bert", "bert with classes", "t5", "t5 v1.1", "bart",
    )
} | {"gemma": make_gemma, "mamba": make_mamba}  # fmt: skip


def randomize(model):
    """Give a model weights of a size at which nothing is linear."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.endswith(("weight", "mixer.D"))
            is_scale = is_scale and "gemma" not in model.config.model_type
            x.copy_(float(is_scale) + 0.2 * torch.randn(x.shape, generator=generator))
    return model.eval()


# --- the forms of transformers 4 ------------------------------------------------------------------


def write_old_form(source: pathlib.Path, target: pathlib.Path):
    """Write the same model as transformers 4, or the first files of its family, did."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    kind = config["model_type"]
    config = _use_old_keys(config) | {"transformers_version": "4.30.0", "torch_dtype": "float32"}
    config.pop("dtype", None)
    tensors = _OLD_TENSORS.get(kind, lambda x: x)(tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file({k: x.contiguous() for k, x in tensors.items()}, target / "model.safetensors")


def _use_old_keys(config: dict) -> dict:
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if config["model_type"] == "gemma3_text":
        full, local = rope["full_attention"], rope["sliding_attention"]
        config |= {"rope_theta": full["rope_theta"], "rope_local_base_freq": local["rope_theta"]}
        config["rope_scaling"] = {"type": full["rope_type"], "factor": full["factor"]}
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        config.pop("layer_types")
        return config
    config.pop("layer_types", None)
    if config["model_type"] == "gpt_neox":
        config["rotary_pct"] = rope["partial_rotary_factor"]
        config["rotary_emb_base"] = rope["rope_theta"]
    elif rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {k: x for k, x in rope.items() if k not in ("rope_theta", "rope_type")}
        is_scaled = rope["rope_type"] != "default"
        # Version 4 began with "type", and then had "rope_type".
        name = "type" if rope["rope_type"] == "yarn" else "rope_type"
        config["rope_scaling"] = {name: rope["rope_type"], **scaling} if is_scaled else None
    if config["model_type"] == "t5":
        config["tie_word_embeddings"] = config.pop("scale_decoder_outputs")
    return config


def _strip(prefix: str, **more) -> Callable:
    def strip(tensors: dict) -> dict:
        return {k.removeprefix(prefix): x for k, x in tensors.items()} | more

    return strip


def _make_old_bert(tensors: dict) -> dict:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    found = {
        re.sub(r"LayerNorm\.(weight|bias)$", lambda end: old[end[0]], name): x
        for name, x in tensors.items()
    }
    found["bert.embeddings.position_ids"] = torch.arange(32)[None]
    if "cls.predictions.bias" in found:
        found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"].clone()
        embedding = found["bert.embeddings.word_embeddings.weight"]
        found["cls.predictions.decoder.weight"] = embedding.clone()
        found["cls.seq_relationship.weight"] = torch.ones(2, 32)
        found["bert.pooler.dense.weight"] = torch.ones(32, 32)
    return found


_OLD_TENSORS: dict[str, Callable] = {
    "gpt2": _strip(
        "transformer.",
        **{"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.ones(1)},
    ),
    "bloom": _strip("transformer."),
    "gpt_neox": lambda x: x | {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 32, 32)},
    "bert": _make_old_bert,
    "llama": lambda x: x | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "t5": lambda x: x | {"decoder.embed_tokens.weight": x["shared.weight"].clone()},
    "gemma2": lambda x: x | {"lm_head.weight": x["model.embed_tokens.weight"].clone()},
}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()
