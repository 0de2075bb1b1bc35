"""The training step and the evaluation step: pure functions of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxgpt.backend import get_backend
from jaxgpt.config import Config, TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.model import abstract_params
from jaxgpt.model.capture import find_groups
from jaxgpt.objectives import OBJECTIVES, Loss, Sums, compute_own_means
from jaxgpt.quantization import check_unquantized
from jaxgpt.selection import merge, select, select_letters
from jaxgpt.sharding import constrain
from jaxgpt.trainer.norms import compute_layer_norms
from jaxgpt.trainer.spikes import count_updates, guard_step
from jaxgpt.trainer.state import FrozenBase, TrainState
from jaxgpt.tuning_losses import Frozen

# By name, float32 [] each:
#
#     loss        nats per token (or text), as minimized
#     nats        nats per token, without label smoothing, z-loss and load balancing
#     accuracy    fraction of tokens predicted correctly
#     tokens      tokens with a weight in the loss
#     grad_norm   before clipping
#     lr          learning rate
#     skipped, is_spike     with a guard: see `jaxgpt.trainer.spikes`
#
# `norms`, with `train.log_norms`, has vectors: see `jaxgpt.trainer.norms`. And there are the
# objective's own metrics (see `jaxgpt.objectives.Sums`).
Metrics = dict[str, jax.Array]


def compute_gradient(
    model: nn.Module,
    cfg: TrainConfig,
    params,
    batch: Batch,
    rng: jax.Array | None,
    selection: Any = None,
    loss_fn: Loss | None = None,
    base: FrozenBase | None = None,
):
    """Compute the gradient of the *summed* loss of a batch, and its sums.

    Args:
        batch: arrays [B T].
        rng: key for dropout, or None for no dropout.
        selection: the parameters to differentiate by (see `jaxgpt.selection`); None for all.
        loss_fn: of `Objective.bind`; None for that of the objective without settings.
        base: what the parameters are adapters of, if they are.

    Returns:
        (gradient like the selected params, Sums).
    """
    rngs = {} if rng is None else {"dropout": rng}
    compute_loss = OBJECTIVES[cfg.objective].loss if loss_fn is None else loss_fn

    def loss(selected):
        full = selected if selection is None else merge(selected, params)
        full = full if base is None else base.attach(full)
        return compute_loss(model, full, batch, rngs, cfg)

    trained = select(params, selection)
    check_unquantized(trained, "training")
    grads, sums = jax.grad(loss, has_aux=True)(trained)
    return grads, sums


def choose_microbatch_count(cfg: Config, params, B: int, T: int) -> int:
    """Choose the number of microbatches of a batch [B T], if `train.accumulate` does not set it."""
    # Expert load is balanced within each microbatch, so their number would change the loss.
    min_tokens = get_backend().find_min_microbatch_tokens(optax.tree.size(params))
    if min_tokens is None or cfg.model.has_experts:
        return 1
    return max(p for p in range(1, B + 1) if B % p == 0 and (p == 1 or B // p * T >= min_tokens))


def accumulate_gradient(
    microbatch_count: int,
    model,
    cfg: TrainConfig,
    params,
    batch: Batch,
    rng: jax.Array | None,
    selection: Any = None,
    loss_fn: Loss | None = None,
    base: FrozenBase | None = None,
):
    """Accumulate `compute_gradient` over microbatches in sequence, with the memory of one of them.

    Gradient accumulation gives the gradient of the whole batch.
    """
    if microbatch_count == 1:
        return compute_gradient(model, cfg, params, batch, rng, selection, loss_fn, base)

    def split(x):  # microbatch i has rows i::microbatch_count, so each one spans all devices
        return x.reshape(-1, microbatch_count, *x.shape[1:]).swapaxes(0, 1)

    def add_microbatch(total, indexed_microbatch):
        index, microbatch = indexed_microbatch
        microbatch = jax.tree.map(lambda x: constrain(x, "BT"[: x.ndim]), microbatch)
        key = None if rng is None else jax.random.fold_in(rng, index)
        grads, sums = compute_gradient(
            model, cfg, params, microbatch, key, selection, loss_fn, base
        )
        return jax.tree.map(jnp.add, total, grads), sums

    zeros = jax.tree.map(jnp.zeros_like, select(params, selection))
    indexed = (jnp.arange(microbatch_count), jax.tree.map(split, batch))
    total, sums = jax.lax.scan(add_microbatch, zeros, indexed)
    return total, jax.tree.map(lambda x: jnp.sum(x, 0), sums)


class Update(NamedTuple):
    """What a training step computes before it applies anything."""

    grads: Any  # of the mean loss, of the parameters that are trained
    sums: Sums
    weight: jax.Array  # float32 [], what the sums are divided by
    updates: Any  # to be added to the parameters that are trained
    opt_state: Any


def make_update(
    cfg: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    selection: Any = None,
    frozen_model: nn.Module | None = None,
) -> Callable[..., Update]:
    """Return the pure function (state, batch [B T], frozen=None) -> Update.

    `frozen` are the parameters of `frozen_model`, a teacher or a reference that the loss reads.
    """

    def compute_update(state: TrainState, batch: Batch, frozen: Any = None) -> Update:
        loss_fn = bind_loss(cfg, frozen_model, frozen)
        has_dropout = cfg.model.has_dropout or cfg.lora.dropout > 0
        rng = jax.random.fold_in(state.rng, state.step) if has_dropout else None
        microbatch_count = cfg.train.accumulate or choose_microbatch_count(
            cfg, (state.params, state.base), *batch.tokens.shape
        )
        grads, sums = accumulate_gradient(
            microbatch_count, model, cfg.train, state.params, batch, rng, selection, loss_fn,
            state.base,
        )  # fmt: skip
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return Update(grads, sums, weight, updates, opt_state)

    return compute_update


def bind_loss(cfg: Config, frozen_model: nn.Module | None, frozen: Any) -> Loss:
    """Return the loss of a config, which may read a frozen model with these parameters."""
    other = None if frozen_model is None or frozen is None else Frozen(frozen_model, frozen)
    return cfg.objective.bind(cfg, other)


def select_trained(cfg: Config) -> Any:
    """Return the selection of the state's parameters that are trained; None if all are."""
    trained = () if cfg.lora.rank else cfg.optimizer.train
    return select_letters(abstract_params(cfg.model)[1], trained) if trained else None


def make_train_step(
    cfg: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    frozen_model: nn.Module | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the training step: a pure function (state, batch [B T]) -> (state, metrics).

    With a frozen model (see `make_update`), its parameters are a third argument.

    Donate the state. If it has a guard (see `jaxgpt.trainer.spikes`), a spike leaves it as it is.
    """
    selection = select_trained(cfg)
    compute_update = make_update(cfg, model, optimizer, selection, frozen_model)

    def train_step(state: TrainState, batch: Batch, frozen: Any = None):
        grads, sums, weight, updates, opt_state = compute_update(state, batch, frozen)
        params = optax.apply_updates(select(state.params, selection), updates)
        if selection is not None:
            params = merge(params, state.params)
        metrics = dict(
            loss=sums["loss"] / weight,
            nats=sums["nats"] / weight,
            accuracy=sums["correct"] / weight,
            tokens=sums["weight"],
            grad_norm=optax.tree.norm(grads),
            lr=jnp.asarray(schedule(count_updates(state)), jnp.float32),
        )
        metrics |= compute_own_means(sums, weight)
        if cfg.train.log_norms:
            groups = find_groups(abstract_params(cfg.model)[0])
            norms = dict(grad=grads, param=state.params)
            metrics["norms"] = {k: compute_layer_norms(x, groups) for k, x in norms.items()}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if state.guard is None:
            return new, metrics
        return guard_step(cfg.train, state, new, metrics)

    return train_step


def make_eval_step(
    cfg: Config, model: nn.Module, frozen_model: nn.Module | None = None
) -> Callable[..., Sums]:
    """Return the pure function (params, batch [B T], frozen=None) -> Sums, without dropout."""

    def eval_step(params, batch: Batch, frozen: Any = None) -> Sums:
        loss_fn = bind_loss(cfg, frozen_model, frozen)
        return loss_fn(model, params, batch, {}, cfg.train)[1]

    return eval_step
