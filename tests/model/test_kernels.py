"""Kernels against attention written as loops over rows, heads and tokens, in float64."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxgpt.model.kernels import KERNELS, Score, attend
from jaxgpt.model.masks import Coords, all_of, any_of, causal, same_document

B, T, S, H, K = 2, 6, 9, 4, 8
NOT_HERE = {"cudnn", "splash", "flash"}  # these need their accelerator
every_kernel = pytest.mark.parametrize("name", [name for name in KERNELS if name not in NOT_HERE])
every_group = pytest.mark.parametrize("G", [4, 2, 1])  # MHA, GQA, MQA


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


def everyone(q, k):
    return same_document(q, k) | True


MASKS = {
    "everyone": everyone,
    "causal": causal,
    "packed": all_of(same_document, causal),
    "either": any_of(same_document, causal),
}


def by_loops(q, k, v, seen, bias):
    """softmax(q kᵀ / √K + bias) v over the keys that are seen [B T S], in float64."""
    out = np.zeros(q.shape)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    share = H // k.shape[2]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(S) if seen[b, t, s]]
                score = [
                    sum(q[b, t, h, i] * k[b, s, h // share, i] for i in range(K)) / math.sqrt(K)
                    + bias[b, h, t, s]
                    for s in keys
                ]
                weight = np.exp(np.array(score) - max(score))
                weight /= weight.sum()
                for s, w in zip(keys, weight, strict=True):
                    out[b, t, h] += w * v[b, s, h // share]
    return out


@every_kernel
@every_group
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_biased", [False, True])
def test_a_kernel_equals_loops_in_float64(name, G, mask, is_biased):
    q, k, v = arrays(G)
    at = coords()
    seen = np.asarray(MASKS[mask](*at))
    bias = np.asarray(slope(STRENGTH, *at), np.float64) if is_biased else np.zeros((B, H, T, S))
    score = Score(MASKS[mask], Partial(slope, STRENGTH) if is_biased else None)
    out = jax.jit(attend, static_argnums=0)(name, q, k, v, *at, score)
    # float32 on values of order 1.
    np.testing.assert_allclose(out, by_loops(q, k, v, seen, bias), atol=2e-6)


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
        return jnp.sum(weigh * attend(name, q, k, v, *at, Score(mask, Partial(slope, strength))))

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
        return jnp.sum(attend(name, q, k, v, nowhere, k_at, Score(MASKS["packed"])) ** 2)

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))


@every_kernel
def test_what_is_not_seen_does_not_matter_however_large(name):
    q, k, v = arrays(2)
    at = coords()
    hidden = np.asarray(at[1].document == 0)[:, :, None, None]
    run = jax.jit(attend, static_argnums=0)
    score = Score(MASKS["packed"])
    plain = run(name, q, k, v, *at, score)
    loud = run(name, q, np.where(hidden, 1e4, k), np.where(hidden, 1e4, v), *at, score)
    np.testing.assert_array_equal(plain, loud)


@every_kernel
def test_bfloat16_stays_bfloat16_and_near_float32(name):
    exact = arrays(2)
    low = [jnp.asarray(x, jnp.bfloat16) for x in exact]
    at = coords()
    run = jax.jit(attend, static_argnums=0)
    out = run(name, *low, *at, Score(MASKS["packed"]))
    assert out.dtype == jnp.bfloat16
    wanted = run(name, *exact, *at, Score(MASKS["packed"]))
    # Inputs, weights and outcome are rounded to 8 bits each: 4 x 2^-8 of values up to 3.
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, atol=0.05)


@every_kernel
def test_scores_far_beyond_float32s_exp_do_not_overflow(name):
    q, k, v = arrays(4)
    out = jax.jit(attend, static_argnums=0)(name, q * 1e3, k, v, *coords(), Score(MASKS["packed"]))
    chex.assert_tree_all_finite(out)


def test_arrays_that_do_not_fit_together_are_refused():
    q, k, v = arrays(4)
    at = coords()
    with pytest.raises(AssertionError):
        attend("dense", q, k, v[:, 1:], *at, Score(causal))
    with pytest.raises(AssertionError):
        attend("dense", q, k[:, :, :3], v[:, :, :3], *at, Score(causal))
