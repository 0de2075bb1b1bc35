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

import math
from typing import Any, NamedTuple

import jax

from jaxgpt.backend import get_backend, get_platform
from jaxgpt.config import Config
from jaxgpt.sharding import SHARDING_RULES
from jaxgpt.trainer.step import choose_microbatch_count

# Fraction of the peak that a step reaches where nothing was measured: a typical figure for an
# accelerator; on a CPU the peak is a measured product, of which a step reaches most.
TYPICAL_MFU = {"cpu": 0.6, "gpu": 0.4, "tpu": 0.4}


class MemoryEstimate(NamedTuple):
    """Bytes that a training step takes on one device."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def temporaries(self) -> int:
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
    shape = jax.ShapeDtypeStruct((parameters,), jax.numpy.float32)
    return cfg.train.accumulate or choose_microbatch_count(
        cfg, shape, cfg.train.batch, cfg.model.context
    )


def estimate_memory(cfg: Config, abstract: Any, mesh: Any) -> MemoryEstimate:
    """Estimate the memory of a training step on one device. The mesh must be active.

    Args:
        abstract: the `TrainState`, as shapes and shardings.
        mesh: whose devices need not exist.
    """
    model, d = cfg.model, cfg.model.sizes
    axes = dict(mesh.shape)
    parameters = count_device_bytes(abstract.params)
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    microbatches = count_microbatches(cfg, total)
    divided = math.prod(axes[a] for a in SHARDING_RULES["B"]) * axes["context"]
    n = cfg.train.batch * model.context / (divided * microbatches)
    itemsize = 2 if model.dtype == "bfloat16" else 4
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
    gradients = parameters * (2 if microbatches > 1 else 1)
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
    has_kernel = get_platform() != "cpu" and T * T >= backend.min_accelerated_scores
    return not has_kernel and (T < backend.min_strip_queries or T * T < backend.max_dense_scores)
