"""Codes against their definition in float64, level by level; rules with and without them."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_optimizer import LETTERS, SIZES, descend, draw, draw_grads, train
from test_optimizer import config as rule_config
from tiny_runs import assert_same_bits, config, make_training, random_batch

from jaxgpt.config import ConfigError, MeshConfig, OptimizerConfig, load
from jaxgpt.model import abstract_params
from jaxgpt.moments import _draw_bits, _find_row_axes, pack_bfloat16, pack_int8, unpack_int8
from jaxgpt.optimizer import OPTIMIZERS, OPTIMIZERS_WITHOUT_MOMENTS, build, get_state_letters
from jaxgpt.sharding import make_mesh, make_shardings

ROOT = pathlib.Path(__file__).parent.parent
WITH_MOMENTS = [name for name in OPTIMIZERS if name not in OPTIMIZERS_WITHOUT_MOMENTS]
LEVELS = {  # all values of a code, as fractions of the scale
    False: np.array([np.sign(c) * (c / 127) ** 2 for c in range(-127, 128)]),
    True: np.array([(c / 255) ** 4 for c in range(256)]),
}

pack_rows = jax.jit(pack_int8, static_argnums=(2, 3))
pack_halves = jax.jit(pack_bfloat16, static_argnums=(2, 3))


# --- reference implementations ---


def lowbias32(x):
    """Hash integers, computed in 64 bits."""
    x = np.uint64(x)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def reference_bits(shape, step: int, number: int):
    salt = lowbias32((lowbias32(step) + number) % 2**32)
    return lowbias32(np.arange(np.prod(shape), dtype=np.uint64) ^ salt).reshape(shape)


def find_neighbor_levels(row, is_square):
    """float64 [n] -> the levels below and above each entry, and its position between them."""
    levels = LEVELS[is_square] * np.abs(row).max()
    above = np.clip(np.searchsorted(levels, row), 1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    width = np.where(high > low, high - low, 1)
    return low, high, (row - low) / width


def reference_round(row, random, is_square):
    """Round a row stochastically to its levels, float64 [n]."""
    low, high, share = find_neighbor_levels(row, is_square)
    u = random / 2**32
    up = np.where(row >= 0, u < share, ~(u < 1 - share))
    read = np.where(up, high, low)
    return np.where(is_square & (row > 0) & (read == 0), high, read)


# --- codes ---

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)
ROWS = arrays.arrays(np.float32, (3, 32), elements=FLOATS, fill=st.just(np.float32(1e-3)))


def pack_and_unpack(x, random, is_square):
    code, scale = pack_rows(x, random, (1,), is_square)
    return np.asarray(code, np.int32), np.asarray(unpack_int8(code, scale, is_square))


@settings(max_examples=60, deadline=None)
@given(x=ROWS, seed=st.integers(0, 2**31), is_square=st.booleans())
def test_an_entry_is_rounded_to_one_of_the_two_levels_around_it(x, seed, is_square):
    x = np.abs(x) if is_square else x
    x = np.where(np.abs(x) < 2.0**-126, 0, x)  # many machines flush smaller ones to 0
    random = np.random.default_rng(seed).integers(0, 2**32, x.shape, np.uint32)
    code, back = pack_and_unpack(x, random, is_square)
    for row, read in zip(x.astype(np.float64), back, strict=True):
        low, high, _ = find_neighbor_levels(row, is_square)
        tolerance = 1e-5 * np.maximum(np.abs(low), np.abs(high)) + 2.0**-126
        assert ((low - tolerance <= read) & (read <= high + tolerance)).all()
        largest = np.abs(row).argmax()
        assert read[largest] == pytest.approx(row[largest], rel=1e-6)
    assert (code[x == 0] == 0).all()
    if is_square:
        assert (code[x > 0] > 0).all()


@pytest.mark.parametrize("is_square", [False, True])
def test_rounding_equals_the_reference(is_square):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 64)) * 10.0 ** rng.integers(-6, 1, (40, 64))
    x = (x**2 if is_square else x).astype(np.float32)
    random = rng.integers(0, 2**32, x.shape, np.uint32)
    _, back = pack_and_unpack(x, random, is_square)
    pairs = zip(x.astype(np.float64), random, strict=True)
    expected = np.stack([reference_round(row, some, is_square) for row, some in pairs])
    # float32 has the probability to 1e-5, so hardly one of 2560 draws goes the other way.
    assert (~np.isclose(back, expected, rtol=1e-5, atol=0)).sum() <= 1


@pytest.mark.parametrize("kind", ["m", "v", "bfloat16"])
def test_rounding_is_unbiased(kind):
    rng = np.random.default_rng(1)
    x = np.abs(rng.standard_normal((8, 64)).astype(np.float32)) + 0.05
    draws = 4000
    total, squares = np.zeros(x.shape), np.zeros(x.shape)
    for number in range(draws // 50):
        tall = np.tile(x, (50, 1))
        random = _draw_bits(tall.shape, jnp.int32(number), 3)
        if kind == "bfloat16":
            read = np.asarray(pack_halves(tall, random, (1,), False)[0], np.float64)
        else:
            read = pack_and_unpack(tall, random, kind == "v")[1].astype(np.float64)
        error = (read - tall).reshape(50, *x.shape)
        total, squares = total + error.sum(0), squares + (error**2).sum(0)
    mean, deviation = total / draws, np.sqrt(squares / draws)
    assert (deviation > 0).mean() > 0.9
    # The last term is for rare steps. Rounding to nearest would be off by 0.002.
    assert (np.abs(mean) <= 5 * deviation / np.sqrt(draws) + 5e-4 * x).all()


def test_a_row_with_nan_or_infinity_has_no_finite_entries():
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 7] = np.uint32(0x7FFFFFFF).view(np.float32), -np.inf  # a NaN that could carry
    _, back = pack_and_unpack(x, np.zeros(x.shape, np.uint32), False)
    assert not np.isfinite(back[:2]).any()
    np.testing.assert_allclose(back[2], 1, rtol=1e-6)
    halves = np.asarray(pack_halves(x, np.full(x.shape, 2**32 - 1, np.uint32), (1,), False)[0])
    np.testing.assert_array_equal(np.isnan(halves.astype(np.float32)), np.isnan(x))
    np.testing.assert_array_equal(np.isinf(halves.astype(np.float32)), np.isinf(x))


def test_bfloat16_values_are_not_changed():
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(jnp.bfloat16)
    random = np.full(x.shape, 2**32 - 1, np.uint32)
    np.testing.assert_array_equal(pack_halves(x.astype(np.float32), random, (1,), False)[0], x)


def test_random_bits_equal_the_reference_hash():
    for step, number in ((0, 0), (7, 3)):
        ours = _draw_bits((3, 4, 5), jnp.int32(step), number)
        np.testing.assert_array_equal(ours, reference_bits((3, 4, 5), step, number))


def test_random_bits_look_random():
    draws = np.stack([_draw_bits((64, 64), jnp.int32(s), n) for s in range(8) for n in range(2)])
    bits = (draws[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean((1, 2)) - 0.5).max() < 5 * 0.5 / 64  # five deviations of 4096 coins
    between = np.corrcoef(draws.reshape(16, -1).astype(float)) - np.eye(16)
    along = [np.corrcoef(d[:, 1:].ravel(), d[:, :-1].ravel())[0, 1] for d in draws.astype(float)]
    assert max(np.abs(between).max(), np.abs(along).max()) < 5 / 64


def average(g2, draw_fn, steps=1500, b2=0.999):
    """Return the last v of a row of constant g^2, quantized to 8 bits between steps."""

    @jax.jit
    def run(v):
        def step(packed, number):
            v = b2 * unpack_int8(*packed, True) + (1 - b2) * g2
            return pack_int8(v, draw_fn(number), (1,), True), None

        first = pack_int8(v, draw_fn(jnp.int32(0)), (1,), True)
        return unpack_int8(*jax.lax.scan(step, first, jnp.arange(steps))[0], True)

    return run(jnp.ones_like(g2).at[:, 1:].set(0.5))


def test_an_average_can_change_by_less_than_a_quantization_step():
    g2 = jnp.full((1, 512), 0.25).at[:, 0].set(1.0)  # the first one holds the scale at 1
    expected = 0.25 + 0.25 * 0.999**1500
    moved = average(g2, lambda number: _draw_bits(g2.shape, number, 0))[0, 1:]
    assert float(moved.mean()) == pytest.approx(expected, rel=0.01)
    stuck = average(g2, lambda number: jnp.full(g2.shape, 2**31, jnp.uint32))[0, 1:]
    np.testing.assert_allclose(stuck, 0.5, rtol=0.01)  # rounding to nearest


def test_a_row_is_the_last_axes_with_at_least_64_entries():
    assert _find_row_axes((50, 768), "V>D") == (1,)
    assert _find_row_axes((12, 768, 12, 64), "LD>HK") == (3,)
    assert _find_row_axes((12, 768, 12, 32), "LD>HK") == (3, 2)
    assert _find_row_axes((12, 8, 4, 6), "LED>F") == (3, 2)  # never across layers or experts


# --- rules ---


def reference_adamw(cfg, params, grads, is_rounded=True):
    """Return the leaves of AdamW's parameters in float64, with moments rounded after every step."""
    order = jax.tree.leaves(LETTERS)
    params, read = jax.tree.leaves(params), {}
    numbers = {}
    for field in ("m", "v"):
        for i, d in enumerate(order):
            if ">" in d:
                numbers[field, i] = len(numbers)

    def quantize(x, field, i, step):
        if (field, i) not in numbers or not is_rounded:
            return x
        letters, random = order[i], reference_bits(x.shape, step, numbers[field, i])
        axes = _find_row_axes(x.shape, letters)
        rows = (-1, np.prod([x.shape[a] for a in axes]))
        pairs = zip(x.reshape(rows), random.reshape(rows), strict=True)
        return np.stack([reference_round(*pair, field == "v") for pair in pairs]).reshape(x.shape)

    for t, tree in enumerate(grads, 1):
        for i, g in enumerate(jax.tree.leaves(tree)):
            m = cfg.b1 * read.get(("m", i), 0) + (1 - cfg.b1) * g
            v = cfg.b2 * read.get(("v", i), 0) + (1 - cfg.b2) * g**2
            direction = (m / (1 - cfg.b1**t)) / (np.sqrt(v / (1 - cfg.b2**t)) + cfg.eps)
            decay = cfg.weight_decay if ">" in order[i] else 0.0
            params[i] = params[i] - cfg.lr * (direction + decay * params[i])
            read["m", i], read["v", i] = quantize(m, "m", i, t), quantize(v, "v", i, t)
    return params


def test_adamw_in_8_bits_equals_the_reference_with_rounded_moments():
    cfg = rule_config(lr=0.01, schedule="warmup_constant", warmup=0, moments="int8")
    ours = train(cfg, draw(0), draw_grads())
    theirs = reference_adamw(cfg, draw(0), draw_grads())
    pairs = list(zip(jax.tree.leaves(ours), theirs, strict=True))

    # A different draw shows in its own entry only, as about 1e-4.
    def count_differences(pairs):
        return sum((~np.isclose(a, b, rtol=2e-5, atol=2e-6)).sum() for a, b in pairs)

    assert count_differences(pairs) <= 2
    plain = reference_adamw(cfg, draw(0), draw_grads(), is_rounded=False)
    # A missing rounding would show in nearly every entry of a matrix.
    sizes = [p.size for p, d in zip(plain, jax.tree.leaves(LETTERS), strict=True) if ">" in d]
    assert count_differences(zip(plain, theirs, strict=True)) > 0.5 * sum(sizes)


@pytest.mark.parametrize(
    ("name", "moments"), [*((name, "int8") for name in WITH_MOMENTS), ("adamw", "bfloat16")]
)
def test_a_rule_lowers_a_quadratic_with_fewer_bits(name, moments):
    target = jax.tree.map(jnp.float32, draw(1))
    loss = lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True)  # noqa: E731
    assert descend(name, loss, draw(0), LETTERS, moments=moments) < 0.2


@pytest.mark.parametrize("name", WITH_MOMENTS)
def test_moments_of_matrices_are_codes_with_the_letters_of_their_parameters(name):
    optimizer, _ = build(rule_config(name, moments="int8"), 5, LETTERS)
    state = jax.eval_shape(optimizer.init, jax.tree.map(jnp.float32, draw(0)))
    letters = get_state_letters(optimizer, state, LETTERS)
    assert jax.tree.structure(letters) == jax.tree.structure(state)
    matrices, vectors = (
        {d.replace(">", "") for d in jax.tree.leaves(LETTERS) if (">" in d) == is_matrix}
        for is_matrix in (True, False)
    )
    found = list(zip(jax.tree.leaves(state), jax.tree.leaves(letters), strict=True))
    assert {d for x, d in found if x.dtype.itemsize == 1} == matrices
    wide = {d for x, d in found if x.dtype == jnp.float32 and "." not in d}
    assert wide == vectors
    assert sum(x.size for x, d in found if "." in d) < 50  # scales, and Muon's coefficients


def test_the_bytes_of_a_state_are_codes_scales_and_vectors():
    optimizer, _ = build(rule_config(moments="int8"), 5, LETTERS)
    state = optimizer.init(jax.tree.map(jnp.float32, draw(0)))
    V, D, H, K, F, L, E = (SIZES[d] for d in "VDHKFLE")
    codes = V * D + L * (D * H * K + H * K * D + D * F + E * D * F)
    scales = 1 + L * (1 + 1 + 1 + E)  # here every matrix is one row
    vectors = L * (H * K + D) + D
    counts = 3  # of the rule, of the rounding, of the schedule
    expected = 2 * (codes + 4 * scales + 4 * vectors) + 4 * counts
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == expected


def test_gpt2_has_two_bytes_of_state_per_parameter():
    cfg = load(str(ROOT / "configs" / "gpt2_124m.py"), ["optimizer.moments=int8"])
    shapes, letters = abstract_params(cfg.model)
    optimizer, _ = build(cfg.optimizer, 10, letters)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    state = size(jax.eval_shape(optimizer.init, shapes))
    assert 2 < state / (size(shapes) / 4) < 2.04


def test_an_update_on_many_devices_is_bit_identical_and_gathers_nothing():
    many = dict(SIZES, V=16, D=64, H=4, K=16, F=128, L=4)
    cfg = rule_config(moments="int8")
    optimizer, _ = build(cfg, 5, LETTERS)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, pipe=2))
    params = jax.tree.map(jnp.float32, draw(0, sizes=many))
    grads = [jax.tree.map(np.float32, g) for g in draw_grads(sizes=many)]
    first = (params, optimizer.init(params))
    letters = (LETTERS, get_state_letters(optimizer, first[1], LETTERS))
    where = make_shardings(first, letters, mesh)

    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    single_device_step, sharded_step = jax.jit(step), jax.jit(step, out_shardings=where)
    expected, found = first, jax.device_put(first, where)
    for g in grads:
        expected = single_device_step(*expected, g)
        found = sharded_step(*found, jax.device_put(g, where[0]))
    assert_same_bits(found, expected)
    fractions = {x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(found[0])}
    assert min(fractions) == 1 / mesh.size
    text = sharded_step.lower(*found, jax.device_put(g, where[0])).compile().as_text()
    assert not re.findall(r"(all-gather|all-to-all|collective-permute)[-a-z]*\(", text)
    assert "all-reduce" in text  # the largest entry of a sharded row


def test_a_model_learns_equally_well_with_8_bits():
    def trained(moments):
        cfg = config("optimizer.lr=3e-3", "train.steps=120", f"optimizer.moments={moments}")
        state, losses = make_training(cfg).run(
            120, batch_of=lambda number: random_batch(number % 4)
        )
        return state, np.mean(losses[-20:]), losses[0]

    _, plain, first = trained("float32")
    state, loss, _ = trained("int8")
    assert plain < first - 2
    assert loss == pytest.approx(plain, abs=0.02)
    codes = [x for x in jax.tree.leaves(state.opt_state) if x.dtype.itemsize == 1]
    assert len(codes) == 2 * 8


# --- errors ---


@pytest.mark.parametrize("name", OPTIMIZERS_WITHOUT_MOMENTS)
def test_a_rule_without_moments_rejects_other_formats(name):
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(name=name, moments="int8")
    assert str(error.value) == (
        f"optimizer.moments='int8' with optimizer.name='{name}', which keeps no moments of "
        "matrices: use optimizer.moments=float32, or one of adamw, adam, momentum, rmsprop, lion, "
        "muon."
    )
