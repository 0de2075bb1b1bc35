"""Gated cells against torch's, and what all mixers with a state share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import forward, random_params, random_tokens, tiny, whole

from jaxgpt.architecture import MixerConfig
from jaxgpt.model import Coords, abstract_params, init_cache, init_params
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.model.mixers.recurrent import Moment, in_chunks, moments, remember

B, T, D = 2, 11, 16
GATES = {"lstm": "ifgo", "gru": "rzn"}  # in torch's order, which is ours
TORCH = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}

every_cell = pytest.mark.parametrize("name", GATES)


def one_layer(cfg):
    """The parameters of the first mixer, and x [B T D]."""
    params = random_params(cfg, std=0.5)["stack"]["layers"]["block_0"]["mixer"]
    x = np.random.default_rng(3).normal(size=(B, T, D)).astype(np.float32)
    return jax.tree.map(lambda p: p[0], params), jnp.asarray(x)


@partial(jax.jit, static_argnames="name")
def ours(name, params, x):
    """(loss, y) and the gradients by (params, x)."""

    def loss(params, x):
        at = whole(x[..., 0].astype(int))
        y, _ = MIXERS[name](tiny(mixers=(name,), position="none")).apply(
            {"params": params}, x, Sight(at, at), None
        )
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def theirs(name, params, x):
    """The same of torch: what it shows, mapped by o."""
    cell = TORCH[name](D, D, batch_first=True)
    given = torch.tensor(np.asarray(x), requires_grad=True)
    o = torch.tensor(np.asarray(params["o"]["w"]), requires_grad=True)
    with torch.no_grad():
        for kind, leaf in (("weight_ih_l0", "w"), ("weight_hh_l0", "u"), ("bias_ih_l0", "b")):
            gates = [np.asarray(params[f"{leaf}_{gate}"]).T for gate in GATES[name]]
            getattr(cell, kind).copy_(torch.tensor(np.concatenate(gates)))
        cell.bias_hh_l0.zero_()
        if name == "gru":
            cell.bias_hh_l0[2 * D :] = torch.tensor(np.asarray(params["c_n"]))
    y = cell(given)[0] @ o
    torch.sin(y).sum().backward()
    gradients = {"o": {"w": o.grad.numpy()}}
    for kind, leaf in (("weight_ih_l0", "w"), ("weight_hh_l0", "u"), ("bias_ih_l0", "b")):
        parts = np.split(getattr(cell, kind).grad.numpy(), len(GATES[name]))
        gradients |= {f"{leaf}_{g}": part.T for g, part in zip(GATES[name], parts, strict=True)}
    if name == "gru":
        gradients["c_n"] = cell.bias_hh_l0.grad.numpy()[2 * D :]
    return y.detach().numpy(), gradients, given.grad.numpy()


@every_cell
def test_a_cell_and_its_gradients_equal_torchs(name):
    params, x = one_layer(tiny(mixers=(name,), position="none"))
    (_, y), (gradients, by_x) = ours(name, params, x)
    wanted, wanted_gradients, wanted_by_x = theirs(name, params, x)
    assert wanted.std() > 0.3
    # Both float32: values of order 1, and gradients that sum 22 tokens.
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    np.testing.assert_allclose(by_x, wanted_by_x, atol=3e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for leaf, g in wanted_gradients.items():
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5, err_msg=leaf)
        jax.tree.map(close, gradients[leaf], g)


def test_a_forget_gate_begins_open_and_all_other_biases_at_zero():
    cfg = tiny(mixers=("lstm", "gru"), position="none")
    params = jax.jit(lambda key: init_params(cfg, key)[0])(jax.random.key(0))
    lstm, gru = (params["stack"]["layers"][f"block_{i}"]["mixer"] for i in range(2))
    np.testing.assert_array_equal(lstm["b_f"], 1)
    for gate in "igo":
        np.testing.assert_array_equal(lstm[f"b_{gate}"], 0)
    for name in ("b_r", "b_z", "b_n", "c_n"):
        np.testing.assert_array_equal(gru[name], 0)


@every_cell
def test_gates_have_biases_whether_or_not_the_model_has(name):
    def biases(bias):
        shapes, _ = abstract_params(tiny(mixers=(name,), position="none", bias=bias))
        mixer = shapes["stack"]["layers"]["block_0"]["mixer"]
        return {leaf for leaf in mixer if leaf[0] in "bc"}, "b" in mixer["o"]

    wanted = {f"b_{gate}" for gate in GATES[name]} | ({"c_n"} if name == "gru" else set())
    assert biases(False) == (wanted, False)
    assert biases(True) == (wanted, True)


# --- what all mixers with a state share ---


@pytest.mark.parametrize("name", ["lstm", "gru", "mamba", "s4"])
def test_slots_without_a_token_leave_the_state_as_it_is(name):
    """A row that pauses behind its tokens, and goes on in the next call."""
    numbers = MixerConfig(state=4, chunk=3)
    cfg = tiny(mixers=(name,), position="none", mixer=numbers)
    params = random_params(cfg)
    tokens = random_tokens(cfg, 0, 2, 9)
    wanted, _ = forward(cfg, params, tokens, whole(tokens))
    # Row 0 reads 4 tokens and pauses twice, row 1 reads 6; then both read 3 more.
    place = np.array([[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5]])
    at = Coords(jnp.asarray(place), jnp.array([[1, 1, 1, 1, 0, 0], [1] * 6]))
    rows = np.arange(2)[:, None]
    cache = init_cache(cfg, batch=2, slots=9)
    _, cache = forward(cfg, params, tokens[rows, place], at, cache)
    place = np.array([[4, 5, 6], [6, 7, 8]])
    at = Coords(jnp.asarray(place), jnp.ones((2, 3), jnp.int32))
    found, _ = forward(cfg, params, tokens[rows, place], at, cache)
    # The same float32 sums in another order, through two layers.
    np.testing.assert_allclose(found, wanted[rows, place], atol=1e-5)


def test_a_moment_begins_where_a_token_is_the_first_of_its_document():
    at = Coords(jnp.array([[0, 0, 1, 0, 0, 1]]), jnp.array([[0, 1, 1, 2, 0, 0]]))
    when = moments(at)
    np.testing.assert_array_equal(when.begins[0], [0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(when.is_token[0], [0, 1, 1, 1, 0, 0])


def test_remembering_is_a_loop_that_forgets_at_beginnings_and_skips_what_is_no_token():
    x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    begins = np.array([[0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0]], bool)
    is_token = np.array([[0, 1, 1, 1, 0, 1, 1], [1] * 7], bool)

    def cell(state, x):
        state = {"a": state["a"] * 0.5 + x}
        return state, state["a"] + 1

    start = {"a": jnp.ones((2, 3))}
    end, y = remember(
        cell, start, jnp.asarray(x), Moment(jnp.asarray(begins), jnp.asarray(is_token))
    )
    for row in range(2):
        a = np.ones(3)
        for t in range(7):
            if is_token[row, t]:
                a = (0 if begins[row, t] else a) * 0.5 + x[row, t]
                np.testing.assert_allclose(y[row, t], a + 1, atol=1e-6)
        np.testing.assert_allclose(end["a"][row], a, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_chunks_change_nothing(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 3)), jnp.float32)

    def piece(state, x):
        sums = state[:, None] + jnp.cumsum(x, axis=1)
        return sums[:, -1], sums**2

    end, y = in_chunks(piece, jnp.ones((2, 3)), x, size)
    sums = 1 + np.cumsum(x, axis=1)
    np.testing.assert_allclose(y, sums**2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(end, sums[:, -1], rtol=1e-5, atol=1e-5)
