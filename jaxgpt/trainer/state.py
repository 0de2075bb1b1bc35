"""All that changes while training, as one pytree."""

from functools import partial
from typing import Any

import jax
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from jaxgpt import sharding
from jaxgpt.config import ModelConfig
from jaxgpt.model import abstract_params, init_params
from jaxgpt.optimizer import state_letters


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer and randomness after `step` updates."""

    step: jax.Array  # int32 []
    params: Any  # float32 masters
    opt_state: Any
    rng: jax.Array  # a key that is never used itself, only folded with the step


def init_state(cfg: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; the same for the same seed on any number of devices."""
    init_key, rng = jax.random.split(jax.random.key(seed))
    params, _ = init_params(cfg, init_key)
    return TrainState(jax.numpy.int32(0), params, optimizer.init(params), rng)


def abstract_state(cfg: ModelConfig, optimizer, seed: int, mesh: Mesh) -> TrainState:
    """As `init_state`, with shapes and shardings in place of arrays.

    Optimizer moments lie like the parameters they belong to; what belongs to no parameter is
    small, and every device has a copy.
    """
    shapes = jax.eval_shape(lambda: init_state(cfg, optimizer, seed))
    _, letters = abstract_params(cfg)
    moments = state_letters(optimizer, shapes.opt_state, letters)
    letters = shapes.replace(step="", params=letters, opt_state=moments, rng="")
    return jax.tree.map(_placed, shapes, sharding.shardings(shapes, letters, mesh))


def _placed(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def make_state(cfg: ModelConfig, optimizer, seed: int, abstract: TrainState) -> TrainState:
    """`init_state`, each device making its own part of every array."""
    where = jax.tree.map(lambda x: x.sharding, abstract)
    # The CPU's compiler takes half of the time for the same bits.
    options = {"xla_backend_optimization_level": 1} if sharding.platform() == "cpu" else None
    init = partial(init_state, cfg, optimizer, seed)
    return jax.jit(init, out_shardings=where, compiler_options=options)()
