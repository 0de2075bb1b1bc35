"""config.json of GPT-2, its contemporaries and Mamba <-> the settings of a model: see llamas.py."""

import math
from typing import Any

from jaxgpt.architecture import ModelConfig
from jaxgpt.interop.keys import Keys, name_activation
from jaxgpt.interop.rope import read_rope, write_rope_keys

Settings = dict[str, Any]

_GPT2_STYLE: Settings = dict(norm="layer", feedforward="plain", bias="all")


def read_gpt2(keys: Keys) -> Settings:
    """Read a GPT-2."""
    keys.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "n_ctx")
    keys.ignore(*(k for k in keys.values if k.startswith("summary_")))
    keys.expect("scale_attn_weights", True)
    keys.expect("scale_attn_by_inverse_layer_idx", False)
    keys.expect("add_cross_attention", False)
    width = keys.size("n_embd", "hidden_size", default=768)
    return _GPT2_STYLE | dict(
        vocab=keys.size("vocab_size", default=50257),
        context=keys.size("n_positions", "n_ctx", "max_position_embeddings", default=1024),
        width=width,
        layers=keys.size("n_layer", "num_hidden_layers", default=12),
        heads=keys.size("n_head", "num_attention_heads", default=12),
        ffn=keys.size("n_inner", default=4 * width),
        norm_eps=keys.number("layer_norm_epsilon", default=1e-5),
        activation=keys.activation("activation_function", default="gelu_new"),
        position="learned",
        tie=keys.flag("tie_word_embeddings", default=True),
    )


def write_gpt2(cfg: ModelConfig) -> Settings:
    """Write a GPT-2."""
    return dict(
        vocab_size=cfg.vocab,
        n_positions=cfg.context,
        n_embd=cfg.width,
        n_layer=cfg.layers,
        n_head=cfg.heads,
        n_inner=cfg.sizes["F"],
        layer_norm_epsilon=cfg.norm_eps,
        activation_function=name_activation(cfg.activation, tanh="gelu_new"),
        resid_pdrop=cfg.dropout,
        embd_pdrop=cfg.dropout,
        attn_pdrop=cfg.attention_dropout,
        tie_word_embeddings=cfg.tie,
    )


def read_gpt_neox(keys: Keys) -> Settings:
    """Read a GPT-NeoX or Pythia."""
    keys.ignore("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder")
    keys.expect("attention_bias", True)
    heads, width = (
        keys.size(name, default=default)
        for name, default in (("num_attention_heads", 64), ("hidden_size", 6144))
    )
    rope, head_width = read_rope(keys, share=0.25), width // heads or 1
    # Odd numbers of channels are rounded down.
    rope["share"] = int(head_width * rope.get("share", 1.0)) / head_width
    is_parallel = keys.flag("use_parallel_residual", default=True)
    return _GPT2_STYLE | dict(
        vocab=keys.size("vocab_size", default=50432),
        context=keys.size("max_position_embeddings", default=2048),
        width=width,
        layers=keys.size("num_hidden_layers", default=44),
        heads=heads,
        ffn=keys.size("intermediate_size", default=24576),
        norm_eps=keys.number("layer_norm_eps", default=1e-5),
        activation=keys.activation("hidden_act", default="gelu"),
        wiring="parallel" if is_parallel else "pre",
        rope=rope,
        tie=keys.flag("tie_word_embeddings", default=False),
    )


def write_gpt_neox(cfg: ModelConfig) -> Settings:
    """Write a GPT-NeoX or Pythia."""
    rope = write_rope_keys(cfg)
    share = cfg.layer_cycle[0].rope.share
    rope["rope_parameters"]["partial_rotary_factor"] = share
    return rope | dict(
        vocab_size=cfg.vocab,
        max_position_embeddings=cfg.context,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.sizes["F"],
        layer_norm_eps=cfg.norm_eps,
        hidden_act=name_activation(cfg.activation),
        use_parallel_residual=cfg.wiring == "parallel",
        rotary_pct=share,
        rotary_emb_base=rope["rope_theta"],
        attention_bias=True,
        attention_dropout=cfg.attention_dropout,
        hidden_dropout=cfg.dropout,
        tie_word_embeddings=cfg.tie,
    )


def read_bloom(keys: Keys) -> Settings:
    """Read a BLOOM."""
    keys.ignore("hidden_dropout", "attention_dropout", "slow_but_exact", "unk_token_id")
    keys.ignore(
        "skip_bias_add", "skip_bias_add_qkv", "masked_softmax_fusion", "bias_dropout_fusion"
    )
    keys.ignore("attention_softmax_in_fp32", "offset_alibi", "seq_length", "n_inner")
    keys.expect("apply_residual_connection_post_layernorm", False)
    width = keys.size("n_embed", "hidden_size", default=64)
    return _GPT2_STYLE | dict(
        vocab=keys.size("vocab_size", default=250880),
        context=keys.size("seq_length", default=2048),
        width=width,
        layers=keys.size("n_layer", "num_hidden_layers", default=2),
        heads=keys.size("n_head", "num_attention_heads", default=8),
        ffn=4 * width,
        norm_eps=keys.number("layer_norm_epsilon", default=1e-5),
        activation="gelu_tanh",
        position="alibi",
        embed_norm=True,
        tie=keys.flag("tie_word_embeddings", default=True),
    )


def write_bloom(cfg: ModelConfig) -> Settings:
    """Write a BLOOM."""
    return dict(
        vocab_size=cfg.vocab,
        seq_length=cfg.context,
        hidden_size=cfg.width,
        n_layer=cfg.layers,
        n_head=cfg.heads,
        layer_norm_epsilon=cfg.norm_eps,
        hidden_dropout=cfg.dropout,
        attention_dropout=cfg.attention_dropout,
        apply_residual_connection_post_layernorm=False,
        tie_word_embeddings=cfg.tie,
    )


def read_mpt(keys: Keys) -> Settings:
    """Read an MPT."""
    keys.ignore("resid_pdrop", "emb_pdrop", "learned_pos_emb", "verbose", "init_config")
    keys.expect("no_bias", True)
    keys.expect("norm_type", "low_precision_layernorm")
    keys.expect("embedding_fraction", 1.0)
    keys.expect("logit_scale", None)
    attention = Keys(keys.group("attn_config"), f"{keys.where}: attn_config")
    attention.ignore("attn_pdrop", "attn_impl")
    attention.expect("attn_type", "multihead_attention")
    for name in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        attention.expect(name, False)
    attention.expect("clip_qkv", None, 0)
    attention.expect("alibi", True)
    attention.expect("alibi_bias_max", 8)
    scale = attention.maybe_number("softmax_scale")
    attention.check_all_read()
    width = keys.size("d_model", "hidden_size", default=2048)
    return dict(
        vocab=keys.size("vocab_size", default=50368),
        context=keys.size("max_seq_len", default=2048),
        width=width,
        layers=keys.size("n_layers", "num_hidden_layers", default=24),
        heads=keys.size("n_heads", "num_attention_heads", default=16),
        ffn=keys.size("expansion_ratio", default=4) * width,
        norm="layer",
        norm_eps=keys.number("layer_norm_epsilon", default=1e-5),
        feedforward="plain",
        activation="gelu",
        position="alibi",
        query_scale=scale,
        tie=keys.flag("tie_word_embeddings", default=True),
    )


def write_mpt(cfg: ModelConfig) -> Settings:
    """Write an MPT."""
    attention = dict(
        attn_type="multihead_attention", alibi=True, alibi_bias_max=8, softmax_scale=cfg.query_scale
    )
    return dict(
        vocab_size=cfg.vocab,
        max_seq_len=cfg.context,
        d_model=cfg.width,
        n_layers=cfg.layers,
        n_heads=cfg.heads,
        expansion_ratio=max(1, cfg.sizes["F"] // cfg.width),
        layer_norm_epsilon=cfg.norm_eps,
        no_bias=True,
        resid_pdrop=cfg.dropout,
        emb_pdrop=cfg.dropout,
        attn_config=attention,
        tie_word_embeddings=cfg.tie,
    )


# --- Mamba ---------------------------------------------------------------------------------------


def read_mamba(keys: Keys) -> Settings:
    """Read a Mamba."""
    keys.ignore("residual_in_fp32", "rescale_prenorm_residual", "use_mambapy")
    keys.ignore("use_associative_scan", "fused_add_norm", "rms_norm", "ssm_cfg", "n_layer")
    keys.ignore(*(k for k in keys.values if k.startswith("time_step_")))
    keys.ignore("d_inner", "pad_vocab_size_multiple", "d_model", "intermediate_size")
    keys.expect("hidden_act", "silu")
    keys.expect("use_conv_bias", True)
    width, expand = keys.size("hidden_size", default=768), keys.size("expand", default=2)
    rank = keys.take("time_step_rank", default="auto")
    if rank not in ("auto", math.ceil(width / 16)):
        raise keys.fail("time_step_rank", f"{math.ceil(width / 16)}, hidden_size / 16 rounded up")
    if keys.take("intermediate_size", default=expand * width) != expand * width:
        raise keys.fail("intermediate_size", f"expand * hidden_size = {expand * width}")
    return dict(
        vocab=keys.size("vocab_size", default=50280),
        context=keys.size("max_position_embeddings", default=2048),
        width=width,
        layers=keys.size("num_hidden_layers", default=32),
        norm_eps=keys.number("layer_norm_epsilon", default=1e-5),
        mixers=("mamba",),
        position="none",
        feedforward="none",
        mixer=dict(
            state=keys.size("state_size", default=16),
            expand=expand,
            conv=keys.size("conv_kernel", default=4),
        ),
        bias="all" if keys.flag("use_bias", default=False) else None,
        tie=keys.flag("tie_word_embeddings", default=True),
    )


def write_mamba(cfg: ModelConfig) -> Settings:
    """Write a Mamba."""
    return dict(
        vocab_size=cfg.vocab,
        max_position_embeddings=cfg.context,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        layer_norm_epsilon=cfg.norm_eps,
        state_size=cfg.mixer.state,
        expand=cfg.mixer.expand,
        conv_kernel=cfg.mixer.conv,
        intermediate_size=cfg.mixer.expand * cfg.width,
        time_step_rank=cfg.sizes["R"],
        use_bias=cfg.bias == "all",
        use_conv_bias=True,
        hidden_act="silu",
        residual_in_fp32=True,
        tie_word_embeddings=cfg.tie,
    )
