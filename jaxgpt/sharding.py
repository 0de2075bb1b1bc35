"""Sharding: one table from dimension letters to mesh axes, for parameters and activations alike.

The mesh has six named axes, most of which have size 1 most of the time:

    data     data parallelism: replicas of the model, each with its part of the batch
    pipe     pipeline parallelism: each stage holds some of the layers
    fsdp     parameters sharded, all-gathered where used; also shards the batch
    expert   experts sharded; also shards the batch
    context  the tokens of a row sharded; keys and values all-gathered where used
    tensor   tensor parallelism: heads, feed-forward and vocabulary sharded

Devices adjacent along the last axes are adjacent on the machine, where communication is cheap.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config, MeshConfig
from jaxgpt.dims import Letters
from jaxgpt.settings import ConfigError, format_nearest_multiples

# Dimension letter (see dims.py) -> the mesh axes it is sharded over. Others are not sharded.
SHARDING_RULES = {
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
MESH_AXES = ("data", "pipe", "fsdp", "expert", "context", "tensor")
# Whether JAX accepts a sharding constraint where some mesh axes are manual, inside `shard_map`.
CAN_CONSTRAIN_SHARDS = jax.__version_info__ >= (0, 8)


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """Make the device mesh of a config.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(cfg, len(devices))
    # Auto: the compiler propagates shardings. (jax.make_mesh now defaults to Explicit.)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=auto, devices=devices)


def resolve_sizes(cfg: MeshConfig, device_count: int) -> tuple[int, ...]:
    """Return the sizes of MESH_AXES over so many devices, -1 replaced.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    requested = [getattr(cfg, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in requested if size != -1)
    sizes = tuple(device_count // fixed if size == -1 else size for size in requested)
    if math.prod(sizes) != device_count:
        axis_sizes = zip(MESH_AXES, requested, strict=True)
        layout = " x ".join(f"mesh.{name}={size}" for name, size in axis_sizes if size != 1)
        multiple = "a multiple of " if -1 in requested else ""
        raise ConfigError(
            f"{layout or 'mesh.data=1'} needs {multiple}{fixed} devices, found {device_count}: use "
            "sizes whose product is the device count, or one -1 for the rest of the devices."
        )
    return sizes


def check_fits(cfg: Config, mesh: Mesh | AbstractMesh):
    """Check, before anything is compiled, that the mesh divides the batch, context and layers.

    Raises:
        ConfigError: it does not; the message gives the nearest values that work.
    """
    divisors = {f"mesh.{axis}": mesh.shape[axis] for axis in SHARDING_RULES["B"]}
    divisors["train.accumulate"] = cfg.train.accumulate
    _check_divides("train.batch", cfg.train.batch, divisors)
    model = cfg.model
    _check_divides("model.context", model.context, {"mesh.context": mesh.shape["context"]})
    stages = {"mesh.pipe": mesh.shape["pipe"], "layers that repeat": len(model.layer_cycle)}
    if mesh.shape["pipe"] > 1:
        _check_divides("model.layers", model.layers, stages)
        if model.family == "encoder_decoder":
            _check_divides("model.encoder_layers", model.encoder_layers or model.layers, stages)
        if model.has_experts:
            raise ConfigError(
                f"mesh.pipe={mesh.shape['pipe']} with model.feedforward={model.feedforward!r}: "
                "a pipeline does not add up the experts' load over its microbatches. Shard experts "
                "with mesh.expert, and use mesh.pipe=1."
            )


def _check_divides(key: str, size: int, divisors: dict[str, int]):
    divisors = {name: parts for name, parts in divisors.items() if parts > 1}
    parts = math.prod(divisors.values())
    if size % parts:
        layout = " x ".join(f"{name}={parts}" for name, parts in divisors.items())
        layout += f" = {parts} parts" if len(divisors) > 1 else ""
        raise ConfigError(
            f"{key}={size} cannot be divided in {layout}: use {key}="
            f"{format_nearest_multiples(size, parts)}."
        )


def make_spec(shape, letters: Letters, mesh) -> PartitionSpec:
    """Return the PartitionSpec of an array from the letters of its dimensions.

    Dimensions are assigned from left to right: each mesh axis shards at most one dimension of an
    array, the first that has a rule for it, and a dimension that its axes do not divide evenly is
    not sharded. Inside `shard_map`, its manual axes are already used.
    """
    used: set[str] = set(mesh.manual_axes)
    out: list[tuple[str, ...] | None] = []
    for size, letter in zip(shape, letters.replace(">", ""), strict=True):
        axes = tuple(
            a for a in SHARDING_RULES.get(letter, ()) if a not in used and mesh.shape[a] > 1
        )
        if not axes or size % math.prod(mesh.shape[axis] for axis in axes):
            out.append(None)
        else:
            used.update(axes)
            out.append(axes)
    return PartitionSpec(*out)


def get_active_mesh():
    """Return the mesh of `jax.set_mesh`, or None if there is only one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def use_mesh_of(params) -> AbstractContextManager:
    """Return a context with the mesh that the parameters lie on active, if none is yet."""
    mesh = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    is_active = not jax.sharding.get_abstract_mesh().empty
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) and not is_active else nullcontext()


def map_shards(f: Callable, in_specs: tuple, out_specs, has_kernel: bool = False) -> Callable:
    """Wrap `f` in `jax.shard_map`, manual only over the mesh axes that the specs name.

    `f` may use collectives over those axes. A sum over devices has the right gradient only if it
    lies outside the differentiated function.
    """
    specs = jax.tree.leaves((in_specs, out_specs), is_leaf=lambda x: isinstance(x, PartitionSpec))
    axes = {axis for spec in specs for entry in spec if entry for axis in get_axis_names(entry)}
    mesh = get_active_mesh()
    if mesh is None or not axes:
        return f
    if mesh.shape["pipe"] > 1:  # the `vmap` over stages has spmd_axis_name="pipe"
        axes.add("pipe")
    if has_kernel:  # a TPU kernel is rejected if any axis is automatic, even one of size 1
        axes |= {axis for axis in mesh.axis_names if mesh.shape[axis] == 1} - {*mesh.manual_axes}
    return jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False
    )


def get_axis_names(entry) -> tuple[str, ...]:
    """Return the axes of one entry of a PartitionSpec, which may be a name, a tuple, or None."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def is_sharded(letter: str, size: int) -> bool:
    """Return whether the active mesh shards a dimension of this letter and size."""
    mesh = get_active_mesh()
    return mesh is not None and make_spec((size,), letter, mesh) != PartitionSpec(None)


def make_shardings(abstract, letters, mesh: Mesh):
    """Map trees of shapes and of letters to the tree of parameter shardings."""
    return jax.tree.map(
        lambda x, d: NamedSharding(mesh, make_spec(x.shape, d, mesh)), abstract, letters
    )


def make_load_shardings(abstract, letters, mesh: Mesh | None):
    """Return the shardings of parameters over a mesh, or on the first device if it is None."""
    if mesh is not None:
        return make_shardings(abstract, letters, mesh)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: device, abstract)


def list_unsharded_dims(abstract, letters, mesh: Mesh) -> list[str]:
    """List the parameter dimensions left unsharded because their axes do not divide them."""
    found = {}
    for x, d in zip(jax.tree.leaves(abstract), jax.tree.leaves(letters), strict=True):
        for size, letter in zip(x.shape, d.replace(">", ""), strict=True):
            axes = [axis for axis in SHARDING_RULES.get(letter, ()) if mesh.shape[axis] > 1]
            if axes and size % math.prod(mesh.shape[axis] for axis in axes):
                layout = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                found[f"{letter}={size} over {layout}"] = True
    return list(found)


def make_replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a copy of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def make_batch_sharding(mesh: Mesh, shape) -> NamedSharding:
    """Return the sharding of a batch array of this shape, [B] or [B T], by rows and tokens."""
    return NamedSharding(mesh, make_spec(shape, "BT"[: len(shape)], mesh))


def constrain(x: jax.Array, letters: Letters) -> jax.Array:
    """Constrain an activation's sharding on the active mesh; return it unchanged without one."""
    mesh = get_active_mesh()
    if mesh is None or (mesh.manual_axes and not CAN_CONSTRAIN_SHARDS):
        return x
    return jax.lax.with_sharding_constraint(x, make_spec(x.shape, letters, mesh))


# --- all-gather in stages ----------------------------------------------------------------------

# The compiler for TPUs has no all-gather along all three dimensions of a torus at once, and no
# reduce-scatter: it all-reduces the whole array, twice the bytes. These are the chips along the
# last dimension of a slice, by its number of chips, for the generations that are 3D tori.
TORUS_LINES = {64: 4, 128: 8, 256: 8, 512: 8, 1024: 16, 2048: 16}
TORUS_KINDS = ("TPU v4", "TPU v5", "TPU v5p")


def find_gather_stages(mesh) -> tuple[int, int] | None:
    """Return the sizes that an all-gather along fsdp is split into, (planes, lines), or None."""
    device = getattr(mesh, "abstract_device", None) or mesh.devices.flat[0]
    size = mesh.shape["fsdp"]
    is_whole_torus = size == mesh.size and size in TORUS_LINES
    if not is_whole_torus or mesh.manual_axes or device.device_kind not in TORUS_KINDS:
        return None
    return size // TORUS_LINES[size], TORUS_LINES[size]


def gather_param(x: jax.Array, letters: Letters) -> jax.Array:
    """All-gather a parameter along fsdp where it takes two stages; else return it unchanged.

    Elsewhere the compiler gathers a parameter where it is used. The gradient is reduced and
    scattered in the opposite order.
    """
    mesh = get_active_mesh()
    stages = mesh and find_gather_stages(mesh)
    if not stages:
        return x
    axes = [get_axis_names(entry) for entry in make_spec(x.shape, letters, mesh)]
    return _gather_in_stages(stages, axes.index(("fsdp",)), x) if ("fsdp",) in axes else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_in_stages(stages: tuple[int, int], dim: int, x: jax.Array) -> jax.Array:
    """All-gather dimension `dim` of x along the lines of a torus, then along its planes."""
    for axes in (("planes", "lines"), ("planes",), ()):
        x = _constrain_to_torus(stages, dim, axes, x)
    return x


def _gather_forward(stages, dim, x):
    return _gather_in_stages(stages, dim, x), None


def _gather_backward(stages, dim, _, d_x):
    for axes in (("planes",), ("planes", "lines")):
        d_x = _constrain_to_torus(stages, dim, axes, d_x)
    return (d_x,)


_gather_in_stages.defvjp(_gather_forward, _gather_backward)


def _constrain_to_torus(stages, dim: int, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """Constrain x to be divided in `dim` along axes of the torus, and along no other."""
    # The same devices in the same order as in the active mesh, with fsdp as two axes.
    torus = AbstractMesh(stages, ("planes", "lines"), axis_types=(AxisType.Auto,) * 2)
    spec = [axes or None if i == dim else None for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(torus, PartitionSpec(*spec)))
