"""One letter per kind of dimension, the same letter in the whole package.

    B batch      T query tokens   S key tokens     N tokens = B * T    C context
    D width      H query heads    G kv heads       M = H / G           K head width
    F ffn width  V vocabulary     L layers, stacked                    E experts, stacked
    I inner width of mamba        Z state          R rank of mamba     W convolution
    P summary    Q chunk          U t5's buckets   Y kinds of tokens   A classes

A parameter is declared by its letters; ">" separates inputs from outputs, so "D>HK" maps the
width to heads, and a plain "D" is a vector (a bias, a norm's scale). Sharding, weight decay, Muon
and the parameter table depend on these letters only, not on the model.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

from jaxgpt.quantized_array import is_quantized

Letters = str


class LabeledParam(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with its letters. Exists only between `init` and `split`."""

    value: jax.Array
    letters: Letters = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):  # called by nn.scan and nn.vmap, which stack parameters
        return self.replace(letters=params["letter"] + self.letters)

    def remove_axis(self, index, params):
        return self.replace(letters=self.letters[1:])


def declare_param(module: nn.Module, name: str, letters: Letters, sizes: Mapping[str, int], init):
    """Declare a parameter of `module` by its letters.

    Args:
        letters: such as "D>HK"; the shape follows from `sizes`, the size of every letter.
        init: (key, shape) -> array.

    Returns:
        The array, or the `QuantizedArray` that stands in its place.
    """
    if module.has_variable("params", name):
        stored: Any = module.get_variable("params", name)
        if is_quantized(stored):  # Flax would compare its parts with the shape
            return stored
    shape = tuple(sizes[letter] for letter in letters if letter != ">")
    return module.param(name, lambda key: LabeledParam(init(key, shape), letters))


def split(tree) -> tuple:
    """Split an initialized tree into (plain arrays, letters): two trees of the same structure."""

    def is_labeled(x):
        return isinstance(x, LabeledParam)

    values = jax.tree.map(lambda x: x.value, tree, is_leaf=is_labeled)
    letters = jax.tree.map(lambda x: x.letters, tree, is_leaf=is_labeled)
    return values, letters
