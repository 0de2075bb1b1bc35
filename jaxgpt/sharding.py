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
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config, MeshConfig
from jaxgpt.dims import Letters
from jaxgpt.settings import ConfigError, nearest_multiples

# Dimension (see dims.py) -> the mesh axes it is divided over. Other letters stay whole.
RULES = {
    "B": ("data", "fsdp", "expert"),
    "N": ("data", "fsdp", "expert", "context", "pipe"),
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
        named = zip(AXES, asked, strict=True)
        grid = " x ".join(f"mesh.{name}={size}" for name, size in named if size != 1)
        many = "a multiple of " if -1 in asked else ""
        raise ConfigError(
            f"{grid or 'mesh.data=1'} needs {many}{fixed} devices, found {len(devices)}: use "
            "sizes whose product is the device count, or one -1 for what is left."
        )
    # Auto: the compiler propagates shardings. (jax.make_mesh now defaults to Explicit.)
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=devices)


def check_fits(cfg: Config, mesh: Mesh):
    """Refuses, before anything is compiled, what the mesh can not divide.

    Raises:
        ConfigError: with the nearest values that work.
    """
    among = {f"mesh.{axis}": mesh.shape[axis] for axis in RULES["B"]}
    among["train.accumulate"] = cfg.train.accumulate
    _check_divides("train.batch", cfg.train.batch, among)
    model = cfg.model
    _check_divides("model.context", model.context, {"mesh.context": mesh.shape["context"]})
    stages = {"mesh.pipe": mesh.shape["pipe"], "layers that repeat": len(model.unit)}
    if mesh.shape["pipe"] > 1:
        _check_divides("model.layers", model.layers, stages)
        if model.family == "encoder_decoder":
            _check_divides("model.encoder_layers", model.encoder_layers or model.layers, stages)
        if model.has_experts:
            raise ConfigError(
                f"mesh.pipe={mesh.shape['pipe']} with model.feedforward={model.feedforward!r}: "
                "a pipeline does not add up the experts' load over its parts. Divide experts by "
                "mesh.expert, and use mesh.pipe=1."
            )


def _check_divides(key: str, size: int, among: dict[str, int]):
    among = {name: parts for name, parts in among.items() if parts > 1}
    parts = math.prod(among.values())
    if size % parts:
        grid = " x ".join(f"{name}={parts}" for name, parts in among.items())
        grid += f" = {parts} parts" if len(among) > 1 else ""
        raise ConfigError(
            f"{key}={size} can not be divided in {grid}: use {key}="
            f"{nearest_multiples(size, parts)}."
        )


def spec(shape, letters: Letters, mesh) -> PartitionSpec:
    """Where an array's dimensions go.

    Read from left to right: a mesh axis serves one dimension of an array, first come first
    served, and a dimension that the axes do not divide evenly stays whole. Inside `shard_map`,
    what it divides is divided already.
    """
    used: set[str] = set(mesh.manual_axes)
    out: list[tuple[str, ...] | None] = []
    for size, letter in zip(shape, letters.replace(">", ""), strict=True):
        axes = tuple(a for a in RULES.get(letter, ()) if a not in used and mesh.shape[a] > 1)
        if not axes or size % math.prod(mesh.shape[axis] for axis in axes):
            out.append(None)
        else:
            used.update(axes)
            out.append(axes)
    return PartitionSpec(*out)


def mesh_in_force():
    """The mesh of `jax.set_mesh`, or None where there is one device only."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """What a program that is traced now will run on: "cpu", "gpu" or "tpu".

    The mesh in force knows, and may be of devices that this machine does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def is_one_cpu() -> bool:
    """Whether a program that is traced now will run on one device, a CPU."""
    return platform() == "cpu" and not mesh_in_force()


def on_parts(f: Callable, in_specs: tuple, out_specs, has_kernel: bool = False) -> Callable:
    """`f` as every device runs it on its own parts. Axes that no spec names are left alone.

    `f` may talk to other devices by the names of the axes. A sum over devices has the right
    gradient only if it is outside of what is differentiated.
    """
    specs = jax.tree.leaves((in_specs, out_specs), is_leaf=lambda x: isinstance(x, PartitionSpec))
    axes = {axis for place in specs for part in place if part for axis in named(part)}
    mesh = mesh_in_force()
    if mesh is None or not axes:
        return f
    if mesh.shape["pipe"] > 1:  # stages are stacked along an axis of `vmap`, which adds its name
        axes.add("pipe")
    if has_kernel:  # a TPU's is refused where any axis is left to the compiler, even of one device
        axes |= {axis for axis in mesh.axis_names if mesh.shape[axis] == 1} - {*mesh.manual_axes}
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def named(part) -> tuple[str, ...]:
    """The axes of one entry of a PartitionSpec, which may be a name, some, or None."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def is_divided(letter: str, size: int) -> bool:
    """Whether the mesh in force divides a dimension of this letter and size."""
    mesh = mesh_in_force()
    return mesh is not None and spec((size,), letter, mesh) != PartitionSpec(None)


def shardings(abstract, letters, mesh: Mesh):
    """The sharding of every parameter: trees of shapes and of letters -> tree of shardings."""
    return jax.tree.map(lambda x, d: NamedSharding(mesh, spec(x.shape, d, mesh)), abstract, letters)


def undivided(abstract, letters, mesh: Mesh) -> list[str]:
    """Dimensions of parameters that stay whole because an axis does not divide them."""
    found = {}
    for x, d in zip(jax.tree.leaves(abstract), jax.tree.leaves(letters), strict=True):
        for size, letter in zip(x.shape, d.replace(">", ""), strict=True):
            axes = [axis for axis in RULES.get(letter, ()) if mesh.shape[axis] > 1]
            if axes and size % math.prod(mesh.shape[axis] for axis in axes):
                grid = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                found[f"{letter}={size} over {grid}"] = True
    return list(found)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, shape) -> NamedSharding:
    """Where an array of a batch, of this shape [B] or [B T], lies: each device has its tokens."""
    return NamedSharding(mesh, spec(shape, "BT"[: len(shape)], mesh))


def constrain(x: jax.Array, letters: Letters) -> jax.Array:
    """Pins an activation to the mesh in force (`jax.set_mesh`); does nothing without one."""
    mesh = mesh_in_force()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, letters, mesh))
