"""The mixture of experts against a loop over tokens."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import ExpertsConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords, build
from jaxgpt.model.experts import MAX_BLOCK_TOKENS, Router, compute_balance_loss
from jaxgpt.model.feedforward import FEEDFORWARDS

E, ACTIVE, B, T = 4, 2, 2, 23
MIXTURES = ["moe_plain", "moe_gated"]
CHOICE = ExpertsConfig(E, ACTIVE)


def make_mixture(name, capacity=0.0, moe=CHOICE, **changes):
    """Return (cfg, module, its random parameters)."""
    moe = dataclasses.replace(moe, capacity=capacity)
    cfg = tiny(feedforward=name, moe=moe, **changes)
    module = FEEDFORWARDS[name](cfg)
    x, coords = inputs(cfg)
    shapes, _ = split(jax.eval_shape(lambda: module.init(jax.random.key(0), x, coords)["params"]))
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return cfg, module, jax.tree.map(draw, shapes)


def inputs(cfg, length=T):
    x = np.random.default_rng(0).normal(size=(B, length, cfg.width)).astype(np.float32)
    return x, single_document_coords(np.zeros((B, length), np.int32))


def compute_by_loop(cfg, name, params, x, is_real, capacity=np.inf):
    """Route token by token in float64: first choices of all tokens, then second ones."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = x.astype(np.float64)

    def apply_ffn(e, y):
        up = y @ e["up"]["w"]
        if name == "moe_gated":
            gate = y @ e["gate"]["w"]
            return (gate / (1 + np.exp(-gate)) * up) @ e["down"]["w"]
        return (up / (1 + np.exp(-up))) @ e["down"]["w"]

    def expert(i, y):
        return apply_ffn(jax.tree.map(lambda w: w[i], params["experts"]), y)

    out = np.zeros_like(x)
    if cfg.moe.shared:
        out += np.stack([apply_ffn(params["shared"], y) for y in x])
    load = np.zeros(E, int)
    for choice in range(ACTIVE):
        for n, y in enumerate(x):
            if not is_real[n]:
                continue
            p = np.exp(y @ params["router"]["w"])
            p = p / p.sum() if cfg.moe.scoring == "softmax" else p / (1 + p)
            top = np.argsort(-p)[:ACTIVE]
            i = top[choice]
            gate = p[i] / (p[top].sum() if cfg.moe.scoring == "softmax" else 1)
            if load[i] < capacity:
                is_input = cfg.moe.gated == "inputs"
                out[n] += expert(i, gate * y) if is_input else gate * expert(i, y)
            load[i] += 1
    return out, load


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "changes",
    [
        dict(shared=2),
        dict(scoring="sigmoid"),
        dict(gated="inputs"),
        dict(shared=1, scoring="sigmoid", gated="inputs"),  # Llama 4's
    ],
    ids=str,
)
def test_shared_experts_sigmoid_gates_and_gated_inputs_equal_the_loop(name, changes):
    cfg, module, params = make_mixture(name, moe=ExpertsConfig(E, ACTIVE, **changes))
    x, coords = inputs(cfg)
    out = np.asarray(jax.jit(module.apply)({"params": params}, x, coords)).reshape(B * T, -1)
    wanted, _ = compute_by_loop(cfg, name, params, x.reshape(B * T, -1), np.ones(B * T))
    np.testing.assert_allclose(out, wanted, atol=2e-5)  # float32 sums of 48 products


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0, float(E)])
def test_a_mixture_equals_a_loop_over_tokens(name, capacity):
    cfg, module, params = make_mixture(name, capacity)
    x, coords = inputs(cfg)
    coords = coords._replace(
        segment_ids=coords.segment_ids.at[0, :5].set(0)
    )  # padding uses no capacity
    out = jax.jit(module.apply)({"params": params}, x, coords)
    limit = np.ceil(capacity * B * T * ACTIVE / E) if capacity else np.inf
    is_real = np.asarray(coords.segment_ids).reshape(-1) > 0
    wanted, load = compute_by_loop(cfg, name, params, x.reshape(B * T, -1), is_real, limit)
    assert load.min() > 0
    assert (load.max() > limit) == (capacity in (0.5, 1.0))  # some are dropped
    out = np.asarray(out).reshape(B * T, -1)
    # float32 sums of 24 products of order 1.
    np.testing.assert_allclose(out[is_real], wanted[is_real], atol=2e-5)


def compute_densely(cfg, params, x, limit):
    """Compute every token with every expert, with gate 0 for those it does not take."""
    tokens = x.reshape(-1, cfg.width)
    probability = jax.nn.softmax(tokens @ params["router"]["w"])
    top, chosen = jax.lax.top_k(probability, ACTIVE)
    one_hot = jax.nn.one_hot(chosen.T.reshape(-1), E)  # first choices first
    one_hot = (one_hot * (jnp.cumsum(one_hot, axis=0) <= limit)).reshape(ACTIVE, -1, E)
    gate = jnp.einsum("AN,ANE->NE", (top / top.sum(axis=-1, keepdims=True)).T, one_hot)
    expert_0 = FEEDFORWARDS[cfg.feedforward.removeprefix("moe_")](cfg)
    outputs = jax.vmap(lambda w: expert_0.apply({"params": w}, tokens))(params["experts"])
    return jnp.einsum("NE,END->ND", gate, outputs).reshape(x.shape)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_gradients_equal_those_of_every_expert_computing_every_token(name, capacity):
    cfg, module, params = make_mixture(name, capacity, bias=True)
    x, coords = inputs(cfg, 3 * MAX_BLOCK_TOKENS)  # so that experts have several blocks
    weights = np.random.default_rng(2).normal(size=x.shape)
    limit = capacity * 3 * MAX_BLOCK_TOKENS * B * ACTIVE / E or np.inf

    def gradients(run):
        return jax.jit(jax.grad(lambda p, x: jnp.sum(weights * run(p, x)), (0, 1)))(params, x)

    ours = gradients(lambda p, x: module.apply({"params": p}, x, coords))
    wanted = gradients(lambda p, x: compute_densely(cfg, p, x, limit))
    # Sums over 400 tokens of terms of order 1, in another order.
    chex.assert_trees_all_close(ours, wanted, atol=2e-3, rtol=1e-4)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted)) > 0.1


def test_gradients_in_bfloat16_are_near_those_in_float32():
    cfg, module, params = make_mixture("moe_gated")
    x, coords = inputs(cfg)
    loss = lambda p, x: jnp.sum(module.apply({"params": p}, x, coords).astype(jnp.float32))  # noqa: E731
    low, high = (
        jax.jit(jax.grad(loss))(params, jnp.asarray(x, d)) for d in ("bfloat16", "float32")
    )
    chex.assert_trees_all_equal_dtypes(low, high)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        # Three significant digits; tokens near a routing boundary may go to another expert.
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_biases_belong_to_each_expert():
    cfg, module, params = make_mixture("moe_gated", bias=True)
    assert params["experts"]["up"]["b"].shape == (E, cfg.ffn)
    assert "b" not in params["router"]
    x, coords = inputs(cfg)
    out = jax.jit(module.apply)({"params": params}, x, coords)
    shifted = jax.tree.map(lambda p: p, params)
    shifted["experts"]["down"]["b"] += 1.0  # gates sum to 1
    np.testing.assert_allclose(
        jax.jit(module.apply)({"params": shifted}, x, coords) - out, 1.0, atol=1e-5
    )


def test_the_balance_loss_is_one_if_even_and_the_number_of_experts_if_one_gets_all():
    even = jnp.full((8, E), 1 / E)
    one_hot = jax.nn.one_hot(jnp.arange(8) % E, E, dtype=jnp.int32)
    real = jnp.ones(8, bool)
    np.testing.assert_allclose(compute_balance_loss(even, one_hot, real), 1.0, rtol=1e-6)
    expert_0 = jax.nn.one_hot(jnp.zeros(8, int), E)
    np.testing.assert_allclose(
        compute_balance_loss(expert_0, expert_0.astype(int), real), E, rtol=1e-6
    )
    # Padding counts neither among the probabilities nor among the choices.
    half = real.at[4:].set(False)
    mixed = even.at[4:].set(expert_0[4:])
    np.testing.assert_allclose(
        compute_balance_loss(mixed, one_hot * half[:, None], half), 1.0, rtol=1e-6
    )


def test_every_layer_stores_the_balance_loss_of_its_choices():
    cfg = tiny(feedforward="moe_gated", moe=ExpertsConfig(E, ACTIVE), position="none", layers=3)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, B, T)
    block = params["stack"]["layers"]["block_0"]
    for last in (block["mixer"]["o"], block["ffn"]["experts"]["down"]):
        last["w"] *= 0  # so that every layer gets the embeddings
    coords = single_document_coords(tokens)
    coords = coords._replace(segment_ids=coords.segment_ids.at[0, :5].set(0))
    _, collections = jax.jit(
        lambda p: build(cfg).apply({"params": p}, tokens, coords, mutable=["losses"])
    )(params)
    (found,) = jax.tree.leaves(collections["losses"])
    x = np.float64(params["embed"]["table"])[tokens][np.asarray(coords.segment_ids) > 0]  # [N D]
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    wanted = []
    for scale, router in zip(block["ffn_norm_in"]["scale"], block["ffn"]["router"]["w"],
                             strict=True):  # fmt: skip
        p = np.exp(x * scale @ np.float64(router))
        p /= p.sum(-1, keepdims=True)
        chosen = np.argsort(-p)[:, :ACTIVE]
        f = np.bincount(chosen.reshape(-1), minlength=E) / chosen.size
        wanted.append(E * f @ p.mean(0))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.ptp(wanted) > 0.01  # the layers differ


def test_the_router_computes_in_float32_whatever_the_compute_dtype():
    cfg, _, params = make_mixture("moe_gated", dtype="bfloat16")
    x = jnp.asarray(inputs(cfg)[0], jnp.bfloat16)
    found = Router(cfg).apply({"params": params["router"]}, x)
    wanted = np.float64(x) @ np.float64(params["router"]["w"])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # float32 sums of 16 terms of order 1


def test_a_mixture_without_capacity_is_causal():
    cfg = tiny(feedforward="moe_gated", moe=ExpertsConfig(E, ACTIVE))
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 1, 12)
    changed = tokens.at[0, 7].add(1) % cfg.vocab
    a, b = (forward(cfg, params, t, single_document_coords(t))[0][0] for t in (tokens, changed))
    np.testing.assert_allclose(a[:7], b[:7], atol=1e-6)
    assert np.abs(a[7:] - b[7:]).max() > 0.1


def test_all_padding_gives_no_nan():
    cfg, module, params = make_mixture("moe_gated")
    x, coords = inputs(cfg)
    padding = Coords(coords.positions, jnp.zeros_like(coords.segment_ids))
    run = jax.jit(lambda p: module.apply({"params": p}, x, padding, mutable=["losses"]))
    chex.assert_tree_all_finite(run(params))
