"""Position encodings against their formulas, in float64 NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import forward, random_params, random_tokens, single_document_coords, tiny
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.t5.modeling_t5 import T5Attention

from jaxgpt.architecture import RopeConfig
from jaxgpt.dims import split
from jaxgpt.model import capture, init_params
from jaxgpt.model.masks import Coords
from jaxgpt.model.positions import (
    POSITION_ENCODINGS,
    SCALINGS,
    apply_rope,
    assign_bucket,
    compute_alibi_bias,
    compute_alibi_slopes,
    compute_sin_cos,
    encode_sinusoidal,
)

B, T, H, K, THETA = 2, 9, 3, 8, 500.0


def make_frequencies(theta: float, size: int) -> np.ndarray:
    return theta ** (-2 * np.arange(size // 2) / size)


@partial(jax.jit, static_argnames=("attention_factor", "size"))
def rotate(x, position, attention_factor=1.0, size=K):
    """Rotate the first `size` channels of x by the frequencies of THETA."""
    return apply_rope(
        *compute_sin_cos(
            make_frequencies(THETA, size).astype(np.float32), attention_factor, position
        ),
        x,
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_inputs(name: str, **changes):
    """Return (x [B T D], position [B T], parameters, bound module)."""
    cfg = tiny(position=name, **changes)
    encoding = POSITION_ENCODINGS[name](cfg)
    x, position = normal(0, B, T, cfg.width), np.random.default_rng(1).integers(0, 20, (B, T))
    coords = (jnp.asarray(x), jnp.asarray(position))
    params, _ = split(encoding.init(jax.random.key(0), *coords, method="embed").get("params", {}))
    bound = encoding.bind({"params": params})
    return x, position, params, bound


def test_rope_is_multiplication_by_a_complex_number():
    x = normal(0, B, T, H, K)
    position = np.random.default_rng(1).integers(0, 50, (B, T))
    phase = np.exp(1j * position[:, :, None, None] * make_frequencies(THETA, K))
    rotated = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * phase
    wanted = np.concatenate([rotated.real, rotated.imag], axis=-1)
    # Angles up to 50 in float32 are off by 50 * 6e-8 = 3e-6 at most.
    np.testing.assert_allclose(rotate(x, position), wanted, atol=2e-5)


@pytest.mark.parametrize("shift", [1, 40])
def test_rope_scores_depend_only_on_the_distance(shift):
    q, k = normal(0, 1, T, H, K), normal(1, 1, T, H, K)
    position = jnp.arange(T)[None]

    @jax.jit
    def scores(position):
        return jnp.einsum("BTHK,BSHK->BHTS", rotate(q, position), rotate(k, position))

    near, far = scores(position), scores(position + shift)
    np.testing.assert_allclose(far, near, atol=1e-4)  # sums of 8 products at angles to 50
    assert np.abs(near - jnp.einsum("BTHK,BSHK->BHTS", q, k)).max() > 0.1


def test_rope_keeps_the_dtype_and_rotates_in_float32():
    x = jnp.asarray(normal(0, B, T, H, K), jnp.bfloat16)
    position = jnp.full((B, T), 1000)  # in bfloat16 1001 would be 1000 as well
    rotated = rotate(x, position + 1)
    assert rotated.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), position + 1)
    # Rounding the result to bfloat16: 2^-9 of values up to 4.
    np.testing.assert_allclose(rotated.astype(jnp.float32), exact, atol=4 * 2**-8)


def test_rope_uses_the_theta_of_the_config():
    _, position, params, encoding = make_inputs("rope", rope=RopeConfig(theta=THETA))
    assert params == {}
    y = normal(3, B, T, H, 4)  # heads of `tiny`
    wanted = rotate(y, position, size=4)
    np.testing.assert_array_equal(encoding.make_rotation(position)(y), wanted)
    assert encoding.make_bias() is None


def test_sinusoidal_is_the_papers_formula():
    width, position = 12, np.array([[0, 1, 2, 30, 99]])
    wanted = np.empty((1, 5, width))
    for t, encoding in enumerate(position[0]):
        for i in range(width // 2):
            angle = encoding / 10_000 ** (2 * i / width)
            wanted[0, t, 2 * i] = np.sin(angle)
            wanted[0, t, 2 * i + 1] = np.cos(angle)
    # Angles up to 99 in float32 are off by 99 * 6e-8 = 6e-6 each way.
    np.testing.assert_allclose(encode_sinusoidal(jnp.asarray(position), width), wanted, atol=3e-5)


def test_sinusoidal_adds_to_the_embedding_only():
    x, position, params, encoding = make_inputs("sinusoidal")
    assert params == {}
    added = encoding.embed(x, position) - x
    np.testing.assert_allclose(added, encode_sinusoidal(position, x.shape[-1]), atol=1e-6)
    assert encoding.make_rotation(position) is None
    assert encoding.make_bias() is None


def test_learned_adds_its_row_for_the_position():
    x, position, params, encoding = make_inputs("learned")
    assert params["table"].shape == (32, 16)  # context, width
    wanted = x + np.asarray(params["table"])[position]
    np.testing.assert_array_equal(encoding.embed(x, position), wanted)
    assert encoding.make_rotation(position) is None
    assert encoding.make_bias() is None


def test_none_is_the_identity_in_all_three_places():
    x, position, params, encoding = make_inputs("none")
    assert params == {}
    np.testing.assert_array_equal(encoding.embed(x, position), x)
    assert encoding.make_rotation(position) is None
    assert encoding.make_bias() is None


# --- partial and scaled rotation ---------------------------------------------------------------


def test_rope_rotates_only_its_fraction_of_a_head():
    cfg = tiny(head_width=8, rope=RopeConfig(THETA, share=0.5))
    y, position = normal(0, B, T, H, 8), np.random.default_rng(1).integers(0, 50, (B, T))
    found = POSITION_ENCODINGS["rope"](cfg).bind({}).make_rotation(position)(y)
    wanted = rotate(y[..., :4], position, size=4)
    np.testing.assert_array_equal(found[..., :4], wanted)
    np.testing.assert_array_equal(found[..., 4:], y[..., 4:])


def test_the_attention_factor_multiplies_rotated_channels():
    x, position = normal(0, B, T, H, K), np.random.default_rng(1).integers(0, 50, (B, T))
    scaled = rotate(x, position, attention_factor=1.7)
    np.testing.assert_allclose(scaled, 1.7 * rotate(x, position), atol=1e-5)


# Llama 3.1's numbers; those of Code Llama and of YaRN's own Llama 2; a small head.
SCALED = [
    ("none", RopeConfig(), 128),
    ("linear", RopeConfig(factor=4.0), 128),
    ("ntk", RopeConfig(factor=8.0), 128),
    ("yarn", RopeConfig(factor=16.0, original=4096), 128),
    ("yarn", RopeConfig(1e6, factor=2.5, original=1024), 64),
    ("llama3", RopeConfig(5e5, factor=8.0, original=8192), 128),
    ("llama3", RopeConfig(100.0, factor=3.0, original=256), 32),
]

# Whose ramp would begin before the first channel, end after the last, or both; and at the limit.
CLIPPED = [
    ("yarn", RopeConfig(1e4, factor=4.0, original=128), 64),
    ("yarn", RopeConfig(100.0, factor=4.0, original=4096), 32),
    ("yarn", RopeConfig(100.0, factor=4.0, original=65536), 32),
    ("yarn", RopeConfig(4.0, factor=4.0, original=180), 16),
]


def scale_frequencies(name, r: RopeConfig, size, **changes):
    cfg = tiny(
        head_width=size, rope=RopeConfig(r.theta, 1.0, name, r.factor, r.original), **changes
    )
    return SCALINGS[name](cfg, make_frequencies(r.theta, size))


@pytest.mark.parametrize(("name", "r", "size"), SCALED + CLIPPED)
def test_rope_is_scaled_as_in_transformers(name, r, size):
    # "dynamic" there derives the factor from the length of the text: ours is for one such length.
    parameters = dict(rope_theta=r.theta, factor=1.0 if name == "ntk" else r.factor)
    parameters |= dict(rope_type={"ntk": "dynamic", "none": "linear"}.get(name, name))
    parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0) if name == "llama3" else {}
    parameters |= dict(original_max_position_embeddings=r.original) if r.original else {}
    theirs = transformers.LlamaConfig(
        head_dim=size, max_position_embeddings=4096, rope_parameters=parameters
    )
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    wanted, attention_factor = compute(theirs, torch.device("cpu"), seq_len=int(4096 * r.factor))
    found = scale_frequencies(name, r, size)
    np.testing.assert_allclose(found[0], wanted.numpy(), rtol=1e-5)  # theirs are float32
    np.testing.assert_allclose(found[1], attention_factor, rtol=1e-6)
    if (name, r, size) in SCALED[1:]:
        assert np.max(make_frequencies(r.theta, size) / found[0]) > 0.9 * r.factor


def test_every_scaling_is_compared():
    assert {name for name, _, _ in SCALED} == SCALINGS.keys()


@pytest.mark.parametrize("name", ["yarn", "llama3"])
def test_the_original_context_defaults_to_the_context_over_the_factor(name):
    parameters = scale_frequencies(name, RopeConfig(100.0, factor=4.0, original=64), 32)
    for found, wanted in zip(
        scale_frequencies(name, RopeConfig(100.0, factor=4.0), 32, context=256),
        parameters,
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["ntk", "yarn", "llama3"])
def test_short_wavelengths_stay_and_long_ones_grow_by_the_factor(name):
    before, factor = make_frequencies(1e4, 128), 8.0
    found, _ = scale_frequencies(name, RopeConfig(1e4, factor=factor, original=512), 128)
    np.testing.assert_allclose(found[0], before[0])
    np.testing.assert_allclose(found[-1], before[-1] / factor)
    assert np.all(np.diff(found) < 0)


# --- biases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "wanted"),
    [
        (8, [2.0**-i for i in range(1, 9)]),  # the paper's own
        # The paper's code: the 8 of 8 heads, and then every second of those of 16.
        (12, [*(2.0**-i for i in range(1, 9)), *(2.0 ** -(i / 2) for i in (1, 3, 5, 7))]),
        (1, [2.0**-8]),
        (3, [2.0**-4, 2.0**-8, 2.0**-2]),
    ],
)
def test_the_slopes_of_alibi(heads, wanted):
    np.testing.assert_allclose(compute_alibi_slopes(heads), wanted, rtol=1e-6)


def make_q_and_k_coords(seed=0):
    """Return coordinates of queries [B T] and of keys [B S]."""
    rng = np.random.default_rng(seed)
    return tuple(
        Coords(jnp.asarray(rng.integers(0, 60, (B, n))), jnp.ones((B, n), jnp.int32))
        for n in (T, 5)
    )


def test_alibi_is_minus_the_slope_times_the_distance():
    q, k = make_q_and_k_coords()
    encoding = POSITION_ENCODINGS["alibi"](tiny(position="alibi")).bind({})
    found = encoding.make_bias()(q, k)
    for b, h, t, s in np.ndindex(B, 4, T, 5):
        wanted = -(2.0 ** (-2 * (h + 1))) * abs(int(q.positions[b, t]) - int(k.positions[b, s]))
        np.testing.assert_allclose(found[b, h, t, s], wanted, rtol=1e-6)
    assert encoding.make_rotation(q.positions) is None
    np.testing.assert_array_equal(found, compute_alibi_bias(compute_alibi_slopes(4), q, k))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 100)])
def test_the_buckets_of_t5_are_those_of_transformers(is_causal, buckets, max_distance):
    relative = np.arange(-300, 301)
    found = assign_bucket(jnp.asarray(relative), buckets, max_distance, is_causal)
    wanted = T5Attention._relative_position_bucket(
        torch.tensor(-relative), not is_causal, buckets, max_distance
    )
    np.testing.assert_array_equal(found, wanted)
    assert set(np.asarray(found).tolist()) == set(range(buckets)) - (
        set() if is_causal else {buckets // 2}
    )


@pytest.mark.parametrize("direction", ["causal", "both"])
def test_the_bias_of_t5_is_the_table_row_of_the_distances_bucket(direction):
    cfg, (q, k) = tiny(position="t5", position_buckets=8, position_reach=20), make_q_and_k_coords()
    table = normal(3, 8, 4)
    encoding = POSITION_ENCODINGS["t5"](cfg, direction).bind({"params": {"table": table}})
    found = encoding.make_bias()(q, k)
    assert found.dtype == jnp.float32
    for b, h, t, s in np.ndindex(B, 4, T, 5):
        relative = q.positions[b, t] - k.positions[b, s]
        u = assign_bucket(relative, 8, 20, direction == "causal")
        assert found[b, h, t, s] == table[u, h]
    assert encoding.make_rotation(q.positions) is None


# --- in a whole model --------------------------------------------------------------------------


def compute_by_hand(cfg, params, tokens):
    """Compute the hidden states of one attention layer on one text, in float64 loops."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    block = jax.tree.map(lambda x: x[0], p["stack"]["layers"]["block_0"])
    mixer, n = block["mixer"], len(tokens)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    x = p["embed"]["table"][tokens]
    if cfg.position == "sinusoidal":
        angle = np.arange(n)[:, None] * make_frequencies(1e4, cfg.width)
        x = x * np.sqrt(cfg.width) + np.stack([np.sin(angle), np.cos(angle)], -1).reshape(n, -1)
    y = norm(x, block["mixer_norm_in"]["scale"])
    q, k, v = (np.einsum("td,dhk->thk", y, mixer[name]["w"]) for name in "qkv")
    if cfg.position == "rope":
        phase = np.exp(1j * np.arange(n)[:, None, None] * make_frequencies(1e4, 4))
        q, k = ((z[..., :2] + 1j * z[..., 2:]) * phase for z in (q, k))
        q, k = (np.concatenate([z.real, z.imag], -1) for z in (q, k))
    if cfg.position == "temperature":
        q = q * (1 + 0.1 * np.log(1 + (np.arange(n) + 1) // 3))[:, None, None]
    out = np.zeros((n, 4, 4))
    for h, t in np.ndindex(4, n):
        scores = k[: t + 1, h] @ q[t, h] / 2
        relative = t - np.arange(t + 1)
        if cfg.position == "alibi":
            scores = scores - 2.0 ** (-2 * (h + 1)) * relative
        if cfg.position == "t5":
            scores = scores + p["stack"]["position"]["table"][find_t5_buckets(relative), h]
        weights = np.exp(scores - scores.max())
        out[t, h] = weights / weights.sum() @ v[: t + 1, h]
    return norm(x + np.einsum("thk,hkd->td", out, mixer["o"]["w"]), p["stack"]["norm"]["scale"])


def find_t5_buckets(relative):
    """Return buckets by Raffel et al. 2020: 16 of 32 are exact, the others logarithmic to 128."""
    return [
        d if d < 16 else min(16 + int(math.log(d / 16) / math.log(128 / 16) * 16), 31)
        for d in relative.tolist()
    ]


@pytest.mark.parametrize("name", sorted(POSITION_ENCODINGS.keys() - {"learned"}))
def test_positions_extrapolate_beyond_the_training_context(name):
    cfg = tiny(
        position=name, layers=1, kv_heads=4, feedforward="none", context=16, temperature_floor=3
    )
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 1, 2 * cfg.context)
    found, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    # Sums of 32 values of order 1 in float32, at angles up to 32.
    np.testing.assert_allclose(found[0], compute_by_hand(cfg, params, tokens[0]), atol=1e-4)


# --- initial sizes -----------------------------------------------------------------------------


def embed_initially(family="decoder", **changes):
    """Return (token part, position part) [B T D] of the first values of the residual stream."""
    cfg = tiny(width=64, vocab=512, position="sinusoidal", family=family, **changes)
    params, _ = init_params(cfg, jax.random.key(0))
    tokens = random_tokens(cfg, 0, 4, 32)
    _, found = capture(cfg, params, tokens, single_document_coords(tokens), ["embedding"])
    positions = encode_sinusoidal(single_document_coords(tokens).positions, cfg.width)
    return np.asarray(found["embedding"] - positions), np.asarray(positions)


@pytest.mark.parametrize("settings", [{}, dict(family="encoder", types=2)], ids=["gpt", "types"])
def test_embeddings_begin_as_large_as_sinusoidal_positions(settings):
    tokens, positions = embed_initially(**settings)
    # Sines and cosines have mean square 1/2; of two tables with variance 1 the sum has 2.
    expected = np.sqrt(2.0 * (2 if settings else 1))
    ratio = np.sqrt(np.mean(tokens**2) / np.mean(positions**2))
    # Of 4 x 32 tokens of 64 channels the root mean square is known to 0.8%; with types, which is
    # one row of 64 channels, to 6%.
    np.testing.assert_allclose(ratio, expected, rtol=0.25 if settings else 0.05)


@pytest.mark.parametrize(
    ("settings", "std"),
    [
        (dict(embed_scale=False), 0.02),
        (dict(embed_scale=False, embed_std=0.3), 0.3),
        (dict(embed_std=0.01), 0.01 * 8),
        (dict(embed_scale=True), 1.0),
    ],
)
def test_given_scales_of_embeddings_are_used(settings, std):
    tokens, _ = embed_initially(**settings)
    np.testing.assert_allclose(tokens.std(), std, rtol=0.05)


@pytest.mark.parametrize("name", sorted(POSITION_ENCODINGS.keys() - {"sinusoidal"}))
def test_other_positions_leave_embeddings_at_gpt2s_scale(name):
    cfg = tiny(position=name)
    assert not cfg.has_embed_scale
    assert cfg.embed_init_std == 0.02
    scaled = tiny(position=name, embed_scale=True)  # Gemma
    assert scaled.has_embed_scale
    assert scaled.embed_init_std == 0.02


def test_the_bias_of_t5_begins_as_in_its_code():
    params, _ = init_params(tiny(position="t5", heads=16, head_width=4), jax.random.key(0))
    table = params["stack"]["position"]["table"]  # [32 16], uniform
    bound = np.sqrt(6 / (32 + 16))
    assert np.abs(table).max() <= bound
    np.testing.assert_allclose(table.std(), bound / np.sqrt(3), rtol=0.1)  # known to 2%
