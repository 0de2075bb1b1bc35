"""The models to compare: (jaxgpt config, transformers model, table of weights).

All are tiny, and sizes in a config that could be confused differ from each other. The transformers
models have no padding token, since its embedding would get no gradient.
"""

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from jaxgpt.architecture import ExpertsConfig, ModelConfig, RopeConfig, SparseConfig
from jaxgpt.interop import names

V, D, F, THETA, EPS = 97, 32, 48, 500.0, 1e-4
GPT2_STYLE = dict(norm="layer", feedforward="plain", bias=True)  # of GPT-2 and its contemporaries
EAGER_ATTENTION = dict(attn_implementation="eager")


def make_config(**changes) -> ModelConfig:
    sizes = dict(vocab=V, context=32, width=D, layers=2, heads=4, ffn=F, norm_eps=EPS)
    return ModelConfig(**sizes | changes)


def make_llama_settings(**changes) -> dict:
    """Return the settings that Llama's config shares with those of its successors."""
    sizes = dict(
        vocab_size=V, max_position_embeddings=32, hidden_size=D, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=F, rms_norm_eps=EPS,
        rope_parameters=dict(rope_type="default", rope_theta=THETA),
        tie_word_embeddings=False, pad_token_id=None, **EAGER_ATTENTION,
    )  # fmt: skip
    return sizes | changes


def make_llama(kv_heads: int = 2, **changes):
    cfg = make_config(kv_heads=kv_heads, tie=False, **dict(rope=RopeConfig(THETA)) | changes)
    config = transformers.LlamaConfig(**make_llama_settings(
        num_key_value_heads=kv_heads, head_dim=cfg.sizes["K"],
        rope_parameters=_make_rope_parameters(cfg.rope),
        # In transformers "dynamic" scales if the text is longer than this; it has 20 tokens.
        max_position_embeddings=10 if cfg.rope.scaling == "ntk" else 32,
    ))  # fmt: skip
    return cfg, transformers.LlamaForCausalLM(config), names.LLAMA


def _make_rope_parameters(rope: RopeConfig) -> dict:
    scaling_settings = {
        "none": {},
        "linear": dict(factor=rope.factor),
        "yarn": dict(factor=rope.factor),
        "llama3": dict(factor=rope.factor, low_freq_factor=1.0, high_freq_factor=4.0),
        "ntk": dict(factor=1.0),
    }
    name = {"none": "default", "ntk": "dynamic"}.get(rope.scaling, rope.scaling)
    parameters = dict(rope_type=name, rope_theta=rope.theta) | scaling_settings[rope.scaling]
    original = {"original_max_position_embeddings": rope.original} if rope.original else {}
    return parameters | original


def make_scaled_llama(scaling: str):
    """Return a Llama whose channels have wavelengths below, near and above the context length."""
    original = {"yarn": 16, "llama3": 16}.get(scaling)
    factor = 2.0 if scaling == "ntk" else 3.0
    return make_llama(head_width=16, rope=RopeConfig(20.0, 1.0, scaling, factor, original))


def make_mistral():
    cfg = make_config(
        kv_heads=2, tie=False, rope=RopeConfig(THETA), pattern=("window",),
        sparse=SparseConfig(window=5),
    )  # fmt: skip
    config = transformers.MistralConfig(**make_llama_settings(sliding_window=5))
    return cfg, transformers.MistralForCausalLM(config), names.LLAMA


def make_mixtral():
    cfg = make_config(
        kv_heads=2, tie=False, rope=RopeConfig(THETA), feedforward="moe_gated",
        moe=ExpertsConfig(experts=4, active=2),
    )  # fmt: skip
    config = transformers.MixtralConfig(
        **make_llama_settings(num_local_experts=4, num_experts_per_tok=2)
    )
    return cfg, transformers.MixtralForCausalLM(config), names.LLAMA


def make_qwen3():
    cfg = make_config(kv_heads=2, tie=False, rope=RopeConfig(THETA), qk_norm=True, head_width=16)
    config = transformers.Qwen3Config(**make_llama_settings(head_dim=16))
    return cfg, transformers.Qwen3ForCausalLM(config), names.LLAMA


def make_gemma2():
    cfg = make_config(
        kv_heads=2, rope=RopeConfig(THETA), head_width=16, layers=4, pattern=("window", "full"),
        sparse=SparseConfig(window=5), softcap=3.0, final_softcap=4.0, query_scale=24**-0.5,
        wiring="sandwich", embed_scale=True, activation="gelu_tanh",
    )  # fmt: skip
    config = transformers.Gemma2Config(**make_llama_settings(
        head_dim=16, num_hidden_layers=4, sliding_window=5, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0, query_pre_attn_scalar=24, tie_word_embeddings=True,
        hidden_activation="gelu_pytorch_tanh",
    ))  # fmt: skip
    return cfg, transformers.Gemma2ForCausalLM(config), names.GEMMA2


def make_gemma3():
    cycle = 6  # of 8 layers: a tail of two
    cfg = make_config(
        kv_heads=2, head_width=16, layers=8, pattern=("window",) * 5 + ("full",),
        rope=RopeConfig(
            theta=(THETA,) * 5 + (30.0,), scaling=("none",) * 5 + ("linear",), factor=8.0
        ),
        sparse=SparseConfig(window=5), query_scale=24**-0.5, qk_norm="head", wiring="sandwich",
        embed_scale=True, activation="gelu_tanh",
    )  # fmt: skip
    rope = dict(
        sliding_attention=dict(rope_type="default", rope_theta=THETA),
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=30.0),
    )
    config = transformers.Gemma3TextConfig(**make_llama_settings(
        head_dim=16, num_hidden_layers=8, sliding_window=5, sliding_window_pattern=cycle,
        query_pre_attn_scalar=24, tie_word_embeddings=True, rope_parameters=rope,
        hidden_activation="gelu_pytorch_tanh",
    ))  # fmt: skip
    return cfg, transformers.Gemma3ForCausalLM(config), names.GEMMA2


def make_qwen2():
    cfg = make_config(kv_heads=2, rope=RopeConfig(THETA), bias="qkv")
    config = transformers.Qwen2Config(**make_llama_settings(tie_word_embeddings=True))
    return cfg, transformers.Qwen2ForCausalLM(config), names.LLAMA


def make_llama_with_attention_biases():
    cfg = make_config(kv_heads=2, tie=False, rope=RopeConfig(THETA), bias="attention")
    config = transformers.LlamaConfig(**make_llama_settings(attention_bias=True))
    return cfg, transformers.LlamaForCausalLM(config), names.LLAMA


def make_llama_with_sinks():
    """Return a Llama with the attention of gpt-oss, which has sinks and biases."""
    cfg = make_config(kv_heads=2, tie=False, rope=RopeConfig(THETA), bias="attention", sinks=True)
    config = transformers.LlamaConfig(**make_llama_settings(attention_bias=True))
    config.sliding_window = None
    model = transformers.LlamaForCausalLM(config)
    model.model.rotary_emb = GptOssRotaryEmbedding(config)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = GptOssAttention(config, i)
    return cfg, model, names.LLAMA


def make_llama4():
    """Return six layers with a period of four: three with RoPE in chunks and one without."""
    cfg = make_config(
        kv_heads=2, tie=False, layers=6, rope=RopeConfig(THETA), qk_norm="l2",
        pattern=("chunked",) * 3 + ("full",), sparse=SparseConfig(chunk=5),
        position=("rope",) * 3 + ("temperature",), temperature_scale=0.7, temperature_floor=4,
        feedforward=("gated", "moe_gated"), ffn=(40, F),
        moe=ExpertsConfig(experts=4, active=1, shared=1, scoring="sigmoid", gated="inputs"),
    )  # fmt: skip
    config = transformers.Llama4TextConfig(**make_llama_settings(
        num_hidden_layers=6, head_dim=8, intermediate_size_mlp=40, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=5,
        attn_temperature_tuning=True, attn_scale=0.7, floor_scale=4, use_qk_norm=True,
    ))  # fmt: skip
    return cfg, transformers.Llama4ForCausalLM(config), names.LLAMA4


def make_olmo2():
    cfg = make_config(
        kv_heads=2, tie=False, rope=RopeConfig(THETA), wiring="reordered", qk_norm="width"
    )
    config = transformers.Olmo2Config(**make_llama_settings())
    return cfg, transformers.Olmo2ForCausalLM(config), names.OLMO2


def make_gpt2():
    cfg = make_config(**GPT2_STYLE, position="learned", activation="gelu_tanh")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=D, n_layer=2, n_head=4, n_inner=F,
        layer_norm_epsilon=EPS, activation_function="gelu_new", **EAGER_ATTENTION,
    )  # fmt: skip
    return cfg, transformers.GPT2LMHeadModel(config), names.GPT2


def make_gpt_neox():
    cfg = make_config(
        **GPT2_STYLE,
        tie=False,
        rope=RopeConfig(THETA, share=0.5),
        wiring="parallel",
        activation="gelu",
    )
    config = transformers.GPTNeoXConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=D, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=F, layer_norm_eps=EPS, hidden_act="gelu",
        rope_parameters=dict(rope_type="default", rope_theta=THETA, partial_rotary_factor=0.5),
        use_parallel_residual=True, tie_word_embeddings=False, **EAGER_ATTENTION,
    )  # fmt: skip
    return cfg, transformers.GPTNeoXForCausalLM(config), names.GPT_NEOX


def make_bloom():
    cfg = make_config(
        **GPT2_STYLE, ffn=4 * D, position="alibi", embed_norm=True, activation="gelu_tanh"
    )
    config = transformers.BloomConfig(
        vocab_size=V, hidden_size=D, n_layer=2, n_head=4, layer_norm_epsilon=EPS,
    )  # fmt: skip
    return cfg, transformers.BloomForCausalLM(config), names.BLOOM


def make_mpt():
    cfg = make_config(
        ffn=4 * D, position="alibi", norm="layer", norm_eps=1e-5, feedforward="plain",
        activation="gelu",
    )  # fmt: skip
    config = transformers.MptConfig(
        vocab_size=V, d_model=D, n_layers=2, n_heads=4, expansion_ratio=4, max_seq_len=32,
    )  # fmt: skip
    return cfg, transformers.MptForCausalLM(config), names.MPT


def make_bert(classes: int = 0):
    cfg = make_config(
        **GPT2_STYLE, family="encoder", position="learned", wiring="post", embed_norm=True, types=2,
        activation="gelu", classes=classes, head="linear" if classes else "mlm",
    )  # fmt: skip
    config = transformers.BertConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=D, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=F, layer_norm_eps=EPS, type_vocab_size=2,
        num_labels=classes or 2, pad_token_id=None, **EAGER_ATTENTION,
    )  # fmt: skip
    kind = transformers.BertForSequenceClassification if classes else transformers.BertForMaskedLM
    return cfg, kind(config), names.BERT


def make_t5(is_gated: bool):
    cfg = make_config(
        family="encoder_decoder", encoder_layers=3, position="t5", position_buckets=8,
        position_reach=12, head_width=16, query_scale=1.0, tie=not is_gated,
        head_scale=None if is_gated else D**-0.5,
        feedforward="gated" if is_gated else "plain",
        activation="gelu_tanh" if is_gated else "relu",
    )  # fmt: skip
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=16, d_ff=F, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
        layer_norm_epsilon=EPS, feed_forward_proj="gated-gelu" if is_gated else "relu",
        tie_word_embeddings=not is_gated, **EAGER_ATTENTION,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    if is_gated:  # transformers ties weights of a new model even if the config does not
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return cfg, model, names.T5


def make_bart():
    cfg = make_config(
        **GPT2_STYLE, family="encoder_decoder", encoder_layers=3, position="learned", wiring="post",
        norm_eps=1e-5, embed_norm=True, activation="gelu",
    )  # fmt: skip
    config = transformers.BartConfig(
        vocab_size=V, max_position_embeddings=32, d_model=D, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=F, decoder_ffn_dim=F,
        activation_function="gelu", pad_token_id=None, **EAGER_ATTENTION,
    )  # fmt: skip
    return cfg, transformers.BartForConditionalGeneration(config), names.BART


CASES = {
    "gpt2": make_gpt2,
    "llama": make_llama,
    "llama with one kv head": lambda: make_llama(kv_heads=1),
    **{
        f"llama with {name} scaling": lambda name=name: make_scaled_llama(name)
        for name in ("ntk", "yarn", "llama3")
    },
    "mistral": make_mistral,
    "mixtral": make_mixtral,
    "qwen3": make_qwen3,
    "gemma2": make_gemma2,
    "gemma3": make_gemma3,
    "qwen2": make_qwen2,
    "llama with attention biases": make_llama_with_attention_biases,
    "llama with the attention of gpt-oss": make_llama_with_sinks,
    "llama4": make_llama4,
    "olmo2": make_olmo2,
    "gpt_neox": make_gpt_neox,
    "bloom": make_bloom,
    "mpt": make_mpt,
    "bert": make_bert,
    "bert with classes": lambda: make_bert(classes=3),
    "t5": lambda: make_t5(is_gated=False),
    "t5 v1.1": lambda: make_t5(is_gated=True),
    "bart": make_bart,
}
