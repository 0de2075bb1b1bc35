"""The training state: everything that changes during training, as one pytree."""

import dataclasses
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
from jaxgpt.lora import (
    describe_frozen,
    describe_trained,
    init_adapters,
    select_frozen,
    select_full,
    store_base,
    to_nodes,
)
from jaxgpt.model import abstract_params, init_params
from jaxgpt.model.lowrank import attach
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.optimizer import get_state_letters
from jaxgpt.quantized_array import is_quantized, label_dims
from jaxgpt.seeds import make_key
from jaxgpt.selection import select_letters


class FrozenBase(struct.PyTreeNode):
    """The parameters of a model that adapters are trained on (see `jaxgpt.lora`)."""

    params: Any  # those that are not trained, in `lora.base`
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def attach(self, trained: Any) -> Any:
        """Return the parameters of the model, of the base and what is trained."""
        return attach(self.params, to_nodes(trained, self.scale, self.dropout))


class TrainState(struct.PyTreeNode):
    """Parameters, optimizer and randomness after `step` updates."""

    step: jax.Array  # int32 []
    params: Any  # float32 masters of what is trained: all of the model, or adapters on `base`
    opt_state: Any
    rng: jax.Array  # a key that is never used directly, only folded with the step
    guard: Any = None  # a `spikes.SpikeGuard` if the step finds spikes; saved with the progress
    base: FrozenBase | None = None  # of adapters; not saved

    @property
    def model_params(self) -> Any:
        """The parameters of the model: those that are trained, on their base if there is one."""
        return self.params if self.base is None else self.base.attach(self.params)


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


def init_adapter_state(cfg: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Initialize the training state of adapters, without their base.

    What is trained in full beside them (`optimizer.train`) is as in a new model.
    """
    init_key, rng = jax.random.split(make_key(cfg.seed))
    params = attach(select_full(cfg, init_params(cfg.model, init_key)[0]),
                    init_adapters(cfg.model, cfg.lora, init_key))  # fmt: skip
    return TrainState(jax.numpy.int32(0), params, optimizer.init(params), rng)


def abstract_adapter_state(cfg: Config, optimizer, mesh: Mesh) -> TrainState:
    """Return the training state of adapters, and their base, as shapes and shardings."""
    shapes = jax.eval_shape(lambda: init_adapter_state(cfg, optimizer))
    _, letters = describe_trained(cfg)
    moments = get_state_letters(optimizer, shapes.opt_state, letters)
    base, base_letters = describe_frozen(cfg)
    base = jax.eval_shape(partial(store_base, cfg), base)
    base_letters = jax.tree.map(
        lambda x, d: label_dims(x, d) if is_quantized(x) else d, base, base_letters,
        is_leaf=is_quantized,
    )  # fmt: skip
    frozen = FrozenBase(base, cfg.lora.scale, cfg.lora.dropout)
    shapes = shapes.replace(base=frozen)
    letters = shapes.replace(
        step="", params=letters, opt_state=moments, rng="", base=frozen.replace(params=base_letters)
    )
    return jax.tree.map(_add_sharding, shapes, sharding.make_shardings(shapes, letters, mesh))


def build_run_optimizer(cfg: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of what a run trains, and its schedule."""
    _, letters = describe_trained(cfg)
    rule = cfg.optimizer
    if cfg.lora.rank:  # the tree has nothing else in it
        rule = dataclasses.replace(rule, train=())
    return build_optimizer(rule, cfg.train.steps, letters)


def make_abstract_state(cfg: Config, mesh: Any) -> tuple[Any, Any, TrainState]:
    """Return the optimizer of a config, its schedule, and the state as shapes and shardings.

    Args:
        mesh: whose devices need not exist.
    """
    optimizer, schedule = build_run_optimizer(cfg)
    if cfg.lora.rank:
        return optimizer, schedule, abstract_adapter_state(cfg, optimizer, mesh)
    state = abstract_state(cfg.model, optimizer, cfg.seed, mesh, cfg.optimizer.train)
    return optimizer, schedule, state


def make_adapter_state(cfg: Config, optimizer, abstract: TrainState) -> TrainState:
    """Run `init_adapter_state` with every array created sharded."""
    return _run_init(partial(init_adapter_state, cfg, optimizer), abstract.replace(base=None))


def make_first_base(cfg: Config, wanted: Any) -> Any:
    """Initialize the base of adapters that have no other: that of a new model of the seed.

    Args:
        wanted: what is frozen, as shapes and shardings.
    """
    init_key, _ = jax.random.split(make_key(cfg.seed))
    init = partial(_init_frozen, cfg)
    return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))(init_key)


def _init_frozen(cfg: Config, key: jax.Array) -> Any:
    return select_frozen(cfg, init_params(cfg.model, key)[0])


def make_state(cfg: ModelConfig, optimizer, seed: int, abstract: TrainState) -> TrainState:
    """Run `init_state` with every array created sharded, each device making its own shard."""
    return _run_init(partial(init_state, cfg, optimizer, seed), abstract)


def _run_init(init, abstract: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    level = get_backend().init_optimization_level
    options = None if level is None else {"xla_backend_optimization_level": level}
    return jax.jit(init, out_shardings=shardings, compiler_options=options)()
