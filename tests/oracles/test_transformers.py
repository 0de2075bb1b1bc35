"""The same random weights in transformers (torch) and here give the same model."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import whole
from oracles.models import CASES
from oracles.weights import as_ours, places

from jaxgpt.config import ModelConfig
from jaxgpt.model import Coords, Source, abstract_params, build, head, init_cache, logits
from jaxgpt.objectives import vocabulary_loss

B, T, S = 3, 20, 14


class Task(NamedTuple):
    """What a model is asked: int32 [B T] each, `weights` float32, source [B S]."""

    tokens: jax.Array
    at: Coords
    targets: jax.Array  # [B] classes for a classifier
    weights: jax.Array  # which targets count
    more: dict  # further arguments of the model: types, source


def padded(tokens, lengths) -> Coords:
    """The coordinates of rows that end after `lengths` tokens."""
    at = whole(tokens)
    return at._replace(document=jnp.asarray(at.position < jnp.array(lengths)[:, None], jnp.int32))


def task(cfg: ModelConfig) -> Task:
    rng = np.random.default_rng(0)

    def draw(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

    tokens = draw(cfg.vocab, B, T)
    at, weights, more = whole(tokens), np.ones((B, T), np.float32), {}
    if cfg.family == "decoder":
        targets, weights[:, -1] = jnp.roll(tokens, -1, axis=1), 0
    elif cfg.family == "encoder":
        at, targets = padded(tokens, (T, 13, 7)), draw(cfg.vocab, B, T)
        weights = np.asarray((rng.random((B, T)) < 0.4) * at.document, np.float32)
        more = dict(types=draw(cfg.types, B, T))
        targets = draw(cfg.classes, B) if cfg.classes else targets
    else:
        source = draw(cfg.vocab, B, S)
        targets = draw(cfg.vocab, B, T)
        more = dict(source=Source(source, padded(source, (9, S, 5))))
    return Task(tokens, at, targets, jnp.asarray(weights), more)


def ask_theirs(cfg: ModelConfig, model, t: Task):
    """Their outcome, with `loss` and `logits`, where the loss is their own too."""
    labels = np.where(t.weights, t.targets, -100) if t.targets.ndim == 2 else t.targets
    args = dict(input_ids=t.tokens, labels=labels)
    if cfg.family == "decoder":
        args["labels"] = t.tokens  # they shift by themselves
    elif cfg.family == "encoder":
        args |= dict(attention_mask=t.at.document, token_type_ids=t.more["types"])
    else:
        source = t.more["source"]
        args |= dict(input_ids=source.tokens, attention_mask=source.at.document)
        args |= dict(decoder_input_ids=t.tokens)
    return model(**{k: torch.tensor(np.asarray(x), dtype=torch.long) for k, x in args.items()})


def ask_ours(cfg: ModelConfig, t: Task, params):
    """(mean loss in nats, (scores, hidden states))."""
    if cfg.classes:
        scores = build(cfg).apply({"params": params}, t.tokens, t.at, method="classify", **t.more)
        return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(B), t.targets]), (scores, None)
    hidden, _ = build(cfg).apply({"params": params}, t.tokens, t.at, **t.more)
    loss, sums = vocabulary_loss(hidden, head(cfg, params), t.targets, t.weights, chunk=12)
    return loss / sums.weight, (logits(cfg, params, hidden), hidden)


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            # Weights of this size make attention and activations far from linear.
            is_scale = x.ndim == 1 and name.endswith("weight")
            x.copy_(float(is_scale) + 0.2 * torch.randn(x.shape, generator=generator))


class Pair(NamedTuple):
    """Logits, loss and gradients of both."""

    cfg: ModelConfig
    task: Task
    rows: list
    names: list[str]  # of their parameters
    params: dict
    hidden: jax.Array | None
    ours: dict
    theirs: dict


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    cfg, model, rows = CASES[request.param]()
    model.eval()
    randomise(model)
    asked = task(cfg)
    out = ask_theirs(cfg, model, asked)
    out.loss.backward()
    named = dict(model.named_parameters())
    params = as_ours(rows, {k: x.detach().numpy() for k, x in named.items()}, cfg)
    zeros = as_ours(rows, {k: np.zeros(x.shape) for k, x in named.items()}, cfg)
    gradients = as_ours(rows, {k: x.grad.numpy() for k, x in named.items()}, cfg)
    theirs = dict(
        logits=out.logits.detach().numpy(),
        loss=out.loss.item(),
        gradients=jax.tree.map(jnp.subtract, gradients, zeros),  # the rows' constants drop out
    )
    run = jax.jit(jax.value_and_grad(partial(ask_ours, cfg, asked), has_aux=True))
    (loss, (scores, hidden)), gradients = run(params)
    ours = dict(logits=scores, loss=loss, gradients=gradients)
    return Pair(cfg, asked, rows, list(named), params, hidden, ours, theirs)


def test_every_weight_of_ours_has_its_place_in_theirs(pair):
    chex.assert_trees_all_equal_shapes_and_dtypes(pair.params, abstract_params(pair.cfg)[0])


def test_every_weight_of_theirs_has_its_place_in_ours(pair):
    placed = {name for place in places(pair.rows, pair.names, pair.cfg) for name in place[1]}
    assert placed == set(pair.names)


def test_logits_agree(pair):
    ours, theirs = pair.ours["logits"], pair.theirs["logits"]
    assert theirs.std() > 0.15  # there is something to compare
    is_token = np.asarray(pair.task.at.document if ours.ndim == 3 else np.ones(B)) > 0
    # Two float32 implementations of two layers, on values up to 10.
    np.testing.assert_allclose(ours[is_token], theirs[is_token], atol=1e-4)


def test_losses_agree(pair):
    np.testing.assert_allclose(pair.ours["loss"], pair.theirs["loss"], rtol=1e-5)


def test_gradients_of_all_parameters_agree(pair):
    ours, theirs = pair.ours["gradients"], pair.theirs["gradients"]
    chex.assert_trees_all_close(ours, theirs, atol=1e-4, rtol=1e-3)

    def relative(path, a, b):
        # The bias of the keys has no gradient but rounding: softmax does not see it.
        if [key.key for key in path][-2:] == ["k", "b"]:
            return 0.0
        return float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + 1e-9))

    worst = jax.tree.map_with_path(relative, ours, theirs)
    assert max(jax.tree.leaves(worst)) < 1e-3, worst
    moved = [x for x in jax.tree.leaves(theirs) if np.abs(x).max() > 1e-5]
    assert len(moved) > 0.8 * len(jax.tree.leaves(theirs))


@partial(jax.jit, static_argnames="cfg")
def decode(cfg: ModelConfig, params, tokens, at: Coords, cache, more):
    return build(cfg).apply({"params": params}, tokens, at, cache, **more)


def test_decoding_from_prompts_of_different_length_gives_the_same_hidden_states(pair):
    cfg, asked = pair.cfg, pair.task
    if cfg.family == "encoder":
        pytest.skip("an encoder does not decode")
    lengths = np.array([6, 4, 1])
    rows = np.arange(B)[:, None]
    cache = init_cache(cfg, B, slots=16, source=S if asked.more else 0)
    more, steps = asked.more, [np.arange(-6, 0), *([i] for i in range(5))]
    for step in steps:  # the prompts, padded on the left, and then a token each
        place = lengths[:, None] + np.array(step)
        is_token = place >= 0
        place = np.maximum(place, 0)
        at = Coords(jnp.asarray(place), jnp.asarray(is_token, jnp.int32))
        hidden, cache = decode(cfg, pair.params, asked.tokens[rows, place], at, cache, more)
        wanted = np.asarray(pair.hidden)[rows, place]
        # The same float32 sums in another order, through two to four layers.
        np.testing.assert_allclose(hidden[is_token], wanted[is_token], atol=1e-5, rtol=1e-4)
        more = {}  # the source is read once
