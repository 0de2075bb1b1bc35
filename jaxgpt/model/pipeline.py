"""Pipeline parallelism: each stage holds some of the layers and sends its output to the next.

A batch is split into microbatches. At every tick each stage works on the microbatch that the
previous stage had one tick before; so the pipeline takes `stages` ticks to fill, and with P
microbatches it is idle for (stages - 1) / (P + stages - 1) of the time. All is one array program:
the activations of the stages are stacked along a dimension that the mesh axis `pipe` shards, a tick
is one `vmap` over it, and sending is a shift along it, which the partitioner turns into
collective-permutes. Gradients run backwards through the same program.

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

from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.sharding import SHARDING_RULES, constrain, get_active_mesh, get_axis_names, make_spec

MAX_MICROBATCHES_PER_STAGE = 4  # if there are enough rows: a fifth of the time is idle

# Of `LayerContext`.
BATCHED_FIELDS = ("q_coords", "k_coords", "rotations", "query_scales", "memory", "memory_coords")

Layer = Callable[
    [Any, jax.Array, LayerContext, Any], jax.Array
]  # (params, x, layer_context, id) -> x


def count_stages(repeats: int) -> int:
    """Return the number of pipeline stages of the active mesh, 1 if it does not divide repeats."""
    mesh = get_active_mesh()
    count = mesh.shape["pipe"] if mesh else 1
    return 1 if repeats % count else count


def count_microbatches(B: int, stages: int) -> int:
    """Return how many microbatches a batch of B rows is split into: each must span all devices."""
    mesh = get_active_mesh()
    rows = B // math.prod(mesh.shape[axis] for axis in SHARDING_RULES["B"])
    limit = MAX_MICROBATCHES_PER_STAGE * stages
    return max(n for n in range(1, max(rows, 1) + 1) if rows % n == 0 and n <= limit)


def run_pipeline(
    layer: Layer, params, x: jax.Array, layer_context: LayerContext, stages: int
) -> jax.Array:
    """Apply all layers in sequence to x [B T D].

    Args:
        layer: one layer group. It gets an id that is unique to a layer and microbatch, to fold into
            random keys.
        params: of all layers, stacked: leaves [L ...].
        layer_context: passed to every layer; `BATCHED_FIELDS` have a leading B.
    """
    P = count_microbatches(x.shape[0], stages)
    params = jax.tree.map(lambda w: w.reshape(stages, -1, *w.shape[1:]), params)
    batched = {name: getattr(layer_context, name) for name in BATCHED_FIELDS}
    rest: Any = layer_context._replace(**dict.fromkeys(BATCHED_FIELDS))  # type: ignore[arg-type]
    run = partial(_run_stages, layer, P)
    if "data" in get_axis_names(make_spec(x.shape[:1], "B", get_active_mesh())[0]):
        # Each model replica is a pipeline of its own, so that gradients are all-reduced over
        # replicas once, at the end; the partitioner would do so at every tick.
        row_spec, replicated = PartitionSpec("data"), PartitionSpec()
        run = jax.shard_map(
            run,
            in_specs=(replicated, row_spec, row_spec, replicated),
            out_specs=row_spec,
            axis_names={"data"},
            check_vma=False,
        )
    return constrain(run(params, x, batched, rest), "BTD")


def _run_stages(
    layer: Layer, P: int, params, x: jax.Array, batched: dict, layer_context: LayerContext
) -> jax.Array:
    """Run the pipeline: params [stages L/stages ...], x and batched [B ...] -> [B T D]."""
    stages, depth = jax.tree.leaves(params)[0].shape[:2]
    stage_ids = jnp.arange(stages)
    mesh = get_active_mesh()
    replica = jax.lax.axis_index("data") if mesh and "data" in mesh.manual_axes else 0

    def split_microbatches(y):  # [B ...] -> [P B/P ...]: microbatch i is rows i::P, on all devices
        y = y.reshape(-1, P, *y.shape[1:]).swapaxes(0, 1)
        return constrain(y, ".BTD"[: y.ndim])

    batched = jax.tree.map(split_microbatches, batched)
    # Padded with zeros for the ticks in which the pipeline drains.
    inputs = jnp.pad(split_microbatches(x), [(0, stages - 1)] + [(0, 0)] * x.ndim)

    def run_stage(params, x, batched, stage_id, microbatch):
        context = layer_context._replace(**batched)

        def apply_layer(x, xs):
            params, i = xs
            layer_id = ((replica * P + microbatch) * stages + stage_id) * depth + i
            return layer(params, x, context, layer_id), None

        return jax.lax.scan(apply_layer, x, (params, jnp.arange(depth)))[0]

    run_all_stages = jax.vmap(run_stage, spmd_axis_name="pipe")

    def tick(activations, xs):
        x, time = xs
        previous = jnp.roll(activations, 1, axis=0)
        activations = jnp.where(stage_ids[:, None, None, None] == 0, x, previous)
        activations = constrain(activations, "LBTD")
        microbatch = jnp.clip(time - stage_ids, 0, P - 1)  # [stages]; clipped ones are discarded
        context = jax.tree.map(lambda y: y[microbatch], batched)
        activations = run_all_stages(params, activations, context, stage_ids, microbatch)
        activations = constrain(activations, "LBTD")
        return activations, activations

    activations = constrain(jnp.zeros((stages, *inputs.shape[1:]), x.dtype), "LBTD")
    _, out = jax.lax.scan(tick, activations, (inputs, jnp.arange(P + stages - 1)))
    out = out[stages - 1 :, -1]  # [P B/P T D]
    return out.swapaxes(0, 1).reshape(x.shape)
