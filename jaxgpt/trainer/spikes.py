"""Loss spikes: what one is, found inside the training step, on the devices.

    spike = loss or gradient norm is not finite
            or gradient norm > m · mean gradient norm           m: train.spike_threshold
            or loss > max(m · mean loss, mean loss + 1)

The means are over the last `train.spike_window` steps, of those that were no spikes: plain ones at
first, then with exponentially decreasing weights. A loss that is small, that of a text learned by
heart, is no spike at a multiple of it, so it must also rise by a nat.

From a spike on the step leaves the state as it is, whatever it is called with, until the guard is
reset. The loop need not wait for any step therefore: when it reads the metrics, some steps later,
the state is still that from before the spike, and can be examined. What follows does not depend on
when the loop looks.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import TrainConfig
from jaxgpt.hosts import fetch
from jaxgpt.trainer.state import TrainState

MIN_LOSS_RISE = 1.0  # nats above the mean


class SpikeGuard(NamedTuple):
    """The running means, and the spike that has been found. All are [], float32 or as noted."""

    mean_loss: jax.Array
    mean_grad_norm: jax.Array
    steps: jax.Array  # int32, steps in the means
    skipped: jax.Array  # int32, steps of the run whose updates were left out
    is_tripped: jax.Array  # bool, whether there is a spike, and the state is held
    loss: jax.Array  # of the spike
    grad_norm: jax.Array


DTYPES: tuple[Any, ...] = (
    *(np.float32, np.float32, np.int32, np.int32),
    *(np.bool_, np.float32, np.float32),
)
SAVED = ("mean_loss", "mean_grad_norm", "steps", "skipped")


def add_guard(
    state: TrainState, values: Mapping[str, float], sharding: jax.sharding.Sharding
) -> TrainState:
    """Return the state with a guard that has found nothing yet.

    Args:
        values: of a guard that was saved, see `read_guard`; {} for a new one.
        sharding: that puts a copy on every device.
    """

    def make(name: str, dtype) -> jax.Array:
        value = dtype(values.get(name, 0))
        return jax.make_array_from_callback((), sharding, lambda _: np.asarray(value))

    fields = zip(SpikeGuard._fields, DTYPES, strict=True)
    return state.replace(guard=SpikeGuard(**{name: make(name, dtype) for name, dtype in fields}))


def read_guard(guard: SpikeGuard | None) -> dict[str, float]:
    """Return what of a guard belongs to a checkpoint, as numbers; {} of None."""
    return {name: getattr(fetch(guard), name).item() for name in SAVED} if guard else {}


def skip_step(state: TrainState) -> TrainState:
    """Return the state after the spike at which it is held, with its update left out."""
    sharding = state.step.sharding
    step = np.int32(int(state.step) + 1)
    guard = read_guard(state.guard)
    state = state.replace(step=jax.make_array_from_callback((), sharding, lambda _: step))
    return add_guard(state, guard | {"skipped": guard["skipped"] + 1}, sharding)


def count_updates(state: TrainState) -> jax.Array:
    """Return how many updates the optimizer has made: the steps but those that were skipped."""
    return state.step if state.guard is None else state.step - state.guard.skipped


def guard_step(
    cfg: TrainConfig, old: TrainState, new: TrainState, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Return the new state, or at a spike and after it the old one, and the metrics.

    Args:
        old, new: before and after the update.
        metrics: of the step, with its loss and grad_norm.
    """
    loss, norm = metrics["loss"], metrics["grad_norm"]
    guard = old.guard
    is_spike = _is_spike(cfg, guard, metrics)
    is_held = guard.is_tripped | is_spike
    is_first = is_spike & ~guard.is_tripped

    def average(mean, x):
        share = 1 / jnp.minimum(guard.steps + 1, cfg.spike_window).astype(jnp.float32)
        return jnp.where(is_held, mean, mean + (x - mean) * share)

    new_guard = guard._replace(
        mean_loss=average(guard.mean_loss, loss),
        mean_grad_norm=average(guard.mean_grad_norm, norm),
        steps=jnp.where(is_held, guard.steps, guard.steps + 1),
        is_tripped=is_held,
        loss=jnp.where(is_first, loss, guard.loss),
        grad_norm=jnp.where(is_first, norm, guard.grad_norm),
    )
    kept = {
        name: jax.tree.map(
            lambda before, after: jnp.where(is_held, before, after),
            getattr(old, name),
            getattr(new, name),
        )
        for name in ("step", "params", "opt_state")
    }
    skipped = guard.skipped.astype(jnp.float32)
    return new.replace(guard=new_guard, **kept), metrics | dict(is_spike=is_held, skipped=skipped)


def _is_spike(cfg: TrainConfig, guard: SpikeGuard, metrics) -> jax.Array:
    loss, norm = metrics["loss"], metrics["grad_norm"]
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not cfg.spike_multiple:
        return ~is_finite
    loss_limit, norm_limit = compute_limits(cfg, guard)
    is_high = (loss > loss_limit) | (norm > norm_limit)
    return ~is_finite | (is_high & (guard.steps >= cfg.spike_window))


def compute_limits(cfg: TrainConfig, guard: SpikeGuard) -> tuple[jax.Array, jax.Array]:
    """Return the highest loss and gradient norm that are no spike, once the means are known."""
    multiple = cfg.spike_multiple
    loss_limit = jnp.maximum(multiple * guard.mean_loss, guard.mean_loss + MIN_LOSS_RISE)
    return loss_limit, multiple * guard.mean_grad_norm


def describe_spike(cfg: TrainConfig, guard: SpikeGuard) -> str:
    """Return in words what a guard has found."""
    found = fetch(guard)
    for name, value in (("loss", found.loss), ("gradient norm", found.grad_norm)):
        if not np.isfinite(value):
            return f"the {name} is {value}"
    loss_limit, norm_limit = map(float, compute_limits(cfg, found))
    if cfg.spike_multiple and found.steps >= cfg.spike_window:
        if found.loss > loss_limit:
            return f"the loss is {found.loss:.4g}, and its mean {found.mean_loss:.4g}"
        if found.grad_norm > norm_limit:
            return f"the gradient norm is {found.grad_norm:.4g}, and its mean " + (
                f"{found.mean_grad_norm:.4g}"
            )
    raise AssertionError(f"no spike: {found}")
