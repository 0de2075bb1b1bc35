"""The layers divided among devices: each stage has some of them, and passes on what it made.

A batch is cut into parts. At every turn each stage works on another part, the one that the stage
before it had at the turn before; so `stages` turns fill the line, and with P parts a share of
(stages - 1) / (P + stages - 1) of the work is idle. All is one array program: what the stages hold
is stacked along a dimension that the mesh's axis `pipe` divides, a turn is one `vmap` over it, and
passing on is a shift along it, which the partitioner turns into messages between neighbours.
Gradients run through the same program backwards.

Source: Huang et al. 2019 (GPipe), arXiv:1811.06965, section 2; as one sharded program, Xu et al.
2021 (GSPMD), arXiv:2105.04663, section 3.3.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxgpt.model.mixers.mixer import Sight
from jaxgpt.sharding import RULES, constrain, mesh_in_force, named, spec

PARTS = 4  # parts for each stage, where there are rows enough: a fifth is idle

OF_ROWS = ("q_at", "k_at", "rotate", "memory", "memory_at")  # what in a Sight has a leading B

Layer = Callable[[Any, jax.Array, Sight, Any], jax.Array]  # (params, x, sight, number) -> x


def stages(repeats: int) -> int:
    """In how many stages the mesh in force divides so many repeats of the unit."""
    mesh = mesh_in_force()
    count = mesh.shape["pipe"] if mesh else 1
    return 1 if repeats % count else count


def parts(B: int, stages: int) -> int:
    """Into how many parts a batch of B rows is cut: each must lie on all devices."""
    mesh = mesh_in_force()
    rows = B // math.prod(mesh.shape[axis] for axis in RULES["B"])
    return max(n for n in range(1, max(rows, 1) + 1) if rows % n == 0 and n <= PARTS * stages)


def pipeline(layer: Layer, params, x: jax.Array, sight: Sight, stages: int) -> jax.Array:
    """Applies all layers, one after the other, to x [B T D].

    Args:
        layer: one repeat of the unit. It is told another number for every layer and part of the
            batch, to draw at random with.
        params: of all of them, stacked: leaves [L ...].
        sight: what they are told; the coordinates, the memory and what rotates have a leading B.
    """
    P = parts(x.shape[0], stages)
    params = jax.tree.map(lambda w: w.reshape(stages, -1, *w.shape[1:]), params)
    rows = {name: getattr(sight, name) for name in OF_ROWS}
    rest: Any = sight._replace(**dict.fromkeys(OF_ROWS))  # type: ignore[arg-type]
    run = partial(_line, layer, P)
    if "data" in named(spec(x.shape[:1], "B", mesh_in_force())[0]):
        # Each copy of the model is a pipeline by itself, so that gradients are added up over the
        # copies once, at the end; the partitioner would do so at every turn.
        ours, everywhere = PartitionSpec("data"), PartitionSpec()
        run = jax.shard_map(
            run,
            in_specs=(everywhere, ours, ours, everywhere),
            out_specs=ours,
            axis_names={"data"},
            check_vma=False,
        )
    return constrain(run(params, x, rows, rest), "BTD")


def _line(layer: Layer, P: int, params, x: jax.Array, rows: dict, sight: Sight) -> jax.Array:
    """Params [stages L/stages ...], x and rows [B ...] -> [B T D]."""
    stages, depth = jax.tree.leaves(params)[0].shape[:2]
    numbers = jnp.arange(stages)
    mesh = mesh_in_force()
    copy = jax.lax.axis_index("data") if mesh and "data" in mesh.manual_axes else 0

    def cut(y):  # [B ...] -> [P B/P ...]: part i takes rows i::P, so that each lies everywhere
        y = y.reshape(-1, P, *y.shape[1:]).swapaxes(0, 1)
        return constrain(y, ".BTD"[: y.ndim])

    rows = jax.tree.map(cut, rows)
    fed = jnp.pad(cut(x), [(0, stages - 1)] + [(0, 0)] * x.ndim)  # nothing, while the line empties

    def stage(params, x, rows, number, part):
        told = sight._replace(**rows)

        def one(x, layer_of):
            params, i = layer_of
            count = ((copy * P + part) * stages + number) * depth + i
            return layer(params, x, told, count), None

        return jax.lax.scan(one, x, (params, jnp.arange(depth)))[0]

    every = jax.vmap(stage, spmd_axis_name="pipe")

    def turn(line, fresh):
        x, time = fresh
        line = jnp.where(numbers[:, None, None, None] == 0, x, jnp.roll(line, 1, axis=0))
        part = jnp.clip(time - numbers, 0, P - 1)  # [stages]; outside of it nobody looks
        told = jax.tree.map(lambda y: y[part], rows)
        line = constrain(every(params, constrain(line, "LBTD"), told, numbers, part), "LBTD")
        return line, line

    line = constrain(jnp.zeros((stages, *fed.shape[1:]), x.dtype), "LBTD")
    _, out = jax.lax.scan(turn, line, (fed, jnp.arange(P + stages - 1)))
    out = out[stages - 1 :, -1]  # [P B/P T D]
    return out.swapaxes(0, 1).reshape(x.shape)
