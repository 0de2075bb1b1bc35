"""Models with the same random weights in jaxgpt and in transformers (torch)."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import single_document_coords
from oracles.models import CASES

from jaxgpt.config import ModelConfig
from jaxgpt.interop.rows import convert_arrays, locate_weights
from jaxgpt.model import (
    Coords,
    EncoderInput,
    abstract_params,
    build,
    compute_logits,
    init_cache,
    make_head,
)
from jaxgpt.objectives import vocabulary_loss

B, T, S = 3, 20, 14


class TaskInputs(NamedTuple):
    """The inputs and targets of a model: int32 [B T] each, `weights` float32, source [B S]."""

    tokens: jax.Array
    coords: Coords
    targets: jax.Array  # [B] class labels for a classifier
    weights: jax.Array  # of the targets in the loss
    model_args: dict  # further arguments of the model: types, source


def make_padded_coords(tokens, lengths) -> Coords:
    """Return the coordinates of rows that end after `lengths` tokens."""
    coords = single_document_coords(tokens)
    return coords._replace(
        segment_ids=jnp.asarray(coords.positions < jnp.array(lengths)[:, None], jnp.int32)
    )


def make_task(cfg: ModelConfig) -> TaskInputs:
    rng = np.random.default_rng(0)

    def draw(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

    tokens = draw(cfg.vocab, B, T)
    coords, weights, model_args = single_document_coords(tokens), np.ones((B, T), np.float32), {}
    if cfg.family == "decoder":
        targets, weights[:, -1] = jnp.roll(tokens, -1, axis=1), 0
    elif cfg.family == "encoder":
        coords, targets = make_padded_coords(tokens, (T, 13, 7)), draw(cfg.vocab, B, T)
        weights = np.asarray((rng.random((B, T)) < 0.4) * coords.segment_ids, np.float32)
        model_args = dict(types=draw(cfg.types, B, T))
        targets = draw(cfg.classes, B) if cfg.classes else targets
    else:
        source = draw(cfg.vocab, B, S)
        targets = draw(cfg.vocab, B, T)
        model_args = dict(source=EncoderInput(source, make_padded_coords(source, (9, S, 5))))
    return TaskInputs(tokens, coords, targets, jnp.asarray(weights), model_args)


def run_transformers(cfg: ModelConfig, model, t: TaskInputs):
    """Run the transformers model: its output has `loss` and `logits`."""
    labels = np.where(t.weights, t.targets, -100) if t.targets.ndim == 2 else t.targets
    args = dict(input_ids=t.tokens, labels=labels)
    if cfg.family == "decoder":
        args["labels"] = t.tokens  # transformers shifts labels itself
    elif cfg.family == "encoder":
        args |= dict(attention_mask=t.coords.segment_ids, token_type_ids=t.model_args["types"])
    else:
        source = t.model_args["source"]
        args |= dict(input_ids=source.tokens, attention_mask=source.coords.segment_ids)
        args |= dict(decoder_input_ids=t.tokens)
    return model(**{k: torch.tensor(np.asarray(x), dtype=torch.long) for k, x in args.items()})


def run_jaxgpt(cfg: ModelConfig, t: TaskInputs, params):
    """Return (mean loss in nats, (logits, hidden states)) of jaxgpt."""
    if cfg.classes:
        scores = build(cfg).apply(
            {"params": params}, t.tokens, t.coords, method="classify", **t.model_args
        )
        return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(B), t.targets]), (scores, None)
    hidden, _ = build(cfg).apply({"params": params}, t.tokens, t.coords, **t.model_args)
    loss, sums = vocabulary_loss(hidden, make_head(cfg, params), t.targets, t.weights, chunk=12)
    return loss / sums["weight"], (compute_logits(cfg, params, hidden), hidden)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            # With weights of this size attention and activations are far from linear.
            is_scale = x.ndim == 1 and name.endswith("weight")
            x.copy_(float(is_scale) + 0.2 * torch.randn(x.shape, generator=generator))


class Pair(NamedTuple):
    """One model in both libraries, with logits, loss and gradients."""

    cfg: ModelConfig
    task: TaskInputs
    rows: list
    names: list[str]  # of the parameters in transformers
    params: dict
    hidden: jax.Array | None
    actual: dict
    expected: dict


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    cfg, model, rows = CASES[request.param]()
    model.eval()
    randomize(model)
    task = make_task(cfg)
    out = run_transformers(cfg, model, task)
    out.loss.backward()
    named = dict(model.named_parameters())
    params = convert_arrays(rows, {k: x.detach().numpy() for k, x in named.items()}, cfg)
    zeros = convert_arrays(rows, {k: np.zeros(x.shape) for k, x in named.items()}, cfg)
    gradients = convert_arrays(rows, {k: x.grad.numpy() for k, x in named.items()}, cfg)
    expected = dict(
        logits=out.logits.detach().numpy(),
        loss=out.loss.item(),
        # The difference removes the constants of affine rearrangements.
        gradients=jax.tree.map(jnp.subtract, gradients, zeros),
    )
    run = jax.jit(jax.value_and_grad(partial(run_jaxgpt, cfg, task), has_aux=True))
    (loss, (scores, hidden)), gradients = run(params)
    actual = dict(logits=scores, loss=loss, gradients=gradients)
    return Pair(cfg, task, rows, list(named), params, hidden, actual, expected)


def test_every_weight_of_jaxgpt_has_a_counterpart_in_transformers(pair):
    chex.assert_trees_all_equal_shapes_and_dtypes(pair.params, abstract_params(pair.cfg)[0])


def test_every_weight_of_transformers_has_a_counterpart_in_jaxgpt(pair):
    names = {name for row in locate_weights(pair.rows, pair.names, pair.cfg) for name in row.names}
    assert names == set(pair.names)


def test_logits_agree(pair):
    actual, expected = pair.actual["logits"], pair.expected["logits"]
    assert expected.std() > 0.15  # the logits are not trivially small
    is_token = np.asarray(pair.task.coords.segment_ids if actual.ndim == 3 else np.ones(B)) > 0
    # Two float32 implementations of two layers, on values up to 10.
    np.testing.assert_allclose(actual[is_token], expected[is_token], atol=1e-4)


def test_losses_agree(pair):
    np.testing.assert_allclose(pair.actual["loss"], pair.expected["loss"], rtol=1e-5)


def test_gradients_of_all_parameters_agree(pair):
    actual, expected = pair.actual["gradients"], pair.expected["gradients"]
    chex.assert_trees_all_close(actual, expected, atol=1e-4, rtol=1e-3)

    def relative_error(path, a, b):
        # Softmax is invariant to the bias of the keys: its gradient is rounding error.
        if [key.key for key in path][-2:] == ["k", "b"]:
            return 0.0
        return float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + 1e-9))

    errors = jax.tree.map_with_path(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < 1e-3, errors
    nonzero = [x for x in jax.tree.leaves(expected) if np.abs(x).max() > 1e-5]
    assert len(nonzero) > 0.8 * len(jax.tree.leaves(expected))


@partial(jax.jit, static_argnames="cfg")
def decode(cfg: ModelConfig, params, tokens, coords: Coords, cache, model_args):
    return build(cfg).apply({"params": params}, tokens, coords, cache, **model_args)


def test_decoding_from_prompts_of_different_length_gives_the_same_hidden_states(pair):
    cfg, task = pair.cfg, pair.task
    if cfg.family == "encoder":
        pytest.skip("an encoder does not decode")
    lengths = np.array([6, 4, 1])
    rows = np.arange(B)[:, None]
    cache = init_cache(cfg, B, slots=16, source=S if task.model_args else 0)
    model_args, steps = task.model_args, [np.arange(-6, 0), *([i] for i in range(5))]
    for step in steps:  # left-padded prompts, then one token at a time
        positions = lengths[:, None] + np.array(step)
        is_token = positions >= 0
        positions = np.maximum(positions, 0)
        coords = Coords(jnp.asarray(positions), jnp.asarray(is_token, jnp.int32))
        hidden, cache = decode(
            cfg, pair.params, task.tokens[rows, positions], coords, cache, model_args
        )
        expected = np.asarray(pair.hidden)[rows, positions]
        # The same float32 sums in another order, through two to four layers.
        np.testing.assert_allclose(hidden[is_token], expected[is_token], atol=1e-5, rtol=1e-4)
        model_args = {}  # the source is encoded once
