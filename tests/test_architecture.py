"""Impossible models are rejected at configuration, by key; all others can be initialized."""

import itertools

import pytest

from jaxgpt.config import Config, ConfigError, ModelConfig, override
from jaxgpt.model import abstract_params
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.kernels import KERNELS, LIMITS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITION_ENCODINGS, SCALINGS


def get_error(*assignments):
    with pytest.raises(ConfigError) as error:
        override(Config(), assignments)
    return str(error.value)


ENCODER = ("model.family=encoder", "train.objective=masked")
BOTH = ("model.family=encoder_decoder", "train.objective=span")


@pytest.mark.parametrize(
    ("assignments", "parts"),
    [
        # kernels
        (["model.kernel=splash", "model.position=t5"],
         ["model.kernel='splash'", "model.position='t5'", "bias"]),
        (["model.kernel=splash", "model.position=alibi"], ["'splash'", "'alibi'", "blockwise"]),
        (["model.kernel=cudnn", "model.softcap=50"], ["model.kernel='cudnn'", "model.softcap=50"]),
        (["model.kernel=strips", "model.attention_dropout=0.1"],
         ["model.kernel='strips'", "model.attention_dropout=0.1", "auto or dense."]),
        (["model.mixers=performer", "model.attention_dropout=0.1"],
         ["model.attention_dropout=0.1", "performer", "attention"]),
        (["model.mixers=performer", "model.sinks=true"], ["model.sinks=True", "performer"]),
        # mixers
        (["model.mixers=linformer"],
         ["model.mixers='linformer'", "not causal", "linformer_causal"]),
        (["model.mixers=mamba", "model.position=none", *ENCODER],
         ["'mamba'", "causal only", "attention"]),
        (["model.mixers=attention,lstm", *BOTH], ["'lstm'", "'encoder_decoder'"]),
        (["model.mixers=lstm"], ["model.position='rope'", "model.mixers=lstm", "use none"]),
        (["model.mixers=performer", "model.position=alibi"], ["'alibi'", "performer", "attention"]),
        (["model.mixers=gru", "model.position=none", "model.softcap=5"],
         ["model.softcap=5", "gru"]),
        (["model.mixers=gru", "model.position=none", "model.qk_norm=true"],
         ["model.qk_norm='head'", "gru"]),
        (["model.mixers=performer", "model.pattern=window"],
         ["model.pattern='window'", "'performer'"]),
        (["model.mixers=mamba,attention", "model.pattern=window"], ["'window'", "'mamba'"]),
        (["model.mixers=attenton"], ["'attenton'", "Did you mean 'attention'"]),
        (["model.mixers="], ["model.mixers is empty"]),
        (["model.mixers=transformer_xl", "model.position=none", "model.width=15", "model.heads=5"],
         ["'transformer_xl'", "even model.width", "15"]),
        (["model.mixer.buckets=7"], ["model.mixer.buckets=7", "6 or 8"]),
        # layers
        (["model.feedforward="], ["model.feedforward is empty"]),
        (["model.rope.theta="], ["model.rope.theta is empty"]),
        (["model.rope.theta=1e4,0"], ["model.rope.theta=0.0", "more than 0"]),
        (["model.position=rope,alibbi"], ["'alibbi'", "Did you mean 'alibi'"]),
        (["model.position=rope,learned"], ["model.position=rope,learned", "'learned'", "only"]),
        (["model.position=rope,none", "model.head_width=15"], ["'rope'", "even", "15"]),
        (["model.position=rope,alibi", "model.kernel=splash"], ["'splash'", "alibi", "bias"]),
        (["model.pattern=window,full", "model.unroll=2"], ["model.unroll=2", "3 repeats"]),
        (["model.sparse.near=2"], ["model.sparse.near=2", "1 or 3"]),
        (
            ["model.sparse.window=16"],
            ["model.sparse.window=16 has no effect with model.pattern=full", "'window'"],
        ),
        (
            ["model.pattern=window", "model.sparse.block=8"],
            ["model.sparse.block=8 has no effect with model.pattern=window", "'blocks'"],
        ),
        (
            ["model.layers=2", "model.position=rope,none,rope"],
            ["model.position has 3 values for 2 layers", "the last 1 would have no effect"],
        ),
        (
            ["model.layers=2", "model.rope.theta=1e4,1e4,1e5,1e6"],
            ["model.rope.theta has 4 values for 2 layers", "the last 2"],
        ),
        # positions
        (["model.rope.factor=4"], ["model.rope.factor=4", "model.rope.scaling", "yarn"]),
        (["model.position=learned", "model.rope.theta=5"],
         ["model.rope", "model.position='learned'"]),
        (["model.rope.share=0.3"], ["model.rope.share", "0.3", "even"]),
        (["model.rope.scaling=yan"], ["'yan'", "Did you mean 'yarn'"]),
        (["model.position=t5", "model.position_buckets=32", "model.position_reach=16"],
         ["model.position_reach=16", "model.position_buckets=32"]),
        # experts
        (["model.feedforward=moe_gated", "model.moe.active=9"],
         ["model.moe.active=9", "model.moe.experts=8"]),
        (["model.feedforward=moe"], ["'moe'", "moe_gated", "moe_plain"]),
        # families and objectives
        (["model.family=encoder"],
         ["train.objective='causal'", "model.family=decoder", "masked or classify"]),
        (["train.objective=masked"], ["'masked'", "model.family=encoder", "causal or prefix"]),
        (["model.classes=3"], ["model.classes=3", "encoder", "'decoder'"]),
        (["model.classes=3", *ENCODER], ["train.objective='masked'", "model.classes=3"]),
        (["model.family=encoder", "train.objective=classify"], ["'classify'", "model.classes=0"]),
        (["model.family=encoder", "train.objective=classify", "model.classes=1"],
         ["model.classes=1"]),
        (["model.types=2"], ["model.types=2", "encoder"]),
        (["model.encoder_layers=2"], ["model.encoder_layers=2", "encoder_decoder"]),
        (["model.pattern=prefix"], ["prefix", "train.objective='causal'"]),
        (["train.objective=prefix"], ["train.objective='prefix'", "model.pattern=full"]),
        (["model.pattern=prefix", *ENCODER], ["'prefix'", "'encoder'"]),
        (["model.vocab=260", *ENCODER], ["model.vocab=260", "1 masks", "at least 261"]),
    ],
)  # fmt: skip
def test_impossible_combinations_are_rejected_with_their_keys_and_a_remedy(assignments, parts):
    message = get_error(*assignments)
    assert [part for part in parts if part not in message] == [], message


def test_width_need_not_be_divisible_without_heads():
    assert ModelConfig(mixers=("lstm",), position="none", width=100).width == 100


FAMILIES = ("decoder", "encoder", "encoder_decoder")
SMALL = dict(vocab=64, context=16, width=16, layers=2, heads=2, ffn=16)


def is_valid(**changes):
    """Return whether a model is accepted; if it is, its parameters have shapes."""
    try:
        cfg = ModelConfig(**SMALL | changes)
    except ConfigError:
        return False
    return bool(abstract_params(cfg)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mixer_with_every_position_encoding_is_initialized_or_rejected(family):
    table = {
        (mixer, position): is_valid(family=family, mixers=(mixer,), position=position)
        for mixer, position in itertools.product(MIXERS, POSITION_ENCODINGS)
    }
    directions = {"decoder": ["causal"], "encoder": ["both"], "encoder_decoder": ["both", "causal"]}
    for (mixer, position), is_accepted in table.items():
        has_directions = set(directions[family]) <= set(MIXERS[mixer].DIRECTIONS)
        hook = POSITION_ENCODINGS[position].ATTENTION_HOOK
        is_expected = has_directions and (not hook or hook in MIXERS[mixer].USES)
        assert is_accepted == is_expected, (mixer, position)


@pytest.mark.parametrize(
    ("key", "table"),
    [("norm", NORMS), ("activation", ACTIVATIONS), ("feedforward", FEEDFORWARDS)],
)
def test_every_norm_activation_and_feedforward_is_initialized_in_every_family(key, table):
    assert all(is_valid(family=f, **{key: name}) for f in FAMILIES for name in table)


def test_every_pattern_is_initialized_where_it_is_possible():
    for family, pattern in itertools.product(FAMILIES, PATTERNS):
        is_possible = pattern != "prefix" or family == "decoder"
        assert is_valid(family=family, pattern=(pattern,)) == is_possible, (family, pattern)


def test_every_kernel_rejects_its_limitations_and_nothing_else():
    features = {
        "bias": dict(position="alibi"),
        "softcap": dict(softcap=5.0),
        "sinks": dict(sinks=True),
        "attention_dropout": dict(attention_dropout=0.1),
    }
    for kernel, (what, changes) in itertools.product(KERNELS, features.items()):
        assert is_valid(kernel=kernel, **changes) == (what not in LIMITS.get(kernel, {}))


def test_every_scaling_of_rope_is_initialized():
    rope = type(ModelConfig().rope)
    for name in SCALINGS:
        factor = 1.0 if name == "none" else 4.0
        assert is_valid(rope=rope(scaling=name, factor=factor))
