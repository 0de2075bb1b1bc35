"""The same random weights in transformers (torch) and here give the same model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import whole
from oracles.weights import GPT2, LLAMA, as_ours

from jaxgpt.config import ModelConfig
from jaxgpt.model import abstract_params, build, logits, unembedding
from jaxgpt.objectives import vocabulary_loss

B, T = 3, 20


def llama(tie: bool, kv_heads: int = 2):
    cfg = ModelConfig(
        vocab=97, context=32, width=32, layers=2, heads=4, kv_heads=kv_heads, ffn=48, tie=tie,
        rope_theta=500.0, norm_eps=1e-4,
    )  # fmt: skip
    theirs = transformers.LlamaConfig(
        vocab_size=97, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, intermediate_size=48,
        tie_word_embeddings=tie, rms_norm_eps=1e-4,
        rope_parameters=dict(rope_type="default", rope_theta=500.0),
        attn_implementation="eager",
    )  # fmt: skip
    return cfg, transformers.LlamaForCausalLM(theirs), LLAMA


def gpt2():
    cfg = ModelConfig(
        vocab=97, context=32, width=32, layers=2, heads=4, ffn=128, position="learned",
        norm="layer", norm_eps=1e-4, feedforward="plain", activation="gelu_tanh", bias=True,
    )  # fmt: skip
    theirs = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=128,
        layer_norm_epsilon=1e-4, activation_function="gelu_new", attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return cfg, transformers.GPT2LMHeadModel(theirs), GPT2


CASES = {
    "llama": lambda: llama(tie=False),
    "llama tied": lambda: llama(tie=True),
    "llama with one kv head": lambda: llama(tie=False, kv_heads=1),
    "gpt2": gpt2,
}


def mean_loss(cfg, params, tokens):
    """Of each token but the first, in nats; and the scores."""
    hidden, _ = build(cfg).apply({"params": params}, tokens, whole(tokens))
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    loss, sums = vocabulary_loss(hidden, unembedding(params), targets, weights, chunk=12)
    return loss / sums.weight, logits(params, hidden)


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """Logits, loss and gradients of both: (ours, theirs), and the config."""
    cfg, model, table = CASES[request.param]()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            # Weights of this size make attention and activations far from linear.
            is_scale = x.ndim == 1 and name.endswith("weight")
            x.copy_(float(is_scale) + 0.2 * torch.randn(x.shape, generator=generator))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (B, T))
    out = model(torch.tensor(tokens), labels=torch.tensor(tokens))
    out.loss.backward()
    named = dict(model.named_parameters())
    params = as_ours(table, {k: x.detach().numpy() for k, x in named.items()}, cfg)
    theirs = dict(
        logits=out.logits.detach().numpy(),
        loss=out.loss.item(),
        gradients=as_ours(table, {k: x.grad.numpy() for k, x in named.items()}, cfg),
    )
    tokens = jnp.asarray(tokens, jnp.int32)
    run = jax.jit(jax.value_and_grad(lambda p: mean_loss(cfg, p, tokens), has_aux=True))
    (loss, scores), gradients = run(params)
    ours = dict(logits=scores, loss=loss, gradients=gradients)
    return cfg, params, ours, theirs


def test_every_weight_of_theirs_has_its_place(pair):
    cfg, params, _, _ = pair
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(cfg)[0])


def test_logits_agree(pair):
    _, _, ours, theirs = pair
    assert theirs["logits"].std() > 0.3  # there is something to compare
    # Two float32 implementations of two layers, on values up to 10.
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-4)


def test_losses_agree(pair):
    _, _, ours, theirs = pair
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


def test_gradients_of_all_parameters_agree(pair):
    _, _, ours, theirs = pair
    chex.assert_trees_all_close(ours["gradients"], theirs["gradients"], atol=1e-4)

    def relative(a, b):
        return float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + 1e-9))

    worst = jax.tree.map(relative, ours["gradients"], theirs["gradients"])
    # The bias of the keys has no gradient but rounding: softmax does not see it.
    worst["stack"]["layers"]["attn"]["k"].pop("b", None)
    assert max(jax.tree.leaves(worst)) < 1e-3
