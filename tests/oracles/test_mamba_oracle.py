"""Mamba with the same random weights in jaxgpt and in transformers (torch)."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import forward, single_document_coords

from jaxgpt.architecture import MixerConfig, ModelConfig
from jaxgpt.interop.names import MAMBA
from jaxgpt.interop.rows import convert_arrays, locate_weights
from jaxgpt.model import Coords, abstract_params, build, compute_logits, init_cache, make_head
from jaxgpt.objectives import vocabulary_loss

B, T = 3, 20
CFG = ModelConfig(
    vocab=97, context=32, width=32, heads=4, layers=3, norm_eps=1e-4, mixers=("mamba",),
    position="none", feedforward="none", mixer=MixerConfig(state=5, expand=3, conv=3, chunk=8),
)  # fmt: skip
HF_CONFIG = transformers.MambaConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, layer_norm_epsilon=1e-4, state_size=5,
    expand=3, conv_kernel=3, time_step_rank="auto", use_bias=False, use_conv_bias=True,
    residual_in_fp32=True, tie_word_embeddings=True,
)  # fmt: skip


# --- both models on the same tokens ---


def draw_tokens():
    return np.random.default_rng(0).integers(0, CFG.vocab, (B, T))


@pytest.fixture(scope="module")
def reference():
    """Return (arrays by name, loss, logits, gradients by name) of transformers."""
    model = transformers.MambaForCausalLM(HF_CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.endswith(("norm.weight", "norm_f.weight", "mixer.D"))
            x.copy_(float(is_scale) + 0.3 * torch.randn(x.shape, generator=generator))
    ids = torch.tensor(draw_tokens())
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    named = dict(model.named_parameters())
    arrays = {name: x.detach().numpy() for name, x in named.items()}
    gradients = {name: x.grad.numpy() for name, x in named.items()}
    return arrays, out.loss.item(), out.logits.detach().numpy(), gradients


@pytest.fixture(scope="module")
def params(reference):
    return convert_arrays(MAMBA, reference[0], CFG)


@pytest.fixture(scope="module")
def actual(params):
    """Return (loss, logits, gradients) of jaxgpt."""
    ids = jnp.asarray(draw_tokens(), jnp.int32)

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden, _ = build(CFG).apply({"params": params}, ids, single_document_coords(ids))
        weights = jnp.ones((B, T)).at[:, -1].set(0)
        total, sums = vocabulary_loss(
            hidden, make_head(CFG, params), jnp.roll(ids, -1, axis=1), weights, chunk=12
        )
        return total / sums["weight"], compute_logits(CFG, params, hidden)

    (loss_value, logits), gradients = jax.jit(loss)(params)
    return loss_value, logits, gradients


def test_every_weight_has_a_counterpart(reference, params):
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(CFG)[0])
    names = {name for row in locate_weights(MAMBA, reference[0], CFG) for name in row.names}
    assert names == set(reference[0])


def test_logits_and_losses_agree(reference, actual):
    assert reference[2].std() > 0.3  # the logits are not trivially small
    # Two float32 implementations of three layers, on values up to 10.
    np.testing.assert_allclose(actual[1], reference[2], atol=1e-4)
    np.testing.assert_allclose(actual[0], reference[1], rtol=1e-5)


def test_gradients_of_all_parameters_agree(reference, actual):
    def relative_error(a, b):
        assert jnp.max(jnp.abs(b)) > 1e-5
        return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

    errors = jax.tree.map(relative_error, actual[2], convert_arrays(MAMBA, reference[3], CFG))
    assert max(jax.tree.leaves(errors)) < 1e-3, errors


def test_decoding_from_prompts_of_different_length_gives_the_logits_of_transformers(
    reference, params
):
    ids, lengths = draw_tokens(), np.array([6, 4, 1])
    rows = np.arange(B)[:, None]
    cache = init_cache(CFG, B, slots=16)
    for step in [np.arange(-6, 0), [0], [1, 2, 3], [4]]:  # left-padded prompts, then more tokens
        positions = lengths[:, None] + np.array(step)
        is_token = positions >= 0
        positions = np.maximum(positions, 0)
        coords = Coords(jnp.asarray(positions), jnp.asarray(is_token, jnp.int32))
        hidden, cache = forward(CFG, params, jnp.asarray(ids[rows, positions]), coords, cache)
        logits = compute_logits(CFG, params, hidden)
        np.testing.assert_allclose(
            logits[is_token], reference[2][rows, positions][is_token], atol=1e-4
        )
