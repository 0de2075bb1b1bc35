"""Adapters meet their base: both are checked, and become one model."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt.adapters import Adapter, check_base, choose_path, read_base
from jaxgpt.config import Config, LoraConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import describe_frozen, list_full, list_maps, store_base, walk_nodes
from jaxgpt.model import abstract_params, init_params
from jaxgpt.model.layers import DTYPES
from jaxgpt.quantized_array import is_quantized
from jaxgpt.seeds import make_key
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_load_shardings


def join_base(
    model: LanguageModel,
    trained: Any,
    run_folder: str,
    load: Callable[[str], LanguageModel],
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
) -> LanguageModel:
    """Return the model of a run with adapters: these, on the base that they were trained on.

    Args:
        model: of the run, without parameters.
        trained: its adapters, and what is trained in full.
        load: loads the model of a path.
        dtype, mesh: as of `jaxgpt.load`.

    Raises:
        ConfigError: the base is gone, or another one.
    """
    config = model.config
    base = read_base(run_folder, [config.train.start] if config.train.start else [])
    if base.paths:
        path = choose_path(base, run_folder)
        found = load(path).merge().params
    else:
        path, found = "", _init_base(config, mesh)
    check_base(base, pick_frozen(config, found, path, run_folder), path, run_folder)
    found = cast_tree(store_base(config, _pick_fitting(config, found)), dtype)
    adapter = Adapter(trained, config.lora, base, model.origin)
    return adapt(dataclasses.replace(model, params=found), adapter)


def adapt(model: LanguageModel, adapter: Adapter) -> LanguageModel:
    """Return a model with an adapter in use, under the name of its config."""
    name = re.sub(r"[+*]", "-", model.config.name)
    return model.with_adapters({name: adapter}).switch(name)


def _init_base(config: Config, mesh: jax.sharding.Mesh | None) -> Any:
    """Return the parameters that a run without a start begins with."""
    shapes, letters = abstract_params(config.model)
    init_key, _ = jax.random.split(make_key(config.seed))
    init = jax.jit(
        lambda key: init_params(config.model, key)[0],
        out_shardings=make_load_shardings(shapes, letters, mesh),
    )
    return init(init_key)


def pick_frozen(config: Config, params: Any, path: str, where: str) -> Any:
    """Return of the parameters of a base those that the adapters of a run leave frozen.

    Raises:
        ConfigError: one is missing, or has another shape.
    """
    wanted = flatten_dict(describe_frozen(config)[0], sep=".")
    flat = flatten_dict(params, sep=".")
    for name, x in wanted.items():
        found = flat[name].shape if name in flat else "nothing"
        if found != x.shape:
            raise ConfigError(
                f"{path} is not the base of {where}: {name} is {found} there, {x.shape} in the run."
            )
    return unflatten_dict({name: flat[name] for name in wanted}, sep=".")


def _pick_fitting(config: Config, params: Any) -> Any:
    """Return of the parameters of a base those that the model of a config has, in its shapes."""
    wanted = flatten_dict(abstract_params(config.model)[0], sep=".")
    flat = flatten_dict(params, sep=".")
    fitting = {k: x for k, x in flat.items() if k in wanted and wanted[k].shape == x.shape}
    return unflatten_dict(fitting, sep=".")


def cast_tree(params: Any, dtype: str | None) -> Any:
    """Return parameters in a dtype, but for integers; None leaves them as they are."""
    if dtype is None:
        return params
    return jax.tree.map(
        lambda x: x if is_quantized(x) else x.astype(DTYPES[dtype]), params, is_leaf=is_quantized
    )


def set_dtype(config: Config, dtype: str | None) -> Config:
    """Return a config whose model computes in a dtype; None leaves it as it is."""
    if dtype is None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def check_adapters(model: LanguageModel, adapters: Mapping[str, Any]) -> dict[str, Adapter]:
    """Return adapters, or those of models with one, checked against a model.

    Raises:
        ConfigError: one has no adapter, is of another base, or does not fit.
    """
    found = {}
    for name, value in adapters.items():
        if not name or set(name) & set("+*") or name != name.strip():
            raise ConfigError(f"an adapter cannot be named {name!r}: leave out + and *.")
        if isinstance(value, LanguageModel):
            if not value.adapter or value.adapter not in value.adapters:
                raise ConfigError(f"{value.origin or value!r} has no single adapter in use.")
            adapter = value.adapters[value.adapter]
            _check_same_base(model, value, adapter)
        else:
            adapter = value
        _check_fit(model.config, name, adapter)
        found[name] = adapter
    return found


def _check_same_base(model: LanguageModel, other: LanguageModel, adapter: Adapter):
    """Check that a model has the parameters that an adapter of another one was trained on."""
    if not adapter.base.fingerprint:
        return
    params = model.params if model.base is None else model.base
    frozen = pick_frozen(other.config, params, model.origin, adapter.origin)
    if all(x.dtype == "float32" for x in jax.tree.leaves(frozen)):  # not rounded for this model
        check_base(adapter.base, frozen, model.origin, adapter.origin)


def _check_fit(config: Config, name: str, adapter: Adapter):
    """Check that all of an adapter has a place in a model, in its shape.

    Raises:
        ConfigError: something has none.
    """
    maps = {x.path: x for x in list_maps(config.model)}
    nodes = adapter.nodes
    for path, node in walk_nodes(nodes):
        if path not in maps:
            raise ConfigError(f"adapter {name!r} adapts {path}, which this model does not have.")
        expected = [shape for shape, _ in maps[path].describe(node.a.shape[-1]).values()]
        if [node.a.shape, node.b.shape] != expected:
            raise ConfigError(
                f"adapter {name!r}: the factors of {path} are {node.a.shape} and {node.b.shape}, "
                f"and this model has {expected[0]} and {expected[1]}."
            )
    shapes = flatten_dict(abstract_params(config.model)[0], sep=".")
    flat = flatten_dict(nodes, sep=".")
    for path in list_full(nodes):
        if path not in shapes or shapes[path].shape != flat[path].shape:
            raise ConfigError(f"adapter {name!r} has {path}, which does not fit this model.")


def set_adapter(config: Config, adapter: Adapter | None) -> Config:
    """Return a config with the settings that describe an adapter, or that there is none."""
    if adapter is None:
        return dataclasses.replace(config, lora=LoraConfig())
    optimizer = dataclasses.replace(config.optimizer, train=tuple(list_full(adapter.nodes)))
    return dataclasses.replace(config, lora=adapter.config, optimizer=optimizer)


def find_saved_adapter(model: LanguageModel) -> Adapter | None:
    """Return the adapter that is saved of a model; None if its parameters are.

    Raises:
        ConfigError: several adapters are in use, or nothing is known of their base.
    """
    if not model.adapter:
        return None
    adapter = model.adapters.get(model.adapter)
    if adapter is None or not adapter.base.fingerprint:
        why = "it is a sum of several" if adapter is None else "nothing is known of its base"
        raise ConfigError(
            f"the adapter {model.adapter!r} cannot be saved alone, since {why}: save model.merge()."
        )
    return adapter
