"""Gated cells against torch, and the functions that all recurrent mixers share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, abstract_params, init_cache, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.mixers.recurrent import TokenFlags, flag_tokens, scan_in_chunks, scan_tokens

B, T, D = 2, 11, 16
GATES = {"lstm": "ifgo", "gru": "rzn"}  # in torch's order, which is also jaxgpt's
TORCH_CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}

every_cell = pytest.mark.parametrize("name", GATES)


def draw_layer_inputs(cfg):
    """Draw the parameters of the first mixer, and x [B T D]."""
    params = random_params(cfg, std=0.5)["stack"]["layers"]["block_0"]["mixer"]
    x = np.random.default_rng(3).normal(size=(B, T, D)).astype(np.float32)
    return jax.tree.map(lambda p: p[0], params), jnp.asarray(x)


@partial(jax.jit, static_argnames="name")
def run_jaxgpt(name, params, x):
    """Return (loss, y) and the gradients with respect to (params, x)."""

    def loss(params, x):
        coords = single_document_coords(x[..., 0].astype(int))
        y, _ = MIXERS[name](tiny(mixers=(name,), position="none")).apply(
            {"params": params}, x, LayerContext(coords, coords), None
        )
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def run_torch(name, params, x):
    """Compute (y, parameter gradients, input gradient) with torch's cell and the projection o."""
    cell = TORCH_CELLS[name](D, D, batch_first=True)
    torch_x = torch.tensor(np.asarray(x), requires_grad=True)
    o = torch.tensor(np.asarray(params["o"]["w"]), requires_grad=True)
    with torch.no_grad():
        for kind, leaf in (("weight_ih_l0", "w"), ("weight_hh_l0", "u"), ("bias_ih_l0", "b")):
            gates = [np.asarray(params[f"{leaf}_{gate}"]).T for gate in GATES[name]]
            getattr(cell, kind).copy_(torch.tensor(np.concatenate(gates)))
        cell.bias_hh_l0.zero_()
        if name == "gru":
            cell.bias_hh_l0[2 * D :] = torch.tensor(np.asarray(params["c_n"]))
    y = cell(torch_x)[0] @ o
    torch.sin(y).sum().backward()
    gradients = {"o": {"w": o.grad.numpy()}}
    for kind, leaf in (("weight_ih_l0", "w"), ("weight_hh_l0", "u"), ("bias_ih_l0", "b")):
        parts = np.split(getattr(cell, kind).grad.numpy(), len(GATES[name]))
        gradients |= {f"{leaf}_{g}": part.T for g, part in zip(GATES[name], parts, strict=True)}
    if name == "gru":
        gradients["c_n"] = cell.bias_hh_l0.grad.numpy()[2 * D :]
    return y.detach().numpy(), gradients, torch_x.grad.numpy()


@every_cell
def test_a_cell_and_its_gradients_equal_torchs(name):
    params, x = draw_layer_inputs(tiny(mixers=(name,), position="none"))
    (_, y), (gradients, x_gradient) = run_jaxgpt(name, params, x)
    expected, expected_gradients, expected_x_gradient = run_torch(name, params, x)
    assert expected.std() > 0.3
    # Both are float32: values of order 1, and gradients that sum over 22 tokens.
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(x_gradient, expected_x_gradient, atol=3e-5)
    assert gradients.keys() == expected_gradients.keys()
    for leaf, g in expected_gradients.items():
        assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5, err_msg=leaf)
        jax.tree.map(assert_close, gradients[leaf], g)


def test_the_forget_gate_is_initialized_open_and_all_other_biases_to_zero():
    cfg = tiny(mixers=("lstm", "gru"), position="none")
    params = jax.jit(lambda key: init_params(cfg, key)[0])(jax.random.key(0))
    lstm, gru = (params["stack"]["layers"][f"block_{i}"]["mixer"] for i in range(2))
    np.testing.assert_array_equal(lstm["b_f"], 1)
    for gate in "igo":
        np.testing.assert_array_equal(lstm[f"b_{gate}"], 0)
    for name in ("b_r", "b_z", "b_n", "c_n"):
        np.testing.assert_array_equal(gru[name], 0)


@every_cell
def test_gates_have_biases_whether_or_not_the_model_does(name):
    def list_biases(bias):
        shapes, _ = abstract_params(tiny(mixers=(name,), position="none", bias=bias))
        mixer = shapes["stack"]["layers"]["block_0"]["mixer"]
        return {leaf for leaf in mixer if leaf[0] in "bc"}, "b" in mixer["o"]

    expected = {f"b_{gate}" for gate in GATES[name]} | ({"c_n"} if name == "gru" else set())
    assert list_biases(False) == (expected, False)
    assert list_biases(True) == (expected, True)


# --- shared by all recurrent mixers ---


@pytest.mark.parametrize("name", ["lstm", "gru", "mamba", "s4"])
def test_slots_without_a_token_leave_the_state_unchanged(name):
    """One row is padded at the end, and continues in the next call."""
    mixer_sizes = MixerConfig(state=4, chunk=3)
    cfg = tiny(mixers=(name,), position="none", mixer=mixer_sizes)
    params = random_params(cfg)
    tokens = random_tokens(cfg, 0, 2, 9)
    expected, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    # Row 0 has 4 tokens and two empty slots, row 1 has 6 tokens; then both get 3 more.
    positions = np.array([[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
    coords = Coords(jnp.asarray(positions), jnp.array([[1, 1, 1, 1, 0, 0], [1] * 6]))
    rows = np.arange(2)[:, None]
    cache = init_cache(cfg, batch=2, slots=9)
    _, cache = forward(cfg, params, tokens[rows, positions], coords, cache)
    positions = np.array([[4, 5, 6], [6, 7, 8]])
    coords = Coords(jnp.asarray(positions), jnp.ones((2, 3), jnp.int32))
    actual, _ = forward(cfg, params, tokens[rows, positions], coords, cache)
    # The same float32 sums in another order, through two layers.
    np.testing.assert_allclose(actual, expected[rows, positions], atol=1e-5)


def test_a_first_token_is_flagged_in_each_document():
    coords = Coords(jnp.array([[0, 0, 1, 0, 0, 1]]), jnp.array([[0, 1, 1, 2, 0, 0]]))
    flags = flag_tokens(coords)
    np.testing.assert_array_equal(flags.is_first[0], [0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(flags.is_token[0], [0, 1, 1, 1, 0, 0])


def test_scan_tokens_equals_a_loop_that_resets_at_first_tokens_and_skips_empty_slots():
    x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    is_first = np.array([[0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0]], bool)
    is_token = np.array([[0, 1, 1, 1, 0, 1, 1], [1] * 7], bool)

    def cell(state, x):
        state = {"a": state["a"] * 0.5 + x}
        return state, state["a"] + 1

    initial = {"a": jnp.ones((2, 3))}
    final, y = scan_tokens(
        cell, initial, jnp.asarray(x), TokenFlags(jnp.asarray(is_first), jnp.asarray(is_token))
    )
    for row in range(2):
        a = np.ones(3)
        for t in range(7):
            if is_token[row, t]:
                a = (0 if is_first[row, t] else a) * 0.5 + x[row, t]
                np.testing.assert_allclose(y[row, t], a + 1, atol=1e-6)
        np.testing.assert_allclose(final["a"][row], a, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_chunk_size_does_not_change_the_result(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 3)), jnp.float32)

    def scan_chunk(state, x):
        sums = state[:, None] + jnp.cumsum(x, axis=1)
        return sums[:, -1], sums**2

    final, y = scan_in_chunks(scan_chunk, jnp.ones((2, 3)), x, size)
    sums = 1 + np.cumsum(x, axis=1)
    np.testing.assert_allclose(y, sums**2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(final, sums[:, -1], rtol=1e-5, atol=1e-5)
