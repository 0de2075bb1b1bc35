"""What a model saves for its backward pass and what it recomputes, counted without running."""

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny

from jaxgpt.config import MeshConfig
from jaxgpt.model import Coords, abstract_params, build
from jaxgpt.model.block import SAVE_DOTS_AND_ATTENTION
from jaxgpt.model.kernels import ScoreMod, attend, attend_on_mesh, cudnn, splash
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.sharding import make_mesh

B, T = 2, 40  # no multiple of other sizes here


def make_shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def count_saved(cfg) -> Counter:
    """Count the (shape, dtype) of arrays saved between the passes, over all layers."""

    def backward(params, tokens, coords):
        model = build(cfg)
        return jax.vjp(lambda p: model.apply({"params": p}, tokens, coords)[0], params)[1]

    tokens, params = make_shape(B, T), abstract_params(cfg)[0]
    arrays = jax.tree.leaves(jax.eval_shape(backward, params, tokens, Coords(tokens, tokens)))
    stacked = Counter((x.shape, x.dtype.name) for x in arrays if x.shape[:1] == (cfg.layers,))
    parameters = {x.shape for x in jax.tree.leaves(params)}
    return Counter({array: n for array, n in stacked.items() if array[0] not in parameters})


GPT2 = dict(feedforward="plain", activation="gelu", bias=True, norm="layer", position="learned")
# Settings of a model, the number of arrays [N F] it saves, and of numbers per head and token.
CASES = {
    "strips": (dict(kernel="strips"), 2, 0),
    "blockwise": (dict(kernel="blockwise"), 2, 1),  # log Σ e^logit
    "dense": (dict(kernel="dense"), 2, T),  # logits
    "as GPT-2": (dict(kernel="strips", **GPT2), 1, 0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_saves_the_inputs_of_its_products_and_nothing_twice(name, dtype):
    changes, ffn_arrays, per_head = CASES[name]
    cfg = tiny(layers=3, ffn=36, dtype=dtype, **changes)
    d, N = cfg.sizes, B * T
    # The residual stream before and after both norms; q, k, v and the attention output; the input
    # of the activation. Log-sums and logits are float32 whatever the model.
    numbers = 4 * d["D"] + 2 * (d["H"] + d["G"]) * d["K"] + ffn_arrays * d["F"]
    wanted = Counter({dtype: cfg.layers * N * numbers})
    wanted["float32"] += cfg.layers * N * per_head * d["H"]
    found = Counter()
    for (sizes, kind), times in count_saved(cfg).items():
        found[kind] += times * math.prod(sizes)
    assert found == +wanted


# --- recomputation does not rerun a kernel ---


def lower_kernel(kernel, policy, platform, K=128, **sizes) -> str:
    """Return the program of a kernel's value and gradients under a rematerialization policy."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    score_mod = ScoreMod(make_layer_mask(tiny(), "full", "causal"), is_self=True)
    q, coords = (
        make_shape(4, 256, 4, K, dtype=jnp.bfloat16),
        Coords(make_shape(4, 256), make_shape(4, 256)),
    )

    def loss(q, k, v, coords):
        def attend_squared(q, k, v):  # squared, so that the gradient needs the kernel's output
            return jnp.square(attend_on_mesh(mesh, kernel, q, k, v, coords, coords, score_mod))

        return jnp.sum(jax.checkpoint(attend_squared, policy=policy)(q, k, v).astype(jnp.float32))

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(q, q, q, coords)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("sizes", [dict(data=1), dict(data=2, tensor=2)], ids=str)
def test_dots_run_splash_forward_once(sizes):
    calls = {
        policy: lower_kernel(splash.splash, policy, "tpu", **sizes).count("tpu_custom_call")
        for policy in (SAVE_DOTS_AND_ATTENTION, None)
    }
    assert calls == {SAVE_DOTS_AND_ATTENTION: 3, None: 4}  # forward, queries, keys and values


@pytest.mark.parametrize("kernel", ["strips", "blockwise"])
def test_dots_recompute_no_product_of_attention(kernel):
    everything = jax.checkpoint_policies.everything_saveable
    counts = {
        policy: lower_kernel(partial(attend, kernel), policy, "cpu").count("dot_general")
        for policy in (everything, SAVE_DOTS_AND_ATTENTION, None)
    }
    assert counts[everything] == counts[SAVE_DOTS_AND_ATTENTION] < counts[None]


def test_dots_run_cudnn_forward_once(monkeypatch):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    calls = {
        policy: lower_kernel(cudnn.cudnn, policy, "cuda", K=64).count(
            "@__cudnn$fmhaScaleBiasSoftmax("
        )
        for policy in (SAVE_DOTS_AND_ATTENTION, None)
    }
    assert calls == {SAVE_DOTS_AND_ATTENTION: 1, None: 2}
