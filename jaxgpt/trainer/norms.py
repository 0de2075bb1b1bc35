"""Norms by layer: of gradients, parameters and updates, under the names of activations.

    embedding  layers.0  layers.1  ...  final_norm     (an encoder's after "encoder.")

Parameters of layers are stacked along their first axis; one reduction over the others gives the
norms of all of them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.model.capture import order_by_layer
from jaxgpt.model.taps import Group

Groups = Mapping[tuple[str, str], Group]  # as from `find_groups` of all parameters
# Parts of the parameters outside of layers, under the name of the activation that they make.
PART_NAMES = {
    "embed": "embedding",
    "stack.norm": "final_norm",
    "encoder.norm": "encoder.final_norm",
}


def compute_layer_norms(tree: Any, groups: Groups) -> jax.Array:
    """Compute the norm of every layer: float32, in the order of `list_layers` of the same tree.

    Args:
        tree: parameters, or what has their structure; some of them may be left out.
        groups: the layer groups of all parameters.
    """
    squares: dict[str, jax.Array] = {}
    for keys, x in _walk(tree):
        square = jnp.square(jnp.abs(x.astype(jnp.float32)))
        names = _name_layers(keys, groups)
        stacked = _get_group(keys, groups) is not None
        sums = jnp.sum(square, axis=tuple(range(1, x.ndim))) if stacked else [jnp.sum(square)]
        for index, name in enumerate(names):
            squares[name] = squares.get(name, jnp.float32(0)) + sums[index]
    return jnp.sqrt(jnp.stack([squares[name] for name in sorted(squares, key=order_by_layer)]))


def list_layers(tree: Any, groups: Groups) -> list[str]:
    """Return the names of the layers of a tree, in order; see `compute_layer_norms`."""
    names = {name for keys, _ in _walk(tree) for name in _name_layers(keys, groups)}
    return sorted(names, key=order_by_layer)


def _walk(tree: Any):
    for path, x in jax.tree.leaves_with_path(tree):
        yield [key.key for key in path], x


def _get_group(keys: list[str], groups: Groups) -> Group | None:
    return groups.get((keys[0], keys[1])) if len(keys) > 1 else None


def _name_layers(keys: list[str], groups: Groups) -> list[str]:
    """Return the names of the layers that a parameter belongs to: one per repeat, or one."""
    group = _get_group(keys, groups)
    if group is None:
        path = ".".join(keys)
        found = (name for part, name in PART_NAMES.items() if path.startswith(f"{part}."))
        return [next(found, keys[0])]
    prefix = "" if keys[0] == "stack" else f"{keys[0]}."
    first = group.first + int(keys[2].removeprefix("block_"))
    return [f"{prefix}layers.{first + group.size * repeat}" for repeat in range(group.repeats)]
