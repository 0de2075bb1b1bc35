"""From letters of dimensions to devices: one table for parameters and activations alike.

The mesh has six named axes, most of which have size 1 most of the time:

    data     copies of the model, each with its part of the batch
    pipe     the layers divided: some devices have the first ones, others the next
    fsdp     parameters divided, gathered where used; also divides the batch
    expert   experts divided; also divides the batch
    context  the tokens of a row divided; keys and values gathered where used
    tensor   heads, feed-forward and vocabulary divided

Neighbours along the last axes are neighbours on the machine, where talk is cheap.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import MeshConfig
from jaxgpt.dims import Letters
from jaxgpt.settings import ConfigError, nearest_multiples

# Dimension (see dims.py) -> the mesh axes it is divided over. Other letters stay whole.
RULES = {
    "B": ("data", "fsdp", "expert"),
    "N": ("data", "fsdp", "expert", "context"),
    "T": ("context",),
    "L": ("pipe",),
    "E": ("expert",),
    "D": ("fsdp",),
    "H": ("tensor",),
    "G": ("tensor",),
    "F": ("tensor",),
    "I": ("tensor",),
    "V": ("tensor",),
}
AXES = ("data", "pipe", "fsdp", "expert", "context", "tensor")


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """Arranges the devices as the config says.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = [getattr(cfg, axis) for axis in AXES]
    fixed = math.prod(size for size in asked if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in asked]
    if math.prod(sizes) != len(devices):
        sizes = zip(AXES, asked, strict=True)
        grid = " x ".join(f"mesh.{name}={size}" for name, size in sizes if size != 1)
        many = "a multiple of " if -1 in asked else ""
        raise ConfigError(
            f"{grid or 'mesh.data=1'} needs {many}{fixed} devices, found {len(devices)}: use "
            "sizes whose product is the device count, or one -1 for what is left."
        )
    # Auto: the compiler propagates shardings. (jax.make_mesh now defaults to Explicit.)
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def check_batch(batch: int, accumulate: int, mesh: Mesh):
    """Refuses, before anything is compiled, a batch that the mesh can not divide."""
    among = {f"mesh.{axis}": mesh.shape[axis] for axis in RULES["B"]}
    among = {key: size for key, size in among.items() if size > 1}
    among["train.accumulate"] = accumulate
    parts = math.prod(among.values())
    if batch % parts:
        grid = " x ".join(f"{key}={size}" for key, size in among.items())
        raise ConfigError(
            f"train.batch={batch} can not be divided in {grid} = {parts} parts: "
            f"use train.batch={nearest_multiples(batch, parts)}."
        )


def spec(shape, letters: Letters, mesh) -> PartitionSpec:
    """Where an array's dimensions go.

    Read from left to right: a mesh axis serves one dimension of an array, first come first
    served, and a dimension that the axes do not divide evenly stays whole.
    """
    used: set[str] = set()
    out: list[tuple[str, ...] | None] = []
    for size, letter in zip(shape, letters.replace(">", ""), strict=True):
        axes = tuple(a for a in RULES.get(letter, ()) if a not in used and mesh.shape[a] > 1)
        if not axes or size % math.prod(mesh.shape[axis] for axis in axes):
            out.append(None)
        else:
            used.update(axes)
            out.append(axes)
    return PartitionSpec(*out)


def shardings(abstract, letters, mesh: Mesh):
    """The sharding of every parameter: trees of shapes and of letters -> tree of shardings."""
    return jax.tree.map(lambda x, d: NamedSharding(mesh, spec(x.shape, d, mesh)), abstract, letters)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices that hold different data."""
    return NamedSharding(mesh, PartitionSpec(RULES["B"]))


def constrain(x: jax.Array, letters: Letters) -> jax.Array:
    """Pins an activation to the mesh in force (`jax.set_mesh`); does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, letters, mesh))
