"""Maps from the weights of transformers models to jaxgpt's: one table per model.

A row is (path, hf_name, rearrange, leaves), of a layer, a norm or an embedding table. `rearrange`
maps the array of transformers to jaxgpt's; it is affine, so that it applies to values and (without
its constant) to gradients. Within `layers`, path is relative to one block and hf_name to one layer.
Rows that a model does not have are skipped, and a test asserts that no weight of either side is
left over; so similar models share a table.

Linear maps of torch are [out in]; GPT-2's Conv1D are [in out], as in jaxgpt. The halves that RoPE
rotates have the same layout in both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig

# --- rearrangements: (weight or bias, config) -> jaxgpt --------------------------------------


def keep(x, cfg: ModelConfig):
    return x


def add_one(x, cfg: ModelConfig):  # Gemma stores norm scales minus 1
    return x + 1


def transpose(x, cfg: ModelConfig):  # "D>F", and "F" unchanged
    return x.T


def split_heads(x, cfg: ModelConfig):  # "D>HK", "HK"
    return x.T.reshape(*x.T.shape[:-1], -1, cfg.sizes["K"])


def split_heads_of_pairs(x, cfg: ModelConfig):
    """Rearrange as `split_heads` where RoPE rotates channels (2i, 2i + 1), not (i, i + K/2)."""
    y = split_heads(x, cfg)
    return np.concatenate([y[..., ::2], y[..., 1::2]], axis=-1)


def merge_heads(x, cfg: ModelConfig):  # "HK>D", and "D" unchanged
    return x if x.ndim == 1 else x.T.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def merge_heads_conv1d(x, cfg: ModelConfig):  # "HK>D" of a Conv1D
    return x if x.ndim == 1 else x.reshape(cfg.heads, cfg.sizes["K"], cfg.width)


def take_third(i: int) -> Callable:
    """Return the rearrangement to q, k or v of a fused [3 H K in], or [in 3 H K] in a Conv1D."""

    def rearrange(x, cfg: ModelConfig):
        x = x if x.shape[0] == cfg.width else x.T
        return np.split(x, 3, axis=-1)[i].reshape(*x.shape[:-1], cfg.heads, cfg.sizes["K"])

    return rearrange


def take_third_of_heads(i: int) -> Callable:
    """Return the rearrangement to q, k or v of a fused [H 3 K in]."""

    def rearrange(x, cfg: ModelConfig):
        return x.T.reshape(*x.T.shape[:-1], cfg.heads, 3, cfg.sizes["K"])[..., i, :]

    return rearrange


def skip_two_rows(x, cfg: ModelConfig):  # BART's first two positions are reserved for padding
    return x[2:]


def take_half_of_experts(i: int) -> Callable:
    """Return the rearrangement to gate or up, "ED>F", of a fused [E 2F D]."""

    def rearrange(x, cfg: ModelConfig):
        return np.split(x, 2, axis=1)[i].swapaxes(1, 2)

    return rearrange


def take_half_of_columns(i: int) -> Callable:
    """Return the rearrangement to gate or up, "ED>F", of a fused [E D 2F]."""
    return lambda x, cfg: np.split(x, 2, axis=2)[i]


def transpose_experts(x, cfg: ModelConfig):
    return x.swapaxes(1, 2)


# --- rows --------------------------------------------------------------------------------------


class Row(NamedTuple):
    path: str
    hf_name: str
    rearrange: Callable
    leaves: dict[str, str]  # jaxgpt -> transformers


def linear(path, hf_name, rearrange=transpose) -> Row:
    return Row(path, hf_name, rearrange, {"w": ".weight", "b": ".bias"})


def norm(path, hf_name, rearrange=keep) -> Row:
    return Row(path, hf_name, rearrange, {"scale": ".weight", "bias": ".bias"})


def table(path, hf_name, rearrange=keep) -> Row:
    return Row(path, hf_name, rearrange, {"table": ".weight"})


def parameter(path, hf_name, rearrange=keep) -> Row:
    """Make the row of a parameter that is not in a layer in transformers."""
    path, _, leaf = path.rpartition(".")
    return Row(path, hf_name, rearrange, {leaf: ""})


def layers(path: str, hf_name: str, *rows: Row) -> list[Row]:
    """Repeat rows for every block: * is its index in the layer cycle, {} the transformers layer."""
    return [
        row._replace(path=f"{path}.layers.block_*.{row.path}", hf_name=f"{hf_name}.{row.hf_name}")
        for row in rows
    ]


def qkv(path: str, hf_name: str, names: str, rearrange=split_heads) -> list[Row]:
    """Make rows of three maps, named `names` in transformers, with q, k, v in place of {}."""
    return [linear(f"{path}.{x}", f"{hf_name}.{names.format(x)}", rearrange) for x in "qkv"]


def fused(path: str, hf_name: str, rearrange_part: Callable) -> list[Row]:
    return [linear(f"{path}.{x}", hf_name, rearrange_part(i)) for i, x in enumerate("qkv")]


# --- tables ------------------------------------------------------------------------------------

_LLAMA_EMBEDDINGS = [table("embed", "model.embed_tokens"), table("head", "lm_head")]
_LLAMA_ATTENTION = [
    *qkv("mixer", "self_attn", "{}_proj"),
    linear("mixer.o", "self_attn.o_proj", merge_heads),
]
_LLAMA_GATED = [linear(f"ffn.{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")]

LLAMA = [  # and Mistral, Qwen 2 and 3, Mixtral
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
        parameter("mixer.sinks", "self_attn.sinks"),
        *_LLAMA_GATED,
        linear("ffn.router", "mlp.gate"),
        parameter("ffn.experts.gate.w", "mlp.experts.gate_up_proj", take_half_of_experts(0)),
        parameter("ffn.experts.up.w", "mlp.experts.gate_up_proj", take_half_of_experts(1)),
        parameter("ffn.experts.down.w", "mlp.experts.down_proj", transpose_experts),
    ),
]

GEMMA2 = [  # and Gemma 3
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm", add_one),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm", add_one),
        norm("mixer_norm_out", "post_attention_layernorm", add_one),
        norm("ffn_norm_in", "pre_feedforward_layernorm", add_one),
        norm("ffn_norm_out", "post_feedforward_layernorm", add_one),
        *_LLAMA_ATTENTION,
        norm("mixer.q_norm", "self_attn.q_norm", add_one),
        norm("mixer.k_norm", "self_attn.k_norm", add_one),
        *_LLAMA_GATED,
    ),
]

LLAMA4 = [
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm"),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        linear("mixer.q", "self_attn.q_proj", split_heads_of_pairs),
        linear("mixer.k", "self_attn.k_proj", split_heads_of_pairs),
        linear("mixer.v", "self_attn.v_proj", split_heads),
        linear("mixer.o", "self_attn.o_proj", merge_heads),
        *(linear(f"ffn.{x}", f"feed_forward.{x}_proj") for x in ("gate", "up", "down")),
        *(
            linear(f"ffn.shared.{x}", f"feed_forward.shared_expert.{x}_proj")
            for x in ("gate", "up", "down")
        ),
        linear("ffn.router", "feed_forward.router"),
        parameter(
            "ffn.experts.gate.w", "feed_forward.experts.gate_up_proj", take_half_of_columns(0)
        ),
        parameter("ffn.experts.up.w", "feed_forward.experts.gate_up_proj", take_half_of_columns(1)),
        parameter("ffn.experts.down.w", "feed_forward.experts.down_proj", keep),
    ),
]

OLMO2 = [
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm"),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_out", "post_attention_layernorm"),
        norm("ffn_norm_out", "post_feedforward_layernorm"),
        *_LLAMA_ATTENTION,
        norm("mixer.q_norm", "self_attn.q_norm", split_heads),
        norm("mixer.k_norm", "self_attn.k_norm", split_heads),
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
        *fused("mixer", "attn.c_attn", take_third),
        linear("mixer.o", "attn.c_proj", merge_heads_conv1d),
        linear("ffn.up", "mlp.c_fc", keep),
        linear("ffn.down", "mlp.c_proj", keep),
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
        *fused("mixer", "attention.query_key_value", take_third_of_heads),
        linear("mixer.o", "attention.dense", merge_heads),
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
        *fused("mixer", "self_attention.query_key_value", take_third_of_heads),
        linear("mixer.o", "self_attention.dense", merge_heads),
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
        *fused("mixer", "attn.Wqkv", take_third),
        linear("mixer.o", "attn.out_proj", merge_heads),
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
        linear("mixer.q", "attention.self.query", split_heads),
        linear("mixer.k", "attention.self.key", split_heads),
        linear("mixer.v", "attention.self.value", split_heads),
        linear("mixer.o", "attention.output.dense", merge_heads),
        norm("mixer_norm_out", "attention.output.LayerNorm"),
        linear("ffn.up", "intermediate.dense"),
        linear("ffn.down", "output.dense"),
        norm("ffn_norm_out", "output.LayerNorm"),
    ),
    linear("transform.dense", "cls.predictions.transform.dense"),
    norm("transform.norm", "cls.predictions.transform.LayerNorm"),
    parameter("transform.bias", "cls.predictions.bias"),
    linear("classes.pooler", "bert.pooler.dense"),
    linear("classes.scores", "classifier"),
]


def _t5(path: str, hf_name: str, ffn: int, *cross: Row) -> list[Row]:
    """Make the table of one stack of T5, whose feed-forward is sublayer `ffn`."""
    return [
        table(
            f"{path}.position", f"{hf_name}.block.0.layer.0.SelfAttention.relative_attention_bias"
        ),
        norm(f"{path}.norm", f"{hf_name}.final_layer_norm"),
        *layers(
            path,
            hf_name + ".block.{}",
            norm("mixer_norm_in", "layer.0.layer_norm"),
            *qkv("mixer", "layer.0.SelfAttention", "{}"),
            linear("mixer.o", "layer.0.SelfAttention.o", merge_heads),
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
        linear("cross.o", "layer.1.EncDecAttention.o", merge_heads),
    ),
]


def _bart(path: str, hf_name: str, *cross: Row) -> list[Row]:
    return [
        table(f"{path}.position", f"{hf_name}.embed_positions", skip_two_rows),
        norm(f"{path}.embed_norm", f"{hf_name}.layernorm_embedding"),
        *layers(
            path,
            hf_name + ".layers.{}",
            *qkv("mixer", "self_attn", "{}_proj"),
            linear("mixer.o", "self_attn.out_proj", merge_heads),
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
        linear("cross.o", "encoder_attn.out_proj", merge_heads),
        norm("cross_norm_out", "encoder_attn_layer_norm"),
    ),
]


# --- conversion ------------------------------------------------------------------------------


def locate_weights(rows: list[Row], names, cfg: ModelConfig):
    """Yield (path, [names in transformers], whether stacked, rearrange) for the given names."""
    for path, hf_name, rearrange, leaves in rows:
        for leaf, ending in leaves.items():
            locations = [(f"{path}.{leaf}", [hf_name + ending], False)]
            if "*" in path:
                locations = [
                    (f"{block_path}.{leaf}", [hf_name.format(i) + ending for i in ids], True)
                    for block_path, ids in _locate_blocks(path, cfg)
                ]
            yield from ((*location, rearrange) for location in locations if location[1][0] in names)


def _locate_blocks(path: str, cfg: ModelConfig):
    """Yield (path of a block of the cycle or the tail, indices of the layers stacked there)."""
    is_encoder = path.startswith("encoder")
    count = cfg.encoder_layers if is_encoder and cfg.encoder_layers else cfg.layers
    cycle, repeats, tail = cfg.group_layers(count)
    for block in range(len(cycle)):
        ids = range(block, repeats * len(cycle), len(cycle))
        yield path.replace("*", str(block)), ids
    for block in range(len(tail)):
        ids = [repeats * len(cycle) + block]
        yield path.replace(".layers.", ".tail.").replace("*", str(block)), ids


def convert_arrays(rows: list[Row], arrays: dict[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Convert arrays of transformers, by name, to a parameter tree of jaxgpt."""
    tree: dict = {}
    for path, hf_names, is_stacked, rearrange in locate_weights(rows, arrays, cfg):
        values = [rearrange(arrays[name], cfg) for name in hf_names]
        node = tree
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(np.stack(values) if is_stacked else values[0])
    return tree
