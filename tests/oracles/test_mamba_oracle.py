"""The same random weights in the Mamba of transformers (torch) and here give the same model."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import forward, whole
from oracles.weights import as_ours, bare, layers, linear, norm, places, table

from jaxgpt.architecture import MixerConfig, ModelConfig
from jaxgpt.model import Coords, abstract_params, build, head, init_cache, logits
from jaxgpt.objectives import vocabulary_loss

B, T = 3, 20
CFG = ModelConfig(
    vocab=97, context=32, width=32, heads=4, layers=3, norm_eps=1e-4, mixers=("mamba",),
    position="none", feedforward="none", mixer=MixerConfig(state=5, expand=3, conv=3, chunk=8),
)  # fmt: skip
THEIRS = transformers.MambaConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, layer_norm_epsilon=1e-4, state_size=5,
    expand=3, conv_kernel=3, time_step_rank="auto", use_bias=False, use_conv_bias=True,
    residual_in_fp32=True, tie_word_embeddings=True,
)  # fmt: skip


# --- where each of our weights lies in theirs ---


def half(i: int):
    """What goes into the convolution, or the gate, of what is fused as [2I D]."""
    return lambda x, cfg: np.split(x, 2)[i].T


def part(i: int):
    """The low-rank step, B or C, of what is fused as [R+Z+Z I]."""

    def cut(x, cfg):
        R, Z = cfg.sizes["R"], cfg.sizes["Z"]
        return np.split(x, [R, R + Z])[i].T

    return cut


def taps(x, cfg):  # a depthwise Conv1d: [I 1 W]
    return x[:, 0].T


def transposed(x, cfg):
    return x.T


def same(x, cfg):
    return x


MAMBA = [
    table("embed", "backbone.embeddings"),
    norm("stack.norm", "backbone.norm_f"),
    *layers(
        "stack",
        "backbone.layers.{}",
        norm("mixer_norm_in", "norm"),
        linear("mixer.in", "mixer.in_proj", half(0)),
        linear("mixer.gate", "mixer.in_proj", half(1)),
        bare("mixer.conv_w", "mixer.conv1d.weight", taps),
        bare("mixer.conv_b", "mixer.conv1d.bias", same),
        bare("mixer.rank", "mixer.x_proj.weight", part(0)),
        bare("mixer.B", "mixer.x_proj.weight", part(1)),
        bare("mixer.C", "mixer.x_proj.weight", part(2)),
        bare("mixer.step_w", "mixer.dt_proj.weight", transposed),
        bare("mixer.step_b", "mixer.dt_proj.bias", same),
        bare("mixer.log_A", "mixer.A_log", same),
        bare("mixer.skip", "mixer.D", same),
        linear("mixer.o", "mixer.out_proj"),
    ),
]


# --- both models on the same tokens ---


def tokens():
    return np.random.default_rng(0).integers(0, CFG.vocab, (B, T))


@pytest.fixture(scope="module")
def theirs():
    """(arrays by name, loss, logits, gradients by name)."""
    model = transformers.MambaForCausalLM(THEIRS).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.endswith(("norm.weight", "norm_f.weight", "mixer.D"))
            x.copy_(float(is_scale) + 0.3 * torch.randn(x.shape, generator=generator))
    ids = torch.tensor(tokens())
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    named = dict(model.named_parameters())
    arrays = {name: x.detach().numpy() for name, x in named.items()}
    gradients = {name: x.grad.numpy() for name, x in named.items()}
    return arrays, out.loss.item(), out.logits.detach().numpy(), gradients


@pytest.fixture(scope="module")
def params(theirs):
    return as_ours(MAMBA, theirs[0], CFG)


@pytest.fixture(scope="module")
def ours(params):
    """(loss, logits, gradients)."""
    ids = jnp.asarray(tokens(), jnp.int32)

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden, _ = build(CFG).apply({"params": params}, ids, whole(ids))
        weights = jnp.ones((B, T)).at[:, -1].set(0)
        total, sums = vocabulary_loss(
            hidden, head(CFG, params), jnp.roll(ids, -1, axis=1), weights, chunk=12
        )
        return total / sums.weight, logits(CFG, params, hidden)

    (value, scores), gradients = jax.jit(loss)(params)
    return value, scores, gradients


def test_every_weight_has_its_place_in_the_other(theirs, params):
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(CFG)[0])
    placed = {name for place in places(MAMBA, theirs[0], CFG) for name in place[1]}
    assert placed == set(theirs[0])


def test_logits_and_losses_agree(theirs, ours):
    assert theirs[2].std() > 0.3  # there is something to compare
    # Two float32 implementations of three layers, on values up to 10.
    np.testing.assert_allclose(ours[1], theirs[2], atol=1e-4)
    np.testing.assert_allclose(ours[0], theirs[1], rtol=1e-5)


def test_gradients_of_all_parameters_agree(theirs, ours):
    def relative(a, b):
        assert jnp.max(jnp.abs(b)) > 1e-5
        return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))

    worst = jax.tree.map(relative, ours[2], as_ours(MAMBA, theirs[3], CFG))
    assert max(jax.tree.leaves(worst)) < 1e-3, worst


def test_decoding_from_prompts_of_different_length_gives_their_logits(theirs, params):
    ids, lengths = tokens(), np.array([6, 4, 1])
    rows = np.arange(B)[:, None]
    cache = init_cache(CFG, B, slots=16)
    for step in [np.arange(-6, 0), [0], [1, 2, 3], [4]]:  # the prompts, padded on the left; more
        place = lengths[:, None] + np.array(step)
        is_token = place >= 0
        place = np.maximum(place, 0)
        at = Coords(jnp.asarray(place), jnp.asarray(is_token, jnp.int32))
        hidden, cache = forward(CFG, params, jnp.asarray(ids[rows, place]), at, cache)
        found = logits(CFG, params, hidden)
        np.testing.assert_allclose(found[is_token], theirs[2][rows, place][is_token], atol=1e-4)
