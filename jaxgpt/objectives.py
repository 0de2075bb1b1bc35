"""What a model is trained to predict, and the loss over the vocabulary.

The scores of all tokens for all words, float32 [N V], are the largest array of a training step
(GPT-2 at 64 x 1024: 13 GB), so no function here makes it whole. `vocabulary_loss` goes through the
tokens in chunks, and takes the gradient of a chunk while its scores are at hand: one pass of three
products, where recomputing the scores in the backward pass would need four.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxgpt.config import TrainConfig
from jaxgpt.data import Batch, tasks
from jaxgpt.model import Coords, Head, Source, head
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import columns
from jaxgpt.sharding import constrain, mesh_in_force, named, on_parts, platform, spec

# Scores per chunk, in numbers. On CPU a chunk should stay near the cache: for [4096 384] x [8192],
# loss and gradient take 462 ms at 2**22 and 553 ms at 2**25. Accelerators want larger products.
CHUNK_SCORES = {"cpu": 2**22}
CHUNK_SCORES_ELSEWHERE = 2**28
ALIGNED = 64  # words: GPT-2 has 50257 of them


class Sums(NamedTuple):
    """Sums over tokens or texts, float32 [] each, so that parts of a batch can simply be added."""

    loss: jax.Array  # what is minimised: nats, with smoothing and z-loss
    nats: jax.Array  # plain negative log-likelihood, nats
    weight: jax.Array  # tokens that count
    correct: jax.Array  # of these, tokens whose likeliest guess was right
    confusion: jax.Array | None = None  # [A A], texts of a class that were taken for another


@jax.custom_vjp
def score_of(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Of scores [N V] those of the targets, int32 [N].

    The gradient of `take_along_axis` would be an array [N V] of its own, mostly 0; by comparison it
    is part of the loop that makes the gradient of all scores.
    """
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def _score_of_forward(scores, targets):
    return score_of(scores, targets), (targets, scores.shape[-1])


def _score_of_backward(saved, d_hit):
    targets, V = saved
    return jnp.where(jnp.arange(V) == targets[:, None], d_hit[:, None], 0), None


score_of.defvjp(_score_of_forward, _score_of_backward)


def two_passes(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maximum and log Σ e^score of the rows of [N V]: float32 [N] each."""
    return jnp.max(scores, axis=-1), jax.nn.logsumexp(scores, axis=-1)


@jax.custom_vjp
def one_pass(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `two_passes`, reading the scores once. The maximum has no gradient.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """

    def join(a, b):
        (top_a, sum_a), (top_b, sum_b) = a, b
        top = jnp.maximum(top_a, top_b)
        return top, sum_a * jnp.exp(top_a - top) + sum_b * jnp.exp(top_b - top)

    nothing = jnp.float32(NEVER), jnp.float32(0)
    top, total = jax.lax.reduce((scores, jnp.ones_like(scores)), nothing, join, (1,))
    return top, top + jnp.log(total)


def _one_pass_forward(scores):
    top, log_z = one_pass(scores)
    return (top, log_z), (scores, log_z)


def _one_pass_backward(saved, cotangents):
    scores, log_z = saved
    return (cotangents[1][:, None] * jnp.exp(scores - log_z[:, None]),)


one_pass.defvjp(_one_pass_forward, _one_pass_backward)
TOP_AND_LOG_SUM = {"gpu": one_pass}  # by platform; a CPU's compiler makes loops of scalars of it


def score_chunk(hidden, head: Head, targets, weights, smoothing: float, z_loss: float):
    """The loss of a few tokens, written out plainly.

    Args:
        hidden: [N D] in the compute dtype.
        head: what scores them.
        targets: int32 [N]. weights: float32 [N].
        smoothing: share of the target spread evenly over the vocabulary.
        z_loss: weight of log(Z)², which keeps the scores from drifting.

    Returns:
        (loss [], Sums).

    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7; z-loss, Chowdhery
    et al. 2022, arXiv:2204.02311, section 5.
    """
    chex.assert_rank(hidden, 2)
    chex.assert_shape([targets, weights], hidden.shape[:1])
    scores = constrain(head(hidden), "NV")
    top, log_z = TOP_AND_LOG_SUM.get(platform(), two_passes)(scores)
    hit = score_of(scores, targets)
    nats = log_z - hit
    loss = nats
    if smoothing:
        words = scores.shape[-1] if head.words is None else head.words
        total = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) < words, scores, 0), axis=-1)
        loss = (1 - smoothing) * nats + smoothing * (log_z - total / words)
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    # A target that nothing beats is the guess: one comparison in place of an argmax over V.
    correct = hit >= top
    total = jnp.sum(weights * loss)
    return total, Sums(total, jnp.sum(weights * nats), jnp.sum(weights), jnp.sum(weights * correct))


def vocabulary_loss(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    weights: jax.Array,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy over the vocabulary, in chunks of tokens.

    Args:
        hidden: [B T D] in the compute dtype.
        head: what scores hidden states, over V words.
        targets: int32 [B T]. weights: float32 [B T], 0 where a token does not count.
        smoothing, z_loss: see `score_chunk`.
        chunk: tokens per chunk; 0 chooses by size. The outcome does not depend on it.

    Returns:
        (loss [], differentiable in hidden and head; Sums, not differentiable).
    """
    B, T, D = hidden.shape
    chex.assert_rank(head.table, 2)
    chex.assert_axis_dimension(head.table, 1, D)
    chex.assert_shape([targets, weights], (B, T))
    scores = CHUNK_SCORES.get(platform(), CHUNK_SCORES_ELSEWHERE)
    chunk = chunk or max(1, scores // head.table.shape[0])
    table, V, letters = constrain(head.table, "V."), head.table.shape[0], "VD"
    if platform() == "cpu":
        table, letters = columns(table), "DV"
    if platform() == "gpu":  # its units multiply at full speed only where rows are aligned
        table = jnp.pad(table, [(0, -V % ALIGNED), (0, 0)])
        bias = head.bias if head.bias is None else jnp.pad(head.bias, (0, -V % ALIGNED))
        head = dataclasses.replace(head, bias=bias, words=V if V % ALIGNED else None)
    head = dataclasses.replace(head, table=table, letters=letters)
    loss = functools.partial(score_chunk, smoothing=smoothing, z_loss=z_loss)
    return _chunked(loss, chunk, hidden, head, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(loss: Callable, chunk: int, hidden, head, targets, weights):
    """Sums `loss` over the tokens of hidden [B T D], targets [B T] and weights [B T]."""

    def add(sums, part):
        h, t, w = part
        _, more = loss(h, head, t, w)
        return jax.tree.map(jnp.add, sums, more), None

    def of_tokens(hidden, head, targets, weights):
        return None, jax.lax.scan(add, _zeros(), _cut(chunk, hidden, targets, weights))[0]

    _, sums = _on_all(of_tokens, hidden, head, targets, weights)
    return sums.loss, sums


def _chunked_forward(loss, chunk, hidden, head, targets, weights):
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def of_tokens(hidden, head, targets, weights):
        def add(carry, part):
            h, t, w = part
            (_, more), (d_h, d_head) = gradient(h, head, t, w)
            return jax.tree.map(jnp.add, carry, (more, d_head)), d_h

        carry = (_zeros(), jax.tree.map(jnp.zeros_like, head))
        carry, d_hidden = jax.lax.scan(add, carry, _cut(chunk, hidden, targets, weights))
        return d_hidden.reshape(hidden.shape), carry

    d_hidden, (sums, d_head) = _on_all(of_tokens, hidden, head, targets, weights)
    return (sums.loss, sums), (d_hidden, d_head)


def _chunked_backward(loss, chunk, saved, cotangents):
    scale = cotangents[0]
    d_hidden, d_head = jax.tree.map(lambda g: g * scale.astype(g.dtype), saved)
    return d_hidden, d_head, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _cut(chunk: int, *arrays):
    """[B T ...] -> [pieces N/pieces ...]: the fewest equal pieces of at most `chunk` tokens."""
    N = math.prod(arrays[0].shape[:2])
    pieces = next(p for p in range(1, N + 1) if N % p == 0 and N // p <= chunk)
    return tuple(x.reshape(pieces, N // pieces, *x.shape[2:]) for x in arrays)


def _on_all(of_tokens, hidden, head, targets, weights):
    """(what each token gets, the sum over all) where every device does its own tokens.

    The sums, of which the gradient of the table is large, cross the network once: the partitioner
    on its own would send them for every chunk. The vocabulary stays with the partitioner.
    """
    mesh = mesh_in_force()
    if mesh is None:
        return of_tokens(hidden, head, targets, weights)
    place = spec(targets.shape, "BN", mesh)  # N takes the axes that B leaves over

    def part(hidden, head, targets, weights):
        own, sums = of_tokens(hidden, head, targets, weights)
        axes = tuple(axis for entry in place for axis in named(entry))
        return own, jax.lax.psum(sums, axes)

    everywhere = PartitionSpec()
    tokens = PartitionSpec(*place, None)
    return on_parts(part, (tokens, everywhere, place, place), (tokens, everywhere))(
        hidden, head, targets, weights
    )


def _zeros() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in range(4)))


# --- losses: (model, params, batch, rngs, cfg) -> (summed loss [], Sums) ---------------------
#
# `rngs` is {"dropout": key} to train with dropout, {} without. Divide by `Sums.weight` for means.

Loss = Callable[[Any, Any, Batch, dict, TrainConfig], tuple[jax.Array, Sums]]


def next_tokens(model, params, batch: Batch, rngs, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Every token of [B T] tells the target of its place: the next one, or the one it hides."""
    chex.assert_equal_shape(batch[:5])
    arrays = _arrays(batch)
    at = Coords(arrays.positions, arrays.segments, arrays.prefix)
    return _over_vocabulary(model, params, arrays, rngs, cfg, at)


def written(model, params, batch: Batch, rngs, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Every token of [B T] tells the next one, having read a source [B S]."""
    chex.assert_equal_shape(batch[:5])
    chex.assert_equal_shape(batch.source)
    arrays = _arrays(batch)
    tokens, *place = arrays.source
    at = Coords(arrays.positions, arrays.segments)
    source = Source(tokens, Coords(*place))
    return _over_vocabulary(model, params, arrays, rngs, cfg, at, source=source)


def _arrays(batch: Batch) -> Any:  # a Batch of jax.Array
    return jax.tree.map(jnp.asarray, batch)


def _over_vocabulary(model, params, batch, rngs, cfg, at: Coords, **more):
    (hidden, _), told = model.apply(
        {"params": params}, batch.tokens, at, rngs=rngs, mutable=["losses"], **more
    )
    loss, sums = vocabulary_loss(
        hidden,
        head(model.cfg, params),
        batch.targets,
        batch.weights,
        smoothing=cfg.label_smoothing,
        z_loss=cfg.z_loss,
        chunk=cfg.loss_chunk,
    )
    return _balanced(loss, sums, told, cfg)


def classes(model, params, batch: Batch, rngs, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Every text of [B T] tells its class; targets and weights are [B]."""
    chex.assert_shape([batch.targets, batch.weights], batch.tokens.shape[:1])
    arrays = _arrays(batch)
    at = Coords(arrays.positions, arrays.segments)
    scores, told = model.apply(
        {"params": params}, arrays.tokens, at, rngs=rngs, mutable=["losses"], method="classify"
    )
    log_p = jax.nn.log_softmax(scores)  # [B A]
    weights, wanted = arrays.weights, jax.nn.one_hot(arrays.targets, scores.shape[-1])
    nats = -jnp.sum(wanted * log_p, axis=-1)
    smooth = cfg.label_smoothing
    loss = (1 - smooth) * nats - smooth * jnp.mean(log_p, axis=-1)
    guessed = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
    confusion = jnp.einsum("B,BA,BG->AG", weights, wanted, guessed)
    total = jnp.sum(weights * loss)
    sums = Sums(
        total,
        jnp.sum(weights * nats),
        jnp.sum(weights),
        jnp.trace(confusion),
        confusion,
    )
    return _balanced(total, sums, told, cfg)


def _balanced(loss, sums: Sums, told, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Adds what the layers want to be small: the uneven load of experts."""
    uneven = sum(map(jnp.sum, jax.tree.leaves(told)), jnp.float32(0))
    loss = loss + cfg.balance * uneven * sums.weight
    return loss, sums._replace(loss=loss)


@dataclass(frozen=True)
class Objective:
    """What is learned: the batches it takes, their loss, and the family of models that can."""

    task: type[tasks.Task]
    loss: Loss
    family: str
    unit: str = "token"  # what is predicted
    is_text: bool = False  # targets are the text itself, so that bits per byte can be told


OBJECTIVES = {
    "causal": Objective(tasks.Causal, next_tokens, "decoder", is_text=True),
    "prefix": Objective(tasks.Prefix, next_tokens, "decoder"),
    "masked": Objective(tasks.Masked, next_tokens, "encoder"),
    "span": Objective(tasks.Span, written, "encoder_decoder"),
    "pairs": Objective(tasks.Pairs, written, "encoder_decoder"),
    "classify": Objective(tasks.Classify, classes, "encoder", unit="text"),
}
