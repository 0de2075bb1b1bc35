"""Rows of the tables of names, and the parameters that they locate in a model.

A row is (path, hf_name, layout, leaves), of a layer, a norm or an embedding table. Within `layers`,
path is relative to one block and hf_name to one layer.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.interop.layouts import KEEP, SPLIT_HEADS, TRANSPOSE, Fusion, Layout

# --- rows --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One layer, norm or table in both libraries.

    In a name, * is the index in the cycle of layers, {} that of the layer of transformers and <e>
    that of an expert, each of which has a tensor of its own.
    """

    path: str
    hf_name: str
    layout: Layout
    leaves: dict[str, str]  # jaxgpt -> transformers
    fusion: Fusion | None = None  # where hf_name holds several arrays of jaxgpt
    part: int = 0  # which of them this one is
    only: str = ""  # "read": not written so to files; "gated", "plain": with this feed-forward


def linear(path, hf_name, layout=TRANSPOSE, **more) -> Row:
    """Make the row of a linear map."""
    return Row(path, hf_name, layout, {"w": ".weight", "b": ".bias"}, **more)


def norm(path, hf_name, layout=KEEP) -> Row:
    """Make the row of a norm."""
    return Row(path, hf_name, layout, {"scale": ".weight", "bias": ".bias"})


def table(path, hf_name, layout=KEEP, **more) -> Row:
    """Make the row of an embedding table."""
    return Row(path, hf_name, layout, {"table": ".weight"}, **more)


def parameter(path, hf_name, layout=KEEP, **more) -> Row:
    """Make the row of a parameter that is not in a layer in transformers."""
    path, _, leaf = path.rpartition(".")
    return Row(path, hf_name, layout, {leaf: ""}, **more)


def layers(path: str, hf_name: str, *rows: Row) -> list[Row]:
    """Repeat rows for every block."""
    return [
        row._replace(path=f"{path}.layers.block_*.{row.path}", hf_name=f"{hf_name}.{row.hf_name}")
        for row in rows
    ]


def qkv(path: str, hf_name: str, names: str) -> list[Row]:
    """Make rows of three maps, named `names` in transformers, with q, k, v in place of {}."""
    return [linear(f"{path}.{x}", f"{hf_name}.{names.format(x)}", SPLIT_HEADS) for x in "qkv"]


def fused(path: str, hf_name: str, fusion: Fusion, layout=SPLIT_HEADS) -> list[Row]:
    """Make rows of q, k and v, which are one map in transformers."""
    return [
        linear(f"{path}.{x}", hf_name, layout, fusion=fusion, part=i) for i, x in enumerate("qkv")
    ]


def fused_experts(path: str, hf_name: str, fusion: Fusion, layout: Layout) -> list[Row]:
    """Make rows of gate and up, which are one array of all experts in memory."""
    return [
        parameter(f"{path}.{x}.w", hf_name, layout, fusion=fusion, part=i, only="read")
        for i, x in enumerate(("gate", "up"))
    ]


# --- locations -----------------------------------------------------------------------------------


class Location(NamedTuple):
    """Where one parameter of jaxgpt is in transformers."""

    path: str
    names: tuple[str, ...]  # of the tensors that are stacked, in row-major order
    dims: tuple[int, ...]  # (), (layers,) or (layers, experts)
    row: Row

    def read(self, x, cfg: ModelConfig):
        """Return the array of jaxgpt that lies in a tensor of transformers."""
        part = self.row.fusion.take(x, self.row.part, cfg) if self.row.fusion else x
        return self.row.layout.read(part, cfg)


def locate_weights(rows: list[Row], names: Container[str], cfg: ModelConfig) -> Iterator[Location]:
    """Yield the locations of the parameters whose tensors are among `names`."""
    for place in list_locations(rows, cfg):
        if place.names[0] in names:
            yield place


def list_locations(rows: list[Row], cfg: ModelConfig) -> Iterator[Location]:
    """Yield the locations of all parameters that rows describe, in a model of this config."""
    kind = "plain" if "plain" in _list_feedforwards(cfg) else "gated"
    for row in rows:
        if row.only in ("plain", "gated") and row.only != kind:
            continue
        for leaf, ending in row.leaves.items():
            hf_name = row.hf_name + ending
            experts = range(cfg.moe.experts) if "<e>" in hf_name else None
            if "*" not in row.path:
                yield Location(f"{row.path}.{leaf}", (hf_name,), (), row)
                continue
            for path, ids in _locate_blocks(row.path, cfg):
                names = [hf_name.replace("{}", str(i)) for i in ids]
                dims: tuple[int, ...] = (len(names),)
                if experts is not None:
                    names = [name.replace("<e>", str(e)) for name in names for e in experts]
                    dims = (*dims, len(experts))
                yield Location(f"{path}.{leaf}", tuple(names), dims, row)


def _list_feedforwards(cfg: ModelConfig) -> tuple[str, ...]:
    return cfg.feedforward if isinstance(cfg.feedforward, tuple) else (cfg.feedforward,)


def _locate_blocks(path: str, cfg: ModelConfig) -> Iterator[tuple[str, range]]:
    """Yield (path of a block of the cycle or the tail, indices of the layers stacked there)."""
    is_encoder = path.startswith("encoder")
    count = cfg.encoder_layers if is_encoder and cfg.encoder_layers else cfg.layers
    cycle, repeats, tail = cfg.group_layers(count)
    for block in range(len(cycle)):
        yield path.replace("*", str(block)), range(block, repeats * len(cycle), len(cycle))
    for block in range(len(tail)):
        first = repeats * len(cycle) + block
        yield path.replace(".layers.", ".tail.").replace("*", str(block)), range(first, first + 1)


def convert_arrays(rows: list[Row], arrays: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Convert arrays of transformers, by name, to a parameter tree of jaxgpt, all at once."""
    tree: dict[str, Any] = {}
    for place in locate_weights(rows, arrays, cfg):
        values = [place.read(arrays[name], cfg) for name in place.names]
        node = tree
        *parents, leaf = place.path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(np.stack(values).reshape(*place.dims, *values[0].shape))
    return tree
