"""Mamba against the paper in NumPy loops; oracles/test_mamba_oracle.py compares it with torch."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_params, random_tokens, single_document_coords, tiny
from jax.extend.core import jaxprs_in_params

from jaxgpt.architecture import MixerConfig, ModelConfig
from jaxgpt.config import OptimizerConfig
from jaxgpt.model import Coords, abstract_params, build, count_params, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mamba import select_last_tokens
from jaxgpt.model.mixers.mixer import LayerContext
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


def mamba_reference(p, x):
    """Compute y [T D] of one document x [T D] in float64 loops: figure 3 around algorithm 2."""
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


def draw_layer_params(std: float = 0.5):
    params = random_params(CFG, std=std)["stack"]["layers"]["block_0"]["mixer"]
    return jax.tree.map(lambda p: p[0], params)


@jax.jit
def apply_mamba(params, x, coords):
    return MIXERS["mamba"](CFG).apply({"params": params}, x, LayerContext(coords, coords), None)[0]


def test_packed_documents_equal_the_float64_loops_for_each():
    params = draw_layer_params()
    x = np.random.default_rng(1).normal(size=(1, 14, 16))
    coords = Coords(
        jnp.array([[0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0]]),
        jnp.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0]]),
    )
    actual = apply_mamba(params, jnp.asarray(x, jnp.float32), coords)
    params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    for start, end in ((1, 7), (7, 12), (12, 13)):
        expected = mamba_reference(params64, x[0, start:end])
        assert expected.std() > 0.3
        # float32 against float64, on sums of 32 products of order 1.
        np.testing.assert_allclose(actual[0, start:end], expected, atol=2e-5, rtol=1e-5)


def iterate_shapes(jaxpr):
    """Yield the shapes of all arrays in a program."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from iterate_shapes(inner)


def test_the_states_of_all_tokens_are_never_materialized_not_even_for_the_backward_pass():
    T = 64
    x, coords = jnp.zeros((2, T, 16)), single_document_coords(jnp.zeros((2, T), jnp.int32))
    gradient = jax.grad(lambda params: jnp.sum(apply_mamba(params, x, coords)))
    shapes = list(iterate_shapes(jax.make_jaxpr(gradient)(draw_layer_params()).jaxpr))
    state_elements = CFG.sizes["I"] * CFG.sizes["Z"] * 2 * T
    largest = max(shapes, key=np.prod)
    assert np.prod(largest) <= state_elements / CFG.mixer.chunk, largest
    assert (2, 4, 32, 5) in shapes  # the search reaches into the chunks


def test_the_last_tokens_are_found_between_padding():
    past = jnp.arange(14.0).reshape(2, 7, 1)  # three earlier ones, and four
    is_token = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(
        select_last_tokens(past, is_token)[..., 0], [[2, 4, 5], [7, 8, 9]]
    )


def test_steps_and_rates_are_initialized_as_in_the_paper():
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


def test_all_parameters_are_updated_and_only_matrices_decay():
    _, letters = abstract_params(CFG)
    tokens = random_tokens(CFG, 0, 2, 8)
    # Muon depends most on letters: it applies to the matrices of blocks only.
    optimizer, _ = build_optimizer(OptimizerConfig(name="muon", warmup=0), 10, letters)

    @jax.jit
    def updates(params):
        def loss(params):
            return jnp.sum(
                jnp.sin(
                    build(CFG).apply({"params": params}, tokens, single_document_coords(tokens))[0]
                )
            )

        g, zeros = jax.grad(loss)(params), jax.tree.map(jnp.zeros_like, params)
        return [optimizer.update(x, optimizer.init(params), params)[0] for x in (g, zeros)]

    updated, decayed = updates(random_params(CFG))
    for path, x in jax.tree.leaves_with_path(updated):
        assert np.abs(x).max() > 0, jax.tree_util.keystr(path)
    decayed = jax.tree.map(lambda x: bool(np.abs(x).max() > 0), decayed)
    assert decayed == jax.tree.map(lambda dims: ">" in dims, letters)
