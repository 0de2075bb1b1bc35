"""Mamba against the paper written out in NumPy; oracles/test_mamba_oracle.py has torch's."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_params, random_tokens, tiny, whole
from jax.extend.core import jaxprs_in_params

from jaxgpt.architecture import MixerConfig, ModelConfig
from jaxgpt.config import OptimizerConfig
from jaxgpt.model import Coords, abstract_params, build, count_params, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mamba import last_tokens
from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.optimizer import build as build_optimizer

CFG = tiny(
    mixers=("mamba",), position="none", feedforward="none", mixer=MixerConfig(state=5, chunk=4)
)
MAMBA_130M = ModelConfig(
    vocab=50280, context=2048, width=768, layers=24, heads=12, mixers=("mamba",), position="none",
    feedforward="none",
)  # fmt: skip


def silu(x):
    return x / (1 + np.exp(-x))


def slow(p, x):
    """y [T D] of one document x [T D], in float64: figure 3 around algorithm 2, in loops."""
    T = len(x)
    W, I = p["conv_w"].shape
    inner, gate = x @ p["in"]["w"], x @ p["gate"]["w"]
    u = np.zeros((T, I))
    for t in range(T):
        for tap in range(W):
            if t - (W - 1) + tap >= 0:
                u[t] += p["conv_w"][tap] * inner[t - (W - 1) + tap]
    u = silu(u + p["conv_b"])
    B, C = u @ p["B"], u @ p["C"]
    step = np.log1p(np.exp(u @ p["rank"] @ p["step_w"] + p["step_b"]))
    A = -np.exp(p["log_A"])
    h, y = np.zeros_like(A), np.zeros((T, I))
    for t in range(T):
        for i in range(I):
            h[i] = np.exp(step[t, i] * A[i]) * h[i] + step[t, i] * B[t] * u[t, i]
            y[t, i] = C[t] @ h[i] + p["skip"][i] * u[t, i]
    return (y * silu(gate)) @ p["o"]["w"]


def one_layer(std: float = 0.5):
    params = random_params(CFG, std=std)["stack"]["layers"]["block_0"]["mixer"]
    return jax.tree.map(lambda p: p[0], params)


@jax.jit
def fast(params, x, at):
    return MIXERS["mamba"](CFG).apply({"params": params}, x, Sight(at, at), None)[0]


def test_documents_in_a_row_equal_the_paper_written_out_for_each():
    params = one_layer()
    x = np.random.default_rng(1).normal(size=(1, 14, 16))
    at = Coords(
        jnp.array([[0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0]]),
        jnp.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0]]),
    )
    found = fast(params, jnp.asarray(x, jnp.float32), at)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for begin, end in ((1, 7), (7, 12), (12, 13)):
        wanted = slow(exact, x[0, begin:end])
        assert wanted.std() > 0.3
        # float32 against float64, on sums of 32 products of order 1.
        np.testing.assert_allclose(found[0, begin:end], wanted, atol=2e-5, rtol=1e-5)


def shapes_inside(jaxpr):
    """Shapes of all that a program makes."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_inside(inner)


def test_the_states_of_all_tokens_are_never_held_not_even_for_the_backward_pass():
    T = 64
    x, at = jnp.zeros((2, T, 16)), whole(jnp.zeros((2, T), jnp.int32))
    gradient = jax.grad(lambda params: jnp.sum(fast(params, x, at)))
    found = list(shapes_inside(jax.make_jaxpr(gradient)(one_layer()).jaxpr))
    held = CFG.sizes["I"] * CFG.sizes["Z"] * 2 * T
    largest = max(found, key=np.prod)
    assert np.prod(largest) <= held / CFG.mixer.chunk, largest
    assert (2, 4, 32, 5) in found  # it has looked into the chunks


def test_the_last_tokens_are_found_between_padding():
    past = jnp.arange(14.0).reshape(2, 7, 1)  # three from before, and four
    is_token = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(last_tokens(past, is_token)[..., 0], [[2, 4, 5], [7, 8, 9]])


def test_steps_and_rates_begin_as_in_the_paper():
    params = jax.jit(lambda key: init_params(CFG, key)[0])(jax.random.key(0))
    p = params["stack"]["layers"]["block_0"]["mixer"]
    step = np.log1p(np.exp(p["step_b"]))
    assert 0.99e-3 < step.min() < 4e-3  # of 64 draws, log-uniform in two decades
    assert 0.03 < step.max() < 0.101
    np.testing.assert_allclose(-np.exp(p["log_A"]), np.broadcast_to(-np.arange(1, 6), (2, 32, 5)),
                               rtol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(p["skip"], 1)
    assert np.abs(p["conv_w"]).max() <= 0.5
    assert np.abs(p["conv_w"]).max() > 0.45


def test_mamba_130m_has_exactly_its_number_of_parameters():
    count = count_params(MAMBA_130M)
    assert count["total"] == 129_135_360
    assert count["feedforward"] == 0


def test_a_block_without_a_feed_forward_has_neither_its_weights_nor_its_norm():
    shapes, _ = abstract_params(CFG)
    assert shapes["stack"]["layers"]["block_0"].keys() == {"mixer", "mixer_norm_in"}


def test_all_parameters_move_and_only_matrices_decay():
    _, letters = abstract_params(CFG)
    tokens = random_tokens(CFG, 0, 2, 8)
    # Muon asks the most of letters: it tells the matrices of blocks from all else.
    optimizer, _ = build_optimizer(OptimizerConfig(name="muon", warmup=0), 10, letters)

    @jax.jit
    def updates(params):
        def loss(params):
            return jnp.sum(jnp.sin(build(CFG).apply({"params": params}, tokens, whole(tokens))[0]))

        g, still = jax.grad(loss)(params), jax.tree.map(jnp.zeros_like, params)
        return [optimizer.update(x, optimizer.init(params), params)[0] for x in (g, still)]

    moved, decayed = updates(random_params(CFG))
    for path, x in jax.tree.leaves_with_path(moved):
        assert np.abs(x).max() > 0, jax.tree_util.keystr(path)
    decayed = jax.tree.map(lambda x: bool(np.abs(x).max() > 0), decayed)
    assert decayed == jax.tree.map(lambda spelled: ">" in spelled, letters)
