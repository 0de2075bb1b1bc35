"""Activations captured and replaced under the scan over layers, held against a plain loop."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_params, random_tokens, single_document_coords, tiny

from jaxgpt.architecture import ExpertsConfig, MixerConfig
from jaxgpt.config import MeshConfig
from jaxgpt.model import Coords, EncoderInput, build, capture, init_cache, list_activations
from jaxgpt.model.block import LayerGroup
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import LayerContext
from jaxgpt.model.positions import POSITION_ENCODINGS
from jaxgpt.sharding import make_mesh

CLOSE = dict(atol=1e-5, rtol=1e-5)  # float32 sums in another order, through a few layers
SIZES = MixerConfig(
    state=4, features=8, summary=2, chunk=3, hashes=2, buckets=4, bucket_window=2, memory=3
)
FAMILIES = {"causal": "decoder", "both": "encoder"}
every_direction = pytest.mark.parametrize(
    ("name", "direction"),
    [(name, direction) for name, mixer in MIXERS.items() for direction in mixer.DIRECTIONS],
)
B, T = 2, 9
PACKED = Coords(
    jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 0]]),
    jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0]]),
)


def make_model(**settings):
    cfg = tiny(**settings)
    return cfg, random_params(cfg), random_tokens(cfg, 0, B, T)


def mixer_model(name: str, direction: str, **settings):
    position = "rope" if "rotation" in MIXERS[name].USES else "none"
    family = FAMILIES[direction]
    return make_model(mixers=(name,), position=position, family=family, mixer=SIZES, **settings)


def loop_over_layers(cfg, params, x, coords: Coords, change=lambda n, x: x):
    """Apply the layers in a Python loop: per layer the outputs of all its modules, by flax."""
    stack = params["stack"]
    encoding = POSITION_ENCODINGS[cfg.position](cfg, "causal")
    variables = {"params": stack["position"]} if "position" in stack else {}
    rotate = encoding.apply(variables, coords.positions, method="make_rotation")
    bias = encoding.apply(variables, method="make_bias")
    context = LayerContext(
        coords, coords, rotations=(rotate,), biases=(bias,), query_scales=(None,)
    )
    direction = "both" if cfg.family == "encoder" else "causal"
    layers, n = [], len(cfg.layer_cycle)
    for repeat in range(cfg.layers // n):
        weights = jax.tree.map(lambda w, i=repeat: w[i], stack["layers"])
        for i, spec in enumerate(cfg.layer_cycle):
            group = LayerGroup(cfg, (spec,), direction)
            x = change(repeat * n + i, x)
            (x, _), inner = group.apply(
                {"params": {"block_0": weights[f"block_{i}"]}},
                x,
                None,
                context,
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            layers.append((x, inner["intermediates"]["block_0"]))
    return layers


@every_direction
def test_activations_of_every_mixer_equal_those_of_a_loop_over_layers(name, direction):
    cfg, params, tokens = mixer_model(name, direction, layers=3)
    hidden, found = capture(cfg, params, tokens, PACKED)
    np.testing.assert_allclose(hidden, forward(cfg, params, tokens, PACKED)[0], **CLOSE)
    np.testing.assert_array_equal(hidden, found["final_norm"])
    layers = loop_over_layers(cfg, params, found["embedding"], PACKED)
    x = found["embedding"]
    for n, (expected, inner) in enumerate(layers):
        here = {k.removeprefix(f"layers.{n}."): v for k, v in found.items()}
        np.testing.assert_allclose(here["residual_pre"], x, **CLOSE)
        np.testing.assert_allclose(here["mixer.in"], inner["mixer_norm_in"]["__call__"][0], **CLOSE)
        out = inner["mixer"]["__call__"][0][0]
        np.testing.assert_allclose(here["mixer.out"], out, **CLOSE)
        np.testing.assert_allclose(here["residual_mid"], x + out, **CLOSE)
        for part in ("gate", "up"):
            np.testing.assert_allclose(
                here[f"ffn.{part}"], inner["ffn"][part]["__call__"][0], **CLOSE
            )
        hidden = jax.nn.silu(here["ffn.gate"]) * here["ffn.up"]
        np.testing.assert_allclose(here["ffn.hidden"], hidden, **CLOSE)
        np.testing.assert_allclose(here["ffn.out"], inner["ffn"]["__call__"][0], **CLOSE)
        np.testing.assert_allclose(here["residual_post"], expected, **CLOSE)
        if "v" in inner["mixer"] and not isinstance(inner["mixer"]["v"], tuple):
            v = inner["mixer"]["v"]["__call__"][0]
            np.testing.assert_allclose(here["mixer.v"], v, **CLOSE)
        x = expected


@every_direction
def test_every_mixer_names_its_output_and_something_inside(name, direction):
    cfg, params, tokens = mixer_model(name, direction)
    _, found = capture(cfg, params, tokens, PACKED, ["layers.1.mixer.*"])
    inside = {name.removeprefix("layers.1.mixer.") for name in found}
    assert inside >= {"in", "out"}
    assert len(inside) > 2
    if "z" in inside:  # the projection of z is the output
        w = params["stack"]["layers"]["block_0"]["mixer"]["o"]["w"][1]
        out = jnp.einsum("bthk,hkd->btd", found["layers.1.mixer.z"], w)
        np.testing.assert_allclose(out, found["layers.1.mixer.out"], **CLOSE)


@pytest.mark.parametrize("name", ["lstm", "gru", "mamba", "s4"])
def test_the_states_of_a_recurrent_mixer_are_those_that_it_passes_on(name):
    cfg, params, tokens = mixer_model(name, "causal")
    coords = single_document_coords(tokens)
    _, cache = forward(cfg, params, tokens, coords, init_cache(cfg, B, T))
    _, found = capture(cfg, params, tokens, coords)
    for layer, state in enumerate(cache.states):
        fields = [field for field in state["mixer"]._fields if field != "tail"]
        assert fields
        for field in fields:
            last = found[f"layers.{layer}.mixer.{field}"][:, -1]
            np.testing.assert_allclose(last, getattr(state["mixer"], field), **CLOSE)


SETTINGS = {
    "cycle": dict(layers=4, pattern=("full", "window")),
    "tail": dict(layers=3, pattern=("full", "window")),
    "mixers": dict(layers=4, mixers=("attention", "gru"), position="none"),
    "remat": dict(remat="full"),
    "remat dots": dict(remat="dots"),
    "post": dict(wiring="post", norm="layer", bias=True, position="learned"),
    "sandwich": dict(wiring="sandwich", qk_norm=True, softcap=3.0),
    "parallel": dict(wiring="parallel", feedforward="plain", activation="gelu"),
    "moe": dict(feedforward="moe_gated", moe=ExpertsConfig(experts=4, active=2)),
    "none": dict(feedforward="none", position="alibi"),
    "t5": dict(position="t5"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_scanned_equals_unrolled_and_the_loop(settings):
    cfg, params, tokens = make_model(**settings)
    hidden, found = capture(cfg, params, tokens, PACKED)
    unrolled = tiny(**settings, unroll=cfg.layers // len(cfg.layer_cycle))
    again, others = capture(unrolled, params, tokens, PACKED)
    np.testing.assert_allclose(hidden, again, **CLOSE)
    assert list(found) == list(others) == list_activations(cfg)
    numbers = {int(name.split(".")[1]) for name in found if name.startswith("layers.")}
    assert numbers == set(range(cfg.layers))  # also those of a tail
    for name, x in found.items():
        np.testing.assert_allclose(x, others[name], **CLOSE, err_msg=name)
    for n, (x, inner) in enumerate(loop_over_layers(cfg, params, found["embedding"], PACKED)):
        np.testing.assert_allclose(found[f"layers.{n}.residual_post"], x, **CLOSE)
        np.testing.assert_allclose(
            found[f"layers.{n}.mixer.out"], inner["mixer"]["__call__"][0][0], **CLOSE
        )


def rebuild_from_weights(found, site: str):
    weights, v = found[f"{site}.weights"], found[f"{site}.v"]
    repeated = jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshk->bthk", weights, repeated)


@pytest.mark.parametrize("kernel", ["auto", "dense", "strips", "blockwise"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(position="alibi", pattern=("window",)),
        dict(position="t5", softcap=2.0, query_scale=0.7),
        dict(qk_norm=True, kv_heads=1),
    ],
    ids=["plain", "alibi", "t5", "mqa"],
)
def test_weights_rebuild_what_the_kernel_computed(kernel, settings):
    cfg, params, _ = make_model(kernel=kernel, context=48, **settings)
    tokens = random_tokens(cfg, 3, 1, 40)
    coords = single_document_coords(tokens)
    _, found = capture(cfg, params, tokens, coords, ["layers.*.mixer.*"])
    for n in range(cfg.layers):
        site = f"layers.{n}.mixer"
        np.testing.assert_allclose(rebuild_from_weights(found, site), found[f"{site}.z"], **CLOSE)
        np.testing.assert_allclose(found[f"{site}.weights"].sum(-1), 1, **CLOSE)
        softmax = jax.nn.softmax(found[f"{site}.logits"], axis=-1)
        np.testing.assert_allclose(softmax, found[f"{site}.weights"], **CLOSE)
        assert (np.triu(found[f"{site}.weights"][0, 0], 1) == 0).all()


def test_an_encoder_decoder_names_both_stacks_and_its_cross_attention():
    cfg, params, tokens = make_model(family="encoder_decoder", layers=2, encoder_layers=3)
    source = random_tokens(cfg, 5, B, 6)
    coords, source_coords = single_document_coords(tokens), single_document_coords(source)
    inputs = EncoderInput(source, source_coords)
    hidden, found = capture(cfg, params, tokens, coords, source=inputs)
    expected, _ = build(cfg).apply({"params": params}, tokens, coords, source=inputs)
    np.testing.assert_allclose(hidden, expected, **CLOSE)
    assert found["encoder.layers.2.mixer.weights"].shape == (B, 4, 6, 6)
    assert found["encoder.final_norm"].shape == (B, 6, cfg.width)
    for site in ("encoder.layers.2.mixer", "layers.1.mixer", "layers.1.cross"):
        np.testing.assert_allclose(rebuild_from_weights(found, site), found[f"{site}.z"], **CLOSE)
    assert found["layers.1.cross.weights"].shape == (B, 4, T, 6)
    middle = found["layers.1.residual_cross"] + found["layers.1.cross.out"]
    np.testing.assert_allclose(found["layers.1.residual_mid"], middle, **CLOSE)
    assert "layers.2.residual_pre" not in found
    assert list(found) == list_activations(cfg)


def test_bfloat16_activations_keep_their_dtype_and_weights_are_float32():
    cfg, params, tokens = make_model(dtype="bfloat16")
    hidden, found = capture(cfg, params, tokens, PACKED)
    assert hidden.dtype == jnp.bfloat16
    _, reference = capture(tiny(), params, tokens, PACKED)
    for name, x in found.items():
        is_float32 = name.endswith(("logits", "weights"))
        assert x.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), name
        if name.endswith(("weights", "mixer.v")):  # roundings of 2^-9, through two layers
            np.testing.assert_allclose(x.astype(jnp.float32), reference[name], atol=0.15)


@pytest.mark.parametrize("sizes", [dict(pipe=2), dict(data=2, tensor=2)], ids=str)
def test_activations_on_several_devices_are_the_same(sizes):
    cfg, params, tokens = make_model(layers=4)
    hidden, found = capture(cfg, params, tokens, PACKED)
    count = int(np.prod(list(sizes.values())))
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), devices=jax.devices()[:count])):
        sharded, others = capture(cfg, params, tokens, PACKED)
    np.testing.assert_allclose(hidden, sharded, **CLOSE)
    assert found.keys() == others.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, others[name], **CLOSE, err_msg=name)


# --- replacing ---


def test_an_activation_of_one_layer_is_replaced_under_the_scan():
    cfg, params, tokens = make_model(layers=4, pattern=("full", "window"))
    patches = {"layers.1.residual_pre": lambda x: x + 1, "layers.2.residual_*re": lambda x: 2 * x}

    def change(n, x):
        return {1: x + 1, 2: 2 * x}.get(n, x)

    _, found = capture(cfg, params, tokens, PACKED, patches=patches)
    layers = loop_over_layers(cfg, params, found["embedding"], PACKED, change)
    for n, (x, _) in enumerate(layers):
        np.testing.assert_allclose(found[f"layers.{n}.residual_post"], x, **CLOSE)
    np.testing.assert_allclose(
        found["layers.1.residual_pre"], found["layers.0.residual_post"] + 1, **CLOSE
    )


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
def test_replaced_weights_are_applied_to_the_values(kernel):
    cfg, params, tokens = make_model(kernel=kernel)
    coords = single_document_coords(tokens)
    before, _ = capture(cfg, params, tokens, coords, [])
    same, _ = capture(cfg, params, tokens, coords, [], patches={"*.weights": lambda w: w})
    np.testing.assert_allclose(same, before, **CLOSE)
    patches = {"layers.0.mixer.weights": lambda w: jnp.ones_like(w) / T}
    after, found = capture(cfg, params, tokens, coords, ["*.z", "*.v"], patches=patches)
    mean = found["layers.0.mixer.v"].mean(1, keepdims=True)
    z = found["layers.0.mixer.z"].reshape(B, T, 2, 2, -1)
    np.testing.assert_allclose(z, jnp.broadcast_to(mean[:, :, :, None], z.shape), **CLOSE)
    assert np.abs(after - before).max() > 0.01


@every_direction
def test_without_its_output_a_mixer_adds_nothing(name, direction):
    cfg, params, tokens = mixer_model(name, direction)
    patches = {"layers.1.mixer.out": jnp.zeros_like}
    _, found = capture(cfg, params, tokens, PACKED, ["*.residual_*"], patches=patches)
    np.testing.assert_array_equal(found["layers.1.residual_mid"], found["layers.1.residual_pre"])
    assert np.abs(found["layers.0.residual_mid"] - found["layers.0.residual_pre"]).max() > 1e-3


def test_gradients_flow_through_replaced_activations():
    cfg, params, tokens = make_model(remat="full")

    def loss(scale):
        patches = {"layers.1.ffn.hidden": lambda x: scale * x}
        return jnp.sum(jnp.sin(capture(cfg, params, tokens, PACKED, [], patches=patches)[0]))

    expected = (loss(1.01) - loss(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=0.02)  # second differences


# --- errors ---


def test_an_unknown_name_is_refused_with_all_names():
    cfg, params, tokens = make_model()
    with pytest.raises(ValueError, match=r"'layers.2.mixer.q'.*There are: .*layers.1.mixer.q"):
        capture(cfg, params, tokens, PACKED, ["layers.2.mixer.q"])
    with pytest.raises(ValueError, match=r"Did you mean layers\.1\.mixer\.weights or "):
        capture(cfg, params, tokens, PACKED, ["layers.1.mixer.wieghts"])
    with pytest.raises(ValueError, match=r"mixer\.nothing"):
        capture(cfg, params, tokens, PACKED, [], patches={"layers.0.mixer.nothing": jnp.sin})


def test_a_replacement_keeps_the_dtype_of_the_model():
    cfg, params, tokens = make_model(dtype="bfloat16")
    patches = {"layers.0.mixer.z": lambda z: z.astype(jnp.float32)}
    hidden, found = capture(cfg, params, tokens, PACKED, ["layers.0.mixer.z"], patches=patches)
    assert found["layers.0.mixer.z"].dtype == jnp.bfloat16
    assert hidden.dtype == capture(cfg, params, tokens, PACKED, [])[0].dtype


def test_activations_are_in_the_order_of_the_layers():
    cfg, params, tokens = make_model(layers=11)
    _, found = capture(cfg, params, tokens, PACKED, ["layers.*.residual_post"])
    assert list(found) == [f"layers.{i}.residual_post" for i in range(11)]


def test_a_patch_of_another_shape_is_refused():
    cfg, params, tokens = make_model()
    with pytest.raises(AssertionError, match="must keep the shape"):
        capture(cfg, params, tokens, PACKED, [], patches={"layers.0.mixer.q": lambda q: q[:1]})


def test_states_that_nothing_reads_cannot_be_replaced():
    cfg, params, tokens = mixer_model("lstm", "causal")
    with pytest.raises(ValueError, match=r"'c' of .* not replaced"):
        capture(cfg, params, tokens, PACKED, ["*"], patches={"layers.0.mixer.c": jnp.zeros_like})


# --- nothing is computed when nobody asks ---


def lower_gradient(cfg, params, tokens) -> str:
    def loss(params):
        return jnp.sum(build(cfg).apply({"params": params}, tokens, PACKED)[0])

    return jax.jit(jax.grad(loss)).lower(params).as_text()


@pytest.mark.parametrize(
    "settings",
    [
        dict(remat="full"),
        dict(feedforward="moe_gated"),
        *(dict(mixers=(name,), position="none", mixer=SIZES) for name in MIXERS
          if "causal" in MIXERS[name].DIRECTIONS),
    ],
    ids=str,
)  # fmt: skip
def test_without_capture_the_program_is_that_of_a_model_without_taps(settings, monkeypatch):
    cfg, params, tokens = make_model(**settings)
    program = lower_gradient(cfg, params, tokens)
    modules = [m for name, m in sys.modules.items() if name.startswith("jaxgpt.model") and m]
    without = {
        "tap": lambda module, name, x: x,
        "tap_input": lambda module, name, f, *inputs: (f, inputs),
        "is_tapped": lambda module, *names: False,
    }
    for module in modules:
        for name, replacement in without.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    assert lower_gradient(cfg, params, tokens) == program


def test_weights_are_not_computed_unless_requested():
    cfg, params, _ = make_model(kernel="blockwise", context=512)
    tokens = random_tokens(cfg, 3, 1, 512)
    coords = single_document_coords(tokens)

    def lower(*names):
        run = jax.jit(lambda params: capture(cfg, params, tokens, coords, names))
        return run.lower(params).as_text()

    assert "x512x512xf32" not in lower("*.q", "*.z")
    assert "x512x512xf32" in lower("layers.0.mixer.weights")


def test_only_what_a_pattern_names_is_stored():
    cfg, params, tokens = make_model()
    _, found = capture(cfg, params, tokens, PACKED, ["layers.1.mixer.q", "final_norm"])
    assert list(found) == ["layers.1.mixer.q", "final_norm"]
