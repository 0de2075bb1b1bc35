"""config.json of encoders and encoder-decoders <-> the settings of a model: see llamas.py."""

from typing import Any

from jaxgpt.architecture import ModelConfig
from jaxgpt.interop.keys import ACTIVATIONS, Keys, name_activation

Settings = dict[str, Any]


def read_bert(keys: Keys) -> Settings:
    """Read a BERT, without its head: see `families.read_head`."""
    keys.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    keys.ignore(*(k for k in keys.values if k.startswith("pooler_")), "directionality")
    keys.expect("position_embedding_type", "absolute")
    keys.expect("is_decoder", False)
    keys.expect("add_cross_attention", False)
    return dict(
        family="encoder",
        vocab=keys.size("vocab_size", default=30522),
        context=keys.size("max_position_embeddings", default=512),
        width=keys.size("hidden_size", default=768),
        layers=keys.size("num_hidden_layers", default=12),
        heads=keys.size("num_attention_heads", default=12),
        ffn=keys.size("intermediate_size", default=3072),
        types=keys.size("type_vocab_size", default=2),
        norm="layer",
        norm_eps=keys.number("layer_norm_eps", default=1e-12),
        feedforward="plain",
        bias="all",
        activation=keys.activation("hidden_act", default="gelu"),
        position="learned",
        wiring="post",
        embed_norm=True,
        tie=keys.flag("tie_word_embeddings", default=True),
    )


def write_bert(cfg: ModelConfig) -> Settings:
    """Write a BERT."""
    return dict(
        vocab_size=cfg.vocab,
        max_position_embeddings=cfg.context,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.sizes["F"],
        type_vocab_size=max(1, cfg.types),
        layer_norm_eps=cfg.norm_eps,
        hidden_act=name_activation(cfg.activation, tanh="gelu_new"),
        position_embedding_type="absolute",
        hidden_dropout_prob=cfg.dropout,
        attention_probs_dropout_prob=cfg.attention_dropout,
        tie_word_embeddings=cfg.tie,
    )


def read_t5(keys: Keys) -> Settings:
    """Read a T5 of version 1.0 or 1.1.

    Version 1.0 multiplies the logits by width**-0.5. transformers 4 concludes this from
    tie_word_embeddings; transformers 5 writes true there always, and the old meaning to
    scale_decoder_outputs.
    """
    keys.ignore("dropout_rate", "classifier_dropout", "n_positions", "dense_act_fn", "is_gated_act")
    keys.ignore("is_decoder")
    width, heads = keys.size("d_model", default=512), keys.size("num_heads", default=8)
    layers = keys.size("num_layers", default=6)
    gate, _, name = keys.take("feed_forward_proj", default="relu").rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        raise keys.fail("feed_forward_proj", "relu, gated-gelu or gated-silu")
    is_gated = gate == "gated"
    activation = "gelu_tanh" if is_gated and name == "gelu" else ACTIVATIONS[name]
    is_scaled = keys.flag("tie_word_embeddings", default=True)
    is_scaled = keys.flag("scale_decoder_outputs", default=is_scaled)
    return dict(
        family="encoder_decoder",
        vocab=keys.size("vocab_size", default=32128),
        context=keys.size("n_positions", default=512),
        width=width,
        heads=heads,
        head_width=keys.size("d_kv", default=64),
        ffn=keys.size("d_ff", default=2048),
        encoder_layers=layers,
        layers=keys.size("num_decoder_layers", default=layers),
        position="t5",
        position_buckets=keys.size("relative_attention_num_buckets", default=32),
        position_reach=keys.size("relative_attention_max_distance", default=128),
        query_scale=1.0,
        norm_eps=keys.number("layer_norm_epsilon", default=1e-6),
        feedforward="gated" if is_gated else "plain",
        activation=activation,
        head_scale=width**-0.5 if is_scaled else None,
        start_token=_read_start(keys, "pad_token_id", 0),
    )


def write_t5(cfg: ModelConfig) -> Settings:
    """Write a T5."""
    is_gated = cfg.feedforward == "gated"
    name = {"gelu_tanh": "gelu" if is_gated else "gelu_new"}.get(cfg.activation, cfg.activation)
    return dict(
        vocab_size=cfg.vocab,
        n_positions=cfg.context,
        d_model=cfg.width,
        d_kv=cfg.sizes["K"],
        d_ff=cfg.sizes["F"],
        num_heads=cfg.heads,
        num_layers=cfg.encoder_layers or cfg.layers,
        num_decoder_layers=cfg.layers,
        relative_attention_num_buckets=cfg.position_buckets,
        relative_attention_max_distance=cfg.position_reach,
        layer_norm_epsilon=cfg.norm_eps,
        feed_forward_proj=f"gated-{name}" if is_gated else name,
        dropout_rate=cfg.dropout,
        tie_word_embeddings=cfg.tie,
        scale_decoder_outputs=cfg.head_scale is not None,
        is_encoder_decoder=True,
    )


def read_bart(keys: Keys) -> Settings:
    """Read a BART."""
    keys.ignore("dropout", "attention_dropout", "activation_dropout", "classif_dropout")
    keys.ignore("encoder_layerdrop", "decoder_layerdrop", "is_decoder", "extra_pos_embeddings")
    for name, value in (("normalize_before", False), ("add_final_layer_norm", False),
                        ("normalize_embedding", True), ("static_position_embeddings", False),
                        ("add_bias_logits", False)):  # fmt: skip
        keys.expect(name, value)
    sizes = {}
    for name, key, default in (("heads", "attention_heads", 16), ("ffn", "ffn_dim", 4096)):
        sizes[name] = keys.size(f"encoder_{key}", default=default)
        if keys.size(f"decoder_{key}", default=default) != sizes[name]:
            raise keys.fail(f"decoder_{key}", f"that of the encoder, {sizes[name]}")
    keys.expect("num_hidden_layers", keys.size("encoder_layers", default=12))
    return sizes | dict(
        family="encoder_decoder",
        vocab=keys.size("vocab_size", default=50265),
        context=keys.size("max_position_embeddings", default=1024),
        width=keys.size("d_model", default=1024),
        encoder_layers=keys.size("encoder_layers", default=12),
        layers=keys.size("decoder_layers", default=12),
        norm="layer",
        norm_eps=1e-5,
        feedforward="plain",
        bias="all",
        activation=keys.activation("activation_function", default="gelu"),
        position="learned",
        wiring="post",
        embed_norm=True,
        embed_scale=keys.flag("scale_embedding", default=False),
        tie=keys.flag("tie_word_embeddings", default=True),
        start_token=_read_start(keys, "eos_token_id", 2),
    )


def _read_start(keys: Keys, other: str, default: int) -> int | None:
    """Return the token that a target begins with: decoder_start_token_id, or another one."""
    value = keys.take("decoder_start_token_id", other, default=default)
    value = value[0] if isinstance(value, list) and value else value
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_id:
        raise keys.fail("decoder_start_token_id", "the id of a token")
    return value


def write_bart(cfg: ModelConfig) -> Settings:
    """Write a BART."""
    return dict(
        vocab_size=cfg.vocab,
        max_position_embeddings=cfg.context,
        d_model=cfg.width,
        encoder_layers=cfg.encoder_layers or cfg.layers,
        decoder_layers=cfg.layers,
        encoder_attention_heads=cfg.heads,
        decoder_attention_heads=cfg.heads,
        encoder_ffn_dim=cfg.sizes["F"],
        decoder_ffn_dim=cfg.sizes["F"],
        activation_function=name_activation(cfg.activation, tanh="gelu_new"),
        scale_embedding=cfg.has_embed_scale,
        dropout=cfg.dropout,
        attention_dropout=cfg.attention_dropout,
        tie_word_embeddings=cfg.tie,
        is_encoder_decoder=True,
    )
