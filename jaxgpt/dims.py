"""One letter per kind of dimension, the same letter everywhere.

    B batch      T query tokens   S key tokens     N tokens = B * T    C context
    D width      H query heads    G kv heads       M = H / G           K head width
    F ffn width  V vocabulary     L layers, stacked                    E experts, stacked
    I inner width of mamba        Z state          R rank of mamba     W convolution
    P summary    Q chunk          U t5's buckets   Y kinds of tokens   A classes

A parameter is declared by its letters; ">" separates inputs from outputs, so "D>HK" maps the
width to heads, and a plain "D" is a vector (a bias, a norm's scale). Sharding, weight decay, Muon
and the parameter table all read these letters and nothing else: none of them knows the model.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

Letters = str


class Named(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter that remembers its letters. Lives only between `init` and `split`."""

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


def weight(module: nn.Module, name: str, letters: Letters, sizes: Mapping[str, int], init):
    """Declares a parameter of `module` by its letters.

    Args:
        letters: such as "D>HK"; the shape follows from `sizes`, the size of every letter.
        init: (key, shape) -> array.
    """
    shape = tuple(sizes[letter] for letter in letters if letter != ">")
    return module.param(name, lambda key: Named(init(key, shape), letters))


def split(tree) -> tuple:
    """A freshly made tree -> (plain arrays, letters): two trees of the same structure."""

    def is_named(x):
        return isinstance(x, Named)

    values = jax.tree.map(lambda x: x.value, tree, is_leaf=is_named)
    letters = jax.tree.map(lambda x: x.letters, tree, is_leaf=is_named)
    return values, letters
