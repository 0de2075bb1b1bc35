"""Losses on whole texts against formulas in float64, and against plain computations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import MODEL, B, T, V, config, random_batch

from jaxgpt.config import DistillConfig, OnlineConfig, PreferenceConfig, TrainConfig
from jaxgpt.model import build, init_params, make_head
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.trainer.step import accumulate_gradient
from jaxgpt.tuning_losses import (
    PREFERENCE_LOSSES,
    Frozen,
    apply_decoder,
    compute_divergences,
    compute_logprobs,
    distill_loss,
    map_token_chunks,
    policy_loss,
    preference_loss,
    sum_completions,
)

MODULE = build(MODEL)
CFG = TrainConfig(loss_chunk=32)  # several chunks


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))[0]


@pytest.fixture(scope="module")
def other_params():
    return init_params(MODEL, jax.random.key(1))[0]


def make_pairs(reference=None):
    """Return rows of two documents whose weights are ragged, and log-probabilities [B 2]."""
    batch = random_batch(3)
    if reference is None:
        reference = np.random.default_rng(0).normal(-40, 3, (B, 2))
    return batch._replace(reference=np.asarray(reference, np.float32))


@jax.jit
def sum_plainly(params, batch):
    """Return Σ log p [B 2] from the softmax of all tokens at once."""
    hidden, _ = apply_decoder(MODULE, params, batch, {})
    logp = jax.nn.log_softmax(make_head(MODEL, params)(hidden))
    hit = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0] * batch.weights
    return jnp.stack([jnp.sum(hit * (batch.segment_ids == n), 1) for n in (1, 2)], 1)


def formula(name, margin, cfg):
    """Return the loss and its derivative, in float64."""
    e, b = cfg.label_smoothing, cfg.beta
    if name == "ipo":
        goal = 1 / (2 * b)
        loss = (1 - e) * (margin - goal) ** 2 + e * (margin + goal) ** 2
        return loss, 2 * (1 - e) * (margin - goal) + 2 * e * (margin + goal)
    right, wrong = 1 / (1 + np.exp(-b * margin)), 1 / (1 + np.exp(b * margin))
    return -(1 - e) * np.log(right) - e * np.log(wrong), -(1 - e) * b * wrong + e * b * right


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_loss_of_a_pair_and_its_gradient_are_the_formula(name, smoothing):
    cfg = PreferenceConfig(loss=name, beta=0.3, label_smoothing=smoothing)
    margins = np.linspace(-20, 20, 41)
    value = jax.vmap(jax.value_and_grad(lambda m: PREFERENCE_LOSSES[name](m, cfg)))(
        jnp.asarray(margins, jnp.float32)
    )
    for found, expected in zip(value, formula(name, margins, cfg), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)  # of float32


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preference_loss_and_gradient_follow_from_sums_of_log_probabilities(name, params):
    batch, settings = make_pairs(), PreferenceConfig(loss=name, beta=0.1)
    grads, sums = jax.jit(jax.grad(
        lambda p: preference_loss(MODULE, p, batch, {}, CFG, settings=settings), has_aux=True
    ))(params)  # fmt: skip
    policy, pull = jax.vjp(lambda p: sum_plainly(p, batch), params)
    gain = np.asarray(policy, np.float64) - batch.reference
    margin = gain[:, 0] - gain[:, 1]
    losses, slopes = formula(name, margin, settings)
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["margin"], 0.1 * margin.sum(), rtol=1e-4)
    assert sums["correct"] == (margin > 0).sum()
    assert sums["weight"] == B
    np.testing.assert_allclose(sums["chosen_logprob"], np.asarray(policy)[:, 0].sum(), rtol=1e-5)
    (expected,) = pull(jnp.asarray(np.stack([slopes, -slopes], 1), jnp.float32))
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(wanted).max()) + 1e-6
        np.testing.assert_allclose(found, wanted, atol=1e-4 * scale)


def test_at_the_first_step_dpo_is_log_2(params):
    batch = make_pairs()
    score = jax.jit(lambda p: sum_completions(MODULE, p, batch, {}, 32)[0])
    batch = make_pairs(score(params))
    _, sums = preference_loss(MODULE, params, batch, {}, CFG, settings=PreferenceConfig())
    assert abs(float(sums["loss"]) / B - math.log(2)) < 1e-6
    assert abs(float(sums["margin"])) < 1e-4  # zero, up to the order of float32 sums


def test_a_pair_without_a_margin_is_half_right(params):
    batch = make_pairs()
    batch = batch._replace(weights=0 * batch.weights, reference=0 * batch.reference)
    _, sums = preference_loss(MODULE, params, batch, {}, CFG, settings=PreferenceConfig())
    assert sums["correct"] == B / 2


@pytest.mark.parametrize("objective", ["chat", "preference"])
def test_accumulation_in_1_2_and_8_parts_has_the_same_loss(objective, params):
    cfg = config(f"train.objective={objective}")
    batch = jax.tree.map(jnp.asarray, make_pairs() if objective == "preference" else random_batch())
    loss_fn = cfg.objective.bind(cfg)
    losses = []
    for parts in (1, 2, 8):
        _, sums = jax.jit(
            lambda p, parts=parts: accumulate_gradient(
                parts, MODULE, cfg.train, p, batch, None, loss_fn=loss_fn
            )
        )(params)
        losses.append(float(sums["loss"] / sums["weight"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_what_is_computed_in_chunks_does_not_depend_on_them():
    x = jnp.arange(24.0).reshape(2, 12)
    for chunk in (1, 2, 7, 24, 100):
        found, slope = jax.value_and_grad(
            lambda x, c=chunk: map_token_chunks(lambda a: a**2, 3, c, x).sum()
        )(x)
        assert (float(found), slope.tolist()) == (float((x**2).sum()), (2 * x).tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_in_chunks_is_the_plain_one(temperature, params, other_params):
    batch = jax.tree.map(jnp.asarray, random_batch(5))
    hidden = [apply_decoder(MODULE, p, batch, {})[0] for p in (params, other_params)]
    heads = [make_head(MODEL, p) for p in (params, other_params)]

    def compute(hidden, chunk):
        return compute_divergences(hidden, heads[0], 3 * there, heads[1], temperature, chunk)

    def compute_plainly(hidden):
        student, teacher = (
            jax.nn.log_softmax(head(h) / temperature)
            for head, h in zip(heads, (hidden, 3 * there), strict=True)
        )
        return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), -1)

    there = hidden[1]
    weights = batch.weights
    expected = jax.value_and_grad(lambda h: jnp.sum(weights * compute_plainly(h)))(hidden[0])
    for chunk in (0, 16, 64):
        found = jax.value_and_grad(lambda h, c=chunk: jnp.sum(weights * compute(h, c)))(hidden[0])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_teacher_like_the_student_adds_nothing_and_the_weight_divides_the_loss(params):
    batch, frozen = random_batch(2), Frozen(MODULE, params)
    base = OBJECTIVES["chat"].loss(MODULE, params, batch, {}, CFG)[1]
    for weight in (0.0, 0.25, 1.0):
        settings = DistillConfig(teacher="x", weight=weight, temperature=2.0)
        _, sums = distill_loss(MODULE, params, batch, {}, CFG, settings=settings, frozen=frozen)
        np.testing.assert_allclose(sums["nats"], base["nats"], rtol=1e-5)
        np.testing.assert_allclose(sums["loss"], (1 - weight) * base["nats"], rtol=1e-4, atol=1e-2)
        assert sums["correct"] == base["correct"]


def test_policy_loss_is_reinforce_with_a_mean_over_the_tokens_of_each_text(params, other_params):
    batch = random_batch(7)
    values = np.random.default_rng(1).normal(size=(B, 2)).astype(np.float32)
    weights = batch.weights.copy()
    weights[-1] = 0  # an empty row
    batch = batch._replace(reference=values, weights=weights)
    settings = OnlineConfig(kl=0.5)
    _, sums = policy_loss(MODULE, params, batch, {}, CFG, settings=settings,
                          frozen=Frozen(MODULE, other_params))  # fmt: skip

    def score(p):
        hidden, _ = apply_decoder(MODULE, p, jax.tree.map(jnp.asarray, batch), {})
        return np.asarray(compute_logprobs(hidden, make_head(MODEL, p), batch.targets)[0], float)

    here, there = score(params), score(other_params)
    lengths = weights.sum(1)
    shares = weights / np.maximum(lengths, 1)[:, None]
    ratio = there - here
    kl = (shares * (np.exp(ratio) - ratio - 1)).sum()
    expected = 0.5 * kl - (shares * here * values[:, :1]).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(sums["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(sums["reward"], values[:-1, 1].sum(), rtol=1e-5)
    assert sums["weight"] == B - 1
    assert sums["nats"] == -sums["reward"]


def test_log_probabilities_are_those_of_the_softmax(params):
    batch = random_batch(9)
    hidden, _ = apply_decoder(MODULE, params, jax.tree.map(jnp.asarray, batch), {})
    head = make_head(MODEL, params)
    found, is_best = compute_logprobs(hidden, head, batch.targets, chunk=16)
    logp = np.asarray(jax.nn.log_softmax(head(hidden)))
    assert found.shape == (B, T)
    np.testing.assert_allclose(
        found, np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0], rtol=1e-5
    )
    assert (np.asarray(is_best) == (logp.argmax(-1) == batch.targets)).all()
    assert logp.shape[-1] == V


def test_a_teacher_needs_an_objective_that_predicts_the_next_token():
    from jaxgpt.settings import ConfigError

    for text in ("train.objective=preference", "train.objective=online online.reward=exact"):
        with pytest.raises(ConfigError, match=r"distill\.teacher"):
            config("distill.teacher=x", *text.split())
    with pytest.raises(ConfigError, match="label_smoothing"):
        config("train.objective=preference", "train.label_smoothing=0.1")
    assert dataclasses.replace(config("distill.teacher=x")).distill.weight == 0.5
