"""Kernels against attention written as loops over rows, heads and tokens, in float64."""

import logging
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, random_tokens, tiny, whole
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from jaxgpt.config import MeshConfig
from jaxgpt.model import build, kernels
from jaxgpt.model.kernels import (
    ACCELERATED,
    KERNELS,
    Score,
    attend,
    cudnn,
    over_devices,
    splash,
)
from jaxgpt.model.kernels.blockwise import blockwise
from jaxgpt.model.kernels.strips import spans, strips
from jaxgpt.model.masks import PATTERNS, Causal, Coords, Mask, SameDocument, layer_mask
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
def run(name, *given):
    return RUNS[name](*given)


def arrays(G, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, K), (B, S, G, K), (B, S, G, K)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def coords():
    """Two documents, an empty slot at either end of the keys; every query sees something."""
    k = Coords(
        np.array([[0, 0, 1, 2, 3, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5, 6, 7]]),
        np.array([[0, 1, 1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]),
    )
    q = jax.tree.map(lambda x: x[:, 2:8], k)
    return q, k


def slope(strength, q_at, k_at):
    """An ALiBi-like bias [B H T S], with something that learns."""
    distance = q_at.position[:, :, None] - k_at.position[:, None, :]
    return -jnp.abs(distance)[:, None] * strength[None, :, None, None]


STRENGTH = np.array([0.1, 0.5, 1.0, 2.0], np.float32)


class Everyone(Mask):
    def __call__(self, q, k):
        return SameDocument()(q, k) | True


MASKS = {
    "everyone": Everyone(),
    "causal": Causal(),
    "packed": SameDocument() & Causal(),
    "either": SameDocument() | Causal(),
}


def by_loops(q, k, v, seen, bias, cap=math.inf):
    """softmax(soft cap of q kᵀ / √K, + bias) v over the keys that are seen [B T S], in float64."""

    def soft(x):
        return x if cap == math.inf else cap * math.tanh(x / cap)

    out = np.zeros(q.shape)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    share = H // k.shape[2]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(S) if seen[b, t, s]]
                score = [
                    soft(q[b, t, h] @ k[b, s, h // share] / math.sqrt(K)) + bias[b, h, t, s]
                    for s in keys
                ]
                weight = np.exp(np.array(score) - max(score))
                weight /= weight.sum()
                for s, w in zip(keys, weight, strict=True):
                    out[b, t, h] += w * v[b, s, h // share]
    return out


@every_kernel
@pytest.mark.parametrize(
    ("mask", "G", "extra"),
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
def test_a_kernel_equals_loops_in_float64(name, mask, G, extra):
    q, k, v = arrays(G)
    at = coords()
    seen = np.asarray(MASKS[mask](*at))
    if extra == "nothing":
        score, bias, cap = Score(MASKS[mask]), np.zeros((B, H, T, S)), math.inf
    else:
        score = Score(MASKS[mask], Partial(slope, STRENGTH), softcap=1.5)
        bias, cap = np.asarray(slope(STRENGTH, *at), np.float64), 1.5
    # float32 on values of order 1.
    wanted = by_loops(q, k, v, seen, bias, cap)
    np.testing.assert_allclose(run(name, q, k, v, *at, score), wanted, atol=2e-6)


@every_kernel
@every_group
def test_gradients_of_a_kernel_equal_finite_differences_in_float64(name, G):
    q, k, v = arrays(G)
    at = coords()
    mask = MASKS["packed"]
    seen = np.asarray(mask(*at))
    rng = np.random.default_rng(1)
    weigh = rng.normal(size=q.shape)

    def loss(q, k, v, strength):
        return jnp.sum(weigh * RUNS[name](q, k, v, *at, Score(mask, Partial(slope, strength))))

    def exact(q, k, v, strength):
        distance = np.abs(at[0].position[:, :, None] - at[1].position[:, None, :])
        bias = -distance[:, None] * strength[None, :, None, None]
        return np.sum(weigh * by_loops(q, k, v, seen, bias))

    given = [q, k, v, STRENGTH]
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)
    step = 1e-4  # the error of a central difference is of order step², 1e-8
    for place, gradient in enumerate(gradients):
        ahead, behind = ([x.astype(np.float64) for x in given] for _ in range(2))
        way = rng.normal(size=given[place].shape)
        ahead[place] += step * way
        behind[place] -= step * way
        slope_along = (exact(*ahead) - exact(*behind)) / (2 * step)
        # Sums of up to 400 float32 terms of order 1.
        np.testing.assert_allclose(np.sum(gradient * way), slope_along, rtol=1e-4, atol=1e-4)


@every_kernel
def test_a_query_that_sees_nothing_gives_no_nan_and_no_gradient_of_nan(name):
    q, k, v = arrays(2)
    q_at, k_at = coords()
    nowhere = Coords(q_at.position, np.zeros_like(q_at.document))

    def loss(q, k, v):
        return jnp.sum(RUNS[name](q, k, v, nowhere, k_at, Score(MASKS["packed"])) ** 2)

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))


@every_kernel
def test_what_is_not_seen_does_not_matter_however_large(name):
    q, k, v = arrays(2)
    at = coords()
    hidden = np.asarray(at[1].document == 0)[:, :, None, None]
    score = Score(MASKS["packed"])
    plain = run(name, q, k, v, *at, score)
    loud = run(name, q, np.where(hidden, 1e4, k), np.where(hidden, 1e4, v), *at, score)
    np.testing.assert_array_equal(plain, loud)


@every_kernel
def test_bfloat16_stays_bfloat16_and_near_float32(name):
    exact = arrays(2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    at = coords()
    out = run(name, *low, *at, Score(MASKS["packed"]))
    assert out.dtype == jnp.bfloat16
    wanted = run(name, *exact, *at, Score(MASKS["packed"]))
    # Inputs, weights and outcome are rounded to 8 bits each: 4 x 2^-8 of values up to 3.
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=0.05)


@every_kernel
def test_scores_far_beyond_float32s_exp_do_not_overflow(name):
    q, k, v = arrays(4)
    out = run(name, q * 1e3, k, v, *coords(), Score(MASKS["packed"]))
    chex.assert_tree_all_finite(out)


def test_arrays_that_do_not_fit_together_are_refused():
    q, k, v = arrays(4)
    at = coords()
    with pytest.raises(AssertionError):
        attend("dense", q, k, v[:, 1:], *at, Score(Causal()))
    with pytest.raises(AssertionError):
        attend("dense", q, k[:, :, :3], v[:, :, :3], *at, Score(Causal()))


# --- patterns, documents and odd lengths, against `dense` ---

LONG = 45
WEIGH = np.random.default_rng(2).normal(size=(B, LONG, H, K))


def long_coords():
    """Rows of LONG tokens: three documents, and one with nothing at its end; prefixes of 4."""
    lengths = np.array([[20, 9, 16], [7, 30, 8]])
    position = np.array([[t for n in row for t in range(n)] for row in lengths])
    document = np.array([np.repeat([1, 2, 3], row) for row in lengths])
    document[1, -8:] = 0
    return Coords(position, document, np.full_like(document, 4))


def long_arrays(G):
    rng = np.random.default_rng(3)
    return [rng.normal(size=(B, LONG, heads, K)).astype(np.float32) for heads in (H, G, G)]


def at_tokens(kernel, score, at):
    """(q, k, v, strength) -> (out, gradients of the four), of a loss of what is at tokens."""
    here = (at.document > 0)[:, :, None, None]

    def loss(q, k, v, strength):
        bias = Partial(slope, strength) if score.bias is not None else None
        out = jnp.where(here, kernel(q, k, v, at, at, score.replace(bias=bias)), 0)
        return jnp.sum(out * WEIGH), out

    def run(*given):
        (_, out), gradients = jax.value_and_grad(loss, range(4), has_aux=True)(*given)
        return out, gradients

    return jax.jit(run)


def assert_equals_dense(kernel, score, G=2, at=None):
    at = long_coords() if at is None else at
    given = (*long_arrays(G), STRENGTH)
    exact = at_tokens(partial(attend, "dense"), score, at)(*given)
    # Sums of up to 45 x 8 float32 terms of order 1, in another order.
    chex.assert_trees_all_close(at_tokens(kernel, score, at)(*given), exact, atol=2e-5, rtol=2e-5)


def pattern_masks(documents="apart"):
    cfg = tiny(context=64)
    sizes = dict(window=7, stride=5, block=4)
    cfg = tiny(context=64, sparse=type(cfg.sparse)(**sizes), documents=documents)
    return {
        f"{pattern}, {direction}": layer_mask(cfg, pattern, direction)
        for pattern in PATTERNS
        for direction in ("causal", "both")
        if (pattern, direction) != ("prefix", "both")
    }


PATTERN_MASKS = pattern_masks()


PIECES = {"blockwise": partial(blockwise, blocks=(16, 8)), "strips": partial(strips, size=16)}
in_pieces = pytest.mark.parametrize("name", PIECES)


@in_pieces
@pytest.mark.parametrize("mask", PATTERN_MASKS)
def test_pieces_equal_dense_in_values_and_gradients_for_every_pattern(name, mask):
    learned = Partial(slope, STRENGTH)
    score = Score(PATTERN_MASKS[mask], learned, scale=0.5, softcap=3.0, is_self=True)
    assert_equals_dense(PIECES[name], score)


@every_group
def test_pieces_equal_dense_however_heads_share_keys_and_pieces_divide_the_row(G):
    score = Score(PATTERN_MASKS["full, causal"], is_self=True)
    for blocks in [(7, 45), (15, 9), (64, 10)]:
        assert_equals_dense(partial(blockwise, blocks=blocks), score, G)
    for size in (7, 15, 64):
        assert_equals_dense(partial(strips, size=size), score, G)


@in_pieces
def test_gradients_of_pieces_in_bfloat16_are_near_those_in_float32(name):
    at, given = long_coords(), (*long_arrays(2), STRENGTH)
    score = Score(PATTERN_MASKS["full, causal"], Partial(slope, STRENGTH), is_self=True)
    kernel = PIECES[name]
    low = [jnp.asarray(x, jnp.bfloat16) for x in given[:3]]
    out, gradients = at_tokens(kernel, score, at)(*low, STRENGTH)
    assert [x.dtype for x in (out, *gradients)] == [jnp.bfloat16] * 4 + [jnp.float32]
    exact = at_tokens(partial(attend, "dense"), score, at)(*given)
    for a, b in zip((out, *gradients), (exact[0], *exact[1]), strict=True):
        # A few roundings to 8 bits each of what goes into sums of unlike signs.
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * jnp.linalg.norm(b)


# --- strips and blocks: what they do not do ---


@pytest.mark.parametrize(
    ("mask", "is_self", "wanted"),
    [
        ("full, causal", True, [(0, 20), (0, 40), (0, 45)]),
        ("window, causal", True, [(0, 20), (14, 40), (34, 45)]),
        ("window, both", True, [(0, 26), (14, 45), (34, 45)]),
        ("full, both", True, [(0, 45)] * 3),
        ("strided, causal", True, [(0, 20), (0, 40), (0, 45)]),
        ("prefix, causal", True, [(0, 45)] * 3),
        ("full, causal", False, [(0, 45)] * 3),  # a cache, whose places are not the queries'
    ],
)
def test_a_strip_meets_the_keys_that_its_mask_allows_and_no_others(mask, is_self, wanted):
    found = list(spans(Score(PATTERN_MASKS[mask], is_self=is_self), LONG, LONG, 20))
    assert [(q.start, q.stop) for q, _ in found] == [(0, 20), (20, 40), (40, 45)]
    assert [(k.start, k.stop) for _, k in found] == wanted


def test_a_causal_mask_that_lets_documents_meet_is_not_taken_for_an_order_of_places():
    found = spans(Score(Causal(), is_self=True), LONG, LONG, 20)
    assert [(k.start, k.stop) for _, k in found] == [(0, 45)] * 3


@pytest.mark.parametrize("G", [4, 2])
def test_strips_multiply_half_of_a_causal_row_and_never_hold_all_of_it(G):
    def products(kernel):
        gradient, shapes = gradient_of(kernel, 1024, 4, G)
        return gradient.lower(*shapes).cost_analysis()["flops"]

    def shapes(kernel):
        gradient, given = gradient_of(kernel, 1024, 4, G)
        return gradient.lower(*given).as_text()

    # 5 products backward and 2 forward; dense has 6, as it keeps its weights.
    share = products(partial(strips, size=64)) / products(partial(strips, size=1024))
    assert 0.5 < share < 0.56  # (1 + 1 / 16) / 2
    assert "1024x1024x" in shapes(partial(attend, "dense"))
    assert "1024x1024x" not in shapes(partial(strips, size=64))


def gradient_of(kernel, T, H=2, G=2):
    """A jitted gradient and its arguments' shapes, for one row of T tokens."""
    at = Coords(*(jax.ShapeDtypeStruct((1, T), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (H, G))

    def loss(q, k, v, at):
        return jnp.sum(kernel(q, k, v, at, at, Score(MASKS["packed"], is_self=True)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))), (q, k, k, at)


def test_memory_of_blockwise_gradients_grows_with_the_row_and_of_dense_with_its_square():
    def temporary(kernel, T):
        gradient, shapes = gradient_of(kernel, T)
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def growth(kernel):
        return temporary(kernel, 4096) / temporary(kernel, 1024)

    # 4 times as long. Blockwise has a list of pairs of blocks, a thousandth of the weights; of
    # dense's [T S] arrays not the same number live at once at either length.
    assert growth(partial(blockwise, blocks=(64, 64))) < 4.5
    assert growth(partial(attend, "dense")) > 8


def visited(mask, at, blocks):
    """How many blocks of scores the forward pass and the gradient compute."""
    seen = []

    def counted(strength, q_at, k_at):
        jax.debug.callback(lambda: seen.append(1))
        return slope(strength, q_at, k_at)

    def out(q, k, v, strength):
        score = Score(mask, Partial(counted, strength), is_self=True)
        return jnp.sum(blockwise(q, k, v, at, at, score, blocks))

    counts = []
    for f in (out, jax.grad(out)):
        seen.clear()
        jax.block_until_ready(jax.jit(f)(*long_arrays(2), STRENGTH))
        jax.effects_barrier()
        counts.append(len(seen))
    return counts


@pytest.mark.parametrize("mask", ["full, causal", "window, causal", "window, both", "blocks, both"])
def test_only_blocks_in_which_somebody_is_seen_are_visited(mask):
    at = long_coords()
    seen = np.asarray(PATTERN_MASKS[mask](at, at))
    seen = np.pad(seen, [(0, 0), (0, -LONG % 4), (0, -LONG % 6)]).any(0)
    count = seen.reshape(12, 4, 8, 6).any((1, 3)).sum()
    assert count < 12 * 8
    # The gradient runs the forward pass and then every block once more.
    assert visited(PATTERN_MASKS[mask], at, (4, 6)) == [count, 2 * count]


def test_a_document_is_untouched_by_another_one_full_of_nan():
    at = Coords(np.arange(40)[None] % 20, 1 + np.arange(40)[None] // 20)
    q, k, v = (x[:1, :40] for x in long_arrays(2))
    score = Score(PATTERN_MASKS["full, both"], is_self=True)

    def loss(q, k, v):
        return jnp.sum(blockwise(q, k, v, at, at, score, blocks=(10, 5))[:, :20] ** 2)

    ruin = [np.where(np.arange(40)[None, :, None, None] < 20, x, np.nan) for x in (q, k, v)]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    (a, plain), (b, ruined) = gradient(q, k, v), gradient(*ruin)
    assert a == b
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[:, :20], g) for g in (plain, ruined)))


def test_a_query_that_sees_nothing_gets_0_of_blockwise_and_gives_no_gradient():
    q, k, v = arrays(2)
    q_at, k_at = coords()
    # The others of its block see something, so that the block is visited.
    q_at = Coords(q_at.position, np.where(np.arange(T) < 3, 0, q_at.document))

    def out(q, k, v):
        return blockwise(q, k, v, q_at, k_at, Score(MASKS["packed"]), blocks=(4, 3))[:, :3]

    value, back = jax.vjp(jax.jit(out), q, k, v)
    chex.assert_trees_all_equal(
        (value, *back(np.ones_like(value))), (0 * value, 0 * q, 0 * k, 0 * v)
    )


# --- kernels in a model, and on several devices ---


def test_a_model_learns_the_same_with_blockwise_and_dense(monkeypatch):
    monkeypatch.setitem(KERNELS, "blockwise", partial(blockwise, blocks=(8, 8)))
    changes = dict(position="t5", position_buckets=8, position_reach=16, remat="full", softcap=4.0)
    tokens = random_tokens(tiny(), 0, 2, 30)
    params = random_params(tiny(**changes))

    def gradient(kernel):
        model = build(tiny(**changes, kernel=kernel))
        return jax.jit(
            jax.grad(lambda p: jnp.sum(model.apply({"params": p}, tokens, whole(tokens))[0] ** 2))
        )(params)

    # Sums over 60 tokens of products of order 10, through two layers.
    chex.assert_trees_all_close(gradient("blockwise"), gradient("dense"), atol=1e-3, rtol=1e-4)


DIVIDED = {
    **PIECES,
    "splash": partial(splash.splash, interpret=True),
}


# Keys' heads can be divided among two devices, or not.
@pytest.mark.parametrize(
    ("name", "G"), [("blockwise", 2), ("strips", 2), ("splash", 2), ("splash", 1)]
)
def test_rows_and_heads_on_several_devices_give_the_same(name, G):
    at, given = long_coords(), (*long_arrays(G), STRENGTH)
    score = Score(PATTERN_MASKS["full, causal"], is_self=True)
    wanted = at_tokens(partial(attend, "dense"), score, at)(*given)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    heads = "tensor" if G == 2 else None
    places = [PartitionSpec("data", None, h, None) for h in ("tensor", heads, heads)]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, p) for x, p in zip(given[:3], places, strict=True)]
        run = at_tokens(partial(over_devices, mesh, DIVIDED[name]), score, at)
        # float32 sums in another order, as in `assert_equals_dense`.
        chex.assert_trees_all_close(run(*placed, STRENGTH), wanted, atol=2e-5, rtol=2e-5)
        program = run.lower(*placed, STRENGTH).compile().as_text()
    if G == 2:
        assert "all-gather" not in program  # nobody holds what is another's


@pytest.mark.parametrize("sizes", [dict(fsdp=4), dict(data=2, tensor=2), dict(context=4)], ids=str)
def test_splash_is_lowered_for_several_tpus(sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[:4])
    q = jax.ShapeDtypeStruct((4, 256, 4, 128), jnp.bfloat16)
    at = Coords(*[jax.ShapeDtypeStruct((4, 256), jnp.int32)] * 2)
    score = Score(PATTERN_MASKS["full, causal"], is_self=True)

    def run(q, k, v, at):
        return over_devices(mesh, splash.splash, q, k, v, at, at, score)

    with jax.set_mesh(mesh):
        text = jax.jit(run).trace(q, q, q, at).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


# --- kernels of one kind of device, where it is not ---


KNOWN = ["full, causal", "window, causal", "full, both", "window, both"]


@pytest.mark.parametrize(("mask", "G"), [*zip(KNOWN, [2, 1, 4, 2], strict=True)])
def test_splash_step_by_step_equals_dense_in_values_and_gradients(mask, G):
    score = Score(PATTERN_MASKS[mask], scale=0.5, softcap=3.0, is_self=True)
    assert_equals_dense(partial(splash.splash, interpret=True), score, G)


@pytest.mark.parametrize("head", [64, 128])
def test_splash_and_its_gradient_are_lowered_for_a_tpu(head):
    at = Coords(*(jax.ShapeDtypeStruct((2, 1000), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, head), jnp.bfloat16) for heads in (4, 2))
    score = Score(PATTERN_MASKS["window, causal"], softcap=5.0, is_self=True)

    def loss(q, k, v, at):
        return jnp.sum(splash.splash(q, k, v, at, at, score))

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, at)
    program = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize(
    ("mask", "is_biased"), [("window, causal", False), *((mask, True) for mask in PATTERN_MASKS)]
)
def test_cudnn_is_told_what_is_the_same_as_dense(mask, is_biased, monkeypatch):
    bias = Partial(slope, STRENGTH) if is_biased else None
    score = Score(PATTERN_MASKS[mask], bias, scale=0.5, is_self=True)
    assert_equals_dense(cudnn_by_xla(monkeypatch), score)


def test_cudnn_skips_what_is_after_and_what_is_far_behind_by_place():
    by_place, rest = cudnn._by_place(Score(PATTERN_MASKS["window, causal"], is_self=True))
    assert by_place == dict(is_causal=True, local_window_size=(6, 0))
    assert rest == SameDocument()


JOINED_MASKS = pattern_masks("joined")


def joined_coords():
    """Rows of LONG tokens of one document, of which one has nothing at its end."""
    position, document = np.tile(np.arange(LONG), (B, 1)), np.ones((B, LONG), np.int32)
    position[1, -8:] = document[1, -8:] = 0
    return Coords(position, document, np.full_like(document, 4))


def cudnn_by_xla(monkeypatch):
    plain = jax.nn.dot_product_attention

    def by_xla(*given, implementation, **rest):
        assert implementation == "cudnn"
        return plain(*given, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return cudnn.cudnn


@pytest.mark.parametrize("mask", ["full, causal", "window, causal", "full, both", "window, both"])
@pytest.mark.parametrize("name", [*PIECES, "splash", "cudnn"])
def test_documents_that_are_joined_are_seen_alike_by_every_kernel(name, mask, monkeypatch):
    kernels = dict(PIECES, splash=partial(splash.splash, interpret=True))
    kernel = kernels.get(name) or cudnn_by_xla(monkeypatch)
    assert_equals_dense(kernel, Score(JOINED_MASKS[mask], is_self=True), at=joined_coords())


@pytest.mark.parametrize("mask", ["full, causal", "window, causal"])
def test_where_documents_are_joined_cudnn_and_splash_are_given_no_array_of_a_mask(mask):
    at = Coords(*(jax.ShapeDtypeStruct((2, 256), jnp.int32),) * 2)
    q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)

    def takes_segments(score):  # [B T], next to each other for every lane
        run = jax.jit(lambda q, at: splash.splash(q, q, q, at, at, score))
        text = run.trace(q, at).lower(lowering_platforms=("tpu",)).as_text()
        return "2x256x128xi32" in text

    apart, joined = (Score(masks[mask], is_self=True) for masks in (PATTERN_MASKS, JOINED_MASKS))
    assert cudnn._by_place(apart)[1] == SameDocument()
    assert cudnn._by_place(joined)[1] is None
    assert takes_segments(apart)
    assert not takes_segments(joined)


def test_nothing_is_by_place_in_a_cache_or_across_documents():
    masks = [PATTERN_MASKS["full, causal"], JOINED_MASKS["full, causal"]]
    for score in (*map(Score, masks), Score(Causal(), is_self=True)):
        assert cudnn._by_place(score) == ({}, score.mask)
        assert splash.misfit(*long_arrays(2)[:2], score)


def test_cudnn_and_its_gradient_are_lowered_for_a_gpu(monkeypatch):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    at = Coords(*(jax.ShapeDtypeStruct((2, 96), jnp.int32),) * 2)
    q, k = (jax.ShapeDtypeStruct((2, 96, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def lowered(mask, is_biased):
        def loss(q, k, v, strength, at):
            bias = Partial(slope, strength) if is_biased else None
            return jnp.sum(cudnn.cudnn(q, k, v, at, at, Score(mask, bias, is_self=True)))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, k, k, STRENGTH, at)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    program = lowered(PATTERN_MASKS["window, causal"], is_biased=True)
    assert program.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
    assert program.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "96x96" in program
    program = lowered(JOINED_MASKS["full, causal"], is_biased=False)
    assert program.count("@__cudnn$fmhaSoftmax(") == 1
    assert program.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "96x96" not in program


def shapes(T=64, S=64, K=64, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((2, n, 4, K), dtype) for n in (T, S)]


@pytest.mark.parametrize(
    ("given", "score", "capability", "why"),
    [
        (shapes(), {}, 8.0, None),
        (shapes(dtype=jnp.float32), {}, 9.0, "bfloat16, not in float32"),
        (shapes(), dict(softcap=1.0), 9.0, "soft cap"),
        (shapes(T=63), {}, 9.0, "not 63 and 64"),
        (shapes(K=20), {}, 9.0, "head width 20"),
        (shapes(K=256), {}, 9.0, None),
        (shapes(K=256), {}, 8.0, "up to 128"),
        (shapes(), {}, 7.5, "8.0"),
    ],
)
def test_what_cudnn_can_not_do(given, score, capability, why):
    score = Score(PATTERN_MASKS["full, causal"], is_self=True, **score)
    found = cudnn.misfit(*given, score, capability)
    assert found == why or why in found


@pytest.mark.parametrize("mask", PATTERN_MASKS)
def test_splash_does_the_patterns_it_knows_and_no_others(mask):
    misfit = splash.misfit(*shapes(), Score(PATTERN_MASKS[mask], is_self=True))
    assert (misfit is None) == (mask in KNOWN)


@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("splash", dict(position="alibi")),
        ("splash", dict(position="t5")),
        ("cudnn", dict(softcap=5.0)),
    ],
)
def test_what_a_kernel_can_never_do_is_refused_when_the_config_is_read(kernel, change):
    with pytest.raises(ConfigError, match=f"model.kernel='{kernel}' can not do"):
        tiny(kernel=kernel, **change)


@pytest.mark.parametrize("name", ACCELERATED)
def test_a_kernel_that_is_not_here_is_replaced_and_that_is_said_once(name, caplog):
    kernels.say.cache_clear()
    given = (*arrays(2), *coords(), Score(MASKS["packed"]))
    with caplog.at_level(logging.WARNING):
        out = [jax.jit(attend, static_argnums=0)(name, *given) for _ in range(2)]
        attend(name, *given)
    (line,) = caplog.messages
    assert line.startswith(f"model.kernel={name}: there is no")
    assert line.endswith("using dense instead.")
    np.testing.assert_array_equal(out[0], run("dense", *given))


def chosen(monkeypatch, T, S, here=None):
    """The kernel that `auto` runs where the accelerated kernel `here` can do it."""
    ran = []

    def stub(name):
        return lambda q, *_: ran.append(name) or q

    for name in ACCELERATED:
        can = (lambda *_: None) if name == here else (lambda *_: "not here")
        monkeypatch.setitem(ACCELERATED, name, (stub(name), can))
    for name in ("dense", "strips", "blockwise"):
        monkeypatch.setitem(KERNELS, name, stub(name))
    at = [Coords(*(jax.ShapeDtypeStruct((2, n), jnp.int32),) * 2) for n in (T, S)]
    q, k = shapes(T, S)
    jax.eval_shape(partial(attend, "auto"), q, k, k, *at, Score(Causal()))
    return ran


def test_auto_takes_what_is_there_and_says_nothing(monkeypatch, caplog):
    kernels.say.cache_clear()
    assert chosen(monkeypatch, 2048, 2048) == ["blockwise"]
    assert chosen(monkeypatch, 128, 128) == ["strips"]
    assert chosen(monkeypatch, 1, 8192) == ["dense"]
    assert chosen(monkeypatch, 1, 8192, here="cudnn") == ["dense"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(monkeypatch, 1024, 1024) == ["dense"]
    assert chosen(monkeypatch, 4096, 4096) == ["blockwise"]
    for name in ACCELERATED:
        assert chosen(monkeypatch, 1024, 1024, here=name) == [name]
    assert not caplog.messages
