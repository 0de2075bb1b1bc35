"""One step of training, one step of evaluation: pure functions of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config, TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.objectives import OBJECTIVES, Sums
from jaxgpt.sharding import constrain, is_one_cpu
from jaxgpt.trainer.state import TrainState

# Tokens. A CPU works faster on parts that stay near it, and needs less memory for them; but the
# gradients of every part are added up. Small models have more room for tokens.
PART, PART_OF_SMALL = 1024, 2048
SMALL = 2**22  # parameters


class Metrics(NamedTuple):
    """What a training step tells, float32 [] each."""

    loss: jax.Array  # nats per token (or text), as minimised
    nats: jax.Array  # nats per token, without smoothing, z-loss and balance
    accuracy: jax.Array  # share of tokens guessed right
    tokens: jax.Array  # tokens that counted
    grad_norm: jax.Array  # before clipping
    lr: jax.Array


def gradient(model: nn.Module, cfg: TrainConfig, params, batch: Batch, rng: jax.Array | None):
    """The gradient of the *summed* loss of a batch, and its sums.

    Args:
        batch: arrays [B T].
        rng: key for dropout, or None for none.

    Returns:
        (gradient like params, Sums).
    """
    rngs = {} if rng is None else {"dropout": rng}

    def loss(params):
        return OBJECTIVES[cfg.objective].loss(model, params, batch, rngs, cfg)

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return grads, sums


def parts_of(cfg: Config, params, B: int, T: int) -> int:
    """How many parts a batch [B T] is divided in, where `train.accumulate` leaves it open."""
    # Experts are asked to be evenly busy in every part, so that parts would change what is learned.
    if not is_one_cpu() or cfg.model.has_experts:
        return 1
    least = PART if optax.tree.size(params) > SMALL else PART_OF_SMALL
    return max(p for p in range(1, B + 1) if B % p == 0 and (p == 1 or B // p * T >= least))


def accumulated_gradient(
    parts: int, model, cfg: TrainConfig, params, batch: Batch, rng: jax.Array | None
):
    """As `gradient`, over so many parts one after the other: memory of one part."""
    if parts == 1:
        return gradient(model, cfg, params, batch, rng)

    def cut(x):  # part i takes rows i::parts, so that each part lies on all devices
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        index, piece = part
        piece = jax.tree.map(lambda x: constrain(x, "BT"[: x.ndim]), piece)
        key = None if rng is None else jax.random.fold_in(rng, index)
        grads, sums = gradient(model, cfg, params, piece, key)
        return jax.tree.map(jnp.add, total, grads), sums

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, sums = jax.lax.scan(add, zeros, (jnp.arange(parts), jax.tree.map(cut, batch)))
    return total, jax.tree.map(lambda x: jnp.sum(x, 0), sums)


def make_train_step(
    cfg: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, batch [B T]) -> (state, metrics); jit it with the state donated."""

    def train_step(state: TrainState, batch: Batch):
        rng = jax.random.fold_in(state.rng, state.step) if cfg.model.dropout else None
        parts = cfg.train.accumulate or parts_of(cfg, state.params, *batch.tokens.shape)
        grads, sums = accumulated_gradient(parts, model, cfg.train, state.params, batch, rng)
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = Metrics(
            loss=sums.loss / weight,
            nats=sums.nats / weight,
            accuracy=sums.correct / weight,
            tokens=sums.weight,
            grad_norm=optax.tree.norm(grads),
            lr=jnp.asarray(schedule(state.step), jnp.float32),
        )
        return TrainState(state.step + 1, params, opt_state, state.rng), metrics

    return train_step


def make_eval_step(cfg: Config, model: nn.Module) -> Callable[[Any, Batch], Sums]:
    """The pure function (params, batch [B T]) -> Sums, without dropout."""

    def eval_step(params, batch: Batch) -> Sums:
        return cfg.objective.loss(model, params, batch, {}, cfg.train)[1]

    return eval_step
