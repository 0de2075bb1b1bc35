"""Losses on whole texts: preferences, rewards, and the distribution of a teacher.

What they need of every token, its log-probability or its divergence from a teacher, is computed in
chunks of tokens and again in the backward pass: logits of all tokens, float32 [B T V], are never in
memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgpt.backend import get_backend
from jaxgpt.config import DistillConfig, OnlineConfig, PreferenceConfig, TrainConfig
from jaxgpt.data import Batch
from jaxgpt.model import Coords, Head, make_head
from jaxgpt.sharding import constrain


class Frozen(NamedTuple):
    """Another model that a loss reads, and that is not trained: a teacher, or a reference."""

    model: Any  # the module, which is static
    params: Any


def map_token_chunks(compute: Callable, V: int, chunk: int, *arrays: jax.Array) -> Any:
    """Apply a function of tokens in chunks, which are computed again in the backward pass.

    Args:
        compute: from arrays [B C ...] to arrays [B C].
        V: numbers that it makes per token, which bounds the tokens of a chunk.
        chunk: tokens per chunk; 0 chooses by size. The result does not depend on it.
        arrays: [B T ...].

    Returns:
        What `compute` returns, [B T] each.
    """
    B, T = arrays[0].shape[:2]
    most = chunk or max(1, get_backend().max_chunk_scores // V)
    count = next(n for n in range(1, T + 1) if T % n == 0 and (B * (T // n) <= most or n == T))
    parts = [jnp.moveaxis(x.reshape(B, count, T // count, *x.shape[2:]), 1, 0) for x in arrays]
    found = jax.lax.map(jax.checkpoint(lambda part: compute(*part)), tuple(parts))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T), found)


def compute_logprobs(
    hidden: jax.Array, head: Head, targets: jax.Array, chunk: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability of every target, and whether it is the likeliest: [B T] each.

    Args:
        hidden: [B T D]. targets: int32 [B T].
        head: the output head, over a vocabulary of V.
        chunk: as for `map_token_chunks`.
    """
    chex.assert_shape(targets, hidden.shape[:2])

    def compute(hidden, targets):
        scores = constrain(head(hidden), "BTV")
        hit = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return hit - jax.nn.logsumexp(scores, axis=-1), hit >= jnp.max(scores, axis=-1)

    return map_token_chunks(compute, head.table.shape[0], chunk, hidden, targets)


def compute_divergences(
    hidden: jax.Array,
    head: Head,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    temperature: float,
    chunk: int = 0,
) -> jax.Array:
    """Return T² KL(teacher ‖ student) of every token at a temperature T, float32 [B T].

    Args:
        hidden, teacher_hidden: [B T D], of widths of their own.
        head, teacher_head: over the same vocabulary.
        temperature: that both distributions are softened by.
        chunk: as for `map_token_chunks`.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, with its factor T².
    """

    def compute(hidden, teacher_hidden):
        student = jax.nn.log_softmax(constrain(head(hidden), "BTV") / temperature)
        teacher = jax.nn.log_softmax(constrain(teacher_head(teacher_hidden), "BTV") / temperature)
        return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)

    arrays = hidden, jax.lax.stop_gradient(teacher_hidden)
    return map_token_chunks(compute, 2 * head.table.shape[0], chunk, *arrays)


def to_jax_arrays(batch: Batch) -> Any:
    """Return a batch of jax.Array."""
    return jax.tree.map(jnp.asarray, batch)


def apply_decoder(model, params, batch: Any, rngs: dict) -> tuple[jax.Array, jax.Array]:
    """Return the hidden states of a batch, [B T D], and the sum of its auxiliary losses []."""
    coords = Coords(batch.positions, batch.segment_ids, batch.prefix)
    (hidden, _), aux = model.apply(
        {"params": params}, batch.tokens, coords, rngs=rngs, mutable=["losses"]
    )
    return hidden, sum(map(jnp.sum, jax.tree.leaves(aux)), jnp.float32(0))


def sum_completions(model, params, batch: Any, rngs: dict, chunk: int):
    """Return Σ log p of the tokens that count of both documents of each row, float32 [B 2].

    And the sum of the auxiliary losses [].
    """
    hidden, aux = apply_decoder(model, params, batch, rngs)
    logprobs, _ = compute_logprobs(hidden, make_head(model.cfg, params), batch.targets, chunk)
    is_document = batch.segment_ids[..., None] == jnp.arange(1, 3)  # [B T 2]
    counted = is_document * batch.weights[..., None]
    return jnp.einsum("BT,BTN->BN", logprobs, counted), aux


# --- preferences: a function of the margin, scaled by beta where the paper has it ---


def dpo(margin: jax.Array, cfg: PreferenceConfig) -> jax.Array:
    """Return -log σ(β margin); with label smoothing, as if that fraction were swapped.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; Mitchell 2023, "A note on DPO with
    noisy preferences".
    """
    wrong = cfg.label_smoothing
    right = -jax.nn.log_sigmoid(cfg.beta * margin)
    return (1 - wrong) * right - wrong * jax.nn.log_sigmoid(-cfg.beta * margin)


def ipo(margin: jax.Array, cfg: PreferenceConfig) -> jax.Array:
    """Return (margin - 1 / (2 β))²; with label smoothing, as if that fraction were swapped.

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    wrong, goal = cfg.label_smoothing, 1 / (2 * cfg.beta)
    return (1 - wrong) * jnp.square(margin - goal) + wrong * jnp.square(-margin - goal)


PREFERENCE_LOSSES: dict[str, Callable[[jax.Array, PreferenceConfig], jax.Array]] = {
    "dpo": dpo,
    "ipo": ipo,
}


def preference_loss(
    model, params, batch: Batch, rngs, cfg: TrainConfig, *, settings: PreferenceConfig
):
    """Prefer the first document of every row to the second, relative to a reference model.

    The reference's log-probabilities are `batch.reference` [B 2], computed before training.

    Returns:
        (summed loss [], Sums over pairs). Besides the loss: `margin`, β times by how much more the
        log-probability of the chosen text has risen than that of the rejected one; and
        `chosen_logprob`, which often falls while the margin rises. A pair is correct if its margin
        is above 0, and half of one at 0, as before the first step.
    """
    arrays = to_jax_arrays(batch)
    chex.assert_shape(arrays.reference, (arrays.tokens.shape[0], 2))
    policy, aux = sum_completions(model, params, arrays, rngs, cfg.loss_chunk)
    gain = policy - arrays.reference  # [B 2]
    margin = gain[:, 0] - gain[:, 1]
    is_pair = jnp.any(arrays.segment_ids > 0, axis=1).astype(jnp.float32)  # [B]
    losses = PREFERENCE_LOSSES[settings.loss](margin, settings)
    weight, nats = jnp.sum(is_pair), jnp.sum(is_pair * losses)
    sums = dict(
        nats=nats,
        weight=weight,
        correct=jnp.sum(is_pair * (1 + jnp.sign(margin)) / 2),
        margin=jnp.sum(is_pair * settings.beta * margin),
        chosen_logprob=jnp.sum(is_pair * policy[:, 0]),
    )
    loss = nats + cfg.balance * aux * weight
    return loss, sums | {"loss": loss}


# --- rewards ---


def policy_loss(
    model, params, batch: Batch, rngs, cfg: TrainConfig, *, settings: OnlineConfig, frozen=None
):
    """Make texts likelier by their advantage: REINFORCE with the mean of a group as baseline.

    `batch.reference` [B 2] has the advantage of each text and its reward. A text's tokens are
    averaged, then texts. The held-out loss is minus the mean reward.

    Args:
        frozen: the reference model of the KL penalty; None without one.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1: GRPO with one update per sample, where
    the ratio to the old policy is 1; its estimator of the KL, equation 4.
    """
    arrays = to_jax_arrays(batch)
    hidden, aux = apply_decoder(model, params, arrays, rngs)
    head = make_head(model.cfg, params)
    logprobs, _ = compute_logprobs(hidden, head, arrays.targets, cfg.loss_chunk)
    advantage, reward = arrays.reference[:, 0], arrays.reference[:, 1]  # [B]
    objective, kl = logprobs * advantage[:, None], jnp.zeros_like(logprobs)
    if frozen is not None:
        hidden, _ = apply_decoder(frozen.model, frozen.params, arrays, {})
        there, _ = compute_logprobs(
            hidden, make_head(frozen.model.cfg, frozen.params), arrays.targets, cfg.loss_chunk
        )
        ratio = jax.lax.stop_gradient(there) - logprobs
        kl = jnp.exp(ratio) - ratio - 1
    lengths = jnp.sum(arrays.weights, axis=1)  # [B]
    is_text = (lengths > 0).astype(jnp.float32)
    shares = arrays.weights / jnp.maximum(lengths, 1)[:, None]  # [B T]
    weight, penalty = jnp.sum(is_text), jnp.sum(shares * kl)
    loss = settings.kl * penalty - jnp.sum(shares * objective) + cfg.balance * aux * weight
    rewards = jnp.sum(is_text * reward)
    sums = dict(
        loss=loss,
        nats=-rewards,
        weight=weight,
        correct=jnp.sum(is_text * (reward > 0)),
        reward=rewards,
        kl=penalty,
        answer_tokens=jnp.sum(lengths),
    )
    return loss, sums


# --- a teacher ---


def distill_loss(
    model,
    params,
    batch: Batch,
    rngs,
    cfg: TrainConfig,
    *,
    settings: DistillConfig,
    frozen: Frozen,
):
    """Learn the distribution of a teacher at every token that counts, besides the token itself.

    Returns:
        (summed loss [], Sums): the loss is `distill.weight` of the divergence and the rest of the
        negative log-likelihood; `divergence` is the former, alone, and `nats` the latter.
    """
    arrays = to_jax_arrays(batch)
    hidden, aux = apply_decoder(model, params, arrays, rngs)
    head = make_head(model.cfg, params)
    logprobs, is_best = compute_logprobs(hidden, head, arrays.targets, cfg.loss_chunk)
    there, _ = apply_decoder(frozen.model, frozen.params, arrays, {})
    teacher_head = jax.lax.stop_gradient(make_head(frozen.model.cfg, frozen.params))
    divergences = compute_divergences(
        hidden, head, there, teacher_head, settings.temperature, cfg.loss_chunk
    )
    weight = jnp.sum(arrays.weights)
    nats, divergence = -jnp.sum(arrays.weights * logprobs), jnp.sum(arrays.weights * divergences)
    share = settings.weight
    loss = share * divergence + (1 - share) * nats + cfg.balance * aux * weight
    sums = dict(
        loss=loss,
        nats=nats,
        weight=weight,
        correct=jnp.sum(arrays.weights * is_best),
        divergence=divergence,
    )
    return loss, sums
