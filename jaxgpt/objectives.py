"""Training objectives, and the cross-entropy loss over the vocabulary.

The logits of all tokens, float32 [N V], are the largest array of a training step (GPT-2 at 64 x
1024: 13 GB), so they are never materialized. `vocabulary_loss` processes the tokens in chunks, and
computes the gradient of a chunk together with its logits: one pass of three matrix products, where
recomputing the logits in the backward pass would need four.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxgpt.backend import get_backend
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data import Batch, chat, tasks
from jaxgpt.model import Coords, EncoderInput, Head, make_head
from jaxgpt.model.kernels.score import MASKED_LOGIT
from jaxgpt.model.products import transpose_copy
from jaxgpt.quantized_array import is_quantized
from jaxgpt.sharding import (
    constrain,
    get_active_mesh,
    get_axis_names,
    make_spec,
    map_shards,
)
from jaxgpt.tuning_losses import Frozen, distill_loss, policy_loss, preference_loss, to_jax_arrays

# The metrics of an objective by name: sums over tokens or texts, float32 [] each, so that parts of
# a batch can be added. Every objective has
#
#     loss       what is minimized: nats, with smoothing and auxiliary losses
#     nats       plain negative log-likelihood, nats
#     weight     tokens that count
#     correct    of these, tokens whose likeliest prediction is right
#
# and may have `confusion` [A A] (texts by true and predicted class), and metrics of its own: their
# sums divided by `weight` are in metrics.jsonl, TensorBoard and the console under the same name.
Sums = dict[str, jax.Array]
SUM_NAMES = ("loss", "nats", "weight", "correct", "confusion")
RESERVED_METRICS = (
    *("accuracy", "tokens", "grad_norm", "lr", "tokens_per_second", "mfu", "eta_seconds"),
    *("perplexity", "bits_per_byte", "kind", "step"),
    *("norms", "is_spike", "skipped"),
)


def compute_own_means(sums: Sums, weight) -> dict[str, Any]:
    """Return the metrics that only this objective has, divided by `weight`.

    Raises:
        ValueError: one is no scalar, or has the name of another metric.
    """
    own = {name: x for name, x in sums.items() if name not in SUM_NAMES}
    for name, x in own.items():
        if name in RESERVED_METRICS or x.shape:
            raise ValueError(
                f"an objective returned the metric {name!r} of shape {list(x.shape)}: a metric is "
                f"a sum of shape [], and its name none of {', '.join(RESERVED_METRICS)}."
            )
    return {name: x / weight for name, x in own.items()}


@jax.custom_vjp
def gather_target_scores(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Gather the scores [N] of the targets, int32 [N], from scores [N V].

    The gradient of `take_along_axis` would be a separate array [N V], mostly 0; by a comparison
    instead, it is fused into the loop that computes the gradient of all scores.
    """
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def _gather_target_scores_forward(scores, targets):
    return gather_target_scores(scores, targets), (targets, scores.shape[-1])


def _gather_target_scores_backward(saved, d_hit):
    targets, V = saved
    return jnp.where(jnp.arange(V) == targets[:, None], d_hit[:, None], 0), None


gather_target_scores.defvjp(_gather_target_scores_forward, _gather_target_scores_backward)


def normalize_in_two_passes(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maximum and log Σ e^score of the rows of [N V]: float32 [N] each."""
    return jnp.max(scores, axis=-1), jax.nn.logsumexp(scores, axis=-1)


@jax.custom_vjp
def normalize_in_one_pass(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `normalize_in_two_passes`, reading the scores once. The maximum has no gradient.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """

    def merge(a, b):
        (max_a, sum_a), (max_b, sum_b) = a, b
        maximum = jnp.maximum(max_a, max_b)
        return maximum, sum_a * jnp.exp(max_a - maximum) + sum_b * jnp.exp(max_b - maximum)

    initial = jnp.float32(MASKED_LOGIT), jnp.float32(0)
    maximum, total = jax.lax.reduce((scores, jnp.ones_like(scores)), initial, merge, (1,))
    return maximum, maximum + jnp.log(total)


def _normalize_forward(scores):
    maximum, log_z = normalize_in_one_pass(scores)
    return (maximum, log_z), (scores, log_z)


def _normalize_backward(saved, cotangents):
    scores, log_z = saved
    return (cotangents[1][:, None] * jnp.exp(scores - log_z[:, None]),)


normalize_in_one_pass.defvjp(_normalize_forward, _normalize_backward)


def chunk_loss(hidden, head: Head, targets, weights, smoothing: float, z_loss: float):
    """Compute the loss of a chunk of tokens.

    Args:
        hidden: [N D] in the compute dtype.
        head: the output head.
        targets: int32 [N]. weights: float32 [N].
        smoothing: fraction of the target spread evenly over the vocabulary.
        z_loss: weight of log(Z)², which keeps the logits from drifting.

    Returns:
        (loss [], Sums).

    Source: label smoothing, Szegedy et al. 2016, arXiv:1512.00567, section 7; z-loss, Chowdhery
    et al. 2022, arXiv:2204.02311, section 5.
    """
    chex.assert_rank(hidden, 2)
    chex.assert_shape([targets, weights], hidden.shape[:1])
    scores = constrain(head(hidden), "NV")
    is_one_pass = get_backend().use_one_pass_normalizer
    maximum, log_z = (normalize_in_one_pass if is_one_pass else normalize_in_two_passes)(scores)
    hit = gather_target_scores(scores, targets)
    nats = log_z - hit
    loss = nats
    if smoothing:
        V = scores.shape[-1] if head.vocab is None else head.vocab
        total = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) < V, scores, 0), axis=-1)
        loss = (1 - smoothing) * nats + smoothing * (log_z - total / V)
    if z_loss:
        loss = loss + z_loss * jnp.square(log_z)
    # A target with the maximum score is the prediction: one comparison instead of an argmax over V.
    correct = hit >= maximum
    total = jnp.sum(weights * loss)
    sums = dict(
        loss=total,
        nats=jnp.sum(weights * nats),
        weight=jnp.sum(weights),
        correct=jnp.sum(weights * correct),
    )
    return total, sums


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
    """Compute the cross-entropy over the vocabulary, in chunks of tokens.

    Args:
        hidden: [B T D] in the compute dtype.
        head: the output head, over a vocabulary of V.
        targets: int32 [B T]. weights: float32 [B T], 0 where a token does not count.
        smoothing, z_loss: see `chunk_loss`.
        chunk: tokens per chunk; 0 chooses by size. The result does not depend on it.

    Returns:
        (loss [], differentiable in hidden and head; Sums, not differentiable).
    """
    B, T, D = hidden.shape
    chex.assert_rank(head.table, 2)
    chex.assert_axis_dimension(head.table, 1, D)
    chex.assert_shape([targets, weights], (B, T))
    chunk = chunk or max(1, get_backend().max_chunk_scores // head.table.shape[0])
    if is_quantized(head.table):
        head = dataclasses.replace(head, table=head.table.astype(hidden.dtype))
    loss = functools.partial(chunk_loss, smoothing=smoothing, z_loss=z_loss)
    return _sum_over_chunks(loss, chunk, hidden, _lay_out_head(head), targets, weights)


def _lay_out_head(head: Head) -> Head:
    """Return the head with its table [V D] padded and transposed as the platform multiplies it."""
    backend, V = get_backend(), head.table.shape[0]
    table: Any = head.table  # plain: see `vocabulary_loss`
    table = constrain(table, "V.")
    if padding := -V % backend.vocab_alignment:
        table = jnp.pad(table, [(0, padding), (0, 0)])
        bias = head.bias if head.bias is None else jnp.pad(head.bias, (0, padding))
        head = dataclasses.replace(head, bias=bias, vocab=V)
        if head.adapter is not None:
            b = jnp.pad(head.adapter.b, [(0, 0), (0, padding)])
            head = dataclasses.replace(head, adapter=head.adapter.replace(b=b))
    if backend.use_transposed_copies:
        return dataclasses.replace(head, table=transpose_copy(table), letters="DV")
    return dataclasses.replace(head, table=table)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_over_chunks(loss: Callable, chunk: int, hidden, head, targets, weights):
    """Sum `loss` over the tokens of hidden [B T D], targets [B T] and weights [B T]."""

    def add(sums, part):
        h, t, w = part
        _, more = loss(h, head, t, w)
        return jax.tree.map(jnp.add, sums, more), None

    def compute_local(hidden, head, targets, weights):
        chunks = _split_into_chunks(chunk, hidden, targets, weights)
        return None, jax.lax.scan(add, _make_zero_sums(), chunks)[0]

    _, sums = _run_on_shards(compute_local, hidden, head, targets, weights)
    return sums["loss"], sums


def _sum_over_chunks_forward(loss, chunk, hidden, head, targets, weights):
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def compute_local(hidden, head, targets, weights):
        def add(carry, part):
            h, t, w = part
            (_, more), (d_h, d_head) = gradient(h, head, t, w)
            return jax.tree.map(jnp.add, carry, (more, d_head)), d_h

        carry = (_make_zero_sums(), jax.tree.map(jnp.zeros_like, head))
        chunks = _split_into_chunks(chunk, hidden, targets, weights)
        carry, d_hidden = jax.lax.scan(add, carry, chunks)
        return d_hidden.reshape(hidden.shape), carry

    d_hidden, (sums, d_head) = _run_on_shards(compute_local, hidden, head, targets, weights)
    return (sums["loss"], sums), (d_hidden, d_head)


def _sum_over_chunks_backward(loss, chunk, saved, cotangents):
    scale = cotangents[0]
    d_hidden, d_head = jax.tree.map(lambda g: g * scale.astype(g.dtype), saved)
    return d_hidden, d_head, None, None


_sum_over_chunks.defvjp(_sum_over_chunks_forward, _sum_over_chunks_backward)


def _split_into_chunks(chunk: int, *arrays):
    """Reshape [B T ...] to [n N/n ...]: the fewest equal chunks of at most `chunk` tokens."""
    N = math.prod(arrays[0].shape[:2])
    n = next(n for n in range(1, N + 1) if N % n == 0 and N // n <= chunk)
    return tuple(x.reshape(n, N // n, *x.shape[2:]) for x in arrays)


def _run_on_shards(compute_local, hidden, head, targets, weights):
    """Compute (values per token, sum over all tokens) with every device on its own tokens.

    The sums, of which the gradient of the table is large, are all-reduced once: the partitioner
    alone would all-reduce them for every chunk. The vocabulary is left to the partitioner.
    """
    mesh = get_active_mesh()
    if mesh is None:
        return compute_local(hidden, head, targets, weights)
    token_spec = make_spec(targets.shape, "BN", mesh)  # N takes the axes that B leaves unused

    def compute_shard(hidden, head, targets, weights):
        own, sums = compute_local(hidden, head, targets, weights)
        axes = tuple(axis for entry in token_spec for axis in get_axis_names(entry))
        return own, jax.lax.psum(sums, axes)

    replicated = PartitionSpec()
    hidden_spec = PartitionSpec(*token_spec, None)
    in_specs = (hidden_spec, replicated, token_spec, token_spec)
    return map_shards(compute_shard, in_specs, (hidden_spec, replicated))(
        hidden, head, targets, weights
    )


def _make_zero_sums() -> Sums:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "nats", "weight", "correct")}


# --- losses: (model, params, batch, rngs, cfg) -> (summed loss [], Sums) ---------------------
#
# `rngs` is {"dropout": key} to train with dropout, {} without. Divide by `weight` for means.

Loss = Callable[..., tuple[jax.Array, Sums]]


def next_token_loss(model, params, batch: Batch, rngs, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Predict a target at every token of [B T]: the next token, or the masked one."""
    chex.assert_equal_shape(batch[:5])
    arrays = to_jax_arrays(batch)
    coords = Coords(arrays.positions, arrays.segment_ids, arrays.prefix)
    return _per_token_loss(model, params, arrays, rngs, cfg, coords)


def sequence_to_sequence_loss(
    model, params, batch: Batch, rngs, cfg: TrainConfig
) -> tuple[jax.Array, Sums]:
    """Predict the next token at every token of [B T], given a source [B S]."""
    chex.assert_equal_shape(batch[:5])
    chex.assert_equal_shape(batch.encoder_inputs)
    arrays = to_jax_arrays(batch)
    tokens, *source_coords = arrays.encoder_inputs
    coords = Coords(arrays.positions, arrays.segment_ids)
    source = EncoderInput(tokens, Coords(*source_coords))
    return _per_token_loss(model, params, arrays, rngs, cfg, coords, source=source)


def _per_token_loss(model, params, batch, rngs, cfg, coords: Coords, **more):
    (hidden, _), aux = model.apply(
        {"params": params}, batch.tokens, coords, rngs=rngs, mutable=["losses"], **more
    )
    loss, sums = vocabulary_loss(
        hidden,
        make_head(model.cfg, params),
        batch.targets,
        batch.weights,
        smoothing=cfg.label_smoothing,
        z_loss=cfg.z_loss,
        chunk=cfg.loss_chunk,
    )
    return _add_aux_loss(loss, sums, aux, cfg)


def classification_loss(
    model, params, batch: Batch, rngs, cfg: TrainConfig
) -> tuple[jax.Array, Sums]:
    """Predict the class of every text of [B T]; targets and weights are [B]."""
    chex.assert_shape([batch.targets, batch.weights], batch.tokens.shape[:1])
    arrays = to_jax_arrays(batch)
    coords = Coords(arrays.positions, arrays.segment_ids)
    scores, aux = model.apply(
        {"params": params}, arrays.tokens, coords, rngs=rngs, mutable=["losses"], method="classify"
    )
    log_p = jax.nn.log_softmax(scores)  # [B A]
    weights, one_hot_targets = arrays.weights, jax.nn.one_hot(arrays.targets, scores.shape[-1])
    nats = -jnp.sum(one_hot_targets * log_p, axis=-1)
    smooth = cfg.label_smoothing
    loss = (1 - smooth) * nats - smooth * jnp.mean(log_p, axis=-1)
    predicted = jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1])
    confusion = jnp.einsum("B,BA,BG->AG", weights, one_hot_targets, predicted)
    total = jnp.sum(weights * loss)
    sums = dict(
        loss=total,
        nats=jnp.sum(weights * nats),
        weight=jnp.sum(weights),
        correct=jnp.trace(confusion),
        confusion=confusion,
    )
    return _add_aux_loss(total, sums, aux, cfg)


def _add_aux_loss(loss, sums: Sums, aux, cfg: TrainConfig) -> tuple[jax.Array, Sums]:
    """Add the auxiliary losses of the layers: the load-balancing loss of experts."""
    aux_loss = sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))
    loss = loss + cfg.balance * aux_loss * sums["weight"]
    return loss, sums | {"loss": loss}


@dataclass(frozen=True)
class Objective:
    """A training objective: its task (batches), loss, and the model family that it trains."""

    task: type[tasks.Task]
    loss: Loss
    family: str
    loss_unit: str = "token"  # what the mean loss is taken over
    is_text: bool = False  # targets are the text itself: bits per byte are defined
    is_chat: bool = False  # texts are conversations
    settings: str = ""  # the section of the config that the loss is given
    reads_frozen: bool = False  # whether the loss can read another model
    can_distill: bool = False  # whether a teacher's distribution can be learned too

    def bind(self, cfg: Config, frozen: Frozen | None = None) -> Loss:
        """Return the loss of a config, with its settings and the other model that it reads.

        Args:
            frozen: a teacher or a reference; without a teacher, that of the text alone.
        """
        if cfg.distill.teacher and frozen is not None:
            return functools.partial(distill_loss, settings=cfg.distill, frozen=frozen)
        if not self.settings:
            return self.loss
        more = {"frozen": frozen} if self.reads_frozen else {}
        return functools.partial(self.loss, settings=getattr(cfg, self.settings), **more)


OBJECTIVES = {
    "causal": Objective(
        tasks.CausalTask, next_token_loss, "decoder", is_text=True, can_distill=True
    ),
    "prefix": Objective(tasks.PrefixTask, next_token_loss, "decoder", can_distill=True),
    "masked": Objective(tasks.MaskedTask, next_token_loss, "encoder"),
    "span": Objective(tasks.SpanTask, sequence_to_sequence_loss, "encoder_decoder"),
    "pairs": Objective(tasks.PairTask, sequence_to_sequence_loss, "encoder_decoder"),
    "classify": Objective(tasks.ClassifyTask, classification_loss, "encoder", loss_unit="text"),
    "chat": Objective(chat.ChatTask, next_token_loss, "decoder", is_chat=True, can_distill=True),
    "preference": Objective(
        chat.PreferenceTask,
        preference_loss,
        "decoder",
        loss_unit="pair",
        is_chat=True,
        settings="preference",
    ),
    "online": Objective(
        chat.OnlineTask,
        policy_loss,
        "decoder",
        loss_unit="answer",
        is_chat=True,
        settings="online",
        reads_frozen=True,
    ),
}
