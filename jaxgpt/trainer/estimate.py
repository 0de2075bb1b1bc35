"""Estimate the memory and the time of a training step, without compiling or tracing it.

The state (parameters and moments) is counted, to the byte. The rest follows from the dimension
letters, for the n tokens of a microbatch on one device:

    gradients    float32 as the parameters are divided; with microbatches their sum besides
    activations  saved for the backward pass, by layer. Without `model.remat`: the residual stream
                 before and after both norms, q, k, v, the attention output and the input of the
                 activation. `full` saves the residual stream of a layer group, `dots` the products.
    working      the larger of a layer's backward pass and two chunks of logits; a copy of the
                 parameters in the compute dtype; and, where the batch is divided over devices, a
                 gathered layer

It is for what must be cheap: the warnings before a run, and devices for which nothing can be
compiled on this machine. `jaxgpt plan` reads the compiled step where it can.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from jaxgpt.backend import get_backend, make_abstract_device
from jaxgpt.config import Config, override
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import MESH_AXES, SHARDING_RULES, check_fits, resolve_sizes
from jaxgpt.trainer.state import make_abstract_state
from jaxgpt.trainer.step import choose_microbatch_count

# Fraction of the peak that a step reaches where nothing was measured: a typical figure for an
# accelerator; on a CPU the peak is a measured product, of which a step reaches most.
TYPICAL_MFU = {"cpu": 0.6, "gpu": 0.4, "tpu": 0.4}

CPU_OVERHEAD = 1.5  # temporaries of a CPU's programs relative to what must be kept


class MemoryEstimate(NamedTuple):
    """Bytes that a training step takes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Bytes of the step."""
        return sum(self)

    @property
    def temporaries(self) -> int:
        """Bytes besides parameters and moments."""
        return self.gradients + self.activations + self.working


def count_device_bytes(tree: Any) -> int:
    """Count the bytes of a tree of abstract arrays with shardings that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def count_microbatches(cfg: Config, parameters: int) -> int:
    """Return the number of microbatches of a step, on the platform of the active mesh."""
    size = np.broadcast_to(np.float32(0), (parameters,))  # it takes no memory
    return cfg.train.accumulate or choose_microbatch_count(
        cfg, size, cfg.train.batch, cfg.model.context
    )


def estimate_memory(cfg: Config, abstract: Any, mesh: Any) -> MemoryEstimate:
    """Estimate the memory of a training step on one device. The mesh must be active.

    Args:
        abstract: the `TrainState`, as shapes and shardings.
        mesh: whose devices need not exist.
    """
    model, d = cfg.model, cfg.model.sizes
    axes = dict(mesh.shape)
    trained = count_device_bytes(abstract.params)
    parameters = trained + count_device_bytes(abstract.base)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves((abstract.params, abstract.base)))
    microbatches = count_microbatches(cfg, total)
    divided = math.prod(axes[a] for a in SHARDING_RULES["B"]) * axes["context"]
    n = cfg.train.batch * model.context / (divided * microbatches)
    is_wide = get_backend().widens_bfloat16
    itemsize = 2 if model.dtype == "bfloat16" and not is_wide else 4
    tensor, layers = axes["tensor"], model.layers / axes["pipe"]
    if model.family == "encoder_decoder":
        layers += (model.encoder_layers or model.layers) / axes["pipe"]

    heads, kv_heads = d["H"] * d["K"] / tensor, d["G"] * d["K"] / tensor
    hidden = d["F"] / tensor * (model.moe.active if model.has_experts else 1)
    is_gated = any(spec.feedforward.endswith("gated") for spec in model.layer_cycle)
    inputs = 4 * d["D"] + 2 * heads + 2 * kv_heads + (1 + is_gated) * hidden
    products = 3 * d["D"] + 2 * heads + 2 * kv_heads + (1 + is_gated) * hidden
    saved = {"none": inputs, "dots": products, "full": d["D"] / len(model.layer_cycle)}
    activations = layers * n * saved[model.remat] * itemsize
    backward = n * (9 * d["D"] + 3 * heads + 2 * kv_heads + 6 * hidden) * itemsize
    if model.remat != "none":
        backward += n * inputs * itemsize
    scores = n * d["H"] / tensor * model.context * 4 if _is_dense(model.context) else 0
    activations += layers * scores if model.remat == "none" else 0
    backward += 2 * scores

    matrices = 4 * (total - model.vocab * d["D"]) / max(model.layers, 1)
    gathered = 2 * matrices / 4 * itemsize if axes["fsdp"] > 1 else 0
    chunk = min(n, get_backend().max_chunk_scores // d["V"] + 1)
    logits = 2 * chunk * d["V"] * 4 + n * d["D"] * 4
    table = d["V"] * d["D"] / tensor * (4 + itemsize)
    cast = parameters / 4 * itemsize if itemsize < 4 else 0
    gradients = trained * (2 if microbatches > 1 else 1)
    if is_wide and model.remat == "none":  # layers out of their loop; measured: 1.2 to 1.9
        activations, backward = (CPU_OVERHEAD * x for x in (activations, backward))
    return MemoryEstimate(
        parameters,
        count_device_bytes(abstract.opt_state),
        round(gradients),
        round(activations),
        round(max(backward, logits + table) + gathered + cast),
    )


def _is_dense(T: int) -> bool:
    """Return whether attention over rows of T tokens materializes its scores."""
    backend = get_backend()
    has_kernel = backend.has_attention_kernel and backend.min_accelerated_scores <= T * T
    return not has_kernel and (backend.min_strip_queries > T or backend.max_dense_scores > T * T)


def make_abstract_mesh(cfg: Config, count: int, platform: str, kind: str) -> AbstractMesh:
    """Return the mesh of a config over `count` devices, which need not exist.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = resolve_sizes(cfg.mesh, count)
    auto = (AxisType.Auto,) * len(MESH_AXES)
    device = make_abstract_device(kind, platform)
    return AbstractMesh(sizes, MESH_AXES, axis_types=auto, abstract_device=device)


def estimate_step(
    cfg: Config, count: int, platform: str, kind: str = ""
) -> tuple[MemoryEstimate, int]:
    """Estimate the memory of a step on devices that need not exist.

    Returns:
        (memory of one device, number of microbatches).

    Raises:
        ConfigError: the config does not fit this number of devices.
    """
    mesh = make_abstract_mesh(cfg, count, platform, kind)
    check_fits(cfg, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        # Everything else in the config leaves the shapes of the state as they are.
        state = _make_state(Config(model=cfg.model, optimizer=cfg.optimizer, lora=cfg.lora), mesh)
        total = sum(x.size for x in jax.tree.leaves((state.params, state.base)))
        return estimate_memory(cfg, state, mesh), count_microbatches(cfg, total)


@functools.lru_cache(maxsize=16)
def _make_state(cfg: Config, mesh: AbstractMesh) -> Any:
    return make_abstract_state(cfg, mesh)[2]


# --- what to change ------------------------------------------------------------------------------


def list_changes(
    cfg: Config, count: int, platform: str, microbatches: int, has_bfloat16: bool = True
) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, settings, cost) of changes that may save memory, the cheapest first.

    Args:
        count: number of devices.
        microbatches: parts of a batch as it is.
    """
    if count > 1 and cfg.mesh.fsdp == 1 and cfg.mesh.data in (-1, count):
        yield "fsdp", "mesh.data=1 mesh.fsdp=-1", "parameters are gathered where they are used"
    is_rest = cfg.mesh.data == -1 or cfg.mesh.fsdp == -1
    divided = count if is_rest else cfg.mesh.data * cfg.mesh.fsdp
    rows = cfg.train.batch // max(divided, 1)
    for parts in sorted({2 * microbatches, rows}):
        if microbatches < parts <= rows and cfg.train.batch % (parts * divided) == 0:
            yield "accumulate", f"train.accumulate={parts}", "smaller products"
    if cfg.model.dtype == "float32" and has_bfloat16:
        speed = "slower on most CPUs" if platform == "cpu" else "and faster"
        yield "dtype", "model.dtype=bfloat16", f"rounded activations, {speed}"
    if cfg.optimizer.moments == "float32" and has_moments(cfg):
        yield "moments", "optimizer.moments=int8", "moments of 1 byte instead of 4"
    if cfg.model.remat == "none":
        yield "remat", "model.remat=dots", "what lies between products is computed again"
    if cfg.model.remat != "full":
        yield "remat", "model.remat=full", "the forward pass runs twice: a third more arithmetic"


def has_moments(cfg: Config) -> bool:
    """Return whether the optimizer keeps moments of matrices, which may be stored in 8 bits."""
    try:
        override(cfg, ["optimizer.moments=int8"])
    except ConfigError:
        return False
    return True


def format_advice(cfg: Config, count: int, platform: str) -> str:
    """Format what to change when a step did not fit, each with an estimate of its memory."""
    now, microbatches = estimate_step(cfg, count, platform)
    lines = []
    for _, settings, cost in list_changes(cfg, count, platform, microbatches):
        try:
            found, _ = estimate_step(override(cfg, settings.split()), count, platform)
        except ConfigError:
            continue
        if found.total < now.total:
            lines.append((found.total, f"  about {found.total / 1e9:,.2f} GB  {settings} ({cost})"))
    text = "\n".join(line for _, line in sorted(lines))
    return (
        f"A step needs about {now.total / 1e9:,.2f} GB on each device as it is, an estimate. What "
        f"needs less:\n{text}\nor a smaller train.batch={cfg.train.batch}, model.width or "
        "model.layers. `jaxgpt plan`, or the same command with --plan, compiles and ranks them."
    )
