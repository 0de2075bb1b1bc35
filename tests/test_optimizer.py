"""The oracles are the papers' algorithms, written out in float64 NumPy, one layer at a time."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import ConfigError, OptimizerConfig
from jaxgpt.model import abstract_params
from jaxgpt.optimizer import OPTIMIZERS, SCHEDULES, _is_logit_table, build, get_state_letters

SIZES = dict(V=11, D=6, H=2, K=4, F=10, L=3, E=2)
LETTERS = {
    "table": "V>D",
    "blocks": {
        "query": "LD>HK",
        "bias": "LHK",
        "out": "LHK>D",
        "up": "LD>F",
        "experts": "LED>F",
        "scale": "LD",
    },
    "scale": "D",
}
STEPS = 5

every_rule = pytest.mark.parametrize("name", OPTIMIZERS)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def config(name="adamw", **changes) -> OptimizerConfig:
    """No clipping, and a rate that changes in every step, to test the order of their use."""
    defaults = dict(name=name, lr=0.01, b2=0.99, weight_decay=0.3, clip=0.0, warmup=2)
    return OptimizerConfig(**(defaults | changes))


def constant_config(name, lr=0.01, **changes) -> OptimizerConfig:
    return config(name, lr=lr, schedule="warmup_constant", warmup=0, **changes)


def draw(seed: int, letters=LETTERS, sizes=SIZES):
    """Draw a random tree of these letters, float32 values in float64."""
    rng = np.random.default_rng(seed)

    def one(dims):
        shape = [sizes[d] for d in dims.replace(">", "")]
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    return jax.tree.map(one, letters)


def draw_grads(letters=LETTERS, sizes=SIZES):
    return [draw(100 + step, letters, sizes) for step in range(STEPS)]


def train(cfg, params, grads, letters=LETTERS):
    """Return the parameters after one jitted step per gradient."""
    optimizer, step = compiled(cfg, json.dumps(letters))
    params = jax.tree.map(np.float32, params)
    state = optimizer.init(params)
    for g in grads:
        params, state = step(params, state, jax.tree.map(np.float32, g))
    return params


@functools.cache
def compiled(cfg, letters):
    optimizer, _ = build(cfg, STEPS, json.loads(letters))

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, jax.jit(step)


def assert_close(ours, theirs, rtol=2e-5, atol=1e-6):
    """Assert equality: float32 rounds at 6e-8, five steps of roots and quotients at about 1e-6."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


# --- every rule against its paper ---
#
# An oracle yields the direction of each step for one parameter.


def oracle_adam(cfg, letters, grads):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m = cfg.b1 * m + (1 - cfg.b1) * g
        v = cfg.b2 * v + (1 - cfg.b2) * g**2
        yield (m / (1 - cfg.b1**t)) / (np.sqrt(v / (1 - cfg.b2**t)) + cfg.eps)


def oracle_sgd(cfg, letters, grads):
    yield from grads


def oracle_momentum(cfg, letters, grads):
    m = 0.0
    for g in grads:
        m = cfg.b1 * m + g
        yield m


def oracle_rmsprop(cfg, letters, grads):
    v = 0.0
    for g in grads:
        v = cfg.b2 * v + (1 - cfg.b2) * g**2
        yield g / (np.sqrt(v) + cfg.eps)


def oracle_lion(cfg, letters, grads):
    m = 0.0
    for g in grads:
        yield np.sign(cfg.b1 * m + (1 - cfg.b1) * g)
        m = cfg.b2 * m + (1 - cfg.b2) * g


def map_matrices(f, letters, grads):
    """Apply f to the gradients of every stacked matrix (or vector) separately."""
    inputs, _, outputs = letters.partition(">")
    stacked = "".join(d for d in inputs if d in "LE")
    lead = [SIZES[d] for d in stacked]
    rows = math.prod(SIZES[d] for d in inputs if d not in stacked)
    shape = (rows, math.prod(SIZES[d] for d in outputs)) if outputs else (rows,)
    per_matrix = [
        list(f(matrices)) for matrices in np.stack([g.reshape(-1, *shape) for g in grads], axis=1)
    ]
    for steps in zip(*per_matrix, strict=True):
        yield np.stack(steps).reshape(*lead, *grads[0].shape[len(lead) :])


def oracle_adafactor(cfg, letters, grads):
    def algorithm_4_and_5(grads):
        R = C = V = 0.0
        for t, G in enumerate(grads, 1):
            b2 = 1 - t**-0.8
            square = G**2 + 1e-30
            if G.ndim == 2:
                R = b2 * R + (1 - b2) * square.sum(1, keepdims=True)
                C = b2 * C + (1 - b2) * square.sum(0, keepdims=True)
                V = R @ C / R.sum()
            else:
                V = b2 * V + (1 - b2) * square
            U = G / np.sqrt(V)
            yield U / max(1, np.sqrt(np.mean(U**2)))

    return map_matrices(algorithm_4_and_5, letters, grads)


def newton_schulz(M):
    X = M / np.linalg.norm(M)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


def oracle_muon(cfg, letters, grads):
    if not (letters.startswith("L") and ">" in letters):
        return oracle_adam(cfg, letters, grads)

    def nesterov(grads):
        m = 0.0
        for t, G in enumerate(grads, 1):
            m = cfg.b1 * m + (1 - cfg.b1) * G
            ahead = cfg.b1 * m / (1 - cfg.b1 ** (t + 1)) + (1 - cfg.b1) * G / (1 - cfg.b1**t)
            yield 0.2 * np.sqrt(max(G.shape)) * newton_schulz(ahead)

    return map_matrices(nesterov, letters, grads)


ORACLES = dict(
    adamw=oracle_adam,
    adam=oracle_adam,
    sgd=oracle_sgd,
    momentum=oracle_momentum,
    rmsprop=oracle_rmsprop,
    adafactor=oracle_adafactor,
    lion=oracle_lion,
    muon=oracle_muon,
)


@every_rule
def test_a_rule_equals_the_algorithm_of_its_paper(name):
    cfg = config(name, b1=0.8)
    rates = [expected_rate(cfg, STEPS, step) for step in range(STEPS)]

    def update_by_hand(letters, p, *grads):
        decay = cfg.weight_decay if ">" in letters and name != "adam" else 0.0
        for lr, direction in zip(rates, ORACLES[name](cfg, letters, grads), strict=True):
            p = p - lr * (direction + decay * p)
        return p

    expected = jax.tree.map(update_by_hand, LETTERS, draw(0), *draw_grads())
    # Newton-Schulz multiplies rounding by up to 3.4445^5 = 485 where a singular value is small
    tolerance = dict(rtol=1e-4, atol=1e-4) if name == "muon" else {}
    assert_close(train(cfg, draw(0), draw_grads()), expected, **tolerance)


TORCH = {
    "adamw": lambda t, groups, c: t.AdamW(groups, betas=(c.b1, c.b2), eps=c.eps),
    "adam": lambda t, groups, c: t.Adam(groups, betas=(c.b1, c.b2), eps=c.eps),
    "sgd": lambda t, groups, c: t.SGD(groups),
    "momentum": lambda t, groups, c: t.SGD(groups, momentum=c.b1),
    "rmsprop": lambda t, groups, c: t.RMSprop(groups, alpha=c.b2, eps=c.eps),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_rule_equals_pytorchs(name):
    torch = pytest.importorskip("torch")
    # PyTorch's sgd and rmsprop have only coupled weight decay, ours is decoupled
    cfg = constant_config(name, weight_decay=0.3 if name == "adamw" else 0.0)
    letters = jax.tree.leaves(LETTERS)
    params = [torch.nn.Parameter(torch.tensor(p)) for p in jax.tree.leaves(draw(0))]
    groups = [
        dict(params=[p], lr=cfg.lr, weight_decay=cfg.weight_decay if ">" in d else 0.0)
        for p, d in zip(params, letters, strict=True)
    ]
    theirs = TORCH[name](torch.optim, groups, cfg)
    for grads in draw_grads():
        for p, g in zip(params, jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g)
        theirs.step()
    ours = jax.tree.leaves(train(cfg, draw(0), draw_grads()))
    assert_close(ours, [p.detach().numpy() for p in params])


def test_adafactor_equals_optaxs_where_both_factor_the_same_axes():
    letters, sizes = {"up": "D>F"}, dict(D=8, F=12)
    params, grads = draw(0, letters, sizes), draw_grads(letters, sizes)
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=2, multiply_by_parameter_scale=False)
    expected = jax.tree.map(jnp.float32, params)
    state = theirs.init(expected)
    for g in grads:
        updates, state = theirs.update(jax.tree.map(jnp.float32, g), state, expected)
        expected = optax.apply_updates(expected, updates)
    ours = train(constant_config("adafactor", weight_decay=0.0), params, grads, letters)
    assert_close(ours, expected)


def test_a_relative_rate_is_that_of_optaxs_adafactor():
    letters, sizes = {"up": "D>F"}, dict(D=8, F=12)
    params, grads = draw(0, letters, sizes), draw_grads(letters, sizes)
    params["up"] = params["up"] * 0.05
    theirs = optax.adafactor(0.01, min_dim_size_to_factor=2, multiply_by_parameter_scale=True)
    expected = jax.tree.map(jnp.float32, params)
    state = theirs.init(expected)
    for g in grads:
        updates, state = theirs.update(jax.tree.map(jnp.float32, g), state, expected)
        expected = optax.apply_updates(expected, updates)
    cfg = constant_config("adafactor", weight_decay=0.0, relative_lr=True)
    assert_close(train(cfg, params, grads, letters), expected)


def test_a_relative_rate_is_that_of_each_layer_and_has_a_least_value():
    letters = {"query": "LD>HK", "scale": "LD", "zero": "LD>F"}
    params, grads = draw(0, letters), draw_grads(letters)[:1]
    params["query"] = params["query"] * np.array([1.0, 100.0] * 9)[: SIZES["L"], None, None, None]
    params["zero"] = params["zero"] * 0
    absolute, relative = (
        train(
            constant_config("adafactor", weight_decay=0.0, relative_lr=is_relative),
            params, grads, letters,
        )
        for is_relative in (False, True)
    )  # fmt: skip
    for name, p in params.items():
        axes = tuple(range(1, p.ndim))
        rms = np.sqrt(np.mean(p**2, axis=axes, keepdims=True))
        step = np.asarray(absolute[name], np.float64) - p
        expected = p + step * np.maximum(rms, 1e-3)
        assert_close(relative[name], expected, rtol=1e-3, atol=1e-6)


def test_only_adafactor_has_a_relative_rate():
    with pytest.raises(ConfigError, match=r"relative_lr=True with optimizer\.name='adamw'"):
        config("adamw", relative_lr=True)


def test_adafactor_stores_a_row_and_a_column_per_matrix():
    letters = {"query": "LD>HK"}
    optimizer, _ = build(config("adafactor"), STEPS, letters)
    state = optimizer.init(draw(0, letters))
    L, D, H, K = (SIZES[d] for d in "LDHK")
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == L * D + L * H * K


def test_adafactor_stays_finite_for_rows_without_gradients():
    letters, sizes = {"table": "V>D"}, dict(V=1000, D=4)
    grads = draw_grads(letters, sizes)
    for g in grads:
        g["table"][1:] = 0
        g["table"][0] *= 1e-6
    params = train(
        constant_config("adafactor", weight_decay=0.0), draw(0, letters, sizes), grads, letters
    )
    chex.assert_tree_all_finite(params)
    assert_close(params["table"][1:], draw(0, letters, sizes)["table"][1:], atol=0)


# --- letters of parameters ---


@every_rule
def test_stacked_layers_are_updated_like_separate_ones(name):
    letters = {"query": "LD>HK", "out": "LHK>D", "up": "LD>F", "scale": "LD", "bias": "LHK"}
    params, grads = draw(0, letters), draw_grads(letters)
    stacked = train(config(name), params, grads, letters)
    for layer in range(SIZES["L"]):
        select = lambda tree, i=layer: jax.tree.map(lambda x: x[i : i + 1], tree)  # noqa: E731
        separate = train(config(name), select(params), [select(g) for g in grads], letters)
        assert_close(select(stacked), separate)


@every_rule
def test_all_heads_form_one_matrix(name):
    tall, flat = {"query": "LD>HK"}, {"query": "LD>F"}
    params, grads = draw(0, tall), draw_grads(tall)
    merge = lambda tree: jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), tree)  # noqa: E731
    assert_close(
        merge(train(config(name), params, grads, tall)),
        train(config(name), merge(params), [merge(g) for g in grads], flat),
    )


@every_rule
def test_weight_decay_applies_to_matrices_only(name):
    cfg = constant_config(name, lr=0.1, weight_decay=0.3)
    zeros = jax.tree.map(np.zeros_like, draw(0))
    share = 1.0 if name == "adam" else 1 - 0.1 * 0.3
    expected = jax.tree.map(lambda d, p: p * share if ">" in d else p, LETTERS, draw(0))
    assert_close(train(cfg, draw(0), [zeros]), expected, rtol=1e-6, atol=0)


def test_muon_orthogonalizes_the_update_of_each_layer():
    letters, sizes = {"up": "LD>F"}, dict(L=3, D=16, F=64)
    zeros = {"up": np.zeros([3, 16, 64])}
    cfg = constant_config("muon", lr=1.0, weight_decay=0.0)
    update = train(cfg, zeros, [draw(1, letters, sizes)], letters)["up"]
    singular = np.linalg.svd(np.asarray(update), compute_uv=False) / (0.2 * math.sqrt(64))
    # five quintic steps bring every singular value near 1, not to it (Jordan et al. 2024)
    assert singular.min() > 0.65
    assert singular.max() < 1.25


def test_muon_updates_have_the_rms_of_adamw_updates():
    letters, sizes = {"up": "LD>F"}, dict(L=2, D=32, F=64)
    update = train(
        constant_config("muon", lr=1.0, weight_decay=0.0),
        {"up": np.zeros([2, 32, 64])},
        [draw(1, letters, sizes)],
        letters,
    )["up"]
    assert 0.1 < float(jnp.sqrt(jnp.mean(update**2))) < 0.3  # Moonlight: 0.2 to 0.4 for AdamW


def test_muon_updates_tables_and_vectors_with_adamw():
    muon, adamw = (train(config(name), draw(0), draw_grads()) for name in ("muon", "adamw"))

    def check(letters, a, b):
        in_block = letters.startswith("L") and ">" in letters
        assert np.allclose(a, b, rtol=1e-6) != in_block, letters

    jax.tree.map(check, LETTERS, muon, adamw)


def test_matrix_lr_is_the_rate_of_matrices_in_blocks():
    same, other, faster = (
        train(config("muon", lr=lr, matrix_lr=matrix_lr), draw(0), draw_grads())
        for lr, matrix_lr in ((0.01, None), (0.01, 0.05), (0.05, None))
    )
    in_blocks = lambda d: d.startswith("L") and ">" in d  # noqa: E731
    expected = jax.tree.map(lambda d, a, b: b if in_blocks(d) else a, LETTERS, same, faster)
    assert_close(other, expected)


# --- tables of attention logits ---

LOGIT_LETTERS = LETTERS | {"bias": "U>H", "scores": "LHC>C"}  # t5, synthesizer_random
LOGIT_SIZES = SIZES | dict(U=5, C=4)
LOGIT_TABLES = ("bias", "scores")


def draw_logits(seed: int):
    return draw(seed, LOGIT_LETTERS, LOGIT_SIZES)


@every_rule
def test_tables_of_logits_move_by_a_multiple_of_the_others_steps(name):
    before, grads = draw_logits(0), [draw_logits(100)]
    plain, faster = (
        train(constant_config(name, logit_lr=factor), before, grads, LOGIT_LETTERS)
        for factor in (1.0, 10.0)
    )
    expected = plain | {
        key: before[key] + 10 * (np.float64(plain[key]) - before[key]) for key in LOGIT_TABLES
    }
    # The plain step is known to float32's rounding of the parameter, and is multiplied by 10.
    chex.assert_trees_all_close(faster, expected, atol=1e-5, rtol=1e-5)
    for key in LOGIT_TABLES:
        assert np.abs(faster[key] - before[key]).max() > 1e-3


def test_only_the_letters_of_t5_and_the_random_synthesizer_are_those_of_logits():
    for changes, count in (({}, 0), (dict(position="t5"), 1), (dict(position="learned"), 0),
                           (dict(mixers=("synthesizer_random",), position="none"), 1),
                           (dict(mixers=("synthesizer_dense",), position="none"), 0)):  # fmt: skip
        cfg = tiny(**changes)
        letters = jax.tree.leaves(abstract_params(cfg)[1])
        assert sum(map(_is_logit_table, letters)) == count
        assert cfg.has_logit_tables == bool(count)


def test_the_factor_of_logits_leaves_the_state_of_the_optimizer_as_it_was():
    params = jax.tree.map(np.float32, draw_logits(0))
    plain, faster = (
        build(config(logit_lr=factor), STEPS, LOGIT_LETTERS)[0].init(params)
        for factor in (1.0, 10.0)
    )
    chex.assert_trees_all_equal(plain, faster)


# --- clipping ---


def clipped_sgd_update(clip, scale):
    """Return the SGD update at rate 0.1 for a gradient of norm `scale`, and the unclipped one."""
    grads = draw(1)
    norm = float(optax.tree.norm(grads))
    grads = jax.tree.map(lambda g: g / norm * scale, grads)
    zeros = jax.tree.map(np.zeros_like, grads)
    cfg = constant_config("sgd", lr=0.1, weight_decay=0.0, clip=clip)
    return train(cfg, zeros, [grads]), jax.tree.map(lambda g: -0.1 * g, grads)


def test_a_large_gradient_is_clipped_to_the_global_norm():
    update, whole = clipped_sgd_update(clip=0.5, scale=20.0)
    assert_close(update, jax.tree.map(lambda u: u * 0.5 / 20.0, whole))
    assert float(optax.tree.norm(update)) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize(("clip", "scale"), [(0.5, 0.4), (0.0, 20.0)])
def test_a_small_gradient_is_not_clipped(clip, scale):
    assert_close(*clipped_sgd_update(clip, scale))


# --- schedules ---


def expected_rate(cfg, steps, step):
    """The learning rate, in plain Python, with t counted from 1."""
    t, warmup, floor = step + 1, cfg.warmup, cfg.floor
    if t < warmup:
        return cfg.lr * t / warmup
    left = max(steps - t, 0) / max(steps - warmup, 1)
    decay = min(max(1, round(cfg.decay_share * steps)), steps - warmup)
    height = {
        "warmup_cosine": (1 + math.cos(math.pi * (1 - left))) / 2,
        "warmup_linear": left,
        "warmup_constant": 1.0,
        "warmup_stable_decay": min(1.0, max(steps - t, 0) / max(decay, 1)),
    }
    if cfg.schedule == "inverse_sqrt":
        return cfg.lr * max(floor, math.sqrt(max(warmup, 1) / t))
    if t <= warmup:
        return cfg.lr
    return cfg.lr * (floor + (1 - floor) * height[cfg.schedule])


@every_schedule
@pytest.mark.parametrize(
    ("warmup", "steps"), [(10, 100), (0, 50), (1, 7), (95, 100), (20, 20), (0, 1)]
)
def test_a_schedule_equals_its_formula_at_every_step(name, warmup, steps):
    cfg = config(schedule=name, warmup=warmup, lr=0.3, floor=0.1, decay_share=0.25)
    schedule = SCHEDULES[name](cfg, steps)
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(steps + 3))  # and past the end
    expected = [expected_rate(cfg, steps, step) for step in range(steps + 3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    np.testing.assert_allclose(schedule(steps // 2), expected[steps // 2], rtol=1e-5)


@every_schedule
def test_a_schedule_warms_up_from_above_zero_to_the_peak_and_ends_at_the_floor(name):
    cfg = config(schedule=name, warmup=10, lr=2.0, floor=0.05)
    rates = jax.vmap(SCHEDULES[name](cfg, 5000))(jnp.arange(5000))
    assert float(rates[0]) == pytest.approx(2.0 / 10)
    assert float(rates[9]) == float(rates.max()) == pytest.approx(2.0)
    last = 2.0 if name == "warmup_constant" else 2.0 * 0.05
    assert float(rates[-1]) == pytest.approx(last, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 200),
    data=st.data(),
    floor=st.floats(0.01, 1.0),
    share=st.floats(0.01, 1.0),
)
def test_a_rate_is_positive_and_rises_then_falls(name, steps, data, floor, share):
    warmup = data.draw(st.integers(0, steps))
    cfg = config(schedule=name, warmup=warmup, lr=1.0, floor=floor, decay_share=share)
    rates = np.asarray(jax.vmap(SCHEDULES[name](cfg, steps))(jnp.arange(200)))[:steps]
    assert (rates > 0).all()
    assert (rates <= 1 + 1e-6).all()
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[max(warmup - 1, 0) :]) < 1e-6).all()
    assert (rates[warmup:] >= floor - 1e-6).all()


def test_the_optimizer_follows_the_schedule_it_returns():
    cfg = config("sgd", weight_decay=0.0)
    optimizer, schedule = build(cfg, STEPS, {"scale": "D"})
    one = {"scale": jnp.ones(SIZES["D"])}
    state = optimizer.init(one)
    for step in range(STEPS):
        updates, state = optimizer.update(one, state, one)
        assert_close(updates["scale"], np.full(SIZES["D"], -schedule(step)))


# --- learning ---

RATES = dict(
    adamw=0.05, adam=0.05, sgd=0.1, momentum=0.02, rmsprop=0.05, adafactor=0.05, lion=0.02, muon=0.1
)


@every_rule
def test_a_rule_lowers_a_quadratic(name):
    target = jax.tree.map(jnp.float32, draw(1))
    loss = lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True)  # noqa: E731
    assert descend(name, loss, draw(0), LETTERS) < 0.2


@every_rule
def test_a_rule_learns_a_logistic_regression(name):
    rng = np.random.default_rng(0)
    x = rng.standard_normal([64, 6]).astype(np.float32)  # [B D]
    labels = (x @ rng.standard_normal([6, 3])).argmax(-1)  # [B]

    def loss(params):
        logits = x @ params["w"][0] + params["b"][0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = {"w": np.zeros([1, 6, 3]), "b": np.zeros([1, 3])}
    assert descend(name, loss, params, {"w": "LD>F", "b": "LF"}) < 0.4


def descend(name, loss, params, letters, steps=150, **changes):
    """Return the loss after training, as a fraction of the initial one."""
    cfg = config(name, lr=RATES[name], weight_decay=0.0, **changes)
    optimizer, _ = build(cfg, steps, letters)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    params = jax.tree.map(jnp.float32, params)
    return float(loss(run(params)) / loss(params))


# --- the state is a plain pytree ---


@every_rule
def test_a_donated_step_keeps_structure_and_compiles_once(name):
    optimizer, _ = build(config(name, clip=1.0), STEPS, LETTERS)
    traces = []

    def step(params, state, grads):
        traces.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.float32, draw(0))
    state = jax.jit(optimizer.init)(params)
    before = jax.eval_shape(lambda: (params, state))
    for grads in draw_grads():
        params, state = step(params, state, jax.tree.map(jnp.float32, grads))
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), before)
    chex.assert_tree_all_finite((params, state))
    assert len(traces) == 1


@every_rule
def test_the_state_carries_the_letters_of_its_parameters(name):
    optimizer, _ = build(config(name, clip=1.0), STEPS, LETTERS)
    params = jax.tree.map(jnp.float32, draw(0))
    state = jax.eval_shape(optimizer.init, params)
    letters = get_state_letters(optimizer, state, LETTERS)
    assert jax.tree.structure(letters) == jax.tree.structure(state)

    def check(leaf, letters):
        assert len(letters) == leaf.ndim
        assert all(d == "." or SIZES[d] == n for n, d in zip(leaf.shape, letters, strict=True))
        assert leaf.size <= 3 or set(letters) - {"."}, "nothing large is replicated"

    jax.tree.map(check, state, letters)


def test_adams_moments_have_exactly_their_parameters_letters():
    optimizer, _ = build(config("adamw"), STEPS, LETTERS)
    state = jax.eval_shape(optimizer.init, draw(0))
    found = sorted(jax.tree.leaves(get_state_letters(optimizer, state, LETTERS)))
    dims = [letters.replace(">", "") for letters in jax.tree.leaves(LETTERS)]
    assert found == sorted([*dims, *dims, "", ""])  # m and v; two counts


# --- names ---


@pytest.mark.parametrize(
    ("field", "typo", "near"), [("name", "adamv", "adam"), ("schedule", "warmup_cosin", "cosine")]
)
def test_an_unknown_name_is_rejected_with_the_nearest(field, typo, near):
    with pytest.raises(ConfigError, match=rf"optimizer\.{field}='{typo}'.*Did you mean '\w*{near}"):
        OptimizerConfig(**{field: typo})
