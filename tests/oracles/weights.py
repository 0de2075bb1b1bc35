"""Where each of our weights lies in the models of transformers: a table a model.

A row is (ours, theirs, rearrange). Ours is a path in the tree; of a weight of the layers it is one
layer's. Theirs has {} for the number of the layer. `rearrange` takes their array to ours, so it is
of use for values and for gradients alike. Linear maps of torch are [out in]; GPT-2's Conv1D are
[in out], as ours. A third of GPT-2's c_attn each is q, k and v. The halves that RoPE turns lie
alike in both.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig

Row = tuple[str, str, Callable]


def same(x, cfg: ModelConfig):
    return x


def transposed(x, cfg: ModelConfig):  # "D>F"
    return x.T


def into_heads(x, cfg: ModelConfig):  # "D>HK", "D>GK"
    return x.T.reshape(cfg.width, -1, cfg.sizes["K"])


def out_of_heads(x, cfg: ModelConfig):  # "HK>D"
    return x.T.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def heads_first(x, cfg: ModelConfig):  # "HK>D" of a Conv1D
    return x.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def third(i: int) -> Callable:
    """Part i of a fused c_attn, weight "D>HK" or bias "HK"."""

    def cut(x, cfg: ModelConfig):
        part = np.split(x, 3, axis=-1)[i]
        return part.reshape(*x.shape[:-1], cfg.heads, cfg.sizes["K"])

    return cut


LLAMA: list[Row] = [
    ("embed.table", "model.embed_tokens.weight", same),
    ("head.table", "lm_head.weight", same),
    ("stack.norm.scale", "model.norm.weight", same),
    ("stack.layers.attn_norm_in.scale", "model.layers.{}.input_layernorm.weight", same),
    ("stack.layers.ffn_norm_in.scale", "model.layers.{}.post_attention_layernorm.weight", same),
    ("stack.layers.attn.q.w", "model.layers.{}.self_attn.q_proj.weight", into_heads),
    ("stack.layers.attn.k.w", "model.layers.{}.self_attn.k_proj.weight", into_heads),
    ("stack.layers.attn.v.w", "model.layers.{}.self_attn.v_proj.weight", into_heads),
    ("stack.layers.attn.o.w", "model.layers.{}.self_attn.o_proj.weight", out_of_heads),
    ("stack.layers.ffn.gate.w", "model.layers.{}.mlp.gate_proj.weight", transposed),
    ("stack.layers.ffn.up.w", "model.layers.{}.mlp.up_proj.weight", transposed),
    ("stack.layers.ffn.down.w", "model.layers.{}.mlp.down_proj.weight", transposed),
]

GPT2: list[Row] = [
    ("embed.table", "transformer.wte.weight", same),
    ("stack.position.table", "transformer.wpe.weight", same),
    ("stack.norm.scale", "transformer.ln_f.weight", same),
    ("stack.norm.bias", "transformer.ln_f.bias", same),
    ("stack.layers.attn_norm_in.scale", "transformer.h.{}.ln_1.weight", same),
    ("stack.layers.attn_norm_in.bias", "transformer.h.{}.ln_1.bias", same),
    ("stack.layers.ffn_norm_in.scale", "transformer.h.{}.ln_2.weight", same),
    ("stack.layers.ffn_norm_in.bias", "transformer.h.{}.ln_2.bias", same),
    *(
        (f"stack.layers.attn.{name}.{ours}", f"transformer.h.{{}}.attn.c_attn.{theirs}", third(i))
        for i, name in enumerate("qkv")
        for ours, theirs in (("w", "weight"), ("b", "bias"))
    ),
    ("stack.layers.attn.o.w", "transformer.h.{}.attn.c_proj.weight", heads_first),
    ("stack.layers.attn.o.b", "transformer.h.{}.attn.c_proj.bias", same),
    ("stack.layers.ffn.up.w", "transformer.h.{}.mlp.c_fc.weight", same),
    ("stack.layers.ffn.up.b", "transformer.h.{}.mlp.c_fc.bias", same),
    ("stack.layers.ffn.down.w", "transformer.h.{}.mlp.c_proj.weight", same),
    ("stack.layers.ffn.down.b", "transformer.h.{}.mlp.c_proj.bias", same),
]


def as_ours(table: list[Row], arrays: dict[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their arrays by name (weights, or gradients) as our tree."""
    tree: dict = {}
    for ours, theirs, rearrange in table:
        if theirs not in arrays and "{}" not in theirs:
            continue  # a head that is tied is no parameter of its own
        if "{}" in theirs:
            layers = [rearrange(arrays[theirs.format(i)], cfg) for i in range(cfg.layers)]
            value = np.stack(layers)
        else:
            value = rearrange(arrays[theirs], cfg)
        node = tree
        *path, leaf = ours.split(".")
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(value)
    return tree
