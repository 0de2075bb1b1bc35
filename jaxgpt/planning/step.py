"""Lower the training step of a config for devices that need not exist."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.model import build
from jaxgpt.sharding import check_fits, make_batch_sharding, make_mesh
from jaxgpt.trainer.state import make_abstract_state
from jaxgpt.trainer.step import make_train_step


class Step(NamedTuple):
    """A lowered training step, not yet compiled."""

    mesh: Any
    optimizer: Any
    state: Any  # abstract, with shardings
    lowered: Any


def make_abstract_batch(cfg: Config, mesh) -> Batch:
    """Return a batch of the config's objective as shapes and shardings."""

    def add_sharding(x: np.ndarray) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=make_batch_sharding(mesh, x.shape))

    return jax.tree.map(add_sharding, cfg.objective.task.describe_batch(cfg))


def lower_step(cfg: Config, devices) -> Step:
    """Lower the training step of a config; nothing is allocated, and nothing runs.

    Raises:
        ConfigError: the config does not fit this number of devices.
    """
    mesh = make_mesh(cfg.mesh, devices)
    check_fits(cfg, mesh)
    optimizer, schedule, state = make_abstract_state(cfg, mesh)
    step = jax.jit(
        make_train_step(cfg, build(cfg.model), optimizer, schedule),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    with jax.set_mesh(mesh):
        return Step(mesh, optimizer, state, step.lower(state, make_abstract_batch(cfg, mesh)))
