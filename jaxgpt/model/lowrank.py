"""Low-rank adapters: a map W with an adapter computes x W + (x A) B.

An adapter is a node of the parameter tree beside the weights that it adapts, under the key "lora":

    {"q": {"w": [D H K], "lora": LowRank(a=[D R], b=[R H K])}}

so that whatever takes parameters takes adapted ones: the layers are scanned, sharded, unstacked and
differentiated as before, and a model without adapters computes what it did. `attach` puts adapters
into parameters, `detach` takes them out.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.model.products import matmul

KEY = "lora"  # of an adapter, beside the weights


class LowRank(struct.PyTreeNode):
    """The factors of an adapter; its scale is in b. In scanned layers, all have a leading L.

    With `rows`, a batch has an adapter of its own in each row: a and b are those of all N adapters,
    [N ...], and rows gives the number of each.
    """

    a: jax.Array  # [inputs... R]
    b: jax.Array  # [R outputs...]
    rows: jax.Array | None = None  # int32 [B]
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: jax.Array, axes: int, key: jax.Array | None = None) -> jax.Array:
        """Return (x A) B, [... outputs] in the dtype of x, of x [... inputs].

        Args:
            axes: how many dimensions of x are inputs.
            key: for dropout of x, if there is one.
        """
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        if self.rows is None:
            return matmul(matmul(x, a, axes), b, 1)
        batch_shape, outputs = x.shape[: x.ndim - axes], b.shape[2:]
        flat = x.reshape(x.shape[0], -1, math.prod(x.shape[x.ndim - axes :]))
        a = a.reshape(a.shape[0], flat.shape[-1], -1)[self.rows]
        b = b.reshape(*b.shape[:2], -1)[self.rows]
        y = jnp.einsum("BNR,BRI->BNI", jnp.einsum("BNI,BIR->BNR", flat, a), b)
        return y.reshape(*batch_shape, *outputs)

    def look_up(self, tokens: jax.Array) -> jax.Array:
        """Return the rows [B T D] of A B at token ids [B T], for an embedding; A is [V R]."""
        if self.rows is None:
            return self.a[tokens] @ self.b
        return jnp.einsum("BTR,BRD->BTD", self.a[self.rows[:, None], tokens], self.b[self.rows])


def find_adapter(module: nn.Module) -> LowRank | None:
    """Return the adapter of a module's weights, or None."""
    return module.get_variable("params", KEY) if module.has_variable("params", KEY) else None


def make_dropout_key(module: nn.Module, adapter: LowRank | None) -> jax.Array | None:
    """Return a key for the adapter's dropout if the caller passes a "dropout" key."""
    is_dropping = adapter is not None and adapter.dropout and module.has_rng("dropout")
    return module.make_rng("dropout") if is_dropping else None


def add_output(y: jax.Array, adapter: LowRank | None, x: jax.Array, axes: int, key) -> jax.Array:
    """Return y [... outputs] plus the adapter's output for x [... inputs], if there is one."""
    return y if adapter is None else y + adapter(x, axes, key)


def attach(params: Any, adapters: Any) -> Any:
    """Return parameters with adapters in them.

    Args:
        params: nested dicts of arrays.
        adapters: nested dicts of `LowRank` under the key "lora", and of arrays that take the place
            of those of `params`, or join them.
    """
    out = dict(params)
    for key, value in adapters.items():
        is_inner = isinstance(value, Mapping)
        out[key] = attach(out.get(key, {}), value) if is_inner else value
    return out


def add_letters(letters: Any, params: Any) -> Any:
    """Return the letters of parameters with those of the adapters in them, of the same structure.

    Args:
        letters: of the parameters without adapters.
    """
    out = dict(letters)
    for key, value in params.items():
        if isinstance(value, LowRank):
            inputs, outputs = letters["w"].split(">")
            stacked = inputs[: len(inputs) - len(inputs.lstrip("LE"))]
            out[key] = value.replace(a=f"{inputs}>R", b=f"{stacked}R>{outputs}")
        elif isinstance(value, Mapping):
            out[key] = add_letters(letters[key], value)
    return out


def choose_rows(params: Any, rows: jax.Array) -> Any:
    """Return parameters that hold several adapters with the number of each row's, int32 [B]."""
    return _map_several(params, lambda node: node.replace(rows=rows))


def choose_one(params: Any, number: int) -> Any:
    """Return parameters that hold several adapters with one of them for all rows."""
    return _map_several(params, lambda node: LowRank(node.a[number], node.b[number]))


def _map_several(params: Any, change: Callable[[LowRank], LowRank]) -> Any:
    """Change the nodes that hold the factors of several adapters."""

    def visit(x):
        return change(x) if isinstance(x, LowRank) and x.rows is not None else x

    return jax.tree.map(visit, params, is_leaf=lambda x: isinstance(x, LowRank))


def detach(params: Any) -> Any:
    """Return parameters without the adapters in them: of a model, its frozen base."""
    found = {
        key: detach(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
        if key != KEY
    }
    return {key: value for key, value in found.items() if not isinstance(value, dict) or value}
