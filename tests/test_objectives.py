"""The loss over the vocabulary against float64 NumPy and torch, and its memory use."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import forward, random_params, tiny

from jaxgpt import objectives
from jaxgpt.architecture import ExpertsConfig
from jaxgpt.config import TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.model import Coords, Head, build
from jaxgpt.objectives import OBJECTIVES

B, T, D, V = 3, 10, 16, 37


def vocabulary_loss(hidden, table, targets, weights, **options):
    return objectives.vocabulary_loss(hidden, Head(table), targets, weights, **options)


def make_arrays(dtype=np.float32):
    """Return hidden [B T D], table [V D], targets [B T], weights [B T], a third of them 0."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32)
    return hidden.astype(dtype), table.astype(np.float32), targets, weights


def compute_exact(hidden, table, targets, weights, smoothing=0.0, z_loss=0.0):
    """Return (loss, nats, d_hidden, d_table) in float64, without chunks."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    scores = hidden @ table.T  # [B T V]
    log_z = np.log(np.exp(scores).sum(-1))
    wanted = np.eye(V)[targets]
    nats = log_z - (scores * wanted).sum(-1)
    soft = (1 - smoothing) * wanted + smoothing / V
    loss = log_z - (scores * soft).sum(-1) + z_loss * log_z**2
    p = np.exp(scores - log_z[..., None])
    d_scores = weights[..., None] * (p - soft + 2 * z_loss * log_z[..., None] * p)
    d_table = np.einsum("BTV,BTD->VD", d_scores, hidden)
    return (weights * loss).sum(), (weights * nats).sum(), d_scores @ table, d_table


def value_and_gradients(arrays, scale=1.0, **options):
    """Return ((loss, sums), (d_hidden, d_table)) of scale times the loss."""

    @jax.jit
    def run(hidden, table, targets, weights):
        def loss(hidden, table):
            total, sums = vocabulary_loss(hidden, table, targets, weights, **options)
            return scale * total, sums

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, table)

    return run(*arrays)


# float32 sums of up to B x T = 30 terms of order 10.
CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [0, 1, 3, 4, 7, 15, 29, 30, 1000])
@pytest.mark.parametrize("options", [{}, dict(smoothing=0.1, z_loss=0.01)], ids=str)
def test_the_loss_and_its_gradients_equal_float64_for_every_chunk_size(chunk, options):
    arrays = make_arrays()
    (loss, sums), gradients = value_and_gradients(arrays, chunk=chunk, **options)
    wanted, nats, d_hidden, d_table = compute_exact(*arrays, **options)
    np.testing.assert_allclose(
        [loss, sums["loss"], sums["nats"]], [wanted, wanted, nats], rtol=1e-6
    )
    np.testing.assert_allclose(gradients[0], d_hidden, **CLOSE)
    np.testing.assert_allclose(gradients[1], d_table, **CLOSE)


@pytest.mark.parametrize("options", [{}, dict(smoothing=0.1, z_loss=0.01)], ids=str)
def test_on_a_gpu_the_vocabulary_is_padded_to_full_blocks_and_the_loss_is_the_same(
    options, monkeypatch
):
    monkeypatch.setattr("jaxgpt.backend.get_platform", lambda: "gpu")
    arrays, all_options = make_arrays(), dict(chunk=6, **options)
    (loss, sums), gradients = value_and_gradients(arrays, **all_options)
    wanted, nats, *slopes = compute_exact(*arrays, **options)
    np.testing.assert_allclose([loss, sums["nats"]], [wanted, nats], rtol=1e-6)
    for found, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(found, slope, **CLOSE)
    gradient = jax.jit(jax.grad(lambda *a: vocabulary_loss(*a, **all_options)[0], argnums=(0, 1)))
    text = gradient.lower(*arrays).as_text()
    products = re.findall(r"dot_general.* : (.*)", text)
    assert len(products) == 3
    assert all("64" in line and f"{V}x" not in line and f"x{V}" not in line for line in products)


def test_the_value_without_gradients_is_the_value_with_them():
    arrays = make_arrays()
    (with_gradients, _), _ = value_and_gradients(arrays, chunk=6)
    without_gradients, _ = jax.jit(lambda *a: vocabulary_loss(*a, chunk=6))(*arrays)
    np.testing.assert_allclose(without_gradients, with_gradients, rtol=1e-6)


def test_gradients_scale_with_the_factor_of_the_loss():
    arrays = make_arrays()
    _, once = value_and_gradients(arrays, chunk=6)
    _, thrice = value_and_gradients(arrays, scale=3.0, chunk=6)
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * a, b, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_equals_that_of_torch(smoothing):
    hidden, table, targets, _ = make_arrays()
    weights = np.ones((B, T), np.float32)
    h, w = torch.tensor(hidden, requires_grad=True), torch.tensor(table, requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(
        (h @ w.T).reshape(-1, V),
        torch.tensor(targets).long().reshape(-1),
        label_smoothing=smoothing,
        reduction="sum",
    )
    theirs.backward()
    arrays = hidden, table, targets, weights
    (loss, _), gradients = value_and_gradients(arrays, smoothing=smoothing)
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], h.grad, **CLOSE)
    np.testing.assert_allclose(gradients[1], w.grad, **CLOSE)


def test_z_loss_adds_the_square_of_the_log_partition_function():
    hidden, table, _, weights = make_arrays()
    log_z = torch.logsumexp(torch.tensor(hidden) @ torch.tensor(table).T, -1).numpy()
    plain, z = (vocabulary_loss(*make_arrays(), z_loss=z_loss)[0] for z_loss in (0.0, 0.25))
    np.testing.assert_allclose(z - plain, 0.25 * np.sum(weights * log_z**2), rtol=1e-5)


def test_tokens_of_weight_zero_are_ignored_entirely():
    hidden, table, targets, weights = make_arrays()
    ignored = weights == 0
    other = np.where(ignored[..., None], 100.0, hidden), table, np.where(ignored, 0, targets)
    a, (d_hidden, _) = value_and_gradients((hidden, table, targets, weights), chunk=6)
    b, _ = value_and_gradients((*other, weights), chunk=6)
    np.testing.assert_allclose(jax.tree.leaves(b), jax.tree.leaves(a), rtol=1e-6)
    np.testing.assert_array_equal(d_hidden[ignored], 0)


def test_sums_count_the_weight_and_the_correct_predictions():
    hidden, table, targets, weights = make_arrays()
    best = (hidden @ table.T).argmax(-1)
    targets = np.where(np.arange(T) % 2 == 0, best, targets).astype(np.int32)
    for chunk in (0, 4):
        _, sums = vocabulary_loss(hidden, table, targets, weights, chunk=chunk)
        np.testing.assert_allclose(sums["weight"], weights.sum(), rtol=1e-6)
        np.testing.assert_allclose(sums["correct"], (weights * (best == targets)).sum(), rtol=1e-6)


def test_bfloat16_hidden_states_give_a_float32_gradient_of_the_table_summed_in_float32():
    hidden, table, targets, weights = make_arrays()
    low = jnp.asarray(hidden, jnp.bfloat16)
    (loss, _), (d_hidden, d_table) = value_and_gradients((low, table, targets, weights), chunk=3)
    assert (loss.dtype, d_hidden.dtype, d_table.dtype) == ("float32", "bfloat16", "float32")
    rounded = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float64)
    wanted, _, _, exact_table = compute_exact(
        np.asarray(low, np.float64), rounded, targets, weights
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)  # scores are summed in float32
    # The scores' gradients are rounded to bfloat16 before the product: 2^-9 of terms to 1.
    np.testing.assert_allclose(d_table, exact_table, atol=0.05)


def test_the_logits_of_all_tokens_are_never_materialized():
    rows, length, width, vocab = 8, 128, 32, 16_384
    n_bytes = rows * length * vocab * 4  # 67 MB in float32
    shapes = [((rows, length, width), "float32"), ((vocab, width), "float32")]
    shapes += [((rows, length), "int32"), ((rows, length), "float32")]

    def loss(hidden, table, targets, weights):
        return vocabulary_loss(hidden, table, targets, weights, chunk=64)[0]

    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    for f in (loss, jax.value_and_grad(loss, (0, 1))):
        compiled = jax.jit(f).lower(*arguments).compile()
        # A chunk has 1/16 of the logits; XLA keeps a few copies of it, and of the table.
        assert compiled.memory_analysis().temp_size_in_bytes < n_bytes / 2
        sizes = [np.prod([int(n) for n in found.split(",")])
                 for found in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]  # fmt: skip
        assert max(sizes) < rows * length * vocab / 2


def test_the_chunk_is_chosen_by_size_unless_it_is_given():
    def largest(**options):
        hlo = jax.jit(lambda *a: vocabulary_loss(*a, **options)[0]).lower(*make_arrays()).as_text()
        rows = {int(n) for n in re.findall(rf"tensor<(\d+)x{V}xf32>", hlo)}
        return max(rows - {D})  # the transposed table has D rows

    assert largest() == B * T
    assert largest(chunk=6) == 6


@pytest.mark.parametrize("wrong", range(4))
def test_arrays_of_incompatible_shapes_are_rejected(wrong):
    arrays = list(make_arrays())
    arrays[wrong] = arrays[wrong][:, 1:]
    with pytest.raises(AssertionError):
        vocabulary_loss(*arrays)


# --- objectives ---


def make_batch(cfg) -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, cfg.vocab, (2, B, T)).astype(np.int32)
    positions = np.tile(np.r_[np.arange(6), np.arange(T - 6)], (B, 1)).astype(np.int32)
    segments = np.tile(np.r_[np.full(6, 1), np.full(T - 6, 2)], (B, 1)).astype(np.int32)
    return Batch(tokens, targets, positions, segments, make_arrays()[3])


@pytest.mark.parametrize("tie", [True, False])
def test_the_causal_loss_is_that_of_the_hidden_states_of_the_model(tie):
    cfg = tiny(tie=tie)
    params, data = random_params(cfg), make_batch(cfg)
    train = TrainConfig(label_smoothing=0.1, z_loss=0.01, loss_chunk=6)
    run = jax.jit(lambda p, b: OBJECTIVES["causal"].loss(build(cfg), p, b, {}, train))
    loss, sums = run(params, data)
    assert set(sums) == {"loss", "nats", "weight", "correct"}
    hidden, _ = forward(cfg, params, data.tokens, Coords(data.positions, data.segment_ids))
    table = params["embed" if tie else "head"]["table"]
    wanted, _ = vocabulary_loss(
        hidden, table, data.targets, data.weights, smoothing=0.1, z_loss=0.01
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_the_causal_objective_uses_dropout_only_with_a_key():
    cfg = tiny(dropout=0.5)
    params, data, model = random_params(cfg), make_batch(cfg), build(cfg)
    run = jax.jit(
        lambda rngs: OBJECTIVES["causal"].loss(model, params, data, rngs, TrainConfig())[0]
    )
    a, b, none = (
        run(r) for r in ({"dropout": jax.random.key(0)}, {"dropout": jax.random.key(1)}, {})
    )
    assert len({float(a), float(b), float(none)}) == 3
    assert none == run({})


def test_the_load_balancing_loss_is_weighted_by_the_config():
    cfg = tiny(feedforward="moe_gated", moe=ExpertsConfig(experts=4, active=1))
    params, data, model = random_params(cfg), make_batch(cfg), build(cfg)
    coords = Coords(data.positions, data.segment_ids)
    run = jax.jit(lambda p: model.apply({"params": p}, data.tokens, coords, mutable=["losses"]))
    _, aux = run(params)
    balance_loss = sum(float(x.sum()) for x in jax.tree.leaves(aux))
    assert balance_loss > cfg.layers  # balanced experts give 1 per layer

    def loss(balance):
        train = TrainConfig(balance=balance)
        run = jax.jit(lambda p: OBJECTIVES["causal"].loss(model, p, data, {}, train))
        total, sums = run(params)
        assert float(total) == float(sums["loss"])
        return float(total), float(sums["nats"]), float(sums["weight"])

    (plain, nats, weight), (balanced, same, _) = loss(0.0), loss(0.5)
    np.testing.assert_allclose(plain, nats, rtol=1e-6)
    assert same == nats  # the reported loss is not the minimized one
    np.testing.assert_allclose(balanced - plain, 0.5 * balance_loss * weight, rtol=1e-4)


def test_classification_has_one_prediction_per_text():
    cfg = tiny(family="encoder", classes=3)
    params, rng = random_params(cfg), np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab, (B, T)).astype(np.int32)
    segment_ids = (np.arange(T) < np.array([[10], [4], [7]])).astype(np.int32)
    positions = np.broadcast_to(np.arange(T), (B, T)).astype(np.int32)
    targets, weights = np.array([2, 0, 1], np.int32), np.array([1, 1, 0], np.float32)
    data = Batch(tokens, targets, positions, segment_ids, weights)
    train = TrainConfig(label_smoothing=0.1)
    run = jax.jit(lambda p: OBJECTIVES["classify"].loss(build(cfg), p, data, {}, train))
    loss, sums = run(params)
    coords = Coords(positions, segment_ids)
    score = jax.jit(lambda p: build(cfg).apply({"params": p}, tokens, coords, method="classify"))
    scores = np.asarray(score(params), np.float64)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    nats = -log_p[[0, 1], targets[:2]]  # the third has no weight
    wanted = 0.9 * nats - 0.1 * log_p[:2].mean(-1)
    np.testing.assert_allclose(sums["nats"], nats.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
    confusion = np.zeros((3, 3))
    for row in (0, 1):
        confusion[targets[row], scores[row].argmax()] += 1
    np.testing.assert_array_equal(sums["confusion"], confusion)
    assert sums["correct"] == np.trace(confusion)
    assert sums["weight"] == 2


def test_one_pass_over_the_scores_equals_two():
    scores = jax.random.normal(jax.random.key(0), (7, 130)) * 20
    weights = jnp.arange(7.0)

    def loss(normalize):
        return jax.value_and_grad(lambda x: jnp.sum(normalize(x)[1] * weights))(scores)

    for one, two in zip(
        loss(objectives.normalize_in_one_pass),
        loss(objectives.normalize_in_two_passes),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=2e-5)
    np.testing.assert_array_equal(objectives.normalize_in_one_pass(scores)[0], scores.max(1))
