"""The reference is the textbook: all logits at once, jax.grad, and optax's own AdamW."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_runs import assert_same_bits, config, make_training, random_batch, to_numpy

from jaxgpt import backend
from jaxgpt.config import MeshConfig, OptimizerConfig
from jaxgpt.model import Coords, abstract_params, build, compute_logits
from jaxgpt.model.block import REMAT_POLICIES
from jaxgpt.sharding import make_mesh
from jaxgpt.trainer.step import choose_microbatch_count, make_eval_step

# An eps that is not tiny, because Adam divides a rounding error of 1e-9 by a moment of 1e-9.
ADAMW = OptimizerConfig(lr=1e-2, warmup=2, eps=1e-4, weight_decay=0.3, clip=0.5)
STEPS = 3


@functools.cache
def make_run(*assignments):
    return make_training(config(*assignments, optimizer=ADAMW))


def make_initial_state():
    """Return the initial state, which no setting tested here changes."""
    return make_run().make_state()


@functools.cache
def trained(*assignments):
    """(state, metrics of each step) after a few steps on different batches."""
    run = make_run(*assignments)
    state, step_metrics = make_initial_state(), []
    for number in range(STEPS):
        state, metrics = run.step(state, random_batch(number))
        step_metrics.append(to_numpy(metrics))
    return state, step_metrics


@jax.jit
def naive_logits(params, batch):
    cfg = config().model
    at = Coords(jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    hidden, _ = build(cfg).apply({"params": params}, jnp.asarray(batch.tokens), at)
    return compute_logits(cfg, params, hidden)  # [B T V]


@jax.jit
def naive_nats(params, batch):
    scores = naive_logits(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)  # [B T]


def mean(values, batch):
    return jnp.sum(values * batch.weights) / jnp.sum(batch.weights)


@jax.jit
def naive_gradient(params, batch):
    return jax.value_and_grad(lambda p: mean(naive_nats(p, batch), batch))(params)


@functools.cache
def naive():
    """[(params before, loss, gradient, params after) of each step]."""
    _, letters = abstract_params(config().model)
    optimizer = optax.chain(
        optax.clip_by_global_norm(ADAMW.clip),
        optax.adamw(
            lambda step: jnp.array([5e-3, 1e-2, 0])[step] + (step == 2) * last_rate(),
            ADAMW.b1,
            ADAMW.b2,
            ADAMW.eps,
            weight_decay=ADAMW.weight_decay,
            mask=jax.tree.map(lambda x: ">" in x, letters),
        ),
    )
    params = make_initial_state().params
    opt_state = optimizer.init(params)
    steps = []
    for number in range(STEPS):
        loss, grads = naive_gradient(params, random_batch(number))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        after = optax.apply_updates(params, updates)
        steps.append((params, loss, grads, after))
        params = after
    return steps


def last_rate():
    """The first rate of the cosine after a warmup of 2 in a run of 12."""
    return 1e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 10)) / 2)


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


# --- the update ---


def test_three_steps_equal_the_textbook():
    # Products round in another order; Adam with eps 1e-4 turns 1e-8 of a gradient into 1e-6.
    assert_close(trained()[0].params, naive()[-1][3], atol=2e-6)


def test_the_step_is_counted_and_the_key_is_kept():
    state, _ = trained()
    assert int(state.step) == STEPS
    assert_same_bits(state.rng, make_initial_state().rng)


def test_the_loss_decreases_on_a_repeated_batch():
    run = make_run()
    state, losses = make_initial_state(), []
    for _ in range(11):
        state, metrics = run.step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5


# --- metrics ---


def get_metric(name, *assignments):
    return [float(metrics[name]) for metrics in trained(*assignments)[1]]


def test_the_loss_is_the_mean_before_the_update():
    # float32 has 7 digits; the mean over 180 tokens keeps 6 of them.
    np.testing.assert_allclose(get_metric("loss"), [loss for _, loss, _, _ in naive()], rtol=1e-5)
    assert get_metric("nats") == get_metric("loss")


def test_the_gradient_norm_is_that_before_clipping():
    norms = [optax.tree.norm(grads) for _, _, grads, _ in naive()]
    assert min(norms) > ADAMW.clip
    np.testing.assert_allclose(get_metric("grad_norm"), norms, rtol=1e-4)


def test_the_learning_rate_is_the_one_of_the_step():
    np.testing.assert_allclose(get_metric("lr"), [5e-3, 1e-2, last_rate()], rtol=1e-6)


def test_tokens_are_the_sum_of_weights():
    assert get_metric("tokens") == [random_batch(number).weights.sum() for number in range(STEPS)]


def test_accuracy_is_the_fraction_of_correct_predictions():
    run = make_run()
    params = to_numpy(make_initial_state().params)
    guesses = np.array(jnp.argmax(naive_logits(params, random_batch()), axis=-1))
    # A random model guesses one in 260, so every other target is made right.
    targets = np.where(np.arange(guesses.shape[1]) % 2, guesses, random_batch().targets)
    batch = random_batch()._replace(targets=targets.astype(np.int32))
    _, metrics = run.step(make_initial_state(), batch)
    expected = ((guesses == targets) * batch.weights).sum() / batch.weights.sum()
    assert 0.3 < expected < 0.7
    np.testing.assert_allclose(metrics["accuracy"], expected, rtol=1e-6)


def test_a_batch_without_weights_gives_no_nan():
    run = make_run()
    empty = random_batch(weighted_fraction=0.0)
    state, metrics = run.step(make_initial_state(), empty)
    assert float(metrics["loss"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(to_numpy(state.params)))


# --- gradient accumulation ---


@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_the_update_of_a_whole_batch(parts):
    # As above: the gradients differ by rounding, 1e-8.
    assert_close(trained(f"train.accumulate={parts}")[0].params, trained()[0].params, atol=2e-6)


def test_microbatches_are_weighted_by_their_tokens():
    whole, halves = make_run(), make_run("train.accumulate=2")
    batch = random_batch()
    # Microbatch i has rows i::2. One has all its tokens, the other one in eight.
    weights = np.ones_like(batch.weights)
    weights[1::2, 2:] = 0
    batch = batch._replace(weights=weights)
    state, metrics = whole.step(make_initial_state(), batch)
    state_2, metrics_2 = halves.step(make_initial_state(), batch)
    assert float(metrics_2["tokens"]) == weights.sum()
    np.testing.assert_allclose(metrics_2["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert_close(state_2.params, state.params, atol=2e-6)


MAX_SMALL_MODEL_PARAMS = backend.ONE_CPU.max_small_model_params


def count_microbatches(B, T, *assignments, parameters=MAX_SMALL_MODEL_PARAMS):
    return choose_microbatch_count(config(*assignments), np.broadcast_to(0, parameters), B, T)


@pytest.mark.parametrize(
    ("expected", "B", "T"),
    [(1, 12, 64), (2, 16, 128), (5, 5, 1024), (3, 9, 512)],  # 2 rows do not divide 9
)
def test_a_cpu_uses_microbatches_of_at_least_1024_tokens_or_2048_for_small_models(expected, B, T):
    assert (
        count_microbatches(B, T, parameters=MAX_SMALL_MODEL_PARAMS + 1)
        == count_microbatches(B, 2 * T)
        == expected
    )


def test_batches_are_not_split_on_other_devices_or_with_experts(monkeypatch):
    assert count_microbatches(16, 256) == 2
    assert count_microbatches(16, 256, "model.feedforward=moe_gated") == 1
    with jax.set_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        assert count_microbatches(16, 256) == 1
    monkeypatch.setattr("jaxgpt.backend.get_platform", lambda: "gpu")
    assert count_microbatches(16, 256) == 1


def test_chosen_microbatches_equal_configured_ones(monkeypatch):
    small = dataclasses.replace(backend.ONE_CPU, min_small_model_microbatch_tokens=128)
    monkeypatch.setitem(backend.BACKENDS, "cpu", small)
    chosen, given = (
        make_training(config(f"train.accumulate={n}", optimizer=ADAMW)).step(
            make_initial_state(), random_batch()
        )
        for n in (0, 2)
    )
    assert_same_bits(chosen[0].params, given[0].params)


# --- memory and time ---


def test_the_old_state_is_donated():
    run = make_run()
    state = make_initial_state()
    run.step(state, random_batch())
    moved = jax.tree.leaves((state.params, state.opt_state, state.step))
    assert all(x.is_deleted() for x in moved)


def test_it_is_compiled_once(count_compilations):
    trained()
    assert count_compilations(make_run().step) == 1


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialization_changes_nothing(remat):
    state = trained(f"model.remat={remat}")[0]
    assert_close(state.params, trained()[0].params, atol=2e-6)


def test_unrolling_changes_nothing():
    assert_close(trained("model.unroll=2")[0].params, trained()[0].params, atol=2e-6)


# --- bfloat16 ---


@pytest.fixture(scope="module")
def half():
    return trained("model.dtype=bfloat16")


def test_bfloat16_keeps_float32_parameters_and_moments(half):
    kept = [x for x in jax.tree.leaves((half[0].params, half[0].opt_state)) if x.ndim]
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}


def test_bfloat16_keeps_updates_below_its_resolution(half):
    scale = to_numpy(half[0].params["stack"]["norm"])
    (scale,) = jax.tree.leaves(scale)
    assert np.any(scale != scale.astype(jnp.bfloat16).astype(np.float32))


def test_bfloat16_has_about_the_same_loss(half):
    # Eight bits of mantissa, so 0.4 % of each score of about 1.
    losses = [float(metrics["loss"]) for metrics in half[1]]
    np.testing.assert_allclose(losses, get_metric("loss"), atol=0.02)
    assert losses != get_metric("loss")


# --- dropout ---


DROPOUTS = ["model.dropout=0.2", "model.attention_dropout=0.2"]


@pytest.fixture(scope="module", params=DROPOUTS)
def dropout_loss(request):
    """(state at a step) -> loss, with dropout, of the same batch and parameters."""
    run = make_run(request.param, "train.accumulate=2")

    def loss(step=0, seed=0):
        state = make_initial_state()
        state = state.replace(step=jnp.int32(step), rng=jax.random.fold_in(state.rng, seed))
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, run.abstract))
        return float(run.step(state, random_batch())[1]["loss"])

    return loss


def test_dropout_is_deterministic(dropout_loss):
    assert dropout_loss(step=3) == dropout_loss(step=3)


def test_dropout_differs_between_steps(dropout_loss):
    assert len({dropout_loss(step=step) for step in range(4)}) == 4


def test_dropout_differs_between_seeds(dropout_loss):
    assert dropout_loss(seed=0) != dropout_loss(seed=1)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout_differs_between_microbatches(dropout):
    run = make_run(dropout, "train.accumulate=2")
    batch = random_batch()
    # Both microbatches are the same.
    twice = jax.tree.map(lambda x: np.repeat(x[:8], 2, axis=0), batch)
    first = twice._replace(weights=twice.weights * (np.arange(16) % 2 == 0)[:, None])
    second = twice._replace(weights=twice.weights * (np.arange(16) % 2 == 1)[:, None])
    losses = [float(run.step(make_initial_state(), b)[1]["loss"]) for b in (first, second)]
    assert losses[0] != losses[1]


# --- the loss that is minimized ---


@jax.jit
def naive_regularized_loss(params, batch):
    scores = naive_logits(params, batch)
    log_z = jax.nn.logsumexp(scores, axis=-1)
    smooth = 0.8 * naive_nats(params, batch) + 0.2 * (log_z - scores.mean(-1))
    return mean(smooth + 0.01 * log_z**2, batch)


@pytest.fixture(scope="module")
def regularized():
    return make_run("train.z_loss=0.01", "train.label_smoothing=0.2").step(
        make_initial_state(), random_batch()
    )[1]


def test_z_loss_and_label_smoothing_are_part_of_the_loss(regularized):
    expected = naive_regularized_loss(make_initial_state().params, random_batch())
    np.testing.assert_allclose(regularized["loss"], expected, rtol=1e-5)


def test_z_loss_and_label_smoothing_are_minimized(regularized):
    expected = optax.tree.norm(
        jax.grad(naive_regularized_loss)(make_initial_state().params, random_batch())
    )
    np.testing.assert_allclose(regularized["grad_norm"], expected, rtol=1e-4)
    assert float(regularized["grad_norm"]) != pytest.approx(get_metric("grad_norm")[0], rel=1e-3)


def test_nats_exclude_z_loss_and_label_smoothing(regularized):
    np.testing.assert_allclose(regularized["nats"], get_metric("nats")[0], rtol=1e-5)


# --- evaluation ---


def test_evaluation_sums_plain_nats_without_dropout():
    cfg = config(
        "model.dropout=0.5",
        "model.attention_dropout=0.5",
        "train.z_loss=0.1",
        "train.label_smoothing=0.5",
    )
    params = make_initial_state().params
    batch = random_batch()
    sums = jax.jit(make_eval_step(cfg, build(cfg.model)))(params, batch)
    expected = jnp.sum(naive_nats(params, batch) * batch.weights)
    np.testing.assert_allclose(sums["nats"], expected, rtol=1e-5)
    assert float(sums["weight"]) == batch.weights.sum()
