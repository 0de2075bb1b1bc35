"""Configs of transformers: every key is read or refused, and what is written is read back."""

import dataclasses
import json
import pathlib

import pytest
from helpers import tiny
from interop.hf_cases import MODELS
from interop.table import make_table

from jaxgpt.architecture import ExpertsConfig, ModelConfig, RopeConfig
from jaxgpt.config import load
from jaxgpt.config_files import list_configs
from jaxgpt.interop import families
from jaxgpt.interop.families import FAMILIES, find_family, read_config
from jaxgpt.settings import ConfigError

LLAMA = dict(
    model_type="llama", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
)  # fmt: skip
NEOX = dict(
    model_type="gpt_neox", vocab_size=97, hidden_size=32, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=48,
)  # fmt: skip


def read(config: dict) -> ModelConfig:
    return read_config(config, (), "config.json")


def get_error(config: dict) -> str:
    with pytest.raises(ConfigError) as error:
        read(config)
    return str(error.value)


def test_every_family_is_tested_through_files():
    from oracles.models import CASES  # noqa: F401

    tested = {make().config.model_type for make in MODELS.values()}
    assert tested == set(FAMILIES)


@pytest.mark.parametrize(("change", "words"), [
    ({"mlp_bias": True}, "mlp_bias=true with attention_bias=false"),
    ({"hidden_act": "gelu_10"}, "hidden_act='gelu_10' is not known"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0,
                       "high_freq_factor": 4.0}}, "low_freq_factor=2.0 is not supported; 1 is"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 8.0}},
     "high_freq_factor=8.0"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 64}}, "beta_fast=64"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale=0.7"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
     "attention_factor=1.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "secret": 1}}, "'secret'"),
    ({"new_trick": 3}, "'new_trick' (=3) is not known for model_type='llama'"),
    ({"hidden_size": "32"}, "hidden_size='32' must be a whole number"),
    ({"hidden_size": 2**40}, "hidden_size=1099511627776 must be a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 must be a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
    ({"model_type": "llamma"}, "Did you mean 'llama'?"),
    ({"model_type": None}, "model_type is missing"),
    ({"num_attention_heads": 5}, "model.kv_heads=2 does not divide model.heads=5"),
])  # fmt: skip
def test_a_key_that_changes_the_model_is_refused_by_name(change, words):
    error = get_error(LLAMA | change)
    assert words in error
    assert "config.json" in error


def test_keys_that_change_nothing_are_accepted():
    more = dict(use_cache=False, pretraining_tp=2, initializer_range=0.1, unknown=None, other=False)
    assert read(LLAMA | more) == read(LLAMA)


@pytest.mark.parametrize(("kind", "change", "words"), [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias=False is not supported; True is"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi=False"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln=True"),
    ("bert", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
    ("bart", {"decoder_ffn_dim": 8}, "that of the encoder, 4096"),
    ("mamba", {"time_step_rank": 7}, "time_step_rank=7 must be 48"),
    ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
    ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("mixtral", {"num_experts_per_tok": 9}, "model.moe.active=9"),
])  # fmt: skip
def test_what_a_family_does_not_have_is_refused(kind, change, words):
    assert words in get_error({"model_type": kind} | change)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_defaults_of_transformers_are_those_of_missing_keys(kind):
    import transformers

    defaults = transformers.CONFIG_MAPPING[kind]().to_dict()
    written = json.loads(json.dumps(defaults, default=str))
    written.pop("dtype", None)
    assert read({"model_type": kind}) == read(written)


def test_windows_of_qwen_begin_at_a_layer():
    keys = LLAMA | dict(model_type="qwen2", num_hidden_layers=4, max_window_layers=3)
    assert read(keys).pattern == ("full",)
    cfg = read(keys | dict(use_sliding_window=True, sliding_window=9))
    assert [spec.pattern for spec in cfg.list_layers(4)] == ["full"] * 3 + ["window"]
    assert cfg.sparse.window == 9
    assert find_family(cfg)[1]["max_window_layers"] == 3


def test_both_wirings_of_gpt_neox_are_read():
    assert read(NEOX).wiring == "parallel"
    assert read(NEOX | {"use_parallel_residual": False}).wiring == "pre"
    assert read(NEOX | {"rotary_pct": 0.5}).rope.share == 0.5
    assert read(NEOX | {"rotary_pct": 0.3}).rope.share == 0.25  # of 8 channels, 2.4 are 2


# --- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "kind"), [
    (tiny(), "llama"),
    (tiny(bias="attention"), "llama"),
    (tiny(pattern=("window",)), "mistral"),
    (tiny(feedforward="moe_gated", moe=ExpertsConfig(4, 2)), "mixtral"),
    (tiny(bias="qkv"), "qwen2"),
    (tiny(qk_norm="head"), "qwen3"),
    (tiny(rope=RopeConfig(100.0, 1.0, "ntk", 4.0)), "llama"),
    (tiny(kv_heads=None, rope=RopeConfig(50.0, 0.5), norm="layer", bias=True, feedforward="plain",
          wiring="parallel"), "gpt_neox"),
    (tiny(qk_norm="width", wiring="reordered"), "olmo2"),
    (tiny(family="encoder_decoder", position="t5", kv_heads=None, query_scale=1.0), "t5"),
])  # fmt: skip
def test_a_model_is_exported_as_the_family_that_it_is_of(cfg, kind):
    assert find_family(cfg)[0] == kind


def test_a_raised_base_is_written_as_the_base_that_it_is():
    _, config = find_family(tiny(rope=RopeConfig(100.0, 1.0, "ntk", 4.0)))  # head width 4
    assert config["rope_theta"] == pytest.approx(100.0 * 4.0**2)
    assert config["rope_scaling"] is None


def test_rope_is_written_for_both_versions_of_transformers():
    rope = RopeConfig(500.0, 1.0, "llama3", 8.0, 16)
    _, config = find_family(tiny(rope=rope))
    for keys in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        only = {k: v for k, v in config.items() if not k.startswith("rope_") or k in keys}
        assert read(only).rope == rope


@pytest.mark.parametrize(("changes", "words"), [
    (dict(mixers=("performer",)), "performer"),
    (dict(mixers=("s4",), position="none"), "s4"),
    (dict(sinks=True), "model.sinks=True"),
    (dict(wiring="no_residual"), "model.wiring='no_residual'"),
    (dict(norm="layer"), "no counterpart in transformers"),
    (dict(pattern=("strided",)), "strided"),
    (dict(feedforward="moe_gated", moe=ExpertsConfig(4, 2, capacity=1.0)), "capacity=1.0"),
    (dict(position="sinusoidal"), "sinusoidal"),
])  # fmt: skip
def test_a_model_without_a_counterpart_is_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=words):
        find_family(tiny(**changes))


def test_every_config_that_is_shipped_is_exported():
    kinds = {}
    for name in list_configs():
        if name not in ("gpt3_175b", "sentiment"):
            kinds[name] = find_family(load(name).model)[0]
    assert kinds["gpt_mini"] == kinds["stdlib"] == kinds["llama3_1b"] == "llama"
    assert kinds["gpt2_124m"] == "gpt2"
    with pytest.raises(ConfigError, match=r"model.pattern=\('full', 'window'\) \('full' there"):
        find_family(load("gpt3_175b").model)
    assert kinds["gemma3_1b"] == "gemma3_text"
    with pytest.raises(ConfigError, match=r"model\.norm"):
        find_family(load("sentiment").model)
    assert kinds["bert_mini"] == kinds["bert_base"] == "bert"
    classifier = dataclasses.replace(load("bert_mini").model, head="linear", classes=2)
    assert find_family(classifier)[1]["architectures"] == ["BertForSequenceClassification"]
    assert kinds["t5_v1_1_base"] == kinds["t5_mini"] == "t5"


def test_settings_that_change_nothing_do_not_hinder_an_export():
    cfg = tiny(dropout=0.1, kernel="strips", remat="full")
    kind, config = find_family(cfg)
    back = families.read_config(config, (), "config.json")
    assert (kind, back.width) == ("llama", cfg.width)
    assert back == dataclasses.replace(tiny(), context=cfg.context)


def test_the_table_of_the_documentation_is_that_of_the_registries():
    page = pathlib.Path(__file__).parents[2] / "docs" / "interop.md"
    assert make_table() in page.read_text()
