"""Published models have exactly their published number of parameters; no array is allocated."""

import ast
import functools
import pathlib
import re

import pytest
import torch
import transformers

from jaxgpt.config import load
from jaxgpt.model import count_params

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# As published: in the papers and their code, or counted in the released weights.
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "gpt3_175b": 174_604_259_328,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama3_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "gemma3_1b": 999_885_952,
    "qwen2_0_5b": 494_032_768,
    "olmo2_1b": 1_484_916_736,
    "bert_base": 109_514_298,
    "bert_large": 335_174_458,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
}


def load_model_config(name: str):
    return load(str(CONFIGS / f"{name}.py")).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_exactly_its_number_of_parameters(name):
    assert count_params(load_model_config(name))["total"] == PUBLISHED[name]


# --- the same, counted in transformers -----------------------------------------------------------


def gpt2(c):
    config = transformers.GPT2Config(
        vocab_size=c.vocab, n_positions=c.context, n_embd=c.width, n_layer=c.layers,
        n_head=c.heads, n_inner=c.ffn,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel, config


def llama(c, kind=transformers.LlamaForCausalLM, **more):
    config_class = getattr(kind.config_class, "sub_configs", {}).get("text_config")
    config = (config_class or kind.config_class)(
        vocab_size=c.vocab, max_position_embeddings=c.context, hidden_size=c.width,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.sizes["G"],
        intermediate_size=c.ffn, tie_word_embeddings=c.tie, **more,
    )  # fmt: skip
    return kind, config


mistral = functools.partial(llama, kind=transformers.MistralForCausalLM)
mixtral = functools.partial(llama, kind=transformers.MixtralForCausalLM, num_local_experts=8)


qwen2 = functools.partial(llama, kind=transformers.Qwen2ForCausalLM)
olmo2 = functools.partial(llama, kind=transformers.Olmo2ForCausalLM)


def gemma3(c):
    return llama(c, transformers.Gemma3ForCausalLM, head_dim=c.head_width)


def bert(c, kind=transformers.BertForMaskedLM):
    config = transformers.BertConfig(
        vocab_size=c.vocab, max_position_embeddings=c.context, hidden_size=c.width,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.ffn,
        type_vocab_size=c.types,
    )  # fmt: skip
    return kind, config


def t5(c):
    config = transformers.T5Config(
        vocab_size=c.vocab, d_model=c.width, d_kv=c.sizes["K"], d_ff=c.ffn, num_layers=c.layers,
        num_heads=c.heads, feed_forward_proj="gated-gelu" if c.feedforward == "gated" else "relu",
        relative_attention_num_buckets=c.position_buckets,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration, config


KINDS = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "gemma3": gemma3,
    "qwen2": qwen2,
    "olmo2": olmo2,
    "bert": bert,
    "t5": t5,
}


def count_in_transformers(kind, config) -> dict[str, int]:
    with torch.device("meta"):  # shapes alone
        return {name: x.numel() for name, x in kind(config).named_parameters()}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "gpt3_175b"])
def test_transformers_has_the_same_number_of_parameters(name):
    c = load_model_config(name)
    kind = next(kind for prefix, kind in KINDS.items() if name.startswith(prefix))
    theirs = sum(count_in_transformers(*kind(c)).values())
    if c.family == "encoder_decoder" and not c.tie:  # transformers ties newly created models
        theirs += c.vocab * c.width
    assert count_params(c)["total"] == theirs


def test_gpt3_has_the_number_that_follows_from_its_sizes():
    V, C, D, L = 50257, 2048, 12288, 96
    block = 4 * (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D
    total = V * D + C * D + L * block + 2 * D
    assert count_params(load_model_config("gpt3_175b"))["total"] == total
    assert round(total / 1e9) == 175  # as the paper calls it


@pytest.mark.parametrize(
    ("name", "published"), [("bert_base", 109_482_240), ("bert_large", 335_141_888)]
)
def test_bert_without_its_head_and_with_its_pooler_has_the_published_number(name, published):
    c = load_model_config(name)
    count = count_params(c)
    pooler = c.width**2 + c.width
    assert count["total"] - count["head"] + pooler == published
    sizes = count_in_transformers(*bert(c, transformers.BertModel))

    def theirs(*words):
        return sum(n for name, n in sizes.items() if all(word in name for word in words))

    norms = theirs("LayerNorm")
    assert count == {
        "embedding": theirs("word_embeddings"),
        "position": theirs("position_embeddings") + theirs("token_type_embeddings"),
        "attention": theirs("attention") - theirs("attention", "LayerNorm"),
        "feedforward": theirs(".layer.", "dense") - theirs(".layer.", "attention", "dense"),
        "norms": norms,
        # The transform: a linear map, a norm and a bias per vocabulary entry.
        "head": pooler + 2 * c.width + c.vocab,
        "total": PUBLISHED[name],
    }
    assert sum(sizes.values()) == published


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_the_number_of_parameters_in_a_configs_docstring_is_right(name):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    stated = re.findall(r"([\d,]+)\sparameters", text)
    assert stated or name not in PUBLISHED
    assert stated in ([], [f"{count_params(load_model_config(name))['total']:,}"])
