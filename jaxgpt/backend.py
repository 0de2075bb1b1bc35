"""What is chosen by platform: one record of numbers and choices for each, all of them measured.

The mathematics is the same everywhere; a record decides how it is laid out and in which pieces.
`get_backend()` returns the record of the platform for which a program is being traced. The
measurements are in benchmarks/NOTES.md.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax


@dataclass(frozen=True)
class Backend:
    """The choices of one platform. The defaults suit an accelerator that was not measured."""

    # --- layers (model/transformer.py, model/layers.py) ---

    # Layer groups up to which a training step unrolls its loop over layers. A loop stores the
    # activations for the backward pass in stacked buffers: zeroing, writing and slicing them takes
    # 3 to 9% of a step on a CPU, 9 to 12% on a GPU. More layers take long to compile: 16 of Llama
    # 3.2 1B take 29 s on an H200.
    max_unrolled_layers: int = 0
    # Whether layers are unrolled with `model.remat` too: without a loop, the CPU compiler merges
    # the recomputation with the forward pass.
    use_unrolled_remat: bool = False
    # Whether unrolled layers guard what they recompute against common-subexpression elimination. It
    # saves 4 to 11% of a step on a GPU, and a third of its memory; the CPU compiler ignores it.
    use_cse_guard: bool = False
    # Whether the backward pass reads the mean and rate of a norm instead of recomputing them. With
    # them at hand, XLA's GPU compiler computes a norm's gradient in one pass over its inputs;
    # without, it writes a float32 [N D] product and reads it again for the sum (2.3 to 1.2 ms of a
    # step of GPT-2).
    use_saved_norm_statistics: bool = False

    # --- products (model/products.py) ---

    # Whether linear maps multiply [N I] by [I O] instead of [B T I] by weights of any rank. A CPU
    # takes 1.8 times as long for the product on [B T D]; a TPU would copy q, k, v and the output to
    # make heads contiguous.
    use_flat_products: bool = False
    # Whether a factor is transposed in memory before a product that would read it transposed. CPUs
    # multiply xᵀ at two thirds of the speed, so a copy pays.
    use_transposed_copies: bool = False
    # Whether elementwise functions with many uses are computed in a loop of their own. XLA's CPU
    # compiler otherwise recomputes RoPE's sines and cosines at every use, for each head of each
    # layer; it does not fuse out of a loop.
    use_loop_to_compute_once: bool = False

    # Rows up to which a product with quantized weights dequantizes some inputs at a time; see
    # `products.matmul_quantized`. Elsewhere the compiler fuses it into the product.
    max_rows_of_blocks: int = 0

    # Whether products of bfloat16 are computed, and kept, in float32.
    widens_bfloat16: bool = False

    # --- attention (model/kernels) ---

    # Queries below which attention is `dense` whatever the number of keys: decoding has one.
    min_strip_queries: int = 0
    # T·S below which attention is `dense`. On accelerators a loop iteration costs a few kernel
    # launches, so that `blockwise` only serves to save memory: on an H200 a gradient takes 1.7 and
    # 3.2 ms (dense, blockwise) for T = 512, 2.9 and 6.5 for 1024. Above, it is not measured yet.
    max_dense_scores: int = 2048 * 2048
    # T·S up to which attention that is not `dense` runs in strips; above, it is `blockwise`.
    # Forward and backward on a CPU with two cores, in ms, by (dense, strips, blockwise): 64 rows of
    # 16 and 4 heads of width 32 take (1.5, 1.7, 2.2), 12 rows of 64 (3.9, 2.5, 3.5); 6 heads of
    # width 64 take (203, 123, 171) for 16 rows of 256, (-, 304, 254) for one of 2048.
    max_strip_scores: int = 0
    # T·S from which a kernel for this kind of device is used, where there is one. On an H200 a
    # gradient takes, in ms, (dense, cuDNN): (0.6, 0.9) for T = 128, (1.2, 0.9) for 256.
    min_accelerated_scores: int = 256 * 256
    # Whether there is such a kernel at all.
    has_attention_kernel: bool = True

    # --- the loss over the vocabulary (objectives.py) ---

    # Logits per chunk. On a CPU a chunk should fit the cache: for [4096 384] x [8192], loss and
    # gradient take 462 ms at 2**22 and 553 ms at 2**25. Accelerators need larger products.
    max_chunk_scores: int = 2**28
    # The vocabulary is padded to a multiple of this: tensor cores reach full speed only with
    # aligned rows, and GPT-2 has 50257 tokens (3.9 to 2.6 ms for the gradient of the scores).
    vocab_alignment: int = 1
    # Whether maximum and sum of the scores are computed in one pass (3.0 to 2.6 ms of a step of
    # GPT-2 on an H200). CPU compilers make scalar loops of it.
    use_one_pass_normalizer: bool = False

    # What a batch costs beside its tokens, in tokens, where rows are scored (evaluate): reading all
    # parameters again. SmolLM2-135M on two cores: 0.5 s for 1 x 96 tokens, 2 to 2.5 s for 24 x 64.
    # On an accelerator small batches cost as much as large ones.
    batch_cost_tokens: int = 4096

    # --- the training step (trainer) ---

    # Tokens that a microbatch has at least, if the batch is split for speed; None = it is not. A
    # CPU is faster on microbatches that fit its caches, and needs less memory for them; but every
    # microbatch adds to the gradients.
    min_microbatch_tokens: int | None = None
    # The same for models of up to `max_small_model_params`, which leave more cache for tokens.
    min_small_model_microbatch_tokens: int | None = None
    max_small_model_params: int = 2**22
    # XLA's optimization level for the initialization; None = the default. 1 halves the compile time
    # on a CPU, with bit-identical results.
    init_optimization_level: int | None = None

    def find_min_microbatch_tokens(self, params: int) -> int | None:
        """Return the least number of tokens of a microbatch for a model of so many parameters."""
        is_small = params <= self.max_small_model_params
        return self.min_small_model_microbatch_tokens if is_small else self.min_microbatch_tokens


ONE_CPU = Backend(
    max_unrolled_layers=8,
    use_flat_products=True,
    use_transposed_copies=True,
    use_loop_to_compute_once=True,
    max_rows_of_blocks=64,
    widens_bfloat16=True,
    has_attention_kernel=False,
    min_strip_queries=32,
    max_dense_scores=0,
    max_strip_scores=1024 * 1024,
    max_chunk_scores=2**22,
    batch_cost_tokens=128,
    min_microbatch_tokens=1024,
    min_small_model_microbatch_tokens=2048,
    init_optimization_level=1,
)
BACKENDS = {
    "cpu": ONE_CPU,
    "cpus": replace(  # a mesh of them
        ONE_CPU,
        max_unrolled_layers=0,
        max_rows_of_blocks=0,
        min_microbatch_tokens=None,
        min_small_model_microbatch_tokens=None,
    ),
    "gpu": Backend(
        max_unrolled_layers=48,
        use_unrolled_remat=True,
        use_cse_guard=True,
        use_saved_norm_statistics=True,
        vocab_alignment=64,
        use_one_pass_normalizer=True,
    ),
    "tpu": Backend(),
}


def get_platform() -> str:
    """Return the platform for which a program is being traced: "cpu", "gpu" or "tpu".

    It is that of the active mesh, whose devices need not exist on this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return find_device_platform(device) if device else jax.default_backend()


def make_abstract_device(kind: str, platform: str):
    """Return a device that need not exist, for an abstract mesh.

    Args:
        kind: such as "TPU v5 lite", or "" if it is not known.
        platform: "cpu", "gpu" or "tpu".
    """
    make: Any = jax.sharding.AbstractDevice
    if "platform" in make.__annotations__:
        return make(kind or platform, None, platform)
    return make(platform, None)  # its kind is all that it has


def find_device_platform(device) -> str:
    """Return the platform of a mesh's abstract device, of which old versions of JAX keep the kind.

    Args:
        device: with a `platform`, or with a `device_kind` alone: "cpu", "TPU v5 lite", "Tesla T4".
    """
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind.lower()
    return next((name for name in ("cpu", "tpu") if kind.startswith(name)), "gpu")


MIN_BFLOAT16_CAPABILITY = 8.0  # of NVIDIA's GPUs: Ampere


def choose_dtype(device=None) -> str:
    """Return the `model.dtype` that a device computes fastest in: "bfloat16" or "float32".

    A CPU, and a GPU before Ampere (T4, V100), emulates bfloat16, which is slower than float32.

    Args:
        device: one of `jax.devices()`, by default the first.
    """
    device = device or jax.devices()[0]
    if device.platform != "gpu":
        return "bfloat16" if device.platform == "tpu" else "float32"
    capability = str(getattr(device, "compute_capability", MIN_BFLOAT16_CAPABILITY))
    is_old = not capability.startswith("gfx") and float(capability) < MIN_BFLOAT16_CAPABILITY
    return "float32" if is_old else "bfloat16"


def get_backend() -> Backend:
    """Return the record of the platform for which a program is being traced."""
    mesh, platform = jax.sharding.get_abstract_mesh(), get_platform()
    if platform == "cpu" and not mesh.empty and mesh.size > 1:
        platform = "cpus"
    return BACKENDS.get(platform, BACKENDS["tpu"])
