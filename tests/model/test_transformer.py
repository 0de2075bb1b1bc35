"""The whole model: its size, dependences between tokens, its cache, and neutral settings."""

import dataclasses
import pathlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    compute_logits,
    forward,
    random_params,
    random_tokens,
    single_document_coords,
    tiny,
)

from jaxgpt.config import MeshConfig, ModelConfig
from jaxgpt.model import (
    Coords,
    Head,
    abstract_params,
    build,
    capture,
    count_params,
    init_cache,
    init_params,
    make_head,
)
from jaxgpt.model.block import REMAT_POLICIES, WIRINGS, Dropout
from jaxgpt.model.positions import POSITION_ENCODINGS
from jaxgpt.model.transformer import count_unrolled
from jaxgpt.sharding import make_mesh

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
KEY = jax.random.key(0)

# Hidden states are normed and scaled, of order 1; two orders of the same float32 sums through two
# layers differ by some 1e-6.
CLOSE = dict(atol=1e-5, rtol=1e-5)

every_position = pytest.mark.parametrize("position", POSITION_ENCODINGS)


# --- size ---


def test_the_mini_gpt_has_exactly_its_number_of_parameters_in_every_component():
    assert count_params(ModelConfig()) == {
        "embedding": 3_145_728,
        "position": 0,
        "attention": 3_538_944,
        "feedforward": 7_077_888,
        "norms": 4_992,
        "head": 0,
        "total": 13_767_552,
    }


def test_parameters_are_counted_by_component():
    count = count_params(tiny(position="learned", tie=False, bias=True, norm="layer"))
    assert count == {
        "embedding": 61 * 16,
        "position": 32 * 16,
        "attention": 2 * (16 * 16 + 16 + 2 * (16 * 8 + 8) + 16 * 16 + 16),
        "feedforward": 2 * (2 * (16 * 24 + 24) + 24 * 16 + 16),
        "norms": (2 * 2 + 1) * 2 * 16,
        "head": 61 * 16,
        "total": sum(n for part, n in count.items() if part != "total"),
    }


def test_shapes_are_known_without_allocating():
    shapes, letters = abstract_params(tiny())
    real, same = init_params(tiny(), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, real)
    assert letters == same


# --- initialization ---


@pytest.mark.parametrize(
    "changes", [{}, dict(tie=False, bias=True, norm="layer", position="learned")]
)
def test_the_letters_of_every_parameter_spell_its_shape(changes):
    cfg = tiny(**changes)
    params, letters = abstract_params(cfg)
    sizes = cfg.sizes | {"L": cfg.layers}
    spelled = jax.tree.map(lambda d: tuple(sizes[c] for c in d if c != ">"), letters)
    assert spelled == jax.tree.map(lambda x: x.shape, params)


def test_weights_are_initialized_as_gpt2s():
    cfg = tiny(width=128, ffn=256, layers=8, vocab=512, tie=False, bias=True, position="learned")
    params, _ = init_params(cfg, KEY)
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(("scale", ".b")):
            np.testing.assert_array_equal(x, name.endswith("scale"))
            continue
        is_residual = name.endswith(("o.w", "down.w"))
        std = 0.02 / np.sqrt(2 * cfg.layers) if is_residual else 0.02
        # Of at least 4096 draws the standard deviation is known to 1.1%, the mean to 1.6% of it.
        np.testing.assert_allclose(x.std(), std, rtol=0.05, err_msg=name)
        np.testing.assert_allclose(x.mean(), 0, atol=0.08 * std, err_msg=name)
        if name.startswith("stack.layers"):
            assert np.abs(x[0] - x[1]).mean() > std, f"{name} begins alike in two layers"


def test_parameters_are_float32_whatever_the_compute_dtype():
    params, _ = abstract_params(tiny(dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# --- dependences between tokens ---


@partial(jax.jit, static_argnames="cfg")
def measure_dependence(cfg, params, coords):
    """Return [T S]: how much hidden state t changes with the embedding of token s."""
    T = coords.positions.shape[1]
    tokens = jnp.arange(T)[None]  # all different, so that row s of the table is token s
    direction = jax.random.normal(jax.random.key(9), (cfg.width,))

    def project_hidden(table):
        hidden, _ = build(cfg).apply(
            {"params": params | {"embed": {"table": table}}}, tokens, coords
        )
        return hidden[0] @ direction

    return jnp.abs(jax.jacrev(project_hidden)(params["embed"]["table"])[:, :T]).max(-1)


@every_position
def test_a_hidden_state_depends_on_its_token_and_those_before_only(position):
    cfg = tiny(position=position)
    dependence = measure_dependence(
        cfg, random_params(cfg), single_document_coords(jnp.zeros((1, 8), jnp.int32))
    )
    np.testing.assert_array_equal(dependence > 1e-6, np.tri(8))
    np.testing.assert_array_equal(dependence[np.triu_indices(8, 1)], 0)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_hidden_state_depends_only_on_its_own_document(wiring):
    cfg = tiny(wiring=wiring)
    coords = Coords(jnp.array([[0, 1, 2, 0, 1, 0, 0, 0]]), jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]]))
    dependence = measure_dependence(cfg, random_params(cfg), coords)
    same = np.equal.outer(coords.segment_ids[0], coords.segment_ids[0]) & (
        np.asarray(coords.segment_ids[0]) > 0
    )
    real = np.asarray(coords.segment_ids[0]) > 0
    np.testing.assert_array_equal((dependence > 1e-6)[real], (np.tri(8) * same)[real])
    np.testing.assert_array_equal(dependence[real][~(np.tri(8) * same)[real].astype(bool)], 0)


@every_position
def test_changing_the_future_does_not_change_the_past(position):
    cfg = tiny(position=position)
    params = random_params(cfg)
    a = random_tokens(cfg, 0, 2, 10)
    b = a.at[:, 6:].set((a[:, 6:] + 1) % cfg.vocab)
    (x, _), (y, _) = (forward(cfg, params, tokens, single_document_coords(a)) for tokens in (a, b))
    np.testing.assert_array_equal(x[:, :6], y[:, :6])
    assert np.abs(x[:, 6:] - y[:, 6:]).min(axis=-1).max() > 1e-3


@every_position
def test_packed_documents_equal_the_same_documents_in_separate_rows(position):
    cfg = tiny(position=position)
    params = random_params(cfg)
    a, b = random_tokens(cfg, 0, 1, 7), random_tokens(cfg, 1, 1, 5)
    coords = Coords(
        jnp.concatenate(
            [single_document_coords(a).positions, single_document_coords(b).positions], 1
        ),
        jnp.concatenate(
            [single_document_coords(a).segment_ids, 2 * single_document_coords(b).segment_ids], 1
        ),
    )
    packed, _ = forward(cfg, params, jnp.concatenate([a, b], 1), coords)
    np.testing.assert_allclose(
        packed[:, :7], forward(cfg, params, a, single_document_coords(a))[0], **CLOSE
    )
    np.testing.assert_allclose(
        packed[:, 7:], forward(cfg, params, b, single_document_coords(b))[0], **CLOSE
    )


@every_position
def test_padding_on_either_side_does_not_matter(position):
    sides = (3, 2)
    cfg = tiny(position=position)
    params = random_params(cfg)
    tokens = random_tokens(cfg, 0, 2, 6)
    pad = lambda x, by: jnp.pad(x, ((0, 0), sides), constant_values=by)  # noqa: E731
    coords = single_document_coords(tokens)
    wide, _ = forward(
        cfg, params, pad(tokens, 7), Coords(pad(coords.positions, 3), pad(coords.segment_ids, 0))
    )
    separate, _ = forward(cfg, params, tokens, coords)
    np.testing.assert_allclose(wide[:, sides[0] : sides[0] + 6], separate, **CLOSE)
    chex.assert_tree_all_finite(wide)


def test_rows_are_independent():
    cfg = tiny()
    params = random_params(cfg)
    tokens = random_tokens(cfg, 0, 3, 6)
    batched, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    for row in range(3):
        separate, _ = forward(
            cfg, params, tokens[row : row + 1], single_document_coords(tokens[:1])
        )
        np.testing.assert_allclose(batched[row : row + 1], separate, **CLOSE)


def test_without_positions_only_the_set_of_earlier_tokens_counts():
    # A temperature depends on the position of the query, not of the keys.
    swapped = {}
    for position in POSITION_ENCODINGS:
        cfg = tiny(position=position, layers=1)
        params = random_params(cfg)
        a = jnp.array([[5, 9, 2, 7]])
        x, y = (
            forward(cfg, params, t, single_document_coords(t))[0][0, -1]
            for t in (a, a[:, [1, 0, 2, 3]])
        )
        swapped[position] = float(jnp.abs(x - y).max())
    assert {name for name, change in swapped.items() if change < 1e-5} == {"none", "temperature"}


# --- the cache ---


@pytest.mark.parametrize(
    ("position", "kv_heads"),  # GQA with every position; MHA, GQA and MQA with one
    [*((position, 2) for position in POSITION_ENCODINGS), ("rope", 4), ("rope", 1)],
)
def test_cached_decoding_equals_uncached(position, kv_heads):
    cfg = tiny(position=position, kv_heads=kv_heads, bias=True)
    params = random_params(cfg)
    tokens = random_tokens(cfg, 0, 2, 11)
    coords = single_document_coords(tokens)
    wanted, none = forward(cfg, params, tokens, coords)
    assert none is None
    cache = init_cache(cfg, batch=2, slots=14)
    found, begin = [], 0
    for end in (5, *range(6, 12)):  # a prefill of 5, then token by token
        here = jax.tree.map(lambda x, a=begin, b=end: x[:, a:b], coords)
        hidden, cache = forward(cfg, params, tokens[:, begin:end], here, cache)
        found.append(hidden)
        begin = end
    np.testing.assert_allclose(jnp.concatenate(found, 1), wanted, **CLOSE)
    assert cache.cursor == 11
    np.testing.assert_array_equal(cache.coords.segment_ids[0], [1] * 11 + [0] * 3)


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_rows_of_different_length_share_a_cache_by_padding_on_the_left(documents):
    cfg = tiny(documents=documents)
    params = random_params(cfg)
    short, more = random_tokens(cfg, 0, 1, 4), jnp.array([[3]])
    coords = Coords(jnp.array([[0, 0, 0, 1, 2, 3]]), jnp.array([[0, 0, 1, 1, 1, 1]]))
    _, cache = forward(
        cfg, params, jnp.pad(short, ((0, 0), (2, 0))), coords, init_cache(cfg, batch=1, slots=8)
    )
    next_at = Coords(jnp.array([[4]]), jnp.array([[1]]))
    found, _ = forward(cfg, params, more, next_at, cache)
    row = jnp.concatenate([short, more], 1)
    np.testing.assert_allclose(
        found[0, 0], forward(cfg, params, row, single_document_coords(row))[0][0, -1], **CLOSE
    )


def test_the_cache_has_the_compute_dtype_and_only_the_kv_heads():
    cache = init_cache(tiny(dtype="bfloat16", kv_heads=1), batch=3, slots=5)
    for x in cache.states[0]["mixer"]:
        assert (x.shape, x.dtype) == ((3, 1, 5, 4), jnp.bfloat16)


# --- the embedding ---


def test_the_embedding_is_scaled_before_positions_are_added():
    cfg = tiny(position="learned", embed_scale=True)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    coords = single_document_coords(tokens)
    scaled = params | {"embed": {"table": 4 * params["embed"]["table"]}}  # √16
    wanted, _ = forward(dataclasses.replace(cfg, embed_scale=False), scaled, tokens, coords)
    np.testing.assert_allclose(forward(cfg, params, tokens, coords)[0], wanted, **CLOSE)


# --- settings that change no result ---


@pytest.mark.parametrize("pattern", ["full", "window"])
def test_rows_of_one_document_have_equal_gradients_with_separate_or_joined_documents(pattern):
    cfg = tiny(kernel="strips", pattern=(pattern,))
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 20)
    joined = dataclasses.replace(cfg, documents="joined")
    chex.assert_trees_all_equal(
        loss_and_gradients(joined, params, tokens), loss_and_gradients(cfg, params, tokens)
    )


@partial(jax.jit, static_argnames="cfg")
def loss_and_gradients(cfg, params, tokens):
    def loss(params):
        hidden, _ = build(cfg).apply({"params": params}, tokens, single_document_coords(tokens))
        return jnp.mean(jnp.sin(3 * hidden.astype(jnp.float32)))

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "changes",
    [dict(unroll=2), *(dict(remat=name) for name in REMAT_POLICIES if name != "none")],
    ids=str,
)
def test_unrolling_and_recomputing_change_neither_value_nor_gradients(changes):
    cfg = tiny()
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    plain = loss_and_gradients(cfg, params, tokens)
    other = loss_and_gradients(dataclasses.replace(cfg, **changes), params, tokens)
    # The same float32 operations, fused differently.
    chex.assert_trees_all_close(other, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (dict(layers=6), 6),
        (dict(layers=6, unroll=2), 2),
        (dict(layers=12), 1),
        (dict(layers=12, mixers=("attention", "mamba")), 6),
        (dict(layers=6, remat="full"), 1),
    ],
    ids=str,
)
def test_a_cpu_unrolls_few_layers(changes, count):
    cfg = dataclasses.replace(ModelConfig(heads=4), **changes)
    repeats = cfg.layers // len(cfg.layer_cycle)
    assert count_unrolled(cfg, repeats) == count
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert count_unrolled(cfg, repeats) == (cfg.unroll or 1)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
@pytest.mark.parametrize("unroll", [1, 2])
def test_recomputation_is_guarded_against_cse_without_a_loop(remat, unroll):
    # Without it XLA reuses the forward pass, and no memory is saved.
    cfg = tiny(remat=remat, unroll=unroll, layers=2)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    program = str(jax.make_jaxpr(partial(loss_and_gradients, cfg))(params, tokens))
    assert ("prevent_cse=True" in program) == (unroll == cfg.layers)


def test_bfloat16_is_near_float32():
    cfg = tiny()
    params = random_params(cfg, std=0.1)
    tokens = random_tokens(cfg, 0, 2, 8)
    exact, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    low, _ = forward(tiny(dtype="bfloat16"), params, tokens, single_document_coords(tokens))
    assert low.dtype == jnp.bfloat16
    # Values of order 1 after some ten roundings of 2^-9 each.
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.1)
    assert jnp.mean(jnp.abs(low.astype(jnp.float32) - exact)) < 0.015


@pytest.mark.parametrize(("wiring", "norm"), [("pre", "layer"), ("post", "rms")])
def test_every_parameter_has_a_gradient(wiring, norm):
    cfg = tiny(wiring=wiring, norm=norm, bias=True, position="learned")
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    _, gradients = loss_and_gradients(cfg, params, tokens)
    without_gradient = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree.leaves_with_path(gradients)
        if not np.abs(g).max() > 1e-6 and "['k']['b']" not in jax.tree_util.keystr(path)
    ]  # a bias of the keys adds the same to all scores of a query: softmax is invariant to it
    assert without_gradient == []


# --- dropout ---


@partial(jax.jit, static_argnames="cfg")
def run_with_dropout(cfg, params, tokens, key=None):
    rngs = {} if key is None else {"dropout": key}
    return build(cfg).apply({"params": params}, tokens, single_document_coords(tokens), rngs=rngs)[
        0
    ]


def test_without_a_key_nothing_is_dropped():
    cfg = tiny(dropout=0.5)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    np.testing.assert_array_equal(
        run_with_dropout(cfg, params, tokens), run_with_dropout(tiny(), params, tokens)
    )


def test_the_key_decides_what_is_dropped():
    cfg = tiny(dropout=0.5)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 8)
    a, repeated, b = (run_with_dropout(cfg, params, tokens, jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(a, repeated)
    assert np.abs(a - b).max() > 0.1
    assert np.abs(a - run_with_dropout(cfg, params, tokens)).max() > 0.1


def sparse_params(cfg, path: str, value: float = 1.0):
    """Return parameters of 0, but `value` where the path ends so, and 1 in the scales of norms."""

    def fill(keys, x):
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        is_set, is_scale = name.endswith(path), name.endswith("scale")
        return jnp.full(x.shape, value if is_set else float(is_scale), x.dtype)

    return jax.tree.map_with_path(fill, abstract_params(cfg)[0])


def find_dropped(cfg, path: str, **mesh_sizes):
    """Return the zeros [B T D] after dropout of a constant that only these parameters add."""
    params, tokens = sparse_params(cfg, path), jnp.zeros((16, cfg.context), jnp.int32)
    if not mesh_sizes:
        return np.asarray(run_with_dropout(cfg, params, tokens, KEY)) == 0
    sizes = {"data": 1, **mesh_sizes}
    with jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod([*sizes.values()])])):
        return np.asarray(run_with_dropout(cfg, params, tokens, KEY)) == 0


# The fractions below are of 16 x 32 x 16 = 8192 draws with fixed keys: 5 deviations are 0.028.
@pytest.mark.parametrize("path", ["embed.table", "mixer.o.b", "ffn.down.b"])
def test_embeddings_mixers_and_feedforwards_are_dropped_at_the_rate_of_the_config(path):
    cfg = tiny(dropout=0.3, layers=1, bias=True, norm="rms", position="none", feedforward="plain")
    np.testing.assert_allclose(find_dropped(cfg, path).mean(), 0.3, atol=0.028)


@pytest.mark.parametrize("mesh_sizes", [{}, dict(pipe=2), dict(pipe=2, data=2)], ids=str)
def test_every_layer_and_every_row_has_its_own_dropout_with_or_without_a_pipeline(mesh_sizes):
    cfg = tiny(dropout=0.5, layers=4, bias=True, norm="rms", position="none", feedforward="none")
    dropped = find_dropped(cfg, "mixer.o.b", **mesh_sizes)
    # All four layers drop a channel: 1/16 if each draws for itself, 1/8 if two of them agree.
    np.testing.assert_allclose(dropped.mean(), 1 / 16, atol=0.0134)
    # The rows are in 8 microbatches, of which each device has its own; all hold the same tokens.
    assert len(np.unique(dropped.reshape(16, -1), axis=0)) == 16


def test_the_wrapper_of_dropout_zeroes_its_fraction_and_keeps_the_expectation():
    n, rate = 100_000, 0.3
    y = Dropout(rate).apply({}, jnp.ones(n), rngs={"dropout": KEY})
    # The fraction dropped has a standard deviation of sqrt(.3 x .7 / n) = 0.0014; 5 of them.
    np.testing.assert_allclose(np.mean(y == 0), rate, atol=0.0075)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


# --- the head ---


def test_a_tied_model_computes_logits_with_its_embedding():
    cfg = tiny()
    params = random_params(cfg)
    assert "head" not in params
    assert make_head(cfg, params).table is params["embed"]["table"]


def test_an_untied_model_computes_logits_with_a_table_of_its_own():
    cfg = tiny(tie=False)
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 1, 6)
    hidden, _ = forward(cfg, params, tokens, single_document_coords(tokens))
    found = compute_logits(cfg, params, tokens, single_document_coords(tokens))
    np.testing.assert_allclose(found, hidden @ params["head"]["table"].T, atol=1e-4)
    assert np.abs(params["head"]["table"] - params["embed"]["table"]).max() > 0.1


def test_logits_are_scaled_then_shifted_by_the_bias_then_capped():
    # By hand: the capped value is 4 tanh((0.5 (1·3 + 2·4) + 1) / 4).
    head = Head(jnp.array([[3.0, 4.0]]), jnp.array([1.0]), scale=0.5, softcap=4.0)
    found = head(jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(found, [[4 * np.tanh(6.5 / 4)]], rtol=1e-6)


def test_logits_are_float32_whatever_the_compute_dtype():
    cfg = tiny(dtype="bfloat16")
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 1, 6)
    assert compute_logits(cfg, params, tokens, single_document_coords(tokens)).dtype == jnp.float32


# --- wiring ---


def test_wirings_have_the_norms_of_their_names():
    stacks = {w: abstract_params(tiny(wiring=w))[0]["stack"] for w in WIRINGS}
    names = {w: set(stack["layers"]["block_0"]) for w, stack in stacks.items()}
    assert names["pre"] == {"mixer", "ffn", "mixer_norm_in", "ffn_norm_in"}
    assert names["post"] == {"mixer", "ffn", "mixer_norm_out", "ffn_norm_out"}
    assert names["sandwich"] == names["pre"] | names["post"]
    assert names["parallel"] == names["pre"]
    assert names["no_residual"] == {"mixer", "ffn"}
    assert {w for w, stack in stacks.items() if "norm" not in stack} == {"post"}


def test_without_residual_a_block_is_its_sublayers_applied_to_each_other():
    cfg = tiny(wiring="no_residual")
    params, tokens = random_params(cfg), random_tokens(cfg, 0, 2, 7)
    _, found = capture(cfg, params, tokens, single_document_coords(tokens))
    x = found["embedding"]
    for n in range(2):
        for site in ("mixer", "ffn"):
            np.testing.assert_array_equal(found[f"layers.{n}.{site}.in"], x)
            x = found[f"layers.{n}.{site}.out"]
        np.testing.assert_array_equal(found[f"layers.{n}.residual_post"], x)


def test_without_residual_the_gradient_vanishes_with_depth():
    """Of what the first layer reads over that of what the last one reads: else about 1."""
    ratios = {}
    for wiring in ("pre", "no_residual"):
        cfg = tiny(wiring=wiring, layers=4, feedforward="plain", activation="relu")
        params, tokens = random_params(cfg, std=0.1), random_tokens(cfg, 0, 2, 7)
        at = single_document_coords(tokens)

        def loss(shifts, cfg=cfg, params=params, tokens=tokens, at=at):
            patches = {f"layers.{n}.residual_pre": lambda x, n=n: x + shifts[n] for n in range(4)}
            hidden, _ = capture(cfg, params, tokens, at, [], patches=patches)
            return jnp.sum(hidden[..., 0])

        gradient = jax.grad(loss)(jnp.zeros((4, 2, 7, cfg.width)))
        norms = jnp.linalg.norm(gradient.reshape(4, -1), axis=-1)
        ratios[wiring] = float(norms[0] / norms[-1])
    assert ratios["pre"] > 0.3
    assert ratios["no_residual"] < 0.01
