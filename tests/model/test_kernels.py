"""Kernels against attention written as loops over rows, heads and tokens, in float64."""

import logging
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, single_document_coords, tiny
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from jaxgpt.config import MeshConfig
from jaxgpt.model import build, kernels
from jaxgpt.model.kernels import (
    ACCELERATED,
    KERNELS,
    ScoreMod,
    attend,
    attend_on_mesh,
    cudnn,
    splash,
)
from jaxgpt.model.kernels.blockwise import blockwise
from jaxgpt.model.kernels.dense import dense
from jaxgpt.model.kernels.strips import iterate_strips, strips
from jaxgpt.model.masks import PATTERNS, Causal, Coords, Mask, SameSegment, make_layer_mask
from jaxgpt.sections import SparseConfig
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh

B, T, S, H, K = 2, 6, 9, 4, 8
# Those that need an accelerator have their own tests below; blocks are small here, so that there
# are several, and lengths are no multiple of them.
RUNS = {name: partial(attend, name) for name in KERNELS if name not in ACCELERATED}
RUNS["blocks of 4 x 4"] = partial(blockwise, blocks=(4, 4))
RUNS["strips of 4"] = partial(strips, size=4)
every_kernel = pytest.mark.parametrize("name", RUNS)
every_group = pytest.mark.parametrize("G", [4, 2, 1])  # MHA, GQA, MQA


@partial(jax.jit, static_argnums=0)
def run_kernel(name, *given):
    return RUNS[name](*given)


def make_arrays(G, dtype=np.float32):
    rng = np.random.default_rng(0)
    make_shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K)]
    return [rng.normal(size=shape).astype(dtype) for shape in make_shapes]


def make_coords():
    """Make two documents with padding at both ends of the keys; every query has visible keys."""
    k = Coords(
        np.array([[0, 0, 1, 2, 3, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]]),
        np.array([[0, 1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]),
    )
    q = jax.tree.map(lambda x: x[:, 2:8], k)
    return q, k


def alibi_like_bias(strength, q_coords, k_coords):
    """Return an ALiBi-like bias [B H T S] with a learned strength."""
    distance = q_coords.positions[:, :, None] - k_coords.positions[:, None, :]
    return -jnp.abs(distance)[:, None] * strength[None, :, None, None]


STRENGTH = np.array([0.1, 0.5, 1.0, 2.0], np.float32)


class Everything(Mask):
    def __call__(self, q, k):
        return SameSegment()(q, k) | True


MASKS = {
    "everyone": Everything(),
    "causal": Causal(),
    "packed": SameSegment() & Causal(),
    "either": SameSegment() | Causal(),
}


SINKS = np.array([-1.0, 0.0, 0.5, 3.0], np.float32)


def attend_by_loops(q, k, v, visible, bias, cap=math.inf, sinks=None):
    """Compute softmax(cap(q kᵀ / √K) + bias) v over visible keys [B T S], in float64."""

    def cap_logit(x):
        return x if cap == math.inf else cap * math.tanh(x / cap)

    out = np.zeros(q.shape)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = H // k.shape[2]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(S) if visible[b, t, s]]
                score_mod = [
                    cap_logit(q[b, t, h] @ k[b, s, h // group] / math.sqrt(K)) + bias[b, h, t, s]
                    for s in keys
                ]
                weight = np.exp(np.array(score_mod) - max(score_mod))
                sink = 0 if sinks is None else math.exp(sinks[h] - max(score_mod))
                weight /= weight.sum() + sink
                for s, w in zip(keys, weight, strict=True):
                    out[b, t, h] += w * v[b, s, h // group]
    return out


@every_kernel
@pytest.mark.parametrize(
    ("mask", "G", "modifications"),
    [
        ("everyone", 4, "nothing"),
        ("everyone", 2, "bias and soft cap"),
        ("causal", 2, "nothing"),
        ("causal", 1, "bias and soft cap"),
        ("packed", 1, "nothing"),
        ("packed", 4, "bias and soft cap"),
        ("either", 4, "nothing"),
        ("either", 2, "bias and soft cap"),
    ],
)
def test_a_kernel_equals_loops_in_float64(name, mask, G, modifications):
    q, k, v = make_arrays(G)
    coords = make_coords()
    visible = np.asarray(MASKS[mask](*coords))
    if modifications == "nothing":
        score_mod, bias, cap = ScoreMod(MASKS[mask]), np.zeros((B, H, T, S)), math.inf
    else:
        score_mod = ScoreMod(MASKS[mask], Partial(alibi_like_bias, STRENGTH), softcap=1.5)
        bias, cap = np.asarray(alibi_like_bias(STRENGTH, *coords), np.float64), 1.5
    # float32 on values of order 1.
    wanted = attend_by_loops(q, k, v, visible, bias, cap)
    np.testing.assert_allclose(run_kernel(name, q, k, v, *coords, score_mod), wanted, atol=2e-6)


@every_kernel
@every_group
def test_sinks_equal_loops_in_float64(name, G):
    q, k, v = make_arrays(G)
    coords, mask = make_coords(), MASKS["packed"]
    wanted = attend_by_loops(
        q, k, v, np.asarray(mask(*coords)), np.zeros((B, H, T, S)), sinks=SINKS
    )
    found = run_kernel(name, q, k, v, *coords, ScoreMod(mask, sinks=jnp.array(SINKS)))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@every_kernel
@every_group
@pytest.mark.parametrize("has_sinks", [False, True])
def test_gradients_of_a_kernel_equal_finite_differences_in_float64(name, G, has_sinks):
    q, k, v = make_arrays(G)
    coords = make_coords()
    mask = MASKS["packed"]
    visible = np.asarray(mask(*coords))
    rng = np.random.default_rng(1)
    weights = rng.normal(size=q.shape)

    def loss(q, k, v, strength, sinks=None):
        score_mod = ScoreMod(mask, Partial(alibi_like_bias, strength), sinks=sinks)
        return jnp.sum(weights * RUNS[name](q, k, v, *coords, score_mod))

    def exact(q, k, v, strength, sinks=None):
        distance = np.abs(coords[0].positions[:, :, None] - coords[1].positions[:, None, :])
        bias = -distance[:, None] * strength[None, :, None, None]
        return np.sum(weights * attend_by_loops(q, k, v, visible, bias, sinks=sinks))

    given = [q, k, v, STRENGTH] + [SINKS] * has_sinks
    gradients = jax.jit(jax.grad(loss, argnums=range(len(given))))(*given)
    step = 1e-4  # the error of a central difference is of order step², 1e-8
    for argument, gradient in enumerate(gradients):
        ahead, behind = ([x.astype(np.float64) for x in given] for _ in range(2))
        direction = rng.normal(size=given[argument].shape)
        ahead[argument] += step * direction
        behind[argument] -= step * direction
        slope_along = (exact(*ahead) - exact(*behind)) / (2 * step)
        # Sums of up to 400 float32 terms of order 1.
        np.testing.assert_allclose(np.sum(gradient * direction), slope_along, rtol=1e-4, atol=1e-4)


@every_kernel
def test_a_query_without_visible_keys_gives_all_weight_to_the_sinks(name):
    q, k, v = make_arrays(2)
    q_coords, k_coords = make_coords()
    padding = Coords(q_coords.positions, np.zeros_like(q_coords.segment_ids))

    def attend_padding(sinks):
        score_mod = ScoreMod(MASKS["packed"], sinks=sinks)
        return jnp.sum(jnp.abs(RUNS[name](q, k, v, padding, k_coords, score_mod)))

    value, gradient = jax.jit(jax.value_and_grad(attend_padding))(jnp.array(SINKS))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(H))


@every_kernel
def test_a_query_without_visible_keys_gives_no_nan_in_value_or_gradient(name):
    q, k, v = make_arrays(2)
    q_coords, k_coords = make_coords()
    padding = Coords(q_coords.positions, np.zeros_like(q_coords.segment_ids))

    def loss(q, k, v):
        return jnp.sum(RUNS[name](q, k, v, padding, k_coords, ScoreMod(MASKS["packed"])) ** 2)

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))


@every_kernel
def test_masked_keys_do_not_matter_however_large(name):
    q, k, v = make_arrays(2)
    coords = make_coords()
    hidden = np.asarray(coords[1].segment_ids == 0)[:, :, None, None]
    score_mod = ScoreMod(MASKS["packed"])
    plain = run_kernel(name, q, k, v, *coords, score_mod)
    changed = run_kernel(
        name, q, np.where(hidden, 1e4, k), np.where(hidden, 1e4, v), *coords, score_mod
    )
    np.testing.assert_array_equal(plain, changed)


@every_kernel
def test_bfloat16_stays_bfloat16_and_near_float32(name):
    exact = make_arrays(2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    coords = make_coords()
    out = run_kernel(name, *low, *coords, ScoreMod(MASKS["packed"]))
    assert out.dtype == jnp.bfloat16
    wanted = run_kernel(name, *exact, *coords, ScoreMod(MASKS["packed"]))
    # Inputs, weights and result are rounded to 8 bits each: 4 x 2^-8 of values up to 3.
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=0.05)


@every_kernel
def test_scores_far_beyond_float32s_exp_do_not_overflow(name):
    q, k, v = make_arrays(4)
    out = run_kernel(name, q * 1e3, k, v, *make_coords(), ScoreMod(MASKS["packed"]))
    chex.assert_tree_all_finite(out)


def test_arrays_that_do_not_fit_together_are_refused():
    q, k, v = make_arrays(4)
    coords = make_coords()
    with pytest.raises(AssertionError):
        attend("dense", q, k, v[:, 1:], *coords, ScoreMod(Causal()))
    with pytest.raises(AssertionError):
        attend("dense", q, k[:, :, :3], v[:, :, :3], *coords, ScoreMod(Causal()))


# --- patterns, documents and odd lengths, against `dense` ---

LENGTH = 45
WEIGHTS = np.random.default_rng(2).normal(size=(B, LENGTH, H, K))


def make_long_coords():
    """Make rows of three documents, one with padding at its end; prefixes of 4."""
    lengths = np.array([[20, 9, 16], [7, 30, 8]])
    position = np.array([[t for n in row for t in range(n)] for row in lengths])
    segment_ids = np.array([np.repeat([1, 2, 3], row) for row in lengths])
    segment_ids[1, -8:] = 0
    return Coords(position, segment_ids, np.full_like(segment_ids, 4))


def make_long_arrays(G):
    rng = np.random.default_rng(3)
    return [rng.normal(size=(B, LENGTH, heads, K)).astype(np.float32) for heads in (H, G, G)]


def make_value_and_gradients(kernel, score_mod, coords):
    """Return (q, k, v, strength) -> (out, gradients of the four), of a loss at real tokens.

    With sinks, these are twice the strength.
    """
    is_token = (coords.segment_ids > 0)[:, :, None, None]

    def loss(q, k, v, strength):
        bias = Partial(alibi_like_bias, strength) if score_mod.bias is not None else None
        sinks = 2 * strength if score_mod.sinks is not None else None
        score = score_mod.replace(bias=bias, sinks=sinks)
        out = jnp.where(is_token, kernel(q, k, v, coords, coords, score), 0)
        return jnp.sum(out * WEIGHTS[:, : out.shape[1]]), out

    def run_kernel(*given):
        (_, out), gradients = jax.value_and_grad(loss, range(4), has_aux=True)(*given)
        return out, gradients

    return jax.jit(run_kernel)


def assert_equals_dense(kernel, score_mod, G=2, coords=None):
    coords = make_long_coords() if coords is None else coords
    given = (*make_long_arrays(G), STRENGTH)
    exact = make_value_and_gradients(partial(attend, "dense"), score_mod, coords)(*given)
    # Sums of up to 45 x 8 float32 terms of order 1, in another order.
    chex.assert_trees_all_close(
        make_value_and_gradients(kernel, score_mod, coords)(*given), exact, atol=2e-5, rtol=2e-5
    )


def pattern_masks(documents="separate"):
    sizes = SparseConfig(window=7, chunk=6, stride=5, block=4)
    patterns = ("window", "chunked", "strided", "blocks")  # those that have a size
    cfg = tiny(context=64, layers=4, pattern=patterns, sparse=sizes, documents=documents)
    return {
        f"{pattern}, {direction}": make_layer_mask(cfg, pattern, direction)
        for pattern in PATTERNS
        for direction in ("causal", "both")
        if (pattern, direction) != ("prefix", "both")
    }


PATTERN_MASKS = pattern_masks()


CHUNKED_KERNELS = {
    "blockwise": partial(blockwise, blocks=(16, 8)),
    "strips": partial(strips, size=16),
}
every_chunked_kernel = pytest.mark.parametrize("name", CHUNKED_KERNELS)


@every_chunked_kernel
@pytest.mark.parametrize("mask", PATTERN_MASKS)
def test_chunked_kernels_equal_dense_in_values_and_gradients_for_every_pattern(name, mask):
    bias = Partial(alibi_like_bias, STRENGTH)
    score_mod = ScoreMod(PATTERN_MASKS[mask], bias, scale=0.5, softcap=3.0, is_self=True)
    assert_equals_dense(CHUNKED_KERNELS[name], score_mod)


@every_chunked_kernel
@every_group
def test_chunked_kernels_equal_dense_with_sinks(name, G):
    for mask in ("full, causal", "window, both"):
        score_mod = ScoreMod(PATTERN_MASKS[mask], sinks=jnp.array(SINKS), is_self=True)
        assert_equals_dense(CHUNKED_KERNELS[name], score_mod, G)


@every_group
def test_chunked_kernels_equal_dense_for_every_grouping_and_chunk_size(G):
    score_mod = ScoreMod(PATTERN_MASKS["full, causal"], is_self=True)
    for blocks in [(7, 45), (15, 9), (64, 10)]:
        assert_equals_dense(partial(blockwise, blocks=blocks), score_mod, G)
    for size in (7, 15, 64):
        assert_equals_dense(partial(strips, size=size), score_mod, G)


@every_chunked_kernel
def test_gradients_of_chunked_kernels_in_bfloat16_are_near_those_in_float32(name):
    coords, given = make_long_coords(), (*make_long_arrays(2), STRENGTH)
    score_mod = ScoreMod(
        PATTERN_MASKS["full, causal"], Partial(alibi_like_bias, STRENGTH), is_self=True
    )
    kernel = CHUNKED_KERNELS[name]
    low = [jnp.asarray(x, jnp.bfloat16) for x in given[:3]]
    out, gradients = make_value_and_gradients(kernel, score_mod, coords)(*low, STRENGTH)
    assert [x.dtype for x in (out, *gradients)] == [jnp.bfloat16] * 4 + [jnp.float32]
    exact = make_value_and_gradients(partial(attend, "dense"), score_mod, coords)(*given)
    for a, b in zip((out, *gradients), (exact[0], *exact[1]), strict=True):
        # A few roundings to 8 bits of the terms of sums with mixed signs.
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * jnp.linalg.norm(b)


# --- strips and blocks: what they skip ---


@pytest.mark.parametrize(
    ("mask", "is_self", "wanted"),
    [
        ("full, causal", True, [(0, 20), (0, 40), (0, 45)]),
        ("window, causal", True, [(0, 20), (14, 40), (34, 45)]),
        ("window, both", True, [(0, 26), (14, 45), (34, 45)]),
        ("full, both", True, [(0, 45)] * 3),
        ("strided, causal", True, [(0, 20), (0, 40), (0, 45)]),
        ("prefix, causal", True, [(0, 45)] * 3),
        ("full, causal", False, [(0, 45)] * 3),  # a cache, whose indices are not the queries'
    ],
)
def test_a_strip_computes_the_keys_that_its_mask_allows_and_no_others(mask, is_self, wanted):
    found = list(iterate_strips(ScoreMod(PATTERN_MASKS[mask], is_self=is_self), LENGTH, LENGTH, 20))
    assert [(q.start, q.stop) for q, _ in found] == [(0, 20), (20, 40), (40, 45)]
    assert [(k.start, k.stop) for _, k in found] == wanted


def test_every_strip_of_cross_attention_computes_all_keys_however_few():
    found = list(iterate_strips(ScoreMod(Everything()), 45, 3, 20))
    assert [(k.start, k.stop) for _, k in found] == [(0, 3)] * 3


def test_a_causal_mask_across_documents_is_not_evaluated_on_row_indices():
    found = iterate_strips(ScoreMod(Causal(), is_self=True), LENGTH, LENGTH, 20)
    assert [(k.start, k.stop) for _, k in found] == [(0, 45)] * 3


@pytest.mark.parametrize("G", [4, 2])
def test_strips_compute_half_of_a_causal_row_and_never_materialize_it(G):
    def products(kernel):
        gradient, make_shapes = make_gradient(kernel, 1024, 4, G)
        return gradient.lower(*make_shapes).cost_analysis()["flops"]

    def make_shapes(kernel):
        gradient, given = make_gradient(kernel, 1024, 4, G)
        return gradient.lower(*given).as_text()

    # 5 products backward and 2 forward; dense has 6, as it saves its weights.
    group = products(partial(strips, size=64)) / products(partial(strips, size=1024))
    assert 0.5 < group < 0.56  # (1 + 1 / 16) / 2
    assert "1024x1024x" in make_shapes(partial(attend, "dense"))
    assert "1024x1024x" not in make_shapes(partial(strips, size=64))


def make_gradient(kernel, T, H=2, G=2):
    """Return a jitted gradient and its arguments' shapes, for one row of T tokens."""
    coords = Coords(*(jax.ShapeDtypeStruct((1, T), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (H, G))

    def loss(q, k, v, coords):
        return jnp.sum(kernel(q, k, v, coords, coords, ScoreMod(MASKS["packed"], is_self=True)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), (q, k, k, coords)


def test_memory_of_blockwise_gradients_grows_with_the_row_and_of_dense_with_its_square():
    def temporary(kernel, T):
        gradient, make_shapes = make_gradient(kernel, T)
        return gradient.lower(*make_shapes).compile().memory_analysis().temp_size_in_bytes

    def growth(kernel):
        return temporary(kernel, 4096) / temporary(kernel, 1024)

    # 4 times as long. Blockwise has an array of pairs of blocks, a thousandth of the weights; the
    # number of dense's [T S] arrays alive at once differs between the lengths.
    assert growth(partial(blockwise, blocks=(64, 64))) < 4.5
    assert growth(partial(attend, "dense")) > 8


def count_visited_blocks(mask, coords, blocks):
    """Count the blocks of logits that the forward pass and the gradient compute."""
    visible = []

    def counted(strength, q_coords, k_coords):
        jax.debug.callback(lambda: visible.append(1))
        return alibi_like_bias(strength, q_coords, k_coords)

    def out(q, k, v, strength):
        score_mod = ScoreMod(mask, Partial(counted, strength), is_self=True)
        return jnp.sum(blockwise(q, k, v, coords, coords, score_mod, blocks))

    counts = []
    for f in (out, jax.grad(out)):
        visible.clear()
        jax.block_until_ready(jax.jit(f)(*make_long_arrays(2), STRENGTH))
        jax.effects_barrier()
        counts.append(len(visible))
    return counts


@pytest.mark.parametrize("mask", ["full, causal", "window, causal", "window, both", "blocks, both"])
def test_only_blocks_with_a_visible_pair_are_computed(mask):
    coords = make_long_coords()
    visible = np.asarray(PATTERN_MASKS[mask](coords, coords))
    visible = np.pad(visible, [(0, 0), (0, -LENGTH % 4), (0, -LENGTH % 6)]).any(0)
    count = visible.reshape(12, 4, 8, 6).any((1, 3)).sum()
    assert count < 12 * 8
    # The gradient runs the forward pass and then every block once more.
    assert count_visited_blocks(PATTERN_MASKS[mask], coords, (4, 6)) == [count, 2 * count]


def test_a_document_is_unaffected_by_nan_in_another():
    coords = Coords(np.arange(40)[None] % 20, 1 + np.arange(40)[None] // 20)
    q, k, v = (x[:1, :40] for x in make_long_arrays(2))
    score_mod = ScoreMod(PATTERN_MASKS["full, both"], is_self=True)

    def loss(q, k, v):
        return jnp.sum(blockwise(q, k, v, coords, coords, score_mod, blocks=(10, 5))[:, :20] ** 2)

    with_nan = [np.where(np.arange(40)[None, :, None, None] < 20, x, np.nan) for x in (q, k, v)]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    (a, plain), (b, gradient_with_nan) = gradient(q, k, v), gradient(*with_nan)
    assert a == b
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: x[:, :20], g) for g in (plain, gradient_with_nan))
    )


def test_a_query_without_visible_keys_gets_0_of_blockwise_and_no_gradient():
    q, k, v = make_arrays(2)
    q_coords, k_coords = make_coords()
    # Other queries of its block have visible keys, so that the block is computed.
    q_coords = Coords(q_coords.positions, np.where(np.arange(T) < 3, 0, q_coords.segment_ids))

    def out(q, k, v):
        return blockwise(q, k, v, q_coords, k_coords, ScoreMod(MASKS["packed"]), blocks=(4, 3))[
            :, :3
        ]

    value, pull = jax.vjp(jax.jit(out), q, k, v)
    chex.assert_trees_all_equal(
        (value, *pull(np.ones_like(value))), (0 * value, 0 * q, 0 * k, 0 * v)
    )


# --- kernels in a model, and on several devices ---


def test_a_model_has_the_same_gradients_with_blockwise_and_dense(monkeypatch):
    monkeypatch.setitem(KERNELS, "blockwise", partial(blockwise, blocks=(8, 8)))
    changes = dict(position="t5", position_buckets=8, position_reach=16, remat="full", softcap=4.0)
    tokens = random_tokens(tiny(), 0, 2, 30)
    params = random_params(tiny(**changes))

    def gradient(kernel):
        model = build(tiny(**changes, kernel=kernel))
        return jax.jit(
            jax.grad(
                lambda p: jnp.sum(
                    model.apply({"params": p}, tokens, single_document_coords(tokens))[0] ** 2
                )
            )
        )(params)

    # Sums over 60 tokens of products of order 10, through two layers.
    chex.assert_trees_all_close(gradient("blockwise"), gradient("dense"), atol=1e-3, rtol=1e-4)


SHARDED_KERNELS = {
    **CHUNKED_KERNELS,
    "splash": partial(splash.splash, interpret=True),
}


# Key heads can be sharded over two devices, or not.
@pytest.mark.parametrize(
    ("name", "G", "has_sinks"),
    [
        ("blockwise", 2, False),
        ("strips", 2, False),
        ("strips", 2, True),
        ("splash", 2, False),
        ("splash", 1, False),
    ],
)
def test_rows_and_heads_on_several_devices_give_the_same(name, G, has_sinks):
    coords, given = make_long_coords(), (*make_long_arrays(G), STRENGTH)
    sinks = jnp.array(SINKS) if has_sinks else None
    score_mod = ScoreMod(PATTERN_MASKS["full, causal"], sinks=sinks, is_self=True)
    wanted = make_value_and_gradients(partial(attend, "dense"), score_mod, coords)(*given)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    heads = "tensor" if G == 2 else None
    places = [PartitionSpec("data", None, h, None) for h in ("tensor", heads, heads)]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, p) for x, p in zip(given[:3], places, strict=True)]
        run_kernel = make_value_and_gradients(
            partial(attend_on_mesh, mesh, SHARDED_KERNELS[name]), score_mod, coords
        )
        # float32 sums in another order, as in `assert_equals_dense`.
        chex.assert_trees_all_close(run_kernel(*placed, STRENGTH), wanted, atol=2e-5, rtol=2e-5)
        program = run_kernel.lower(*placed, STRENGTH).compile().as_text()
    if G == 2:
        assert "all-gather" not in program  # no device needs another's shard


@pytest.mark.parametrize("name", ["dense", "strips", "blockwise"])
@pytest.mark.parametrize("mask", ["full, causal", "window, causal", "blocks, both"])
def test_tokens_on_several_devices_give_the_same(name, mask):
    # Four heads cannot be divided by eight devices along `context`, so tokens are.
    length = 40
    coords = jax.tree.map(lambda x: x[:, :length], make_long_coords())
    given = (*(x[:, :length] for x in make_long_arrays(2)), STRENGTH)
    score_mod = ScoreMod(PATTERN_MASKS[mask], Partial(alibi_like_bias, STRENGTH), is_self=True)
    wanted = make_value_and_gradients(partial(attend, "dense"), score_mod, coords)(*given)
    mesh = make_mesh(MeshConfig(data=1, context=8), jax.devices()[:8])
    kernel = CHUNKED_KERNELS.get(name, dense)
    with jax.set_mesh(mesh):
        run_kernel = make_value_and_gradients(partial(attend_on_mesh, mesh, kernel), score_mod,
                                              coords)  # fmt: skip
        # float32 sums in another order, as in `assert_equals_dense`.
        chex.assert_trees_all_close(run_kernel(*given), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(data=2, tensor=2), dict(context=4)], ids=str)
def test_splash_is_lowered_for_several_tpus(sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[:4])
    q = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16)
    coords = Coords(*[jax.ShapeDtypeStruct((4, 256), jnp.int32)] * 2)
    score_mod = ScoreMod(PATTERN_MASKS["full, causal"], is_self=True)

    def run_kernel(q, k, v, coords):
        return attend_on_mesh(mesh, splash.splash, q, k, v, coords, coords, score_mod)

    with jax.set_mesh(mesh):
        text = (
            jax.jit(run_kernel).trace(q, q, q, coords).lower(lowering_platforms=("tpu",)).as_text()
        )
    assert "tpu_custom_call" in text


# --- kernels for one kind of device, on other devices ---


SPLASH_MASKS = ["full, causal", "window, causal", "full, both", "window, both"]


@pytest.mark.parametrize(("mask", "G"), [*zip(SPLASH_MASKS, [2, 1, 4, 2], strict=True)])
def test_emulated_splash_equals_dense_in_values_and_gradients(mask, G):
    score_mod = ScoreMod(PATTERN_MASKS[mask], scale=0.5, softcap=3.0, is_self=True)
    assert_equals_dense(partial(splash.splash, interpret=True), score_mod, G)


@pytest.mark.parametrize("head", [64, 128])
def test_splash_and_its_gradient_are_lowered_for_a_tpu(head):
    coords = Coords(*(jax.ShapeDtypeStruct((2, 1000), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, head), jnp.bfloat16) for heads in (4, 2))
    score_mod = ScoreMod(PATTERN_MASKS["window, causal"], softcap=5.0, is_self=True)

    def loss(q, k, v, coords):
        return jnp.sum(splash.splash(q, k, v, coords, coords, score_mod))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, coords)
    program = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize(
    ("mask", "is_biased"), [("window, causal", False), *((mask, True) for mask in PATTERN_MASKS)]
)
def test_the_arguments_passed_to_cudnn_mean_the_same_as_dense(mask, is_biased, monkeypatch):
    bias = Partial(alibi_like_bias, STRENGTH) if is_biased else None
    score_mod = ScoreMod(PATTERN_MASKS[mask], bias, scale=0.5, is_self=True)
    assert_equals_dense(run_cudnn_by_xla(monkeypatch), score_mod)


def test_cudnn_masks_the_future_and_beyond_the_window_by_row_index():
    index_masks, rest = cudnn._split_mask(ScoreMod(PATTERN_MASKS["window, causal"], is_self=True))
    assert index_masks == dict(is_causal=True, local_window_size=(6, 0))
    assert rest == SameSegment()


JOINED_MASKS = pattern_masks("joined")


def make_joined_coords():
    """Make rows of one document, one of them with padding at its end."""
    position, segment_ids = np.tile(np.arange(LENGTH), (B, 1)), np.ones((B, LENGTH), np.int32)
    position[1, -8:] = segment_ids[1, -8:] = 0
    return Coords(position, segment_ids, np.full_like(segment_ids, 4))


def run_cudnn_by_xla(monkeypatch):
    plain = jax.nn.dot_product_attention

    def by_xla(*given, implementation, **rest):
        assert implementation == "cudnn"
        return plain(*given, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return cudnn.cudnn


@pytest.mark.parametrize("mask", ["full, causal", "window, causal", "full, both", "window, both"])
@pytest.mark.parametrize("name", [*CHUNKED_KERNELS, "splash", "cudnn"])
def test_joined_documents_are_treated_alike_by_every_kernel(name, mask, monkeypatch):
    kernels = dict(CHUNKED_KERNELS, splash=partial(splash.splash, interpret=True))
    kernel = kernels.get(name) or run_cudnn_by_xla(monkeypatch)
    assert_equals_dense(
        kernel, ScoreMod(JOINED_MASKS[mask], is_self=True), coords=make_joined_coords()
    )


@pytest.mark.parametrize("mask", ["full, causal", "window, causal"])
def test_with_joined_documents_cudnn_and_splash_get_no_mask_array(mask):
    coords = Coords(*(jax.ShapeDtypeStruct((2, 256), jnp.int32),) * 2)
    q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)

    def takes_segments(score_mod):  # [B T], broadcast to every lane
        run_kernel = jax.jit(lambda q, coords: splash.splash(q, q, q, coords, coords, score_mod))
        text = run_kernel.trace(q, coords).lower(lowering_platforms=("tpu",)).as_text()
        return "2x256x128xi32" in text

    separate, joined = (
        ScoreMod(masks[mask], is_self=True) for masks in (PATTERN_MASKS, JOINED_MASKS)
    )
    assert cudnn._split_mask(separate)[1] == SameSegment()
    assert cudnn._split_mask(joined)[1] is None
    assert takes_segments(separate)
    assert not takes_segments(joined)


def test_no_mask_is_by_row_index_in_a_cache_or_across_documents():
    masks = [PATTERN_MASKS["full, causal"], JOINED_MASKS["full, causal"]]
    for score_mod in (*map(ScoreMod, masks), ScoreMod(Causal(), is_self=True)):
        assert cudnn._split_mask(score_mod) == ({}, score_mod.mask)
        assert splash.explain_unsupported(*make_long_arrays(2)[:2], score_mod)


def test_cudnn_and_its_gradient_are_lowered_for_a_gpu(monkeypatch):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    coords = Coords(*(jax.ShapeDtypeStruct((2, 96), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((2, 96, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def lowered(mask, is_biased):
        def loss(q, k, v, strength, coords):
            bias = Partial(alibi_like_bias, strength) if is_biased else None
            return jnp.sum(cudnn.cudnn(q, k, v, coords, coords, ScoreMod(mask, bias, is_self=True)))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, k, STRENGTH, coords)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    program = lowered(PATTERN_MASKS["window, causal"], is_biased=True)
    assert program.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert program.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "96x96" in program
    program = lowered(JOINED_MASKS["full, causal"], is_biased=False)
    assert program.count("@__cudnn$fmhaSoftmax(") == 1
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "96x96" not in program


def make_shapes(T=64, S=64, K=64, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((2, n, 4, K), dtype) for n in (T, S)]


@pytest.mark.parametrize(
    ("given", "modifications", "capability", "why"),
    [
        (make_shapes(), {}, 8.0, None),
        (make_shapes(dtype=jnp.float32), {}, 9.0, "bfloat16, not in float32"),
        (make_shapes(), dict(softcap=1.0), 9.0, "soft cap"),
        (make_shapes(), dict(sinks=SINKS), 9.0, "sinks"),
        (make_shapes(T=63), {}, 9.0, "not 63 and 64"),
        (make_shapes(K=20), {}, 9.0, "head width 20"),
        (make_shapes(K=256), {}, 9.0, None),
        (make_shapes(K=256), {}, 8.0, "up to 128"),
        (make_shapes(), {}, 7.5, "8.0"),
    ],
)
def test_what_cudnn_does_not_support(given, modifications, capability, why):
    score_mod = ScoreMod(PATTERN_MASKS["full, causal"], is_self=True, **modifications)
    found = cudnn.explain_unsupported(*given, score_mod, capability)
    assert found == why or why in found


@pytest.mark.parametrize("mask", PATTERN_MASKS)
def test_splash_supports_full_and_window_patterns_only(mask):
    explain_unsupported = splash.explain_unsupported(
        *make_shapes(), ScoreMod(PATTERN_MASKS[mask], is_self=True)
    )
    assert (explain_unsupported is None) == (mask in SPLASH_MASKS)


def test_splash_does_not_support_sinks():
    score_mod = ScoreMod(PATTERN_MASKS["full, causal"], sinks=SINKS, is_self=True)
    assert "sinks" in splash.explain_unsupported(*make_shapes(), score_mod)


@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("splash", dict(position="alibi")),
        ("splash", dict(position="t5")),
        ("splash", dict(sinks=True)),
        ("cudnn", dict(softcap=5.0)),
        ("cudnn", dict(sinks=True)),
        *((name, dict(attention_dropout=0.1)) for name in KERNELS if name not in ("auto", "dense")),
    ],
)
def test_what_a_kernel_never_supports_is_refused_when_the_config_is_read(kernel, change):
    with pytest.raises(ConfigError, match=f"model.kernel='{kernel}' does not support"):
        tiny(kernel=kernel, **change)


@pytest.mark.parametrize("name", ACCELERATED)
def test_an_unavailable_kernel_is_replaced_with_one_warning(name, caplog):
    kernels.warn_once.cache_clear()
    given = (*make_arrays(2), *make_coords(), ScoreMod(MASKS["packed"]))
    with caplog.at_level(logging.WARNING):
        out = [jax.jit(attend, static_argnums=0)(name, *given) for _ in range(2)]
        attend(name, *given)
    (line,) = caplog.messages
    assert line.startswith(f"model.kernel={name}: there is no")
    assert line.endswith("using dense instead.")
    np.testing.assert_array_equal(out[0], run_kernel("dense", *given))


def run_auto_stubbed(monkeypatch, T, S, available=None):
    """Return the kernel that `auto` runs if the accelerated kernel `available` is available."""
    ran = []

    def stub(name):
        return lambda q, *_: ran.append(name) or q

    for name in ACCELERATED:
        explain = (lambda *_: None) if name == available else (lambda *_: "not here")
        monkeypatch.setitem(ACCELERATED, name, (stub(name), explain))
    for name in ("dense", "strips", "blockwise"):
        monkeypatch.setitem(KERNELS, name, stub(name))
    coords = [Coords(*(jax.ShapeDtypeStruct((2, n), jnp.int32),) * 2) for n in (T, S)]
    q, k = make_shapes(T, S)
    jax.eval_shape(partial(attend, "auto"), q, k, k, *coords, ScoreMod(Causal()))
    return ran


def test_auto_chooses_an_available_kernel_without_a_warning(monkeypatch, caplog):
    kernels.warn_once.cache_clear()
    assert run_auto_stubbed(monkeypatch, 2048, 2048) == ["blockwise"]
    assert run_auto_stubbed(monkeypatch, 128, 128) == ["strips"]
    assert run_auto_stubbed(monkeypatch, 1, 8192) == ["dense"]
    assert run_auto_stubbed(monkeypatch, 1, 8192, available="cudnn") == ["dense"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run_auto_stubbed(monkeypatch, 1024, 1024) == ["dense"]
    assert run_auto_stubbed(monkeypatch, 4096, 4096) == ["blockwise"]
    for name in ACCELERATED:
        assert run_auto_stubbed(monkeypatch, 1024, 1024, available=name) == [name]
    assert not caplog.messages
