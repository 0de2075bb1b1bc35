"""Products in float8: the rounding, the products and gradients are those of a slow twin."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import forward, logits, random_params, random_tokens, tiny, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import config, random_batch, training

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords, fp8, init_cache
from jaxgpt.model import logits as score
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.model.heads import Classes, Transform
from jaxgpt.model.layers import Linear
from jaxgpt.settings import ConfigError

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FORMATS = {"e4m3": (E4M3, ml_dtypes.float8_e4m3fn), "e5m2": (E5M2, ml_dtypes.float8_e5m2)}
rounded = jax.jit(fp8.rounded, static_argnums=1)


def twin(x, kind):
    """x rounded and scaled back, in float64, by ml_dtypes: (what it is then, the scale)."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(initial=0)
    limit = float(ml_dtypes.finfo(kind).max)
    scale = 2.0 ** max(-60, np.floor(np.log2(largest / limit)) + 1) if largest else 2.0**-60
    return (x / scale).astype(np.float32).astype(kind).astype(np.float64) * scale, scale


def draw(*shape, seed=0, dtype=jnp.float32):
    """Random numbers of many sizes."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 2.0 ** rng.integers(-6, 3, shape), dtype)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- rounding ---


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)  # the first example compiles
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    st.integers(-120, 100),
)
def test_numbers_are_rounded_as_ml_dtypes_rounds_what_a_power_of_two_has_scaled(name, xs, size):
    kind, slow = FORMATS[name]
    x = np.zeros(8, np.float32)
    x[: len(xs)] = xs
    x = np.ldexp(x, size)
    x[np.abs(x) < 2.0**-126] = 0  # XLA takes subnormal numbers as 0
    found = rounded(x, kind)
    wanted, scale = twin(x, slow)
    assert float(found.scale) == scale
    np.testing.assert_array_equal(np.asarray(found.values, np.float64) * scale, wanted)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-20, 0.4375, 448.0, 57344.0, 3e4, 3e38])
def test_nothing_saturates_and_zeros_stay_zeros(name, largest):
    kind, _ = FORMATS[name]
    x = jnp.asarray([largest, -largest, largest / 3, 0.0], jnp.float32)
    values, scale = rounded(x, kind)
    values = np.asarray(values, np.float32)
    assert np.all(np.isfinite([*values, scale]))
    assert values[3] == 0
    if largest > 1e-12:
        assert float(jnp.finfo(kind).max) / 2 <= values[0] <= float(jnp.finfo(kind).max)


def test_a_number_is_rounded_to_the_same_one_whatever_else_is_in_its_tensor():
    x = draw(64)
    near = x[jnp.abs(x) > 2.0**-5]

    def alone(x):
        values, scale = rounded(x, E4M3)
        return np.asarray(values, np.float32) * float(scale)

    beside = alone(jnp.append(near, 2.0**-5 * 14336))  # at that distance digits begin to be lost
    np.testing.assert_array_equal(beside[:-1], alone(near))
    beside = alone(jnp.append(near, 2.0**-5 * 14336 * 256))
    assert np.any(beside[:-1] != alone(near))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_nan_in_every_product_and_gradient(bad):
    x, w = draw(4, 8).at[1, 2].set(bad), draw(8, 3)
    y, pull = jax.vjp(functools.partial(fp8.product, axes=1), x, w)
    assert np.all(np.isnan(y[1]))
    assert np.any(np.isnan(pull(jnp.ones_like(y))[1]))
    d_x, d_w = jax.vjp(functools.partial(fp8.product, axes=1), draw(4, 8), w)[1](y)
    assert np.any(np.isnan(d_x))
    assert np.any(np.isnan(d_w))


# --- products ---

SHAPES = {
    "D>HK": ((2, 6, 16), (16, 4, 8), 1),
    "HK>D": ((2, 6, 4, 8), (4, 8, 16), 2),
    "D>F of an expert": ((6, 16), (16, 24), 1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_product_and_gradients_are_those_of_what_is_rounded(shapes, dtype):
    x_shape, w_shape, axes = shapes
    x, w = draw(*x_shape, dtype=dtype), draw(*w_shape, seed=1, dtype=dtype)
    y, pull = jax.vjp(functools.partial(fp8.product, axes=axes), x, w)
    d_y = draw(*y.shape, seed=2, dtype=dtype)
    d_x, d_w = pull(d_y)
    assert {y.dtype, d_x.dtype, d_w.dtype} == {jnp.dtype(dtype)}

    flat = np.reshape
    inputs = int(np.prod(w_shape[:axes]))
    x8 = flat(twin(x, ml_dtypes.float8_e4m3fn)[0], (-1, inputs))
    w8 = flat(twin(w, ml_dtypes.float8_e4m3fn)[0], (inputs, -1))
    d8 = flat(twin(d_y, ml_dtypes.float8_e5m2)[0], (-1, w8.shape[1]))
    # float32 sums of up to 32 products; bfloat16 rounds the outcome once.
    error = dict(float32=1e-6, bfloat16=2.0**-8)[jnp.dtype(dtype).name]
    for found, wanted in ((y, x8 @ w8), (d_x, d8 @ w8.T), (d_w, x8.T @ d8)):
        found = np.asarray(found, np.float64).reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=error, atol=1e-6 * np.abs(wanted).max())


def test_products_are_as_far_from_exact_ones_as_the_digits_say():
    x, w, d_y = draw(64, 96), draw(96, 48, seed=1), draw(64, 48, seed=2)
    y, pull = jax.vjp(functools.partial(fp8.product, axes=1), x, w)
    d_x, d_w = pull(d_y)
    # Rounding to 3 bits of mantissa errs by at most 2^-4 and by 0.026 in quadratic mean, to 2 bits
    # by 0.052; the errors of two factors add up like independent ones, and do not grow with a sum.
    for found, exact, error in (
        (y, x @ w, 0.037),
        (d_x, d_y @ w.T, 0.058),
        (d_w, x.T @ d_y, 0.058),
    ):
        assert 0.7 * error < relative(found, exact) < 1.3 * error


def test_under_vmap_and_scan_every_matrix_has_a_scale_of_its_own():
    x, w = draw(3, 4, 16), draw(3, 16, 8, seed=1) * jnp.asarray([1, 1e-6, 1e6])[:, None, None]
    loss = lambda x, w: jnp.sum(fp8.product(x, w, 1) ** 2)  # noqa: E731
    one = jax.jit(jax.grad(loss, (0, 1)))
    wanted = [one(x[i], w[i]) for i in range(3)]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted)
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, w)
    scanned = jax.lax.scan(lambda _, xw: (None, one(*xw)), None, (x, w))[1]
    for found in (mapped, scanned):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


# --- in a model ---


def lowered(*assignments) -> str:
    """The training step as it goes to a GPU's compiler."""
    run = training(config(*assignments))
    with jax.set_mesh(run.mesh):
        batch = jax.tree.map(jnp.asarray, random_batch())
        step = run.step.trace(run.abstract, batch).lower(lowering_platforms=("cuda",))
        return step.as_text()


def test_a_gpu_is_given_three_float8_products_for_each_linear_map_and_no_other():
    text = lowered("model.products=fp8", "model.dtype=bfloat16", "model.kernel=dense")
    dots = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    assert dots
    float8 = [kinds for kinds in dots if any(kind.startswith("f8") for kind in kinds)]
    # q, k, v, o, gate, up, down: forward, and for each one product for x and one for w.
    forward, backward = ("f8E4M3FN", "f8E4M3FN"), {"f8E5M2", "f8E4M3FN"}
    assert sum(kinds == forward for kinds in float8) == 7
    assert sum(set(kinds) == backward for kinds in float8) == 14
    assert len(float8) == 21
    # What sums over tokens is not summed in fewer digits.
    precise = re.findall(r"precision = \[HIGHEST, HIGHEST\] : \([^)]*f8E5M2", text)
    assert len(precise) == 14


def test_without_the_option_no_program_has_float8():
    assert "f8E" not in lowered("model.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"model.products='fp9'.*Did you mean 'fp8'"):
        tiny(products="fp9")


def test_scores_of_words_and_classes_keep_their_digits():
    cfg = tiny(family="encoder", head="mlm", classes=2, layers=1, products="fp8")
    plain = tiny(family="encoder", head="mlm", classes=2, layers=1)
    x = draw(2, 4, cfg.width)
    for module in (Classes, Transform):
        params = module(plain).init(jax.random.key(0), x)
        np.testing.assert_array_equal(module(cfg).apply(params, x), module(plain).apply(params, x))


def test_the_backward_pass_keeps_no_more_than_without_float8():
    def kept(products):
        cfg = tiny(products=products, width=64, ffn=256)
        x = jnp.zeros((8, 128, 64), jnp.bfloat16)
        up, down = Linear(cfg, "D>F"), Linear(cfg, "F>D")
        params = [m.init(jax.random.key(0), jnp.zeros((1, 1, n)))["params"]
                  for m, n in ((up, 64), (down, 256))]  # fmt: skip

        def layer(x, params):
            h = up.apply({"params": params[0]}, x)
            return x + down.apply({"params": params[1]}, h, of=jax.nn.relu), None

        loss = lambda x, params: jnp.sum(jax.lax.scan(layer, x, params, 4)[0])  # noqa: E731
        params = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
        _, pull = jax.eval_shape(lambda *given: jax.vjp(loss, *given), x, params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    # Four layers have four scales of four bytes each.
    assert kept("fp8") - kept("plain") == 4 * 4 * 4


def test_cached_decoding_agrees_with_the_whole_text():
    cfg = tiny(products="fp8")
    params, tokens = random_params(cfg), random_tokens(cfg, 1, 2, 12)
    wanted = logits(cfg, params, tokens, whole(tokens))
    cache, found = init_cache(cfg, 2, 12), []
    for start, end in ((0, 5), *((i, i + 1) for i in range(5, 12))):
        part = slice(start, end)
        at = Coords(*(x[:, part] for x in whole(tokens)[:2]))
        hidden, cache = forward(cfg, params, tokens[:, part], at, cache)
        found.append(score(cfg, params, hidden))
    # One number that falls to the other side when it is rounded would show as 1e-3.
    assert relative(jnp.concatenate(found, axis=1), wanted) < 1e-5


@functools.cache
def losses(*assignments, devices=1):
    return training(config("model.products=fp8", *assignments), devices).run(3)[1]


# The losses of three steps, which differ in the order of sums and in what that tips over when it is
# rounded: 2e-7 is what they are apart here. With "plain" for "fp8" they would be 4e-4.
@pytest.mark.parametrize(
    "assignments",
    [
        ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2"),
        ("model.remat=full", "train.accumulate=2"),
    ],
    ids=["devices", "recomputing layers, and parts of a batch"],
)
def test_training_does_not_depend_on(assignments):
    devices = 8 if "mesh.data=1" in assignments else 1
    np.testing.assert_allclose(losses(*assignments, devices=devices), losses(), rtol=2e-5)


def test_a_mixture_is_the_sum_of_its_experts_on_all_tokens():
    cfg = tiny(products="fp8", feedforward="moe_gated", moe=ExpertsConfig(4, 2))
    mixture, one = FEEDFORWARDS["moe_gated"](cfg), FEEDFORWARDS["gated"](cfg)
    x, weigh = draw(2, 20, cfg.width), draw(2, 20, cfg.width, seed=1)
    at = whole(x[..., 0])
    params, _ = split(mixture.init(jax.random.key(0), x, at)["params"])
    params = jax.tree.map(lambda p: p * 20, params)

    def fast(x):
        return jnp.sum(weigh * mixture.apply({"params": params}, x, at))

    def slow(x):
        share, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]["w"]), 2)
        share = share / jnp.sum(share, axis=-1, keepdims=True)
        y = 0.0
        for e in range(4):
            w = jax.tree.map(lambda w, e=e: w[e], params["experts"])
            here = jnp.sum(share * (chosen == e), axis=-1, keepdims=True)
            y += here * one.apply({"params": w}, x)
        return jnp.sum(weigh * y)

    found, wanted = jax.jit(jax.value_and_grad(fast))(x), jax.jit(jax.value_and_grad(slow))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)


def test_it_learns_a_batch_by_heart_as_fast_as_without():
    def last(products):
        run = training(config(f"model.products={products}", "train.steps=30"))
        return run.run(30, batch_of=lambda _: random_batch())[1][-1]

    without = last("plain")
    assert without < 2  # from 5.57
    assert abs(last("fp8") - without) < 0.03
