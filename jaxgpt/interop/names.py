"""The names of parameters in transformers and in jaxgpt: one table per model.

Rows that a model does not have are skipped, so that similar models share a table; that nothing is
left over on either side is checked where models are converted. The names are those of files and,
where models in memory have others, of both.
"""

from jaxgpt.interop import layouts
from jaxgpt.interop.layouts import (
    GEMMA_SCALE,
    KEEP,
    MERGE_HEADS,
    MERGE_HEADS_CONV1D,
    SKIP_TWO_ROWS,
    SPLIT_HEADS,
    SPLIT_HEADS_CONV1D,
    SPLIT_HEADS_OF_PAIRS,
    TRANSPOSE,
    TRANSPOSE_EXPERTS,
    TRANSPOSE_TAPS,
)
from jaxgpt.interop.rows import (
    Row,
    fused,
    fused_experts,
    layers,
    linear,
    norm,
    parameter,
    qkv,
    table,
)

_LLAMA_EMBEDDINGS = [table("embed", "model.embed_tokens"), table("head", "lm_head")]
_LLAMA_ATTENTION = [
    *qkv("mixer", "self_attn", "{}_proj"),
    linear("mixer.o", "self_attn.o_proj", MERGE_HEADS),
]
_LLAMA_GATED = [linear(f"ffn.{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")]
_MIXTRAL_EXPERTS = [
    linear("ffn.router", "block_sparse_moe.gate"),
    *(
        linear(f"ffn.experts.{x}", f"block_sparse_moe.experts.<e>.{name}")
        for x, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
    # In memory, and in GGUF:
    linear("ffn.router", "mlp.gate", only="read"),
    *fused_experts(
        "ffn.experts", "mlp.experts.gate_up_proj", layouts.HALVES_OF_EXPERTS, TRANSPOSE_EXPERTS
    ),
    parameter("ffn.experts.down.w", "mlp.experts.down_proj", TRANSPOSE_EXPERTS, only="read"),
]

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
        *_MIXTRAL_EXPERTS,
    ),
]

GEMMA = [
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm", GEMMA_SCALE),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm", GEMMA_SCALE),
        norm("ffn_norm_in", "post_attention_layernorm", GEMMA_SCALE),
        *_LLAMA_ATTENTION,
        *_LLAMA_GATED,
    ),
]

GEMMA2 = [  # and Gemma 3
    *_LLAMA_EMBEDDINGS,
    norm("stack.norm", "model.norm", GEMMA_SCALE),
    *layers(
        "stack",
        "model.layers.{}",
        norm("mixer_norm_in", "input_layernorm", GEMMA_SCALE),
        norm("mixer_norm_out", "post_attention_layernorm", GEMMA_SCALE),
        norm("ffn_norm_in", "pre_feedforward_layernorm", GEMMA_SCALE),
        norm("ffn_norm_out", "post_feedforward_layernorm", GEMMA_SCALE),
        *_LLAMA_ATTENTION,
        norm("mixer.q_norm", "self_attn.q_norm", GEMMA_SCALE),
        norm("mixer.k_norm", "self_attn.k_norm", GEMMA_SCALE),
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
        linear("mixer.q", "self_attn.q_proj", SPLIT_HEADS_OF_PAIRS),
        linear("mixer.k", "self_attn.k_proj", SPLIT_HEADS_OF_PAIRS),
        linear("mixer.v", "self_attn.v_proj", SPLIT_HEADS),
        linear("mixer.o", "self_attn.o_proj", MERGE_HEADS),
        *(linear(f"ffn.{x}", f"feed_forward.{x}_proj") for x in ("gate", "up", "down")),
        *(
            linear(f"ffn.shared.{x}", f"feed_forward.shared_expert.{x}_proj")
            for x in ("gate", "up", "down")
        ),
        linear("ffn.router", "feed_forward.router"),
        *fused_experts(
            "ffn.experts", "feed_forward.experts.gate_up_proj", layouts.HALVES_OF_COLUMNS, KEEP
        ),
        parameter("ffn.experts.down.w", "feed_forward.experts.down_proj"),
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
        norm("mixer.q_norm", "self_attn.q_norm", SPLIT_HEADS),
        norm("mixer.k_norm", "self_attn.k_norm", SPLIT_HEADS),
        *_LLAMA_GATED,
    ),
]

GPT2 = [
    table("embed", "transformer.wte"),
    table("head", "lm_head"),
    table("stack.position", "transformer.wpe"),
    norm("stack.norm", "transformer.ln_f"),
    *layers(
        "stack",
        "transformer.h.{}",
        norm("mixer_norm_in", "ln_1"),
        norm("ffn_norm_in", "ln_2"),
        *fused("mixer", "attn.c_attn", layouts.THIRDS_CONV1D, SPLIT_HEADS_CONV1D),
        linear("mixer.o", "attn.c_proj", MERGE_HEADS_CONV1D),
        linear("ffn.up", "mlp.c_fc", KEEP),
        linear("ffn.down", "mlp.c_proj", KEEP),
    ),
]

GPT_NEOX = [
    table("embed", "gpt_neox.embed_in"),
    table("head", "embed_out"),
    table("head", "lm_head", only="read"),
    norm("stack.norm", "gpt_neox.final_layer_norm"),
    *layers(
        "stack",
        "gpt_neox.layers.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        *fused("mixer", "attention.query_key_value", layouts.THIRDS_OF_HEADS),
        linear("mixer.o", "attention.dense", MERGE_HEADS),
        linear("ffn.up", "mlp.dense_h_to_4h"),
        linear("ffn.down", "mlp.dense_4h_to_h"),
    ),
]

BLOOM = [
    table("embed", "transformer.word_embeddings"),
    table("head", "lm_head"),
    norm("stack.embed_norm", "transformer.word_embeddings_layernorm"),
    norm("stack.norm", "transformer.ln_f"),
    *layers(
        "stack",
        "transformer.h.{}",
        norm("mixer_norm_in", "input_layernorm"),
        norm("ffn_norm_in", "post_attention_layernorm"),
        *fused("mixer", "self_attention.query_key_value", layouts.THIRDS_OF_HEADS),
        linear("mixer.o", "self_attention.dense", MERGE_HEADS),
        linear("ffn.up", "mlp.dense_h_to_4h"),
        linear("ffn.down", "mlp.dense_4h_to_h"),
    ),
]

MPT = [
    table("embed", "transformer.wte"),
    table("head", "lm_head"),
    norm("stack.norm", "transformer.norm_f"),
    *layers(
        "stack",
        "transformer.blocks.{}",
        norm("mixer_norm_in", "norm_1"),
        norm("ffn_norm_in", "norm_2"),
        *fused("mixer", "attn.Wqkv", layouts.THIRDS),
        linear("mixer.o", "attn.out_proj", MERGE_HEADS),
        linear("ffn.up", "ffn.up_proj"),
        linear("ffn.down", "ffn.down_proj"),
    ),
]

BERT = [
    table("embed", "bert.embeddings.word_embeddings"),
    table("head", "cls.predictions.decoder"),
    table("stack.position", "bert.embeddings.position_embeddings"),
    table("types", "bert.embeddings.token_type_embeddings"),
    norm("stack.embed_norm", "bert.embeddings.LayerNorm"),
    *layers(
        "stack",
        "bert.encoder.layer.{}",
        linear("mixer.q", "attention.self.query", SPLIT_HEADS),
        linear("mixer.k", "attention.self.key", SPLIT_HEADS),
        linear("mixer.v", "attention.self.value", SPLIT_HEADS),
        linear("mixer.o", "attention.output.dense", MERGE_HEADS),
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
    bias = f"{hf_name}.block.0.layer.0.SelfAttention.relative_attention_bias"
    return [
        table(f"{path}.position", bias),
        norm(f"{path}.norm", f"{hf_name}.final_layer_norm"),
        *layers(
            path,
            hf_name + ".block.{}",
            norm("mixer_norm_in", "layer.0.layer_norm"),
            *qkv("mixer", "layer.0.SelfAttention", "{}"),
            linear("mixer.o", "layer.0.SelfAttention.o", MERGE_HEADS),
            *cross,
            norm("ffn_norm_in", f"layer.{ffn}.layer_norm"),
            linear("ffn.up", f"layer.{ffn}.DenseReluDense.wi", only="plain"),
            linear("ffn.gate", f"layer.{ffn}.DenseReluDense.wi_0", only="gated"),
            linear("ffn.up", f"layer.{ffn}.DenseReluDense.wi_1", only="gated"),
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
        linear("cross.o", "layer.1.EncDecAttention.o", MERGE_HEADS),
    ),
]


def _bart(path: str, hf_name: str, *cross: Row) -> list[Row]:
    return [
        table(f"{path}.position", f"{hf_name}.embed_positions", SKIP_TWO_ROWS),
        norm(f"{path}.embed_norm", f"{hf_name}.layernorm_embedding"),
        *layers(
            path,
            hf_name + ".layers.{}",
            *qkv("mixer", "self_attn", "{}_proj"),
            linear("mixer.o", "self_attn.out_proj", MERGE_HEADS),
            norm("mixer_norm_out", "self_attn_layer_norm"),
            *cross,
            linear("ffn.up", "fc1"),
            linear("ffn.down", "fc2"),
            norm("ffn_norm_out", "final_layer_norm"),
        ),
    ]


BART = [
    table("embed", "model.shared"),
    table("head", "lm_head"),
    *_bart("encoder", "model.encoder"),
    *_bart(
        "stack",
        "model.decoder",
        *qkv("cross", "encoder_attn", "{}_proj"),
        linear("cross.o", "encoder_attn.out_proj", MERGE_HEADS),
        norm("cross_norm_out", "encoder_attn_layer_norm"),
    ),
]

MAMBA = [
    table("embed", "backbone.embeddings"),
    table("head", "lm_head"),
    norm("stack.norm", "backbone.norm_f"),
    *layers(
        "stack",
        "backbone.layers.{}",
        norm("mixer_norm_in", "norm"),
        linear("mixer.in", "mixer.in_proj", fusion=layouts.HALVES, part=0),
        linear("mixer.gate", "mixer.in_proj", fusion=layouts.HALVES, part=1),
        parameter("mixer.conv_w", "mixer.conv1d.weight", TRANSPOSE_TAPS),
        parameter("mixer.conv_b", "mixer.conv1d.bias"),
        *(
            parameter(
                f"mixer.{x}", "mixer.x_proj.weight", TRANSPOSE, fusion=layouts.RANK_B_C, part=i
            )
            for i, x in enumerate(("rank", "B", "C"))
        ),
        parameter("mixer.step_w", "mixer.dt_proj.weight", TRANSPOSE),
        parameter("mixer.step_b", "mixer.dt_proj.bias"),
        parameter("mixer.log_A", "mixer.A_log"),
        parameter("mixer.skip", "mixer.D"),
        linear("mixer.o", "mixer.out_proj"),
    ),
]
