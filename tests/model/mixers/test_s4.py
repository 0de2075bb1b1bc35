"""S4 against dense matrices in float64, and its convolution against its recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny, whole

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.model.mixers.recurrent import moments
from jaxgpt.model.mixers.s4 import System, convolve, hippo, kernel, recur, several

D, Z, T = 16, 4, 40
CFG = tiny(mixers=("s4",), position="none", mixer=MixerConfig(state=Z, chunk=8))


def one_layer():
    """At its beginning, so that the system is HiPPO's, with every number moved a little."""
    begin = jax.jit(lambda key: init_params(CFG, key)[0])(jax.random.key(0))
    params = jax.tree.map(lambda p: p[0], begin["stack"]["layers"]["block_0"]["mixer"])
    rng = np.random.default_rng(1)
    move = lambda p: jnp.asarray(p + 0.1 * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(move, params)


@pytest.fixture(scope="module")
def params():
    return one_layer()


@jax.jit
def mixer(params, x, at, state=None):
    return MIXERS["s4"](CFG).apply({"params": params}, x, Sight(at, at), state)


def system(p) -> System:
    """As `S4.system`."""
    rates = -jnp.exp(p["log_fall"]) + 1j * p["turn"]
    P, B, C = (p[f"{name}_re"] + 1j * p[f"{name}_im"] for name in "PBC")
    return System(rates, P, B, C, jnp.exp(p["log_step"])[:, None])


def dense(s: System):
    """(Ā [D 2Z 2Z], B̄ [D 2Z], C [D 2Z]) with nothing left out and nothing rearranged."""
    rates, P, B, C = (np.concatenate([x, np.conj(x)], -1).astype(complex) for x in s[:4])
    step = np.asarray(s.step, np.float64)[..., None]
    A = rates[:, :, None] * np.eye(rates.shape[1]) - P[:, :, None] * P[:, None].conj()
    left = np.eye(rates.shape[1]) - step / 2 * A
    return (
        np.linalg.solve(left, np.eye(rates.shape[1]) + step / 2 * A),
        np.linalg.solve(left, (step[..., 0] * B)[..., None])[..., 0],
        C,
    )


def slow(s: System, u):
    """2 Re(C x) of one document u [T D], float64 [T D]."""
    A, B, C = dense(s)
    x, y = np.zeros_like(B), []
    for u_t in u:
        x = np.einsum("dij,dj->di", A, x) + B * u_t[:, None]
        y.append(np.sum(C * x, axis=-1))
    y = np.array(y)
    np.testing.assert_allclose(y.imag, 0, atol=1e-9)
    return y.real


def draw(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


# --- the beginning ---


def test_the_beginning_is_hippo_legs_in_another_basis():
    N = 12
    n = np.arange(N)
    A = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1.0)
    P, B = np.sqrt(n + 0.5), np.sqrt(2 * n + 1.0)
    rates, P_, B_ = (np.concatenate([x, x.conj()]) for x in hippo(N // 2))
    A_ = np.diag(rates) - np.outer(P_, P_.conj())
    np.testing.assert_allclose(rates.real, -0.5)
    # What goes in by B and comes out by Pᵀ knows nothing of the basis.
    for left, left_ in ((P, P_), (B, B_)):
        x, x_ = B / N, B_ / N
        for _ in range(6):
            np.testing.assert_allclose(left_.conj() @ x_, left @ x, rtol=1e-9)
            x, x_ = A @ x / N, A_ @ x_ / N


def test_steps_begin_log_uniform_and_systems_alike_in_all_channels():
    begin = jax.jit(lambda key: init_params(CFG, key)[0])(jax.random.key(0))
    p = begin["stack"]["layers"]["block_0"]["mixer"]
    assert np.exp(p["log_step"]).min() >= 0.99e-3
    assert np.exp(p["log_step"]).max() <= 0.101
    rates, P, B = hippo(Z)
    np.testing.assert_allclose(-np.exp(p["log_fall"]), np.broadcast_to(rates.real, (2, D, Z)),
                               rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(p["turn"][1, 3], rates.imag, rtol=1e-6)
    np.testing.assert_allclose(p["P_re"][0, 0] + 1j * p["P_im"][0, 0], P, rtol=1e-5)
    np.testing.assert_allclose(p["B_re"][0, 0] + 1j * p["B_im"][0, 0], B, rtol=1e-5)
    assert np.std(p["C_re"]) > 0.5


# --- the system ---


@pytest.mark.parametrize("length", [1, 7, 600])
def test_the_kernel_is_that_of_dense_matrices_near_and_far(params, length):
    s, beyond = system(params), 4 * length
    impulse = np.zeros((beyond + 1, D))
    impulse[0] = 1
    wanted = slow(s, impulse)
    found = jax.jit(kernel, static_argnums=(1, 2))(s, length, 8)
    most = np.abs(wanted[:length]).max()
    # What comes back from beyond M is 1.5e-6 of the kernel, and rounding is magnified 29 times.
    np.testing.assert_allclose(found, wanted[:length], atol=1e-5 * most)
    if length < 10:  # the kernel goes on so far that it would be seen if all came back
        assert np.abs(wanted[beyond]).max() > 0.1 * most


def test_the_recurrence_is_that_of_dense_matrices(params):
    s, u = system(params), draw(2, T, D)
    _, found = jax.jit(recur, static_argnums=4)(
        s, MIXERS["s4"].state(CFG, 2, 0), u, moments(whole(u[..., 0].astype(int))), 8
    )
    for row in range(2):
        wanted = slow(s, np.asarray(u[row], np.float64))
        assert wanted.std() > 0.1
        np.testing.assert_allclose(found[row], wanted, atol=1e-5, rtol=1e-5)


def test_a_convolution_is_a_sum_over_the_past():
    u, k = draw(2, 9, 3), draw(9, 3)[::-1]
    wanted = [sum(k[i] * u[:, t - i] for i in range(t + 1)) for t in range(9)]
    np.testing.assert_allclose(convolve(u, k), np.stack(wanted, 1), atol=1e-5)


def test_no_state_grows_wherever_the_parameters_go():
    rng = np.random.default_rng(3)
    params = random_params(CFG)["stack"]["layers"]["block_0"]["mixer"]
    params = jax.tree.map(lambda p: p[0], params)
    for std in (0.3, 3.0):
        wild = {k: std * rng.normal(size=p.shape) for k, p in params.items() if k != "o"}
        assert np.abs(np.linalg.eigvals(dense(system(wild))[0])).max() < 1


# --- the mixer ---


def test_documents_in_a_row_equal_the_paper_written_out_for_each(params):
    x = draw(1, 14, D)
    at = Coords(
        jnp.array([[0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0]]),
        jnp.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0]]),
    )
    found, _ = mixer(params, x, at)
    for begin, end in ((1, 7), (7, 12), (12, 13)):
        u = np.asarray(x[0, begin:end], np.float64)
        y = slow(system(params), u) + u * np.asarray(params["skip"])
        wanted = jax.nn.gelu(y, approximate=False) @ params["o"]["w"]
        np.testing.assert_allclose(found[0, begin:end], wanted, atol=1e-5)


def both_ways():
    """Coordinates of two rows: one document each; and the second of two, so that none convolves."""
    one = whole(jnp.zeros((2, T), jnp.int32))
    position = one.position.at[1, 20:].add(-20)
    return one, Coords(position, one.document.at[1, 20:].set(2))


def test_convolution_and_recurrence_agree_and_so_do_their_gradients(params):
    x, (one, two) = draw(2, T, D), both_ways()
    assert not several(moments(one))
    assert several(moments(two))

    @jax.jit
    def run(params, x, at):
        def loss(params, x):
            y, _ = mixer(params, x, at)
            return jnp.sum(jnp.sin(3 * y[0])), y[0]  # the row that is the same in both

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, a), a_gradients = run(params, x, one)
    (_, b), b_gradients = run(params, x, two)
    assert np.abs(a - b).max() > 0  # two ways, by rounding
    np.testing.assert_allclose(a, b, atol=1e-5)

    def agree(path, a, b):
        # Sums over 40 tokens of float32, each with the rounding above.
        np.testing.assert_allclose(
            a, b, atol=2e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path)
        )
        assert np.abs(b).max() > 1e-4, path

    jax.tree.map_with_path(agree, a_gradients, b_gradients)


@pytest.mark.parametrize(
    ("position", "document", "wanted"),
    [
        ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1], False),
        ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0], False),  # padding behind
        ([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], False),  # padding in front
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1], False),  # cut out of a document
        ([0, 1, 0, 1, 2], [1, 1, 2, 2, 2], True),
        ([0, 0, 0, 0, 1], [0, 1, 0, 2, 2], True),
        ([8, 9, 0, 1, 2], [1, 1, 2, 2, 2], True),
    ],
)
def test_rows_of_several_documents_are_told_from_others(position, document, wanted):
    alone = Coords(jnp.array([position]), jnp.array([document]))
    assert several(moments(alone)) == wanted
    beside = whole(jnp.zeros((2, 5), jnp.int32))
    beside = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), beside, alone)
    assert several(moments(beside)) == wanted


def test_what_comes_later_changes_nothing_but_rounding(params):
    one, _ = both_ways()
    x = draw(2, T, D)
    later = x.at[:, 25:].mul(-3)
    (a, _), (b, _) = (mixer(params, y, one) for y in (x, later))
    # A Fourier transform rounds all tokens together.
    np.testing.assert_allclose(a[:, :25], b[:, :25], atol=5e-6)
    assert np.abs(a[:, 25:] - b[:, 25:]).max() > 0.1
