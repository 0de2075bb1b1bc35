"""Feed-forward layers against float64 references, activations against torch.

Mixtures of experts are tested in test_experts.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import single_document_coords, tiny

from jaxgpt.dims import split
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS, gelu_tanh

TORCH = {
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x) ** 2,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def test_every_activation_is_compared():
    assert TORCH.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_that_of_torch(name):
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    # Both in float32, on values up to 36: some units of 6e-8 of it.
    np.testing.assert_allclose(
        ACTIVATIONS[name](x), TORCH[name](torch.tensor(x)).numpy(), rtol=1e-5, atol=2e-6
    )


def silu(x):
    return x / (1 + np.exp(-x))


def plain_reference(x, w):
    return silu(x @ w["up"]["w"] + w["up"]["b"]) @ w["down"]["w"] + w["down"]["b"]


def gated_reference(x, w):
    gate = silu(x @ w["gate"]["w"] + w["gate"]["b"])
    return gate * (x @ w["up"]["w"] + w["up"]["b"]) @ w["down"]["w"] + w["down"]["b"]


REFERENCES = {"plain": plain_reference, "gated": gated_reference}
every_kind = pytest.mark.parametrize("kind", REFERENCES)
COORDS = single_document_coords(np.zeros((2, 5), np.int32))


def test_every_feedforward_without_experts_has_a_reference():
    assert REFERENCES.keys() == FEEDFORWARDS.keys() - {"moe_plain", "moe_gated", "none"}


@every_kind
def test_a_feedforward_equals_its_formula_in_float64(kind):
    rng = np.random.default_rng(0)
    cfg = tiny(feedforward=kind, bias=True)
    module = FEEDFORWARDS[kind](cfg)
    x = rng.normal(size=(2, 5, cfg.width))
    params, _ = split(module.init(jax.random.key(0), x.astype(np.float32), COORDS)["params"])
    params = jax.tree.map(lambda p: rng.normal(size=p.shape) * 0.3, params)
    low = jax.tree.map(lambda p: p.astype(np.float32), params)
    found = jax.jit(module.apply)({"params": low}, x.astype(np.float32), COORDS)
    # float32 sums of up to 24 products of order 1: some 1e-6.
    np.testing.assert_allclose(found, REFERENCES[kind](x, params), atol=2e-5)


@every_kind
def test_a_feedforward_has_no_bias_unless_the_config_has(kind):
    cfg, x = tiny(feedforward=kind), np.zeros((2, 5, 16), np.float32)
    params = FEEDFORWARDS[kind](cfg).init(jax.random.key(0), x, COORDS)["params"]
    assert {name for part in params.values() for name in part} == {"w"}


def test_gelu_tanh_and_its_gradient_equal_the_formula_in_float64():
    x = np.linspace(-12, 12, 2001)
    c = np.sqrt(2 / np.pi)
    t, slope = np.tanh(c * (x + 0.044715 * x**3)), c * (1 + 3 * 0.044715 * x**2)
    given = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(gelu_tanh(given), x / 2 * (1 + t), atol=1e-6)
    gradient = (1 + t) / 2 + x / 2 * (1 - t**2) * slope
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu_tanh))(given), gradient, atol=5e-6)
