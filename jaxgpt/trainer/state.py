"""The training state: everything that changes during training, as one pytree."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from jaxgpt import sharding
from jaxgpt.backend import get_backend
from jaxgpt.config import Config, ModelConfig
from jaxgpt.model import abstract_params, init_params
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.optimizer import get_state_letters
from jaxgpt.seeds import make_key
from jaxgpt.selection import select_letters


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer and randomness after `step` updates."""

    step: jax.Array  # int32 []
    params: Any  # float32 masters
    opt_state: Any
    rng: jax.Array  # a key that is never used directly, only folded with the step
    guard: Any = None  # a `spikes.SpikeGuard` if the step finds spikes; saved with the progress


def init_state(cfg: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Initialize the training state, identically for a seed on any number of devices."""
    init_key, rng = jax.random.split(make_key(seed))
    params, _ = init_params(cfg, init_key)
    return TrainState(jax.numpy.int32(0), params, optimizer.init(params), rng)


def abstract_state(
    cfg: ModelConfig, optimizer, seed: int, mesh: Mesh, trained: Sequence[str] = ()
) -> TrainState:
    """Return the result of `init_state` as shapes and shardings in place of arrays.

    Optimizer moments are sharded like their parameters; state that belongs to no parameter is
    small, and replicated. `trained`: the patterns `optimizer.train` that the optimizer is made for.
    """
    shapes = jax.eval_shape(lambda: init_state(cfg, optimizer, seed))
    _, letters = abstract_params(cfg)
    moments = get_state_letters(optimizer, shapes.opt_state, select_letters(letters, trained))
    letters = shapes.replace(step="", params=letters, opt_state=moments, rng="")
    return jax.tree.map(_add_sharding, shapes, sharding.make_shardings(shapes, letters, mesh))


def _add_sharding(x: jax.ShapeDtypeStruct, target: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)


def make_abstract_state(cfg: Config, mesh: Any) -> tuple[Any, Any, TrainState]:
    """Return the optimizer of a config, its schedule, and the state as shapes and shardings.

    Args:
        mesh: whose devices need not exist.
    """
    _, letters = abstract_params(cfg.model)
    optimizer, schedule = build_optimizer(cfg.optimizer, cfg.train.steps, letters)
    state = abstract_state(cfg.model, optimizer, cfg.seed, mesh, cfg.optimizer.train)
    return optimizer, schedule, state


def make_state(cfg: ModelConfig, optimizer, seed: int, abstract: TrainState) -> TrainState:
    """Run `init_state` with every array created sharded, each device making its own shard."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    level = get_backend().init_optimization_level
    options = None if level is None else {"xla_backend_optimization_level": level}
    init = partial(init_state, cfg, optimizer, seed)
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()
