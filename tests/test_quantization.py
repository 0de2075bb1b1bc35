"""Quantized weights: rounding, products, whole models, memory, meshes, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny
from tiny_runs import config as tiny_config
from tiny_runs import make_training, random_batch, run_config

import jaxgpt
from jaxgpt import inspect
from jaxgpt.cli import evaluate as evaluate_cli
from jaxgpt.cli import next as next_cli
from jaxgpt.cli import sample as sample_cli
from jaxgpt.config import Config, MeshConfig, SampleConfig, TrainConfig
from jaxgpt.interop.exporting import export
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, EncoderInput, abstract_params, build, compute_logits, init_cache
from jaxgpt.model.mixers.mixer import KV, make_quantized_kv, update_kv_cache
from jaxgpt.model.products import MATMULS, count_blocks, matmul_quantized
from jaxgpt.quantization import (
    check_kind,
    count_bytes,
    count_weights,
    dequantize_params,
    find_kind,
    quantize_params,
)
from jaxgpt.quantized_array import is_quantized, pack_nibbles, quantize_array, unpack_nibbles
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh, make_shardings
from jaxgpt.tokenizer import make_byte_tokenizer

# Logits of a model whose products are added up in other pieces, in float32, and theirs.
TOLERANCE = 2e-5
SHAPE = (3, 4, 16, 5)  # of "LHK>D": inputs of 64


def draw(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quantize_slowly(w, bits, size):
    """Return what weights [inputs outputs] are rounded to, one group at a time in NumPy."""
    w, out, top = np.asarray(w, np.float64), np.zeros(w.shape), 2 ** (bits - 1) - 1
    steps = np.zeros(w.shape)
    for start in range(0, len(w), size):
        for o in range(w.shape[1]):
            group = w[start : start + size, o]
            step = float(jnp.bfloat16(np.float32(np.abs(group).max()) / np.float32(top)))
            rounded = np.clip(np.round(group / step), -top, top) if step else group * 0
            out[start : start + size, o], steps[start : start + size, o] = rounded * step, step
    return out, steps


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 0), (4, 32), (4, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_rounded_to_the_nearest_step_of_their_group(bits, group, dtype):
    w = draw(SHAPE, dtype=dtype) * jnp.asarray([1e-3, 1, 50, 1e-30, 7], dtype)
    q = quantize_array(w, bits, group, first=1, count=2)
    assert (q.shape, q.ndim, q.size) == (w.shape, w.ndim, w.size)
    found = np.asarray(q).reshape(3, 64, 5)
    for layer in range(3):
        expected, steps = quantize_slowly(w[layer].reshape(64, 5), bits, group or 64)
        np.testing.assert_allclose(found[layer], expected, rtol=1e-6)
        original = np.asarray(w[layer].reshape(64, 5), np.float64)
        assert (np.abs(found[layer] - original) <= steps * 0.5001).all()


def test_zero_stays_zero_and_the_largest_of_a_group_keeps_its_sign():
    w = jnp.zeros((32, 2)).at[3, 1].set(-4.0)
    for bits in (8, 4):
        found = np.asarray(quantize_array(w, bits, 0, 0, 1))
        assert found[3, 1] == pytest.approx(-4, rel=4e-3)
        assert (np.delete(found.ravel(), 7) == 0).all()


def test_all_pairs_of_four_bits_survive_packing():
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(-8, 8), jnp.arange(-8, 8)), 1).astype(jnp.int8)
    packed = pack_nibbles(pairs, axis=1)
    assert packed.shape == (16, 1, 16)
    np.testing.assert_array_equal(unpack_nibbles(packed, axis=1), pairs)


def test_an_odd_number_of_inputs_gets_eight_bits():
    q = quantize_array(draw((7, 4)), 4, 32, 0, 1)
    assert q.bits == 8
    assert q.values.shape == (1, 7, 4)
    assert quantize_array(draw((30, 4)), 4, 32, 0, 1).values.shape == (1, 15, 4)


@pytest.mark.parametrize(
    ("shape", "axes", "bits", "group"),
    [((64, 3, 8), 1, 8, 0), ((4, 16, 24), 2, 4, 16), ((64, 24), 1, 8, 16), ((64, 24), 1, 4, 0)],
)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (5, 20)])  # the last are too many for blocks
def test_a_product_in_blocks_is_the_product_with_the_weights(shape, axes, bits, group, rows):
    q = quantize_array(draw(shape), bits, group, 0, axes)
    x = draw((*rows, *shape[:axes]), seed=1)
    found = jax.jit(lambda x, q: matmul_quantized(x, q, axes, MATMULS["plain"]))(x, q)
    expected = np.tensordot(np.asarray(x, np.float64), np.asarray(q, np.float64), axes)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("group", [0, 32])
def test_a_product_in_blocks_never_holds_all_weights_and_has_a_gradient(group):
    q = quantize_array(draw((2048, 1024)), 4, group, 0, 1)
    assert count_blocks(q.values.shape[0 if group else 1], q.size) == 4

    def multiply(x):
        return matmul_quantized(x, q, 1, MATMULS["plain"])

    x = draw((1, 2048), seed=1)
    compiled = jax.jit(multiply).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * 4 * q.size
    gradient = jax.grad(lambda x: multiply(x).sum())(x)
    np.testing.assert_allclose(gradient[0], np.asarray(q).sum(1), atol=1e-3)


# --- whole models ---------------------------------------------------------------------------

MODELS = {
    "int8": ("int8", None, {}),
    "int4": ("int4", None, dict(qk_norm="head", bias="all")),
    "groups": ("int8", 32, dict(mixers=("attention", "mamba"), wiring="parallel")),
    "experts": ("int4", None, dict(feedforward="moe_gated")),
    "seq2seq": ("int8", None, dict(family="encoder_decoder", position="t5")),
    "tables": ("int4", 0, dict(tie=False)),
}


def make_case(name: str):
    """Return (cfg, quantized, plain) parameters; `plain` has the same weights as arrays."""
    kind, group, changes = MODELS[name]
    cfg = tiny(vocab=300, **changes)
    params = random_params(cfg, std=0.3)
    quantized = quantize_params(cfg, params, kind, group, embeddings=name == "tables")
    return cfg, quantized, dequantize_params(quantized)


def run(cfg, params, tokens):
    """Return the logits [B T V] of tokens [B T], each row one document."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    coords = Coords(positions, jnp.ones_like(tokens))
    more = {}
    if cfg.family == "encoder_decoder":
        more["source"] = EncoderInput(tokens, coords)

    def forward(params):
        hidden, _ = build(cfg).apply({"params": params}, tokens, coords, **more)
        return compute_logits(cfg, params, hidden)

    return jax.jit(forward)(params)


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_computes_what_its_dequantized_twin_does(name):
    cfg, quantized, plain = make_case(name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (9, 8)))
    np.testing.assert_allclose(
        run(cfg, quantized, tokens), run(cfg, plain, tokens), atol=TOLERANCE * 30
    )


def make_model(params, cfg) -> LanguageModel:
    config = Config(model=cfg, sample=SampleConfig(tokens=12, temperature=0.0))
    return LanguageModel(config, params, make_byte_tokenizer())


@pytest.mark.parametrize("name", ["int8", "int4", "tables", "experts"])
def test_a_quantized_model_generates_what_its_dequantized_twin_does(name):
    cfg, quantized, plain = make_case(name)
    found, expected = (make_model(p, cfg).generate(["the cat", "a"]) for p in (quantized, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_kernels_are_quantized_and_nothing_else():
    _cfg, quantized, _ = make_case("experts")
    leaves = jax.tree.leaves_with_path(quantized, is_leaf=is_quantized)
    found = {path[-1].key: is_quantized(x) for path, x in leaves if path[-2].key != "router"}
    assert found == {"w": True, "scale": False, "table": False}
    routers = [x for path, x in leaves if path[-2].key == "router"]
    assert routers
    assert not any(is_quantized(x) for x in routers)
    _, tables, _ = make_case("tables")
    assert {tables[name]["table"].bits for name in ("embed", "head")} == {8}


def test_bytes_fall_to_a_quarter_and_an_eighth():
    cfg = tiny(vocab=300, width=128, heads=4, ffn=256)
    params = random_params(cfg, std=0.3)
    kernels = sum(x.nbytes for path, x in jax.tree.leaves_with_path(params) if path[-1].key == "w")
    rest = count_bytes(params) - kernels
    for kind, group, bits in [("int8", 0, 8.13), ("int4", 32, 4.5), ("int4", 128, 4.13)]:
        quantized = quantize_params(cfg, params, kind, group)
        arrays = jax.tree.leaves(quantized)
        assert sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) == count_bytes(quantized)
        assert count_bytes(quantized) - rest <= kernels * bits / 32
        assert count_weights(quantized) == count_weights(params)


@pytest.mark.parametrize("name", ["int8", "experts"])
def test_a_sharded_quantized_model_computes_the_same(name):
    cfg, quantized, _ = make_case(name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (8, 8)))
    expected = run(cfg, quantized, tokens)
    kind, group, _ = MODELS[name]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, expert=2))
    params, letters = random_params(cfg, std=0.3), abstract_params(cfg)[1]
    params = jax.device_put(params, make_shardings(params, letters, mesh))
    sharded = quantize_params(cfg, params, kind, group)
    down = sharded["stack"]["layers"]["block_0"]["ffn"]
    down = down["experts"]["down"]["w"] if name == "experts" else down["down"]["w"]
    assert down.values.sharding.num_devices == 8
    assert down.values.addressable_shards[0].data.size <= down.values.size // 4
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(cfg, sharded, tokens), expected, atol=TOLERANCE * 30)
    found = make_model(sharded, cfg).generate(["the cat"])
    assert found[0].tokens == make_model(quantized, cfg).generate(["the cat"])[0].tokens


def test_the_loss_of_a_quantized_model_is_that_of_its_twin():
    cfg, quantized, plain = make_case("tables")
    config = tiny_config(model=cfg)
    batch = random_batch()
    losses = [
        config.objective.loss(build(cfg), params, batch, {}, config.train)[0]
        for params in (quantized, plain)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# --- methods and refusals ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    cfg = tiny(vocab=300)
    return make_model(random_params(cfg, std=0.3), cfg)


def test_a_model_names_its_kind(model):
    small = model.quantize("int4", group=64)
    assert (model.quantized, small.quantized, find_kind(small.params)) == ("", "int4", "int4")
    assert "parameters in int4, step 0" in repr(small)
    assert repr(small).split()[1] == repr(model).split()[1]  # as many parameters
    assert small.score(["the cat"])[0].mean != model.score(["the cat"])[0].mean


def test_a_saved_model_is_quantized_as_it_is_loaded(model, tmp_path):
    jaxgpt.save(model, tmp_path / "saved")
    loaded = jaxgpt.load(tmp_path / "saved", quantize="int4", group=128)
    expected = model.quantize("int4", 128)
    for one, other in zip(*map(jax.tree.leaves, (loaded.params, expected.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match=r"quantize='int5' is not known. Did you mean 'int"):
        jaxgpt.load(tmp_path / "saved", quantize="int5")
    with pytest.raises(ConfigError, match="a group of 48 inputs: use one of 32, 64, 128, or 0"):
        jaxgpt.load(tmp_path / "saved", quantize="int4", group=48)
    with pytest.raises(ConfigError, match="group=32 is of quantize=int8 or int4"):
        jaxgpt.load(tmp_path / "saved", group=32)


def test_what_needs_whole_weights_refuses_quantized_ones(model, tmp_path):
    small = model.quantize("int8")
    with pytest.raises(ConfigError, match=r"quantization takes parameters of float32 .* of int8"):
        small.quantize("int4")
    with pytest.raises(ConfigError, match=r"jaxgpt.save takes .* of int8: load the model without"):
        jaxgpt.save(small, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"an export takes .* of int8"):
        export(small, tmp_path / "hf")
    training = make_training(tiny_config())
    state = training.make_state()
    params = quantize_params(tiny_config().model, state.params, "int8")
    with pytest.raises(ConfigError, match=r"training takes .* of int8"):
        training.run(1, state.replace(params=params))
    assert not (tmp_path / "saved").exists()
    assert not (tmp_path / "hf").exists()


def test_a_broken_model_is_not_quantized(model):
    params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), model.params)
    with pytest.raises(ConfigError, match="NaN or infinite"):
        dataclasses.replace(model, params=params).quantize("int8")
    small = model.quantize("int8")
    broken = jax.tree.map(
        lambda x: x if x.dtype == jnp.int8 else x.at[(0,) * x.ndim].set(jnp.inf), small.params
    )
    assert len(dataclasses.replace(small, params=broken).nonfinite_params) == len(
        jax.tree.leaves(broken, is_leaf=is_quantized)
    )


def test_the_default_groups():
    assert (check_kind("int8"), check_kind("int4"), check_kind("int4", 0)) == (0, 32, 0)


# --- the KV cache -----------------------------------------------------------------------------


def test_an_int8_cache_holds_keys_and_values_to_half_a_step():
    state = make_quantized_kv(KV(jnp.zeros((2, 3, 6, 16)), jnp.zeros((2, 3, 6, 16))))
    new = KV(draw((2, 4, 3, 16)), 50 * draw((2, 4, 3, 16), seed=1))
    found, state = update_kv_cache(state, new, jnp.int32(1))
    for x, y in zip(found, new, strict=True):
        steps = np.abs(np.asarray(y)).max(-1, keepdims=True) / 127
        assert (np.abs(x[:, 1:5] - y) <= steps * 0.51).all()
        assert (x[:, 0] == 0).all()
        assert (x[:, 5] == 0).all()
    later, _ = update_kv_cache(state, KV(*(x[:, :1] for x in new)), jnp.int32(5))
    np.testing.assert_array_equal(later.k[:, :5], found.k[:, :5])


@pytest.mark.parametrize("head_width", [32, 64])
def test_an_int8_cache_has_at_most_055_of_the_bytes_of_bfloat16(head_width):
    cfg = tiny(head_width=head_width, dtype="bfloat16")
    sizes = [count_bytes(init_cache(cfg, 2, 64, kind=kind).states) for kind in ("int8", "model")]
    assert sizes[0] <= 0.55 * sizes[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> LanguageModel:
    """A model that has learned a text, so that its predictions are sharp."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = run_config(
        folder, "name=trained", "model.context=64", "train.steps=60", "train.eval_every=60"
    )
    jaxgpt.train(cfg, is_quiet=True)
    return jaxgpt.load(cfg.run_folder)


def decode_distributions(model: LanguageModel, tokens, kind: str):
    """Return the log-probabilities [B T V] of the tokens after each of `tokens` [B T], cached."""
    cfg, (B, T) = model.config.model, tokens.shape
    cache, found = init_cache(cfg, B, T, kind=kind), []

    @jax.jit
    def step(cache, token, position):
        coords = Coords(position, jnp.ones_like(token))
        hidden, cache = build(cfg).apply({"params": model.params}, token, coords, cache)
        return cache, jax.nn.log_softmax(compute_logits(cfg, model.params, hidden[:, 0]))

    for t in range(T):
        position = jnp.full((B, 1), t, jnp.int32)
        cache, logprobs = step(cache, tokens[:, t : t + 1], position)
        found.append(logprobs)
    return jnp.stack(found, 1)


def test_an_int8_cache_moves_the_predictions_of_a_trained_model_by_little(trained):
    text = "the cat sat on a red mat and the dog ran to a big hill. the hill "
    tokens = jnp.asarray(trained.tokenizer.encode(text)[None, :60])
    exact, rounded = (decode_distributions(trained, tokens, kind) for kind in ("model", "int8"))
    divergence = jnp.sum(jnp.exp(exact) * (exact - rounded), -1).mean()
    assert 0 < divergence <= 1e-3
    assert -exact.max(-1).mean() < 2.5  # nats: it has learned


def test_generation_takes_the_cache_of_its_rules(trained):
    rules = SampleConfig(tokens=20, temperature=0.0)
    exact, rounded = (
        trained.generate(["the "], dataclasses.replace(rules, cache=kind))[0]
        for kind in ("model", "int8")
    )
    assert exact.logprobs != rounded.logprobs
    np.testing.assert_allclose(exact.logprobs[:10], rounded.logprobs[:10], atol=0.05)
    with pytest.raises(ConfigError, match=r"share a cache: sample.cache is \['int8', 'model'\]"):
        trained.generate(["a", "b"], [rules, dataclasses.replace(rules, cache="int8")])


def test_an_encoder_decoder_has_both_of_its_caches_in_int8():
    cfg = tiny(vocab=300, family="encoder_decoder")
    cache = init_cache(cfg, 2, 8, source=4, kind="int8")
    assert {x.dtype.name for x in jax.tree.leaves(cache.states)} == {"int8", "bfloat16"}
    config = Config(
        model=cfg,
        train=TrainConfig(objective="pairs"),
        sample=SampleConfig(tokens=8, temperature=0.0, cache="int8"),
    )
    model = LanguageModel(config, random_params(cfg, std=0.1), make_byte_tokenizer())
    found = model.generate(["the cat"])[0]
    exact = model.generate(["the cat"], cache="model")[0]
    np.testing.assert_allclose(found.logprobs[0], exact.logprobs[0], atol=0.05)


def test_a_state_that_is_no_keys_and_values_is_refused_by_name():
    for mixer in ("mamba", "reformer"):
        with pytest.raises(ConfigError, match=f"sample.cache='int8': .* model.mixers='{mixer}'"):
            init_cache(tiny(mixers=("attention", mixer)), 1, 8, kind="int8")


# --- commands ---------------------------------------------------------------------------------


def test_evaluate_prints_the_loss_of_both(trained, capsys):
    folder = trained.origin.partition("/best/")[0]
    assert evaluate_cli.main([folder, "--quantize", "int4", "--json"], "jaxgpt evaluate") == 0
    found = json.loads(capsys.readouterr().out)
    cost = found["quantized"]
    assert (cost["kind"], cost["group"]) == ("int4", 32)
    assert cost["loss_added"] == cost["loss"] - found["loss"] != 0
    assert cost["bytes"] == count_bytes(trained.quantize("int4").params)
    assert evaluate_cli.main([folder, "--quantize", "int8", "--group", "64"], "e") == 0
    shown = capsys.readouterr().out
    assert f"{found['loss']:.4f} nats/token" in shown
    assert "int8, groups of 64 inputs\nloss           " in shown
    with pytest.raises(ConfigError, match="--quantize='int3' is not known"):
        evaluate_cli.main([folder, "--quantize", "int3"], "e")


def test_sample_and_next_quantize_as_they_load(trained, capsys):
    folder = trained.origin.partition("/best/")[0]
    arguments = [folder, "--prompt", "the ", "--quantize", "int4", "temperature=0", "cache=int8"]
    assert sample_cli.main(arguments, "jaxgpt sample") == 0
    shown = capsys.readouterr()
    expected = trained.quantize("int4").generate(["the "], temperature=0.0, cache="int8")[0].text
    assert shown.out == f"the {expected}\n"
    assert "step 60, int4, seed 0]" in shown.err
    next_cli.main([folder, "the ", "--json", "--quantize", "int8", "--group", "32"], "jaxgpt next")
    found = json.loads(capsys.readouterr().out)[0]
    best = inspect.next_tokens(trained.quantize("int8", 32), "the ", 1)[0]
    assert found["probability"] == pytest.approx(best.probability, rel=1e-6)
