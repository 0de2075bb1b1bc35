"""Where each of our weights lies in the models of transformers: a table a model.

A row is (ours, theirs, rearrange, leaves), of a layer, a norm or a table of vectors. `rearrange`
takes their array to ours; it is linear but for a constant, so that it serves values and gradients.
Within `layers`, ours is a path in one block and theirs one in one layer. A row that a model does
not have is left out, and a test sees to it that nothing is left over on either side; so models of
one kind share a table.

Linear maps of torch are [out in]; GPT-2's Conv1D are [in out], as ours. The halves that RoPE turns
lie alike in both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig

# --- rearrangements: (a weight or a bias, config) -> ours --------------------------------------


def same(x, cfg: ModelConfig):
    return x


def plus_one(x, cfg: ModelConfig):  # Gemma keeps the scales of norms less 1
    return x + 1


def transposed(x, cfg: ModelConfig):  # "D>F", and "F" as it is
    return x.T


def into_heads(x, cfg: ModelConfig):  # "D>HK", "HK"
    return x.T.reshape(*x.T.shape[:-1], -1, cfg.sizes["K"])


def out_of_heads(x, cfg: ModelConfig):  # "HK>D", and "D" as it is
    return x if x.ndim == 1 else x.T.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def heads_first(x, cfg: ModelConfig):  # "HK>D" of a Conv1D
    return x if x.ndim == 1 else x.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def third(i: int) -> Callable:
    """q, k or v of what is fused as [3 H K in], or as [in 3 H K] in a Conv1D."""

    def cut(x, cfg: ModelConfig):
        x = x if x.shape[0] == cfg.width else x.T
        return np.split(x, 3, axis=-1)[i].reshape(*x.shape[:-1], cfg.heads, cfg.sizes["K"])

    return cut


def third_of_each_head(i: int) -> Callable:
    """q, k or v of what is fused as [H 3 K in]."""

    def cut(x, cfg: ModelConfig):
        return x.T.reshape(*x.T.shape[:-1], cfg.heads, 3, cfg.sizes["K"])[..., i, :]

    return cut


def after_two_rows(x, cfg: ModelConfig):  # BART's first two positions are for padding
    return x[2:]


def half_of_experts(i: int) -> Callable:
    """The gates or the ups, "ED>F", of what is fused as [E 2F D]."""

    def cut(x, cfg: ModelConfig):
        return np.split(x, 2, axis=1)[i].swapaxes(1, 2)

    return cut


def experts_transposed(x, cfg: ModelConfig):
    return x.swapaxes(1, 2)


# --- rows --------------------------------------------------------------------------------------


class Row(NamedTuple):
    ours: str
    theirs: str
    rearrange: Callable
    leaves: dict[str, str]  # ours -> theirs


def linear(ours, theirs, rearrange=transposed) -> Row:
    return Row(ours, theirs, rearrange, {"w": ".weight", "b": ".bias"})


def norm(ours, theirs, rearrange=same) -> Row:
    return Row(ours, theirs, rearrange, {"scale": ".weight", "bias": ".bias"})


def table(ours, theirs, rearrange=same) -> Row:
    return Row(ours, theirs, rearrange, {"table": ".weight"})


def bare(ours, theirs, rearrange=same) -> Row:
    """A parameter that is no layer's in theirs."""
    path, _, leaf = ours.rpartition(".")
    return Row(path, theirs, rearrange, {leaf: ""})


def layers(ours: str, theirs: str, *rows: Row) -> list[Row]:
    """Rows of every block: * is its place in the unit, {} its number in theirs."""
    return [
        row._replace(ours=f"{ours}.layers.block_*.{row.ours}", theirs=f"{theirs}.{row.theirs}")
        for row in rows
    ]


def qkv(ours: str, theirs: str, names: str, rearrange=into_heads) -> list[Row]:
    """Three maps whose names in theirs are `names` with q, k, v in place of {}."""
    return [linear(f"{ours}.{x}", f"{theirs}.{names.format(x)}", rearrange) for x in "qkv"]


def fused(ours: str, theirs: str, part: Callable) -> list[Row]:
    return [linear(f"{ours}.{x}", theirs, part(i)) for i, x in enumerate("qkv")]


# --- tables ------------------------------------------------------------------------------------

_LLAMA_EMBEDDINGS = [table("embed", "model.embed_tokens"), table("head", "lm_head")]
_LLAMA_ATTENTION = [
    *qkv("mixer", "self_attn", "{}_proj"),
    linear("mixer.o", "self_attn.o_proj", out_of_heads),
]
_LLAMA_GATED = [linear(f"ffn.{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")]

LLAMA = [  # and Mistral, Qwen 3, Mixtral
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm"),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        *_LLAMA_ATTENTION,
        norm("mixer.q_norm", "self_attn.q_norm"),
        norm("mixer.k_norm", "self_attn.k_norm"),
        *_LLAMA_GATED,
        linear("ffn.router", "mlp.gate"),
        bare("ffn.experts.gate.w", "mlp.experts.gate_up_proj", half_of_experts(0)),
        bare("ffn.experts.up.w", "mlp.experts.gate_up_proj", half_of_experts(1)),
        bare("ffn.experts.down.w", "mlp.experts.down_proj", experts_transposed),
    ),
]

GEMMA2 = [
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm", plus_one),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm", plus_one),
        norm("mixer_norm_out", "post_attention_layernorm", plus_one),
        norm("ffn_norm_in", "pre_feedforward_layernorm", plus_one),
        norm("ffn_norm_out", "post_feedforward_layernorm", plus_one),
        *_LLAMA_ATTENTION,
        *_LLAMA_GATED,
    ),
]

GPT2 = [
    table("embed", "transformer.wte"),
    table("stack.position", "transformer.wpe"),
    norm("stack.norm", "transformer.ln_f"),
    *layers(
        "stack",
        "transformer.h.{}",
        norm("mixer_norm_in", "ln_1"),
        norm("ffn_norm_in", "ln_2"),
        *fused("mixer", "attn.c_attn", third),
        linear("mixer.o", "attn.c_proj", heads_first),
        linear("ffn.up", "mlp.c_fc", same),
        linear("ffn.down", "mlp.c_proj", same),
    ),
]

GPT_NEOX = [
    table("embed", "gpt_neox.embed_in"),
    table("head", "lm_head"),
    norm("stack.norm", "gpt_neox.final_layer_norm"),
    *layers(
        "stack",
        "gpt_neox.layers.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        *fused("mixer", "attention.query_key_value", third_of_each_head),
        linear("mixer.o", "attention.dense", out_of_heads),
        linear("ffn.up", "mlp.dense_h_to_4h"),
        linear("ffn.down", "mlp.dense_4h_to_h"),
    ),
]

BLOOM = [
    table("embed", "transformer.word_embeddings"),
    norm("stack.embed_norm", "transformer.word_embeddings_layernorm"),
    norm("stack.norm", "transformer.ln_f"),
    *layers(
        "stack",
        "transformer.h.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        *fused("mixer", "self_attention.query_key_value", third_of_each_head),
        linear("mixer.o", "self_attention.dense", out_of_heads),
        linear("ffn.up", "mlp.dense_h_to_4h"),
        linear("ffn.down", "mlp.dense_4h_to_h"),
    ),
]

MPT = [
    table("embed", "transformer.wte"),
    norm("stack.norm", "transformer.norm_f"),
    *layers(
        "stack",
        "transformer.blocks.{}",
        norm("mixer_norm_in", "norm_1"),
        norm("ffn_norm_in", "norm_2"),
        *fused("mixer", "attn.Wqkv", third),
        linear("mixer.o", "attn.out_proj", out_of_heads),
        linear("ffn.up", "ffn.up_proj"),
        linear("ffn.down", "ffn.down_proj"),
    ),
]

BERT = [
    table("embed", "bert.embeddings.word_embeddings"),
    table("stack.position", "bert.embeddings.position_embeddings"),
    table("types", "bert.embeddings.token_type_embeddings"),
    norm("stack.embed_norm", "bert.embeddings.LayerNorm"),
    *layers(
        "stack",
        "bert.encoder.layer.{}",
        linear("mixer.q", "attention.self.query", into_heads),
        linear("mixer.k", "attention.self.key", into_heads),
        linear("mixer.v", "attention.self.value", into_heads),
        linear("mixer.o", "attention.output.dense", out_of_heads),
        norm("mixer_norm_out", "attention.output.LayerNorm"),
        linear("ffn.up", "intermediate.dense"),
        linear("ffn.down", "output.dense"),
        norm("ffn_norm_out", "output.LayerNorm"),
    ),
    linear("transform.dense", "cls.predictions.transform.dense"),
    norm("transform.norm", "cls.predictions.transform.LayerNorm"),
    bare("transform.bias", "cls.predictions.bias"),
    linear("classes.pooler", "bert.pooler.dense"),
    linear("classes.scores", "classifier"),
]


def _t5(ours: str, theirs: str, ffn: int, *cross: Row) -> list[Row]:
    """One stack of T5, whose feed-forward is number `ffn` of its sublayers."""
    return [
        table(
            f"{ours}.position", f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"
        ),
        norm(f"{ours}.norm", f"{theirs}.final_layer_norm"),
        *layers(
            ours,
            theirs + ".block.{}",
            norm("mixer_norm_in", "layer.0.layer_norm"),
            *qkv("mixer", "layer.0.SelfAttention", "{}"),
            linear("mixer.o", "layer.0.SelfAttention.o", out_of_heads),
            *cross,
            norm("ffn_norm_in", f"layer.{ffn}.layer_norm"),
            linear("ffn.up", f"layer.{ffn}.DenseReluDense.wi"),
            linear("ffn.gate", f"layer.{ffn}.DenseReluDense.wi_0"),
            linear("ffn.up", f"layer.{ffn}.DenseReluDense.wi_1"),
            linear("ffn.down", f"layer.{ffn}.DenseReluDense.wo"),
        ),
    ]


T5 = [
    table("embed", "shared"),
    table("head", "lm_head"),
    *_t5("encoder", "encoder", 1),
    *_t5(
        "stack",
        "decoder",
        2,
        norm("cross_norm_in", "layer.1.layer_norm"),
        *qkv("cross", "layer.1.EncDecAttention", "{}"),
        linear("cross.o", "layer.1.EncDecAttention.o", out_of_heads),
    ),
]


def _bart(ours: str, theirs: str, *cross: Row) -> list[Row]:
    return [
        table(f"{ours}.position", f"{theirs}.embed_positions", after_two_rows),
        norm(f"{ours}.embed_norm", f"{theirs}.layernorm_embedding"),
        *layers(
            ours,
            theirs + ".layers.{}",
            *qkv("mixer", "self_attn", "{}_proj"),
            linear("mixer.o", "self_attn.out_proj", out_of_heads),
            norm("mixer_norm_out", "self_attn_layer_norm"),
            *cross,
            linear("ffn.up", "fc1"),
            linear("ffn.down", "fc2"),
            norm("ffn_norm_out", "final_layer_norm"),
        ),
    ]


BART = [
    table("embed", "model.shared"),
    *_bart("encoder", "model.encoder"),
    *_bart(
        "stack",
        "model.decoder",
        *qkv("cross", "encoder_attn", "{}_proj"),
        linear("cross.o", "encoder_attn.out_proj", out_of_heads),
        norm("cross_norm_out", "encoder_attn_layer_norm"),
    ),
]


# --- reading them ------------------------------------------------------------------------------


def places(rows: list[Row], names, cfg: ModelConfig):
    """(path of ours, [names in theirs], rearrange, whether stacked) of all that theirs has."""
    unit = len(cfg.unit)
    for ours, theirs, rearrange, leaves in rows:
        for leaf, ending in leaves.items():
            if "*" not in ours:
                found = [(f"{ours}.{leaf}", [theirs + ending], False)]
            else:
                count = cfg.encoder_layers or cfg.layers
                count = count if ours.startswith("encoder") else cfg.layers
                found = [
                    (
                        f"{ours.replace('*', str(block))}.{leaf}",
                        [theirs.format(i) + ending for i in range(block, count, unit)],
                        True,
                    )
                    for block in range(unit)
                ]
            yield from ((*place, rearrange) for place in found if place[1][0] in names)


def as_ours(rows: list[Row], arrays: dict[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Their arrays by name as our tree."""
    tree: dict = {}
    for ours, theirs, is_stacked, rearrange in places(rows, arrays, cfg):
        values = [rearrange(arrays[name], cfg) for name in theirs]
        node = tree
        *path, leaf = ours.split(".")
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(np.stack(values) if is_stacked else values[0])
    return tree
