"""Adapters: which maps have one, what they compute, how they are merged, added and chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.adapters import Adapter, Base, compute_fingerprint, parse_choice
from jaxgpt.config import (
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    override,
)
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import (
    check_lora,
    combine,
    describe_adapters,
    init_adapters,
    list_maps,
    merge_params,
    select_maps,
    stack_rows,
    to_nodes,
    walk_nodes,
)
from jaxgpt.model import Coords, EncoderInput, build, compute_logits, init_params
from jaxgpt.model.lowrank import LowRank, attach, detach
from jaxgpt.tokenizer import make_byte_tokenizer

DECODER = ModelConfig(vocab=40, context=16, width=16, layers=2, heads=4, kv_heads=2, ffn=24)
BYTES = dataclasses.replace(DECODER, vocab=260)
MODELS = {
    "decoder": DECODER,
    "untied": dataclasses.replace(DECODER, tie=False, bias="all", feedforward="plain"),
    "experts": dataclasses.replace(DECODER, feedforward="moe_gated"),
    "cycle": dataclasses.replace(DECODER, layers=3, pattern=("full", "window")),
    "mamba": dataclasses.replace(DECODER, mixers=("mamba",), position="none", kv_heads=None),
    "encoder": dataclasses.replace(DECODER, family="encoder", head="mlm"),
    "pairs": dataclasses.replace(DECODER, family="encoder_decoder", position="t5"),
}
DATA = DataConfig(tokenizer="other.json")  # no bytes, so that a vocabulary may be small
TOKENS = np.random.default_rng(0).integers(0, 40, (3, 8)).astype(np.int32)
COORDS = Coords(np.tile(np.arange(8, dtype=np.int32), (3, 1)), np.ones((3, 8), np.int32))


def make_params(cfg, seed=0):
    return jax.jit(lambda key: init_params(cfg, key)[0])(jax.random.key(seed))


def fill(tree, seed):
    """Return a tree with random numbers in place of its own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), tree)


def make_adapters(cfg, targets=(), rank=3, seed=1):
    shapes, _ = describe_adapters(cfg, LoraConfig(rank=rank, targets=targets))
    return fill(shapes, seed)


def make_inputs(cfg):
    is_pair = cfg.family == "encoder_decoder"
    return {"source": EncoderInput(TOKENS[:, ::-1], COORDS)} if is_pair else {}


def logits(cfg, params):
    @jax.jit
    def run(params):
        hidden, _ = build(cfg).apply({"params": params}, TOKENS, COORDS, **make_inputs(cfg))
        return compute_logits(cfg, params, hidden)

    return np.asarray(run(params))


# --- what they compute -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["untied", "cycle", "encoder", "pairs"])
def test_new_adapters_change_nothing_and_others_are_merged_exactly(name):
    cfg = MODELS[name]
    params = make_params(cfg)
    targets = [x.name for x in list_maps(cfg) if "E" not in x.stacked] + ["embed", "head"]
    lora = LoraConfig(rank=3, targets=tuple(dict.fromkeys(targets)))
    first = init_adapters(cfg, lora, jax.random.key(1))
    plain = logits(cfg, params)
    np.testing.assert_array_equal(logits(cfg, attach(params, to_nodes(first, 2.0))), plain)
    nodes = to_nodes(fill(first, 2), 0.7)
    adapted = attach(params, nodes)
    merged = merge_params(cfg, adapted)
    found = logits(cfg, adapted)
    spread = np.std(found)
    np.testing.assert_allclose(
        found, logits(merged.config, merged.params), atol=1e-5 * max(spread, 1)
    )
    assert np.max(np.abs(found - plain)) > 0.1 * spread
    assert merged.maps == len(select_maps(cfg, lora.targets))
    assert compute_fingerprint(detach(adapted)) == compute_fingerprint(params)


@pytest.mark.parametrize("name", ["decoder", "mamba"])
def test_every_map_has_an_effect_of_its_own(name):
    cfg = MODELS[name]
    params, plain = make_params(cfg), None
    nodes = dict(walk_nodes(to_nodes(make_adapters(cfg), 1.0)))
    zeros = {path: LowRank(x.a, 0 * x.b) for path, x in nodes.items()}

    def tree(chosen):
        found = zeros | ({chosen: nodes[chosen]} if chosen else {})
        return unflatten_dict({f"{path}.lora": x for path, x in found.items()}, sep=".")

    more = make_inputs(cfg)
    run = jax.jit(lambda p: build(cfg).apply({"params": p}, TOKENS, COORDS, **more)[0])
    plain = run(attach(params, tree("")))
    for path in nodes:
        assert np.any(run(attach(params, tree(path))) != plain), path


def test_experts_have_adapters_and_dropout_is_refused_for_them():
    cfg = MODELS["experts"]
    params, trained = make_params(cfg), make_adapters(cfg, ("gate", "up", "down", "q"))
    adapted = attach(params, to_nodes(trained, 0.5))
    merged = merge_params(cfg, adapted)
    np.testing.assert_allclose(logits(cfg, adapted), logits(cfg, merged.params), atol=2e-5)
    config = Config(model=cfg, data=DATA, lora=LoraConfig(rank=2, dropout=0.1))
    with pytest.raises(ConfigError, match=r"lora\.dropout=0\.1 .*experts.*targets without"):
        check_lora(config)
    check_lora(override(config, ["lora.targets=q,o"]))


def test_dropout_acts_on_the_inputs_of_adapters_alone():
    x, key = jnp.ones((2, 5, 16)), jax.random.key(0)
    node = LowRank(jnp.ones((16, 1)), jnp.ones((1, 4)), dropout=0.5)
    y = node(x, 1, key)
    np.testing.assert_allclose(node(x, 1), 16.0)
    values = np.unique(np.asarray(y).round(4))
    assert set(values) <= set(2.0 * np.arange(17))
    assert len(values) > 2
    assert np.all(np.asarray(y) == np.asarray(y)[..., :1])


def test_merging_into_bfloat16_tells_the_rounding():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(DECODER))
    adapted = attach(params, to_nodes(make_adapters(DECODER, ("q",)), 1.0))
    found = merge_params(DECODER, adapted)
    w = np.asarray(params["stack"]["layers"]["block_0"]["mixer"]["q"]["w"], np.float32)
    node = adapted["stack"]["layers"]["block_0"]["mixer"]["q"]["lora"]
    exact = w + np.einsum("LDR,LRHK->LDHK", node.a, node.b)
    merged = found.params["stack"]["layers"]["block_0"]["mixer"]["q"]["w"]
    assert merged.dtype == jnp.bfloat16
    assert found.rounding == pytest.approx(
        np.max(np.abs(np.asarray(merged, np.float32) - exact)), rel=1e-3
    )
    assert 0 < found.rounding < 0.01 * found.change
    assert (
        merge_params(
            DECODER, attach(make_params(DECODER), to_nodes(make_adapters(DECODER), 1.0))
        ).rounding
        == 0
    )


# --- settings --------------------------------------------------------------------------------


def test_a_target_that_matches_nothing_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"lora\.targets='gates'.*Did you mean gate.*There are: "):
        select_maps(DECODER, ("q", "gates"))
    with pytest.raises(ConfigError, match=r"lora\.targets='k'.*matches no map"):
        select_maps(MODELS["mamba"], ("k",))


def test_targets_are_names_or_paths():
    def names(cfg, *targets):
        return [x.path for x in select_maps(cfg, targets)]

    assert len(names(DECODER)) == 7
    assert names(DECODER, "head", "embed") == ["embed", "head"]
    pairs = names(MODELS["pairs"], "q")
    assert pairs == [
        f"{x}.layers.block_0.{y}.q"
        for x, y in (("encoder", "mixer"), ("stack", "cross"), ("stack", "mixer"))
    ]
    assert names(MODELS["pairs"], "stack.*.cross.*") == [
        f"stack.layers.block_0.cross.{x}" for x in "koqv"
    ]


def test_settings_without_a_rank_are_refused():
    with pytest.raises(ConfigError, match=r"lora\.alpha=8\.0 with lora\.rank=0"):
        check_lora(Config(lora=LoraConfig(alpha=8)))
    assert LoraConfig(rank=4, alpha=8).scale == 2
    assert LoraConfig(rank=4, alpha=8, rslora=True).scale == 4


# --- several ---------------------------------------------------------------------------------


def test_a_sum_of_adapters_adds_their_changes():
    params = make_params(DECODER)
    trees = [
        to_nodes(make_adapters(DECODER, t, rank=r, seed=r), 0.4)
        for t, r in ((("q", "up"), 2), (("q", "embed"), 3))
    ]
    both = merge_params(DECODER, attach(params, combine([(0.5, trees[0]), (2.0, trees[1])])))
    changes = [flatten_dict(merge_params(DECODER, attach(params, x)).params) for x in trees]
    start = flatten_dict(params)
    for path, x in flatten_dict(both.params).items():
        base = start.get(path, start["embed", "table"])
        parts = [c.get(path, base) - base for c in changes]
        np.testing.assert_allclose(x, base + 0.5 * parts[0] + 2 * parts[1], atol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "pairs"])
def test_rows_of_a_batch_have_adapters_of_their_own(name):
    cfg = MODELS[name]
    params = make_params(cfg)
    trees = [
        {},
        to_nodes(make_adapters(cfg, ("q", "down", "head"), rank=2, seed=3), 0.5),
        to_nodes(make_adapters(cfg, ("v", "o", "embed", "q"), rank=3, seed=4), 0.5),
    ]
    rows = [2, 0, 1]
    found = logits(cfg, attach(params, stack_rows(trees, jnp.array(rows))))
    for number, row in enumerate(rows):
        alone = logits(cfg, attach(params, trees[row]))
        np.testing.assert_allclose(found[number], alone[number], atol=2e-5)


def test_choices_are_parsed_and_unknown_names_refused():
    known = {"a": None, "b-2": None}
    assert parse_choice("0.5 * a + b-2", known) == [(0.5, "a"), (1.0, "b-2")]
    assert parse_choice("", known) == []
    with pytest.raises(ConfigError, match="adapter='c' is not known"):
        parse_choice("a + c", known)


@pytest.fixture(scope="module")
def model():
    plain = LanguageModel(Config(model=BYTES), make_params(BYTES), make_byte_tokenizer())
    found = {
        name: Adapter(make_adapters(BYTES, t, seed=s), LoraConfig(rank=3, alpha=6, targets=t))
        for name, t, s in (("a", ("q", "down"), 5), ("b", ("v", "embed", "head"), 6))
    }
    return plain.with_adapters(found)


PROMPTS = [[5, 6, 7], [8, 9], [10], [11, 12, 13]]
CHOICES = ["a", "", "b", "0.5 * a + b"]


def test_adapters_are_chosen_by_request(model):
    settings = dict(tokens=6, temperature=0)
    found = model.generate(PROMPTS, adapter=CHOICES, **settings)
    for number, choice in enumerate(CHOICES):
        merged = model.merge(choice)
        # The row has the same place in its batch, so that padding is the same.
        expected = merged.generate(PROMPTS, **settings)[number]
        assert found[number].tokens == expected.tokens
        np.testing.assert_allclose(found[number].logprobs, expected.logprobs, atol=1e-4)
        alone = model.generate(PROMPTS, adapter=choice, **settings)[number]
        assert alone.tokens == expected.tokens
    assert len({x.tokens for x in found}) > 1


def test_a_model_is_switched_merged_and_unmerged(model):
    lines = []
    switched = model.switch("a")
    merged = switched.merge(log=lines.append)
    assert "largest rounding" in lines[0]
    assert merged.unmerge() is switched
    assert not merged.adapters
    assert merged.config.lora.rank == 0
    np.testing.assert_allclose(
        logits(BYTES, switched.params), logits(BYTES, merged.params), atol=1e-5
    )
    assert model.merge() is not None
    with pytest.raises(ConfigError, match="not merged"):
        model.unmerge()
    with pytest.raises(ConfigError, match="2 choices for 4 prompts"):
        model.generate(PROMPTS, adapter=["a", "b"])
    with pytest.raises(ConfigError, match="adapter='c' is not known"):
        model.generate(PROMPTS, adapter="c")


def test_a_tied_head_is_untied_where_one_of_both_is_adapted(model):
    merged = model.merge("b")
    assert not merged.config.model.tie
    assert np.any(merged.params["head"]["table"] != merged.params["embed"]["table"])
    assert model.merge("a").config.model.tie


def test_an_adapter_that_does_not_fit_is_refused(model):
    other = dataclasses.replace(BYTES, ffn=32)
    wrong = Adapter(make_adapters(other, ("up",)), LoraConfig(rank=3, targets=("up",)))
    with pytest.raises(ConfigError, match=r"adapter 'x': the factors of .*ffn\.up are"):
        model.with_adapters({"x": wrong})
    strange = Adapter({"stack": {"q": {"lora": {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}}}},
                      LoraConfig(rank=2))  # fmt: skip
    with pytest.raises(ConfigError, match=r"adapts stack\.q, which this model does not have"):
        model.with_adapters({"x": strange})
    with pytest.raises(ConfigError, match="cannot be named 'a\\+b'"):
        model.with_adapters({"a+b": model.adapters["a"]})


# --- fingerprints ----------------------------------------------------------------------------


def test_a_fingerprint_is_of_values_not_of_their_layout():
    params = make_params(DECODER)
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.tree.map(
        lambda x: jax.device_put(
            x, jax.NamedSharding(mesh, jax.P(*(["x"] if x.shape[0] % 8 == 0 else [None])))
        ),
        params,
    )
    assert compute_fingerprint(spread) == compute_fingerprint(params)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert compute_fingerprint(rounded) == compute_fingerprint(wide) != compute_fingerprint(params)
    table = np.array(params["embed"]["table"])
    table[[3, 4]] = table[[4, 3]]
    swapped = {**params, "embed": {"table": jnp.asarray(table)}}
    assert compute_fingerprint(swapped) != compute_fingerprint(params)
    assert Base(("x", "y"), "1").path == "x"
