"""Float8 products: rounding, products and gradients against a slow reference."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    compute_logits,
    forward,
    random_params,
    random_tokens,
    single_document_coords,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import config, make_training, random_batch

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords, fp8, init_cache, make_head
from jaxgpt.model.feedforward import FEEDFORWARDS
from jaxgpt.model.heads import ClassifierHead, MaskedLMTransform
from jaxgpt.model.layers import Linear
from jaxgpt.settings import ConfigError

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FORMATS = {"e4m3": (E4M3, ml_dtypes.float8_e4m3fn), "e5m2": (E5M2, ml_dtypes.float8_e5m2)}
quantize = jax.jit(fp8.quantize, static_argnums=1)


def round_by_ml_dtypes(x, kind):
    """Round x by ml_dtypes and scale it back, in float64: (rounded x, scale)."""
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(initial=0)
    limit = float(ml_dtypes.finfo(kind).max)
    scale = 2.0 ** max(-60, np.floor(np.log2(largest / limit)) + 1) if largest else 2.0**-60
    return (x / scale).astype(np.float32).astype(kind).astype(np.float64) * scale, scale


def draw_numbers(*shape, seed=0, dtype=jnp.float32):
    """Draw random numbers of many magnitudes."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 2.0 ** rng.integers(-6, 3, shape), dtype)


def relative_error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --- rounding ---


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None)  # the first example compiles
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    st.integers(-120, 100),
)
def test_numbers_are_scaled_by_a_power_of_two_and_rounded_as_by_ml_dtypes(name, xs, size):
    kind, slow = FORMATS[name]
    x = np.zeros(8, np.float32)
    x[: len(xs)] = xs
    x = np.ldexp(x, size)
    x[np.abs(x) < 2.0**-126] = 0  # XLA flushes subnormal numbers to 0
    found = quantize(x, kind)
    wanted, scale = round_by_ml_dtypes(x, slow)
    assert float(found.scale) == scale
    np.testing.assert_array_equal(np.asarray(found.values, np.float64) * scale, wanted)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("largest", [0.0, 1e-38, 1e-20, 0.4375, 448.0, 57344.0, 3e4, 3e38])
def test_nothing_saturates_and_zeros_stay_zeros(name, largest):
    kind, _ = FORMATS[name]
    x = jnp.asarray([largest, -largest, largest / 3, 0.0], jnp.float32)
    values, scale = quantize(x, kind)
    values = np.asarray(values, np.float32)
    assert np.all(np.isfinite([*values, scale]))
    assert values[3] == 0
    if largest > 1e-12:
        assert float(jnp.finfo(kind).max) / 2 <= values[0] <= float(jnp.finfo(kind).max)


def test_a_number_is_rounded_to_the_same_value_whatever_else_is_in_its_tensor():
    x = draw_numbers(64)
    near = x[jnp.abs(x) > 2.0**-5]

    def dequantized(x):
        values, scale = quantize(x, E4M3)
        return np.asarray(values, np.float32) * float(scale)

    scaled = dequantized(jnp.append(near, 2.0**-5 * 14336))  # from this ratio on, digits are lost
    np.testing.assert_array_equal(scaled[:-1], dequantized(near))
    scaled = dequantized(jnp.append(near, 2.0**-5 * 14336 * 256))
    assert np.any(scaled[:-1] != dequantized(near))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infinities_and_nan_become_nan_in_every_product_and_gradient(bad):
    x, w = draw_numbers(4, 8).at[1, 2].set(bad), draw_numbers(8, 3)
    y, pull = jax.vjp(functools.partial(fp8.matmul, axes=1), x, w)
    assert np.all(np.isnan(y[1]))
    assert np.any(np.isnan(pull(jnp.ones_like(y))[1]))
    d_x, d_w = jax.vjp(functools.partial(fp8.matmul, axes=1), draw_numbers(4, 8), w)[1](y)
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
def test_product_and_gradients_are_those_of_the_rounded_factors(shapes, dtype):
    x_shape, w_shape, axes = shapes
    x, w = draw_numbers(*x_shape, dtype=dtype), draw_numbers(*w_shape, seed=1, dtype=dtype)
    y, pull = jax.vjp(functools.partial(fp8.matmul, axes=axes), x, w)
    d_y = draw_numbers(*y.shape, seed=2, dtype=dtype)
    d_x, d_w = pull(d_y)
    assert {y.dtype, d_x.dtype, d_w.dtype} == {jnp.dtype(dtype)}

    flat = np.reshape
    inputs = int(np.prod(w_shape[:axes]))
    x8 = flat(round_by_ml_dtypes(x, ml_dtypes.float8_e4m3fn)[0], (-1, inputs))
    w8 = flat(round_by_ml_dtypes(w, ml_dtypes.float8_e4m3fn)[0], (inputs, -1))
    d8 = flat(round_by_ml_dtypes(d_y, ml_dtypes.float8_e5m2)[0], (-1, w8.shape[1]))
    # float32 sums of up to 32 products; bfloat16 rounds the result once.
    error = dict(float32=1e-6, bfloat16=2.0**-8)[jnp.dtype(dtype).name]
    for found, wanted in ((y, x8 @ w8), (d_x, d8 @ w8.T), (d_w, x8.T @ d8)):
        found = np.asarray(found, np.float64).reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=error, atol=1e-6 * np.abs(wanted).max())


def test_the_error_of_products_is_that_of_the_mantissa_bits():
    x, w, d_y = draw_numbers(64, 96), draw_numbers(96, 48, seed=1), draw_numbers(64, 48, seed=2)
    y, pull = jax.vjp(functools.partial(fp8.matmul, axes=1), x, w)
    d_x, d_w = pull(d_y)
    # Rounding to 3 bits of mantissa errs by at most 2^-4 and by 0.026 in quadratic mean, to 2 bits
    # by 0.052; the errors of two factors add up like independent ones, and do not grow with a sum.
    for found, exact, error in (
        (y, x @ w, 0.037),
        (d_x, d_y @ w.T, 0.058),
        (d_w, x.T @ d_y, 0.058),
    ):
        assert 0.7 * error < relative_error(found, exact) < 1.3 * error


def test_under_vmap_and_scan_every_matrix_has_a_scale_of_its_own():
    x, w = (
        draw_numbers(3, 4, 16),
        draw_numbers(3, 16, 8, seed=1) * jnp.asarray([1, 1e-6, 1e6])[:, None, None],
    )
    loss = lambda x, w: jnp.sum(fp8.matmul(x, w, 1) ** 2)  # noqa: E731
    expert = jax.jit(jax.grad(loss, (0, 1)))
    wanted = [expert(x[i], w[i]) for i in range(3)]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted)
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(x, w)
    scanned = jax.lax.scan(lambda _, xw: (None, expert(*xw)), None, (x, w))[1]
    for found in (mapped, scanned):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


# --- in a model ---


def lower_step(*assignments) -> str:
    """Lower the training step for a GPU."""
    run = make_training(config(*assignments))
    with jax.set_mesh(run.mesh):
        batch = jax.tree.map(jnp.asarray, random_batch())
        step = run.step.trace(run.abstract, batch).lower(lowering_platforms=("cuda",))
        return step.as_text()


def test_a_gpu_program_has_three_float8_products_per_linear_map_and_no_other():
    text = lower_step("model.products=fp8", "model.dtype=bfloat16", "model.kernel=dense")
    dots = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    assert dots
    float8 = [kinds for kinds in dots if any(kind.startswith("f8") for kind in kinds)]
    # q, k, v, o, gate, up, down: forward, and for each one product for x and one for w.
    forward, backward = ("f8E4M3FN", "f8E4M3FN"), {"f8E5M2", "f8E4M3FN"}
    assert sum(kinds == forward for kinds in float8) == 7
    assert sum(set(kinds) == backward for kinds in float8) == 14
    assert len(float8) == 21
    # Sums over tokens are not accumulated at reduced precision.
    precise = re.findall(r"precision = \[HIGHEST, HIGHEST\] : \([^)]*f8E5M2", text)
    assert len(precise) == 14


def test_without_the_option_no_program_has_float8():
    assert "f8E" not in lower_step("model.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"model.products='fp9'.*Did you mean 'fp8'"):
        tiny(products="fp9")


def test_logits_of_tokens_and_classes_keep_full_precision():
    cfg = tiny(family="encoder", head="mlm", classes=2, layers=1, products="fp8")
    plain = tiny(family="encoder", head="mlm", classes=2, layers=1)
    x = draw_numbers(2, 4, cfg.width)
    for module in (ClassifierHead, MaskedLMTransform):
        params = module(plain).init(jax.random.key(0), x)
        np.testing.assert_array_equal(module(cfg).apply(params, x), module(plain).apply(params, x))


def test_the_backward_pass_saves_no_more_than_without_float8():
    def count_saved_bytes(products):
        cfg = tiny(products=products, width=64, ffn=256)
        x = jnp.zeros((8, 128, 64), jnp.bfloat16)
        up, down = Linear(cfg, "D>F"), Linear(cfg, "F>D")
        params = [m.init(jax.random.key(0), jnp.zeros((1, 1, n)))["params"]
                  for m, n in ((up, 64), (down, 256))]  # fmt: skip

        def layer(x, params):
            h = up.apply({"params": params[0]}, x)
            return x + down.apply({"params": params[1]}, h, input_fn=jax.nn.relu), None

        loss = lambda x, params: jnp.sum(jax.lax.scan(layer, x, params, 4)[0])  # noqa: E731
        params = jax.tree.map(lambda p: jnp.stack([p] * 4), params)
        _, pull = jax.eval_shape(lambda *given: jax.vjp(loss, *given), x, params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    # Four layers have four scales of four bytes each.
    assert count_saved_bytes("fp8") - count_saved_bytes("plain") == 4 * 4 * 4


def test_cached_decoding_equals_uncached():
    cfg = tiny(products="fp8")
    params, tokens = random_params(cfg), random_tokens(cfg, 1, 2, 12)
    wanted = compute_logits(cfg, params, tokens, single_document_coords(tokens))
    cache, found = init_cache(cfg, 2, 12), []
    for start, end in ((0, 5), *((i, i + 1) for i in range(5, 12))):
        part = slice(start, end)
        coords = Coords(*(x[:, part] for x in single_document_coords(tokens)[:2]))
        hidden, cache = forward(cfg, params, tokens[:, part], coords, cache)
        found.append(make_head(cfg, params)(hidden))
    # A single number rounded the other way would show as 1e-3.
    assert relative_error(jnp.concatenate(found, axis=1), wanted) < 1e-5


@functools.cache
def compute_losses(*assignments, devices=1):
    return make_training(config("model.products=fp8", *assignments), devices).run(3)[1]


# The losses of three steps differ in the order of sums and in numbers that it rounds the other way:
# by 2e-7 here. With "plain" for "fp8" they would differ by 4e-4.
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
    np.testing.assert_allclose(
        compute_losses(*assignments, devices=devices), compute_losses(), rtol=2e-5
    )


def test_a_mixture_is_the_sum_of_its_experts_on_all_tokens():
    cfg = tiny(products="fp8", feedforward="moe_gated", moe=ExpertsConfig(4, 2))
    mixture, expert = FEEDFORWARDS["moe_gated"](cfg), FEEDFORWARDS["gated"](cfg)
    x, weights = draw_numbers(2, 20, cfg.width), draw_numbers(2, 20, cfg.width, seed=1)
    coords = single_document_coords(x[..., 0])
    params, _ = split(mixture.init(jax.random.key(0), x, coords)["params"])
    params = jax.tree.map(lambda p: p * 20, params)

    def fast(x):
        return jnp.sum(weights * mixture.apply({"params": params}, x, coords))

    def slow(x):
        gate, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]["w"]), 2)
        gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
        y = 0.0
        for e in range(4):
            w = jax.tree.map(lambda w, e=e: w[e], params["experts"])
            expert_gate = jnp.sum(gate * (chosen == e), axis=-1, keepdims=True)
            y += expert_gate * expert.apply({"params": w}, x)
        return jnp.sum(weights * y)

    found, wanted = jax.jit(jax.value_and_grad(fast))(x), jax.jit(jax.value_and_grad(slow))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)


def test_it_overfits_a_batch_as_fast_as_without_float8():
    def compute_last_loss(products):
        run = make_training(config(f"model.products={products}", "train.steps=30"))
        return run.run(30, batch_of=lambda _: random_batch())[1][-1]

    without = compute_last_loss("plain")
    assert without < 2  # from 5.57
    assert abs(compute_last_loss("fp8") - without) < 0.03
