"""What is looked at inside of a model, held against the model's own numbers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from inspected import TEXT, make_model

from jaxgpt import inspect
from jaxgpt.config import ConfigError, SampleConfig
from jaxgpt.inspect.attribution import get_layer_params
from jaxgpt.tokenizer import train

CLOSE = dict(atol=1e-5, rtol=1e-5)
WIRINGS = ["pre", "post", "sandwich", "reordered", "parallel", "no_residual"]


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_the_tokens_are_those_that_the_model_reads(model):
    text = inspect.encode(model, "né")
    assert text.tokens.tolist() == [model.tokenizer.bos, *model.tokenizer.encode("né")]
    assert text.pieces == ("<bos>", "n", "\\xc3", "\\xa9")
    with pytest.raises(ConfigError, match="takes no source="):
        inspect.encode(model, "a", source="b")


def test_captured_logits_give_the_score_of_the_text(model):
    losses = inspect.token_losses(model, TEXT)
    assert np.isnan(losses[0])
    np.testing.assert_allclose(-losses[1:], model.score([TEXT], eos=False)[0].logprobs, atol=1e-4)


def test_a_prefix_model_is_looked_into_as_it_is_scored():
    model = make_model("prefix", pattern=("prefix",))
    losses = inspect.token_losses(model, TEXT)
    np.testing.assert_allclose(-losses[1:], model.score([TEXT], eos=False)[0].logprobs, atol=1e-4)
    assert inspect.induction_scores(model, 6, 2).shape == (2, 4)


@pytest.mark.parametrize("kernel", ["dense", "blockwise"])
@pytest.mark.parametrize("heads", [dict(kv_heads=2), dict(kv_heads=4, bias=True)])
def test_attention_rebuilds_the_output_of_its_layer(kernel, heads):
    model = make_model(kernel=kernel, **heads)
    found = inspect.capture(model, TEXT)
    weights = inspect.attention(model, TEXT)
    assert weights.shape == (2, 4, 10, 10)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    for n in range(2):
        params = get_layer_params(model.params, n)["mixer"]
        v = np.repeat(found[f"layers.{n}.mixer.v"], 4 // v_heads(found, n), axis=1)
        z = np.einsum("hts,shk->thk", weights[n], v)
        out = np.einsum("thk,hkd->td", z, params["o"]["w"]) + params["o"].get("b", 0)
        np.testing.assert_allclose(out, found[f"layers.{n}.mixer.out"], **CLOSE)


def v_heads(found, n):
    return found[f"layers.{n}.mixer.v"].shape[1]


@pytest.mark.parametrize("name", ["zero", "mean"])
def test_a_patch_by_name_replaces_the_activation(model, name):
    found = inspect.capture(model, TEXT, ["layers.0.ffn.out"])["layers.0.ffn.out"]
    value = np.zeros_like(found) if name == "zero" else np.broadcast_to(found.mean(0), found.shape)
    changed = inspect.patch(model, TEXT, {"layers.0.ffn.out": name}, ["layers.0.ffn.out"])
    np.testing.assert_allclose(changed["layers.0.ffn.out"], value, **CLOSE)
    same = inspect.patch(model, TEXT, {"layers.0.ffn.out": value})
    np.testing.assert_allclose(changed.logits, same.logits, **CLOSE)
    assert np.abs(changed.logits - inspect.capture(model, TEXT, []).logits).max() > 0.1


def test_a_patch_with_the_models_own_value_changes_nothing(model):
    found = inspect.capture(model, TEXT)
    for site in ("residual_mid", "mixer.z", "mixer.weights", "ffn.hidden"):
        own = {f"layers.1.{site}": found[f"layers.1.{site}"]}
        np.testing.assert_allclose(inspect.patch(model, TEXT, own).logits, found.logits, **CLOSE)


def test_bad_patches_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \[3\].*activation \[10, 16\]"):
        inspect.patch(model, TEXT, {"layers.0.ffn.out": np.zeros(3)})
    with pytest.raises(ConfigError, match="zreo"):
        inspect.patch(model, TEXT, {"layers.0.ffn.out": "zreo"})
    with pytest.raises(ValueError, match="no activation"):
        inspect.capture(model, TEXT, ["layers.7.*"])


# --- lens and attribution --------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(wiring=w) for w in WIRINGS] + [dict(
    norm="layer", bias=True, tie=False, position="learned", final_softcap=5.0)])  # fmt: skip
def test_the_lens_of_the_last_layer_is_the_output(settings):
    model = make_model(**settings)
    lens = inspect.logit_lens(model, TEXT, count=3)
    logits = inspect.capture(model, TEXT, []).logits
    p = np.asarray(jax.nn.softmax(logits))
    assert lens.names == ("embedding", "layers.0", "layers.1")
    np.testing.assert_allclose(lens.probs[-1], -np.sort(-p)[:, :3], **CLOSE)
    np.testing.assert_allclose(lens.kl[-1], 0, atol=1e-6)
    assert (lens.kl[:-1] > 1e-4).all()
    np.testing.assert_allclose(lens.entropy[-1], -(p * np.log(p)).sum(-1), atol=1e-4)
    np.testing.assert_allclose(
        lens.target_logprobs[-1], -inspect.token_losses(model, TEXT)[1:], atol=1e-4
    )
    likeliest = chr(logits[-1].argmax() - 4)
    if logits[-1].argmax() in range(36, 130):
        assert lens.top_pieces[-1][-1][0] == likeliest


def test_eleven_layers_are_in_order():
    model = make_model(layers=11)
    found = inspect.capture(model, TEXT, ["layers.*.residual_post"])
    assert list(found) == [f"layers.{n}.residual_post" for n in range(11)]
    last = inspect.logit_lens(model, TEXT).target_logprobs[-1]
    np.testing.assert_allclose(last, -inspect.token_losses(model, TEXT)[1:], atol=1e-4)


def test_the_divergence_is_from_the_last_layer(model):
    """KL(last || layer), with the logits of a layer taken from a run that skips what follows it."""
    skip = {"layers.1.mixer.out": "zero", "layers.1.ffn.out": "zero"}
    logits = [inspect.patch(model, TEXT, change).logits for change in ({}, skip)]
    last, first = (np.asarray(jax.nn.log_softmax(x)) for x in logits)
    expected = (np.exp(last) * (last - first)).sum(-1)
    np.testing.assert_allclose(inspect.logit_lens(model, TEXT).kl[1], expected, atol=1e-4)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("settings", [{}, dict(norm="layer", bias=True, tie=False)])
def test_attribution_sums_to_the_logit(wiring, settings):
    model = make_model(wiring=wiring, **settings)
    logits = inspect.capture(model, TEXT, []).logits
    found = inspect.attribute_logit(model, TEXT, position=4)
    assert found.logit == pytest.approx(logits[4].max(), abs=1e-4)
    assert found.values.sum() == pytest.approx(found.logit, abs=1e-4)
    assert found.by_head().shape == ((0, 0) if wiring == "no_residual" else (2, 4))
    other = inspect.attribute_logit(model, TEXT, 70, 80)
    assert other.logit == pytest.approx(logits[-1, 70] - logits[-1, 80], abs=1e-4)


def test_attribution_of_one_part_is_its_share_of_the_logit(model):
    """With the norm's statistics as they are, a part that is left out takes its value along."""
    found = inspect.attribute_logit(model, TEXT, 70)
    at = found.names.index("layers.1.ffn")
    run = inspect.capture(model, TEXT, ["layers.1.ffn.out", "layers.1.residual_post"])
    last = run["layers.1.residual_post"][-1].astype(np.float64)
    rate = 1 / np.sqrt((last**2).mean() + model.config.model.norm_eps)
    scale = np.asarray(model.params["stack"]["norm"]["scale"])
    row = np.asarray(model.params["embed"]["table"])[70]
    share = (run["layers.1.ffn.out"][-1] * rate * scale) @ row
    assert found.values[at] == pytest.approx(share, abs=1e-5)


def test_attribution_of_recurrent_mixers_and_pairs():
    model = make_model(mixers=("lstm",), position="none")
    found = inspect.attribute_logit(model, TEXT)
    assert "layers.0.mixer" in found.names
    assert found.logit == pytest.approx(inspect.capture(model, TEXT, []).logits[-1].max(), abs=1e-4)
    pair = make_model("pairs", family="encoder_decoder", encoder_layers=1)
    found = inspect.attribute_logit(pair, TEXT, source="the source")
    logits = inspect.capture(pair, TEXT, [], source="the source").logits
    assert found.logit == pytest.approx(logits[-1].max(), abs=1e-4)
    assert "layers.1.cross.head.3" in found.names


def test_without_residual_only_the_last_sublayer_writes_into_the_logit():
    found = inspect.attribute_logit(make_model(wiring="no_residual"), TEXT)
    assert found.names == ("layers.1.ffn", "final_norm.bias")


def test_a_head_that_is_not_linear_has_no_attribution():
    model = make_model("masked", family="encoder", head="mlm")
    with pytest.raises(ConfigError, match="'mlm' is not linear"):
        inspect.attribute_logit(model, TEXT)


def test_integrated_gradients_sum_to_the_difference_of_logits():
    # A norm is steep where its input is almost 0, but for a large epsilon.
    model = make_model(norm_eps=1.0)
    text = inspect.encode(model, TEXT)
    logits = inspect.capture(model, TEXT, []).logits
    zero = inspect.patch(model, TEXT, {"embedding": "zero"}).logits
    found = inspect.integrated_gradients(model, text, 70, steps=64)
    assert found.shape == (10,)
    assert found.sum() == pytest.approx(logits[-1, 70] - zero[-1, 70], abs=1e-3)


def test_gradient_x_input_is_the_derivative_by_the_size_of_a_token(model):
    text = inspect.encode(model, TEXT)
    found = inspect.gradient_x_input(model, text, 70)
    value = inspect.capture(model, text, ["embedding"])["embedding"]
    for t in (0, 6):
        step = 1e-2
        up, down = (
            inspect.patch(model, text, {"embedding": scale_row(value, t, 1 + s)}).logits[-1, 70]
            for s in (step, -step)
        )
        assert found[t] == pytest.approx((up - down) / (2 * step), rel=0.02, abs=2e-3)


def scale_row(value, t, factor):
    scaled = value.copy()
    scaled[t] *= factor
    return scaled


def step_lstm(p, state, x):
    h, c = state
    i, f, g, o = (x @ p[f"w_{k}"] + p[f"b_{k}"] + h @ p[f"u_{k}"] for k in "ifgo")
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def step_gru(p, state, x):
    h = state[0]
    r, z = (jax.nn.sigmoid(x @ p[f"w_{k}"] + p[f"b_{k}"] + h @ p[f"u_{k}"]) for k in "rz")
    n = jnp.tanh(x @ p["w_n"] + p["b_n"] + r * (h @ p["u_n"] + p["c_n"]))
    return (1 - z) * n + z * h, None


@pytest.mark.parametrize(("mixer", "step"), [("lstm", step_lstm), ("gru", step_gru)])
def test_gradients_by_position_are_those_of_a_plain_loop_over_tokens(mixer, step):
    model = make_model(mixers=(mixer,), position="none", feedforward="none", layers=1)
    text = inspect.encode(model, TEXT)
    params = jax.tree.map(jnp.asarray, model.params)
    layer = get_layer_params(params, 0)

    def norm(p, x):
        return x / jnp.sqrt(jnp.mean(x**2) + model.config.model.norm_eps) * p["scale"]

    def compute_loss(embedding):
        state = jnp.zeros(16), jnp.zeros(16)
        for x in embedding[:5]:  # the loss of token 5, after token 4
            state = step(layer["mixer"], state, norm(layer["mixer_norm_in"], x))
        x = x + state[0] @ layer["mixer"]["o"]["w"]
        logits = norm(params["stack"]["norm"], x) @ params["embed"]["table"].T
        return -jax.nn.log_softmax(logits)[text.tokens[5]]

    expected = jax.grad(compute_loss)(params["embed"]["table"][text.tokens])
    found = inspect.gradient_by_position(model, text, 5)
    np.testing.assert_allclose(found, jnp.linalg.norm(expected, axis=-1), rtol=1e-4, atol=1e-7)
    assert (found[:5] > 0).all()
    assert not found[5:].any()


def test_gradients_by_position_reach_every_token_before_the_last(model):
    found = inspect.gradient_by_position(model, TEXT)
    assert found.shape == (10,)
    assert found[-1] == 0
    assert (found[:-1] > 0).all()
    with pytest.raises(ConfigError, match=r"position=0 of 10 tokens.*1 to 9"):
        inspect.gradient_by_position(model, TEXT, 0)
    with pytest.raises(ConfigError, match="no loss"):
        inspect.gradient_by_position(make_model("masked", family="encoder"), TEXT)


# --- attention -------------------------------------------------------------------------------


def test_rollout_and_flow_of_a_small_example_by_hand():
    weights = np.zeros((2, 1, 2, 2))
    weights[:, 0] = [[1, 0], [0.5, 0.5]]
    layer = np.array([[1, 0], [0.25, 0.75]])
    np.testing.assert_allclose(inspect.rollout(weights), [layer, layer @ layer])
    # Token 1 passes 0.75 to itself, of which it passes on all but what it took from token 0.
    np.testing.assert_allclose(inspect.flow(weights), [0.25 + 0.25, 0.75], atol=1e-5)


def test_rollout_keeps_causality_and_mass(model):
    found = inspect.rollout(inspect.attention(model, TEXT))
    np.testing.assert_allclose(found.sum(-1), 1)
    assert (np.triu(found, 1) == 0).all()


def test_scores_of_heads_that_do_one_thing():
    T = 11
    previous = np.eye(T, k=-1)[None, None]
    assert inspect.previous_token_scores(previous) == pytest.approx(np.ones((1, 1)))
    assert inspect.previous_token_scores(np.eye(T)[None, None]) == pytest.approx(np.zeros((1, 1)))


def test_induction_scores_are_of_the_token_after_the_earlier_one(model, monkeypatch):
    """Each query of the second half is at t, its token was at t - 6, and the next one at t - 5."""
    length = 6
    tokens = inspect.attention.__globals__["make_repeated_tokens"](model, length, 3)
    assert (tokens[:, 1 : 1 + length] == tokens[:, 1 + length :]).all()
    scores = inspect.induction_scores(model, length, 3)
    expected = np.zeros((3, 2, 4))
    for row, ids in enumerate(tokens):
        text = inspect.EncodedText(ids, ("",) * len(ids))
        weights = inspect.attention(model, text)
        queries = range(1 + length, 1 + 2 * length)
        expected[row] = np.mean([weights[:, :, t, t - length + 1] for t in queries], axis=0)
    np.testing.assert_allclose(scores, expected.mean(0), atol=1e-5)


def test_ablated_heads_change_the_loss_and_no_head_changes_nothing(model):
    first, second = inspect.induction_loss(model, length=8, rows=2)
    tokens = inspect.attention.__globals__["make_repeated_tokens"](model, 8, 2)
    losses = np.stack([
        inspect.token_losses(model, inspect.EncodedText(row, ("",) * len(row))) for row in tokens
    ])  # fmt: skip
    assert first == pytest.approx(losses[:, 2:9].mean(), abs=1e-4)
    assert second == pytest.approx(losses[:, 10:].mean(), abs=1e-4)
    every = inspect.induction_loss(model, itertools.product(range(2), range(4)), 8, 2)
    assert abs(every[1] - second) > 1e-3


def test_an_ablated_head_is_its_own_mean(model):
    z = inspect.capture(model, TEXT, ["layers.1.mixer.z"])["layers.1.mixer.z"]
    (patch,) = inspect.ablate_heads([(1, 2)]).values()
    found = np.asarray(patch(jnp.asarray(z)[None]))[0]
    np.testing.assert_allclose(
        found[:, 2], np.broadcast_to(z[:, 2].mean(0), z[:, 2].shape), **CLOSE
    )
    np.testing.assert_array_equal(np.delete(found, 2, 1), np.delete(z, 2, 1))


def test_attention_of_a_model_without_it_is_refused():
    model = make_model(mixers=("gru",), position="none")
    with pytest.raises(ConfigError, match="its mixers are gru"):
        inspect.attention(model, TEXT)


# --- patching --------------------------------------------------------------------------------


def test_patching_all_of_the_stream_restores_all_and_only_what_differs(model):
    found = inspect.activation_patching(model, "a cat sat", "a car sat", 70, 80)
    assert found.shape == (2, 10)
    assert found[0, 5] == pytest.approx(1, abs=1e-3)  # "t" in place of "r", before layer 0
    np.testing.assert_allclose(found[0, [0, 1, 2, 3, 4, 6, 7, 8, 9]], 0, atol=1e-3)
    run = inspect.capture(model, "a cat sat", ["layers.1.residual_pre"])["layers.1.residual_pre"]
    corrupt = inspect.capture(model, "a car sat", ["layers.1.residual_pre"])
    mixed = corrupt["layers.1.residual_pre"].copy()
    mixed[7] = run[7]
    logits = [
        inspect.capture(model, "a cat sat", []).logits[-1],
        corrupt.logits[-1],
        inspect.patch(model, "a car sat", {"layers.1.residual_pre": mixed}).logits[-1],
    ]
    clean, bad, patched = (x[70] - x[80] for x in logits)
    assert found[1, 7] == pytest.approx((patched - bad) / (clean - bad), abs=1e-3)
    heads = inspect.activation_patching(model, "a cat sat", "a car sat", 70, 80, "mixer.z", "heads")
    assert heads.shape == (2, 4)
    with pytest.raises(ConfigError, match="clean has 3 tokens and corrupt 4"):
        inspect.activation_patching(model, "ab", "abc", 70, 80)


# --- geometry --------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_rows(model):
    params = jax.tree.map(lambda x: x, model.params)
    table = np.asarray(params["embed"]["table"]).copy()
    a, b = (int(model.tokenizer.encode(c)[0]) for c in "ab")
    table[b] = 2 * table[a]
    params["embed"]["table"] = jnp.asarray(table)
    (piece, similar), *_ = inspect.neighbours(dataclasses.replace(model, params=params), "a", 3)
    assert (piece, similar) == ("b", pytest.approx(1))
    with pytest.raises(ConfigError, match="no single token"):
        inspect.neighbours(model, "ab")


def test_an_analogy_of_a_parallelogram(model):
    params = jax.tree.map(lambda x: x, model.params)
    table = 0.01 * np.asarray(params["embed"]["table"])
    ids = [int(model.tokenizer.encode(c)[0]) for c in "mwkq"]
    man, king = np.eye(16)[:2]
    woman = np.eye(16)[2]
    rows = [man, woman, (man + king), (woman + king)]
    for index, row in zip(ids, rows, strict=True):
        table[index] = row / np.linalg.norm(row)
    params["embed"]["table"] = jnp.asarray(table, jnp.float32)
    found = inspect.analogy(dataclasses.replace(model, params=params), "m", "w", "k")
    assert found[0][0] == "q"


def test_measures_of_geometry_by_hand():
    x = np.array([[1.0, 0], [0, 1.0], [-1.0, 0], [0, -1.0]])
    assert inspect.effective_rank(x) == pytest.approx(2)
    assert inspect.effective_rank(np.outer([1, 2, 3], [1, 1])) == pytest.approx(1)
    assert inspect.anisotropy(x) == pytest.approx(-1 / 3)
    projected, shares = inspect.pca(np.array([[0.0, 0], [3, 4], [6, 8]]), 2)
    np.testing.assert_allclose(np.abs(projected[:, 0]), [5, 0, 5], atol=1e-5)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-6)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert inspect.cka(y, 3 * y @ turn) == pytest.approx(1)
    assert inspect.cka(y, y[:, :1]) < 0.9
    np.testing.assert_allclose(np.diag(inspect.similarity_matrix(y)), 1, atol=1e-6)


# --- positions and tokens --------------------------------------------------------------------


def test_every_position_encoding_has_its_picture():
    from jaxgpt.model.positions import POSITION_ENCODINGS

    for name in POSITION_ENCODINGS:
        picture = inspect.describe_positions(name, 12)
        assert picture.similarity.shape == (12, 12), name
        assert np.isfinite(np.nan_to_num(picture.matrix)).all()
    alibi = inspect.describe_positions("alibi", 5, tiny(heads=4))  # slopes 1/4, 1/16, ...
    np.testing.assert_allclose(alibi.matrix[1, 4], np.array([4, 3, 2, 1, 0]) / -16, rtol=1e-6)
    rope = inspect.describe_positions("rope", 12)
    width = rope.matrix.shape[1]
    np.testing.assert_allclose(
        rope.similarity[0], inspect.rope_decay(np.arange(12), width), atol=1e-5
    )
    sines = inspect.describe_positions("sinusoidal", 12)
    np.testing.assert_allclose(np.diag(sines.similarity), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="alibi"):
        inspect.describe_positions("alibbi")


def test_the_positions_of_a_model_are_its_own():
    model = make_model(position="learned")
    picture = inspect.describe_model_positions(model, 9)
    np.testing.assert_array_equal(
        picture.matrix, np.asarray(model.params["stack"]["position"]["table"])[:9]
    )


def test_merges_end_in_the_tokens_of_the_word():
    tokenizer = train(["abab abab the cat sat on the mat " * 5], 300)
    for word in ("abab", " abab", " the", " cats", "é"):
        steps = inspect.merge_steps(tokenizer, word)
        assert steps[0].merge is None
        assert [s.rank for s in steps] == sorted(s.rank for s in steps)
        assert list(steps[-1].pieces) == [t.piece for t in inspect.tokenize(tokenizer, word)]
    assert len(inspect.merge_steps(tokenizer, " abab")) > 2


def test_next_tokens_are_those_of_the_distribution(model):
    found = inspect.next_tokens(model, TEXT, 300)
    assert sum(t.probability for t in found) == pytest.approx(1)
    greedy = model.generate([TEXT], SampleConfig(), temperature=0, tokens=1)[0]
    if greedy.tokens:
        assert found[0].token == greedy.tokens[0]
    assert [t.probability for t in found] == sorted((t.probability for t in found), reverse=True)
