"""S4 against dense matrices in float64, and its convolution against its recurrence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, single_document_coords, tiny

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.mixers.recurrent import flag_tokens
from jaxgpt.model.mixers.s4 import (
    System,
    compute_kernel,
    convolve,
    has_packed_documents,
    make_hippo,
    run_recurrence,
)

D, Z, T = 16, 4, 40
CFG = tiny(mixers=("s4",), position="none", mixer=MixerConfig(state=Z, chunk=8))


def perturb_initial_params():
    """Initialize a layer, so that the system is HiPPO's, and perturb every number a little."""
    begin = jax.jit(lambda key: init_params(CFG, key)[0])(jax.random.key(0))
    params = jax.tree.map(lambda p: p[0], begin["stack"]["layers"]["block_0"]["mixer"])
    rng = np.random.default_rng(1)
    perturb = lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(perturb, params)


@pytest.fixture(scope="module")
def params():
    return perturb_initial_params()


@jax.jit
def apply_mixer(params, x, coords, state=None):
    return MIXERS["s4"](CFG).apply({"params": params}, x, LayerContext(coords, coords), state)


def make_system(p) -> System:
    """Build the system as `S4.make_system` does."""
    rates = -jnp.exp(p["log_fall"]) + 1j * p["turn"]
    P, B, C = (p[f"{name}_re"] + 1j * p[f"{name}_im"] for name in "PBC")
    return System(rates, P, B, C, jnp.exp(p["log_step"])[:, None])


def make_dense_matrices(s: System):
    """(Ā [D 2Z 2Z], B̄ [D 2Z], C [D 2Z]) without any rearrangement."""
    rates, P, B, C = (np.concatenate([x, np.conj(x)], -1).astype(complex) for x in s[:4])
    step = np.asarray(s.step, np.float64)[..., None]
    A = rates[:, :, None] * np.eye(rates.shape[1]) - P[:, :, None] * P[:, None].conj()
    left = np.eye(rates.shape[1]) - step / 2 * A
    return (
        np.linalg.solve(left, np.eye(rates.shape[1]) + step / 2 * A),
        np.linalg.solve(left, (step[..., 0] * B)[..., None])[..., 0],
        C,
    )


def run_dense(s: System, u):
    """Compute 2 Re(C x) of one document u [T D], float64 [T D]."""
    A, B, C = make_dense_matrices(s)
    x, y = np.zeros_like(B), []
    for u_t in u:
        x = np.einsum("dij,dj->di", A, x) + B * u_t[:, None]
        y.append(np.sum(C * x, axis=-1))
    y = np.array(y)
    np.testing.assert_allclose(y.imag, 0, atol=1e-9)
    return y.real


def draw_normal(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


# --- initialization ---


def test_the_initial_system_is_hippo_legs_in_another_basis():
    N = 12
    n = np.arange(N)
    A = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    P, B = np.sqrt(n + 0.5), np.sqrt(2 * n + 1.0)
    rates, P_, B_ = (np.concatenate([x, x.conj()]) for x in make_hippo(N // 2))
    A_ = np.diag(rates) - np.outer(P_, P_.conj())
    np.testing.assert_allclose(rates.real, -0.5)
    np.testing.assert_allclose(P_.imag, 0, atol=1e-12)  # fixes the basis on every processor
    assert (P_.real > 0).all()
    # The response from B to Pᵀ does not depend on the basis.
    for left, left_ in ((P, P_), (B, B_)):
        x, x_ = B / N, B_ / N
        for _ in range(6):
            np.testing.assert_allclose(left_.conj() @ x_, left @ x, rtol=1e-9)
            x, x_ = A @ x / N, A_ @ x_ / N


def init_mixer(**changes):
    """Initialize two layers: their parameters, leaves [2 ...]."""
    cfg = dataclasses.replace(CFG, **changes)
    begin = jax.jit(lambda key: init_params(cfg, key)[0])(jax.random.key(0))
    return begin["stack"]["layers"]["block_0"]["mixer"]


def test_initial_steps_are_log_uniform_and_outputs_complex_normal():
    p = init_mixer(width=512, mixer=MixerConfig(state=8))
    assert np.exp(p["log_step"]).min() >= 0.99e-3
    assert np.exp(p["log_step"]).max() <= 0.101
    # Of 1024 draws, uniform over log 100: five deviations of their mean and standard deviation.
    np.testing.assert_allclose(np.mean(p["log_step"]), np.log(1e-2), atol=0.21)
    np.testing.assert_allclose(np.std(p["log_step"]), np.log(100) / 12**0.5, rtol=0.07)
    # E|C|² = 1, half of it in each part; of 8192 draws five deviations are 4%.
    np.testing.assert_allclose(np.std(p["C_re"]), 0.5**0.5, rtol=0.04)
    np.testing.assert_allclose(np.std(p["C_im"]), 0.5**0.5, rtol=0.04)
    np.testing.assert_allclose(np.mean(p["C_re"] * p["C_im"]), 0, atol=0.03)
    assert len(np.unique(p["C_re"])) > 8000  # of each layer, channel and state


def test_initial_systems_are_equal_in_all_channels():
    p = init_mixer()
    rates, P, B = make_hippo(Z)
    np.testing.assert_allclose(-np.exp(p["log_fall"]), np.broadcast_to(rates.real, (2, D, Z)),
                               rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(p["turn"][1, 3], rates.imag, rtol=1e-6)
    np.testing.assert_allclose(p["P_re"][0, 0] + 1j * p["P_im"][0, 0], P, rtol=1e-5)
    np.testing.assert_allclose(p["B_re"][0, 0] + 1j * p["B_im"][0, 0], B, rtol=1e-5)
    for name in ("turn", "P_re", "P_im", "B_re", "B_im"):
        np.testing.assert_array_equal(p[name], np.broadcast_to(p[name][1, 3], p[name].shape))
    np.testing.assert_array_equal(p["skip"], 1)


# --- the system ---


@pytest.mark.parametrize("length", [1, 7, 600])
def test_the_kernel_equals_that_of_dense_matrices_at_all_lengths(params, length):
    s, M = make_system(params), 4 * length
    impulse = np.zeros((M + 1, D))
    impulse[0] = 1
    expected = run_dense(s, impulse)
    actual = jax.jit(compute_kernel, static_argnums=(1, 2))(s, length, 8)
    kernel_max = np.abs(expected[:length]).max()
    # Aliasing from beyond M is 1.5e-6 of the kernel, and rounding is magnified 29 times.
    np.testing.assert_allclose(actual, expected[:length], atol=1e-5 * kernel_max)
    if length < 10:  # the kernel is so long that full aliasing would fail the test
        # A hundred times the tolerance; over twelve seeds it is 0.11 to 1.3.
        assert np.abs(expected[M]).max() > 1e-3 * kernel_max


def test_the_recurrence_equals_that_of_dense_matrices(params):
    s, u = make_system(params), draw_normal(2, T, D)
    _, actual = jax.jit(run_recurrence, static_argnums=4)(
        s,
        MIXERS["s4"].init_state(CFG, 2, 0),
        u,
        flag_tokens(single_document_coords(u[..., 0].astype(int))),
        8,
    )
    for row in range(2):
        expected = run_dense(s, np.asarray(u[row], np.float64))
        assert expected.std() > 0.1
        np.testing.assert_allclose(actual[row], expected, atol=1e-5, rtol=1e-5)


def test_the_convolution_is_a_sum_over_past_tokens():
    u, k = draw_normal(2, 9, 3), draw_normal(9, 3)[::-1]
    expected = [sum(k[i] * u[:, t - i] for i in range(t + 1)) for t in range(9)]
    np.testing.assert_allclose(convolve(u, k), np.stack(expected, 1), atol=1e-5)


def test_no_state_grows_whatever_the_parameters_are():
    rng = np.random.default_rng(3)
    params = random_params(CFG)["stack"]["layers"]["block_0"]["mixer"]
    params = jax.tree.map(lambda p: p[0], params)
    for std in (0.3, 3.0):
        drawn = {k: std * rng.normal(size=p.shape) for k, p in params.items() if k != "o"}
        assert np.abs(np.linalg.eigvals(make_dense_matrices(make_system(drawn))[0])).max() < 1


# --- the mixer ---


def test_packed_documents_equal_the_float64_loops_for_each(params):
    x = draw_normal(1, 14, D)
    coords = Coords(
        jnp.array([[0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0]]),
        jnp.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0]]),
    )
    actual, _ = apply_mixer(params, x, coords)
    for begin, end in ((1, 7), (7, 12), (12, 13)):
        u = np.asarray(x[0, begin:end], np.float64)
        y = run_dense(make_system(params), u) + u * np.asarray(params["skip"])
        expected = jax.nn.gelu(y, approximate=False) @ params["o"]["w"]
        np.testing.assert_allclose(actual[0, begin:end], expected, atol=1e-5)


def make_coords():
    """Return coordinates of two rows: one document each; and with two documents in the second row.

    With the first the mixer convolves, with the second it runs the recurrence.
    """
    one = single_document_coords(jnp.zeros((2, T), jnp.int32))
    position = one.positions.at[1, 20:].add(-20)
    return one, Coords(position, one.segment_ids.at[1, 20:].set(2))


def test_convolution_and_recurrence_agree_and_so_do_their_gradients(params):
    x, (one, two) = draw_normal(2, T, D), make_coords()
    assert not has_packed_documents(flag_tokens(one))
    assert has_packed_documents(flag_tokens(two))

    @jax.jit
    def run(params, x, coords):
        def loss(params, x):
            y, _ = apply_mixer(params, x, coords)
            return jnp.sum(jnp.sin(3 * y[0])), y[0]  # the row that is equal in both

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, a), a_gradients = run(params, x, one)
    (_, b), b_gradients = run(params, x, two)
    assert np.abs(a - b).max() > 0  # two algorithms, which differ by rounding
    np.testing.assert_allclose(a, b, atol=1e-5)

    def assert_close(path, a, b):
        # float32 sums over 40 tokens, each with the rounding above.
        np.testing.assert_allclose(
            a, b, atol=2e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
        )
        assert np.abs(b).max() > 1e-4, path

    jax.tree.map_with_path(assert_close, a_gradients, b_gradients)


@pytest.mark.parametrize(
    ("position", "document", "expected"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1], False),
        ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0], False),  # padding at the end
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False),  # padding at the beginning
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1], False),  # the middle of a document
        ([0, 1, 0, 1, 2], [1, 1, 2, 2, 2], True),
        ([0, 0, 0, 0, 1], [0, 1, 0, 2, 2], True),
        ([8, 9, 0, 1, 2], [1, 1, 2, 2, 2], True),
    ],
)
def test_rows_with_packed_documents_are_detected(position, document, expected):
    one_row = Coords(jnp.array([position]), jnp.array([document]))
    assert has_packed_documents(flag_tokens(one_row)) == expected
    two_rows = single_document_coords(jnp.zeros((2, 5), jnp.int32))
    two_rows = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), two_rows, one_row)
    assert has_packed_documents(flag_tokens(two_rows)) == expected


def test_later_tokens_change_earlier_outputs_by_rounding_only(params):
    one, _ = make_coords()
    x = draw_normal(2, T, D)
    changed = x.at[:, 25:].mul(-3)
    (a, _), (b, _) = (apply_mixer(params, y, one) for y in (x, changed))
    # A Fourier transform rounds all tokens together.
    np.testing.assert_allclose(a[:, :25], b[:, :25], atol=5e-6)
    assert np.abs(a[:, 25:] - b[:, 25:]).max() > 0.1
