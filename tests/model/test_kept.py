"""What a model keeps for its backward pass, and what it computes again: counted, nothing is run."""

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import tiny

from jaxgpt.config import MeshConfig
from jaxgpt.model import Coords, abstract_params, build
from jaxgpt.model.block import COSTLY
from jaxgpt.model.kernels import Score, attend, cudnn, over_devices, splash
from jaxgpt.model.masks import layer_mask
from jaxgpt.sharding import make_mesh

B, T = 2, 40  # no multiple of anything else here


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def kept(cfg) -> Counter:
    """(shape, dtype) of the arrays that lie between the passes, of all layers."""

    def backward(params, tokens, at):
        model = build(cfg)
        return jax.vjp(lambda p: model.apply({"params": p}, tokens, at)[0], params)[1]

    tokens, params = shape(B, T), abstract_params(cfg)[0]
    arrays = jax.tree.leaves(jax.eval_shape(backward, params, tokens, Coords(tokens, tokens)))
    stacked = Counter((x.shape, x.dtype.name) for x in arrays if x.shape[:1] == (cfg.layers,))
    parameters = {x.shape for x in jax.tree.leaves(params)}
    return Counter({array: n for array, n in stacked.items() if array[0] not in parameters})


GPT2 = dict(feedforward="plain", activation="gelu", bias=True, norm="layer", position="learned")
# What a model is, how many arrays [N F] it keeps, and how many numbers for each head of a token.
KEPT = {
    "strips": (dict(kernel="strips"), 2, 0),
    "blockwise": (dict(kernel="blockwise"), 2, 1),  # the logarithm of the sum of weights
    "dense": (dict(kernel="dense"), 2, T),  # scores
    "as GPT-2": (dict(kernel="strips", **GPT2), 1, 0),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEPT)
def test_a_layer_keeps_what_its_products_take_and_nothing_twice(name, dtype):
    changes, wide, sums = KEPT[name]
    cfg = tiny(layers=3, ffn=36, dtype=dtype, **changes)
    d, N = cfg.sizes, B * T
    # The stream before both norms and after; q, k, v and what attention gives; what goes into the
    # activation. Sums and scores are float32 whatever the model.
    numbers = 4 * d["D"] + 2 * (d["H"] + d["G"]) * d["K"] + wide * d["F"]
    wanted = Counter({dtype: cfg.layers * N * numbers})
    wanted["float32"] += cfg.layers * N * sums * d["H"]
    found = Counter()
    for (sizes, kind), times in kept(cfg).items():
        found[kind] += times * math.prod(sizes)
    assert found == +wanted


# --- recomputation does not run a kernel again ---


def program(kernel, policy, platform, K=128, **sizes) -> str:
    """The text of a kernel's value and gradients, where only what a policy says is kept."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])
    score = Score(layer_mask(tiny(), "full", "causal"), is_self=True)
    q, at = shape(4, 256, 4, K, dtype=jnp.bfloat16), Coords(shape(4, 256), shape(4, 256))

    def loss(q, k, v, at):
        def out(q, k, v):  # squared, so that the gradient needs what the kernel gave
            return jnp.square(over_devices(mesh, kernel, q, k, v, at, at, score))

        return jnp.sum(jax.checkpoint(out, policy=policy)(q, k, v).astype(jnp.float32))

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(q, q, q, at)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("sizes", [dict(data=1), dict(data=2, tensor=2)], ids=str)
def test_dots_run_splash_forward_once(sizes):
    calls = {
        policy: program(splash.splash, policy, "tpu", **sizes).count("tpu_custom_call")
        for policy in (COSTLY, None)
    }
    assert calls == {COSTLY: 3, None: 4}  # forward, queries, keys and values


@pytest.mark.parametrize("kernel", ["strips", "blockwise"])
def test_dots_multiply_no_more_in_attention_than_without_recomputation(kernel):
    everything = jax.checkpoint_policies.everything_saveable
    counts = {
        policy: program(partial(attend, kernel), policy, "cpu").count("dot_general")
        for policy in (everything, COSTLY, None)
    }
    assert counts[everything] == counts[COSTLY] < counts[None]


def test_dots_run_cudnn_forward_once(monkeypatch):
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    calls = {
        policy: program(cudnn.cudnn, policy, "cuda", K=64).count("@__cudnn$fmhaScaleBiasSoftmax(")
        for policy in (COSTLY, None)
    }
    assert calls == {COSTLY: 1, None: 2}
