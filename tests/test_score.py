"""Scores against the training loss and the plain model; hidden states against the plain model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import compute_logits, forward, random_params, single_document_coords, tiny
from tiny_runs import run_config, write_text

import jaxgpt
from jaxgpt import score as s
from jaxgpt.config import Config, MeshConfig, SampleConfig, TrainConfig
from jaxgpt.data import Batch, EncoderInputs
from jaxgpt.data.packing import PackedDocuments
from jaxgpt.data.shards import Tokens
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, abstract_params, build
from jaxgpt.model import compute_logits as apply_head
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_mesh, make_shardings
from jaxgpt.tokenizer import make_byte_tokenizer
from jaxgpt.trainer import train
from jaxgpt.trainer.logging import read_metrics

TOKENIZER = make_byte_tokenizer()
TEXTS = ["the cat sat on the mat", "a", "dogs ran up the hill", "x" * 30, "é", "red"]


def make_model(objective="causal", seed=0, **changes) -> LanguageModel:
    """Return a model of random weights for an objective."""
    family = OBJECTIVES[objective].family
    cfg = tiny(vocab=270, context=64, family=family, **changes)
    config = Config(model=cfg, train=TrainConfig(objective=objective))
    return LanguageModel(config, random_params(cfg, seed), TOKENIZER)


MODEL = make_model()


def compute_text_logprobs(model, ids, given=1, prefix=None):
    """Return the log-probabilities of ids[given:], from the plain model on one row."""
    tokens = jnp.array([ids], jnp.int32)
    at = single_document_coords(tokens)
    if prefix is not None:
        at = at._replace(prefix=jnp.full_like(tokens, prefix))
    log_p = jax.nn.log_softmax(compute_logits(model.config.model, model.params, tokens, at)[0])
    return np.array(log_p)[np.arange(given - 1, len(ids) - 1), ids[given:]]


def encode(text):
    return TOKENIZER.encode(text).tolist()


# --- scores ---


def test_a_text_is_scored_token_by_token_from_bos_to_eos():
    for text, score in zip(TEXTS, MODEL.score(TEXTS), strict=True):
        ids = [*encode(text), TOKENIZER.eos]
        assert score.tokens.tolist() == ids
        expected = compute_text_logprobs(MODEL, [TOKENIZER.bos, *ids])
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)  # other shapes
        assert score.total == pytest.approx(expected.sum(), abs=1e-4)
        assert score.mean == pytest.approx(expected.mean(), abs=1e-5)


def test_a_continuation_is_scored_given_its_prompt():
    prompts = ["the cat", "", "x" * 30, "a", "b", "c"]
    for prompt, text, score in zip(prompts, TEXTS, MODEL.score(TEXTS, prompts), strict=True):
        ids = [TOKENIZER.bos, *encode(prompt), *encode(text)]
        given = 1 + len(encode(prompt))
        assert score.tokens.tolist() == ids[given:]
        expected = compute_text_logprobs(MODEL, ids, given)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)


def test_the_end_of_a_text_is_scored_on_request():
    assert MODEL.score(["ab"], eos=False)[0].tokens.tolist() == encode("ab")
    tokens = MODEL.score(["ab"], ["c"], eos=True)[0].tokens.tolist()
    assert tokens == [*encode("ab"), TOKENIZER.eos]


def test_a_prefix_language_model_reads_the_prompt_in_both_directions():
    model = make_model("prefix", pattern=("prefix",))
    score, whole = model.score(["mat"], ["the cat"])[0], model.score(["the"])[0]
    ids = [TOKENIZER.bos, *encode("the catmat")]
    expected = compute_text_logprobs(model, ids, 8, prefix=8)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert np.abs(expected - compute_text_logprobs(model, ids, 8, prefix=1)).max() > 1e-3
    ids = [TOKENIZER.bos, *encode("the"), TOKENIZER.eos]
    np.testing.assert_allclose(
        whole.logprobs, compute_text_logprobs(model, ids, 1, prefix=1), atol=1e-5
    )


def test_a_target_is_scored_given_its_source_as_in_training():
    model = make_model("pairs")
    sources, targets = ["the cat", "a", "x" * 40], ["sat", "y" * 35, "z"]
    for source, target, score in zip(sources, targets, model.score(targets, sources), strict=True):
        rows = [[TOKENIZER.bos, *encode(text), TOKENIZER.eos] for text in (source, target)]
        tokens, target_ids = np.array([rows[1][:-1]]), np.array([rows[1][1:]])
        ones, places = np.ones_like(tokens), np.arange(tokens.size)[None]
        inputs = np.array([rows[0]])
        source_places = np.arange(inputs.size)[None]
        batch = Batch(
            tokens, target_ids, places, ones, ones.astype(np.float32),
            encoder_inputs=EncoderInputs(inputs, source_places, np.ones_like(inputs)),
        )  # fmt: skip
        cfg = model.config
        _, sums = cfg.objective.loss(build(cfg.model), model.params, batch, {}, cfg.train)
        assert score.tokens.tolist() == rows[1][1:]
        assert -score.mean == pytest.approx(float(sums["nats"] / sums["weight"]), abs=1e-5)


def test_sentinels_of_a_span_model_are_scored():
    model = make_model("span", position="t5")
    score = model.score(["<mask>cat<mask>the"], ["the <mask> sat on <mask> mat"])[0]
    ids = [269, *encode("cat"), 268, *encode("the"), TOKENIZER.eos]
    assert score.tokens.tolist() == ids


# --- the training loss ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on one document, whose end is held out as one: (config, text, last evaluation)."""
    folder = tmp_path_factory.mktemp("score")
    write_text(folder / "text", documents=1, words=600)
    cfg = run_config(folder, "data.split=tail", "train.eval_every=12", "data.holdout=0.2")
    train(cfg, is_quiet=True)
    text = (folder / "text" / "00.txt").read_text()
    record = [r for r in read_metrics(cfg.run_folder) if r["kind"] == "eval"][-1]
    return cfg, text, record


def test_the_mean_score_of_a_document_is_the_loss_of_the_run_on_it(run):
    cfg, text, record = run
    model = jaxgpt.load(cfg.run_folder, checkpoint="latest")
    held_out = text[-(record["tokens"] - 1) :]  # and eos
    assert 300 < len(held_out) < len(text)
    (score,) = model.score([held_out], stride=cfg.model.context)
    assert len(score.tokens) == record["tokens"]
    assert -score.mean == pytest.approx(record["loss"], abs=1e-5)


def test_the_scores_of_packed_documents_sum_to_the_training_loss_of_their_batch(run):
    model = jaxgpt.load(run[0].run_folder)
    texts = ["the cat", "a dog", "sat on mat", "a", "the red hill"]
    documents = [[TOKENIZER.bos, *encode(text), TOKENIZER.eos] for text in texts]
    starts = np.cumsum([0, *map(len, documents)])
    tokens = Tokens(np.concatenate(documents).astype(np.uint16), starts)
    rows = PackedDocuments(tokens, model.config.model.context)
    batch = rows.gather(np.arange(rows.size))
    cfg = model.config
    _, sums = cfg.objective.loss(build(cfg.model), model.params, batch, {}, cfg.train)
    scores = model.score(texts)
    assert sum(len(score.tokens) for score in scores) == float(sums["weight"])
    total = sum(score.total for score in scores)
    assert -total / float(sums["weight"]) == pytest.approx(
        float(sums["nats"] / sums["weight"]), abs=1e-5
    )


def test_a_greedy_continuation_is_the_likeliest_and_has_the_logprobs_of_its_generation(run):
    model, prompts = jaxgpt.load(run[0].run_folder), ["the ", "a dog "]
    rows = model.generate(prompts, temperature=0, tokens=6)
    scores = model.score([row.text for row in rows], prompts)
    others = model.score([row.text[:-1] + "z" for row in rows], prompts)
    for row, score, other in zip(rows, scores, others, strict=True):
        assert score.tokens.tolist() == [*row.tokens]
        np.testing.assert_allclose(score.logprobs, row.logprobs, atol=1e-5)
        assert (score.is_greedy, other.is_greedy) == (True, False)


# --- windows ---


@pytest.mark.parametrize("stride", [1, 20, 64])
def test_a_long_text_is_scored_in_windows_with_every_token_once(stride):
    text = "".join(np.random.default_rng(0).choice(list("abcdef"), 150))
    score = MODEL.score([text], stride=stride)[0]
    ids = [TOKENIZER.bos, *encode(text), TOKENIZER.eos]
    assert score.tokens.tolist() == ids[1:]
    expected = np.full(len(ids), np.nan)
    for begin in range(0, len(ids) - 1, stride):
        window = ids[begin : begin + 65]
        new = compute_text_logprobs(MODEL, window)
        places = expected[begin + 1 : begin + len(window)]
        places[np.isnan(places)] = new[np.isnan(places)]
    np.testing.assert_allclose(score.logprobs, expected[1:], atol=1e-5)


def test_of_a_long_prompt_only_the_windows_with_the_text_are_computed(monkeypatch):
    seen = []
    cut = s._cut_windows
    monkeypatch.setattr(s, "_cut_windows", lambda *a: seen.extend(w := list(cut(*a))) or w)
    score = MODEL.score(["tail"], ["p" * 300], stride=32)[0]
    assert len(seen) == 1
    ids = [TOKENIZER.bos, *encode("p" * 300 + "tail")]
    expected = compute_text_logprobs(MODEL, ids[seen[0].begin :], 301 - seen[0].begin)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)


def test_a_text_that_fits_exactly_needs_no_window():
    assert len(MODEL.score(["x" * 63])[0].tokens) == 64
    with pytest.raises(ConfigError, match=r"65 tokens.*model.context=64.*stride="):
        MODEL.score(["x" * 64])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts=["a"], prompts=["b", "c"]), "2 texts for the 1"),
        (dict(texts=["a"], stride=65), "stride=65 must be 0"),
        (dict(texts=["a"], stride=-1), "stride=-1 must be 0"),
        (dict(texts=[""], eos=False), "no token to score"),
        (dict(texts="abc"), "expected a list of texts"),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MODEL.score(**arguments)


def test_an_encoder_decoder_needs_sources():
    with pytest.raises(ConfigError, match="give prompts="):
        make_model("pairs").score(["a"])


# --- batches ---


def test_one_program_is_compiled_for_every_length_bucket(count_compilations):
    model = make_model(ffn=40)
    before = count_compilations(s.score_batch)
    model.score(["a"])
    model.score(["a" * n for n in range(1, 30)] * 3)
    assert count_compilations(s.score_batch) == before + 1
    model.score(["a", "b" * 33, "c" * 60])
    assert count_compilations(s.score_batch) == before + 2


def test_scores_do_not_depend_on_the_batch(monkeypatch):
    single = [MODEL.score([text])[0] for text in TEXTS]
    small = MODEL.score(TEXTS, batch_tokens=64)
    record = dataclasses.replace(s.get_backend(), max_chunk_scores=270 * 64)  # 32 chunks
    monkeypatch.setattr(s, "get_backend", lambda: record)
    s.score_batch.__wrapped__.clear_cache()
    chunked = MODEL.score(TEXTS)
    s.score_batch.__wrapped__.clear_cache()
    for a, b, c in zip(single, small, chunked, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.logprobs, c.logprobs, atol=1e-5)


def test_the_logits_of_a_batch_are_never_in_memory_at_once():
    cfg = tiny(vocab=2**15, context=64)
    params, _ = abstract_params(cfg)
    rows, row = jax.ShapeDtypeStruct((32, 64), jnp.int32), jax.ShapeDtypeStruct((32,), jnp.int32)
    text = s.score_batch.__wrapped__.lower(cfg, params, rows, rows, row, row).as_text()
    assert "tensor<32x4x32768xf32>" in text  # 2**22 of the 2**26 logits
    assert "x64x32768xf32>" not in text


def test_no_texts_have_no_scores():
    assert MODEL.score([]) == []


# --- hidden states ---


def compute_hidden(model, ids, **changes):
    tokens = jnp.array([ids], jnp.int32)
    at = single_document_coords(tokens)._replace(**changes)
    return np.array(forward(model.config.model, model.params, tokens, at)[0][0])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_hidden_states_are_those_of_the_last_layer(objective):
    model = make_model(objective)
    end = [TOKENIZER.eos] if objective == "masked" else []
    for text, found in zip(TEXTS, model.embed(TEXTS, pool="none"), strict=True):
        ids = [TOKENIZER.bos, *encode(text), *end]
        assert found.tokens.tolist() == ids
        np.testing.assert_allclose(found.vectors, compute_hidden(model, ids), atol=1e-5)


def test_the_hidden_states_of_a_masked_word_head_are_taken_before_it():
    model = make_model("masked", head="mlm")
    (found,) = model.embed(["the cat"], pool="none")
    tokens = jnp.array([found.tokens])
    at = single_document_coords(tokens)
    variables = {"params": model.params}
    expected = build(model.config.model).apply(variables, tokens, at, method="encode")[0]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert np.abs(found.vectors - compute_hidden(model, found.tokens.tolist())).max() > 0.01


def test_an_encoder_decoder_embeds_with_its_encoder():
    model = make_model("pairs")
    (found,) = model.embed(["the cat"], pool="none")
    assert found.tokens.tolist() == [TOKENIZER.bos, *encode("the cat"), TOKENIZER.eos]
    # Scored from these states, a target has the score that the whole model gives it.
    cfg, tokens = model.config.model, jnp.array([[TOKENIZER.bos, *encode("sat")]])
    places = Coords(jnp.arange(tokens.size)[None], jnp.ones_like(tokens))
    source_at = single_document_coords(jnp.array([found.tokens]))
    decode = lambda module: module.stack(  # noqa: E731
        module.embed(tokens), places, None, found.vectors[None], source_at
    )[0]
    hidden = build(cfg).apply({"params": model.params}, method=decode)
    log_p = jax.nn.log_softmax(apply_head(cfg, model.params, hidden)[0])
    (score,) = model.score(["sat"], ["the cat"])
    expected = np.array(log_p)[np.arange(4), score.tokens]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "reduce"),
    [("mean", lambda x: x.mean(0)), ("first", lambda x: x[0]), ("last", lambda x: x[-1])],
)
def test_hidden_states_are_pooled(pool, reduce):
    states = MODEL.embed(TEXTS, pool="none")
    for found, whole in zip(MODEL.embed(TEXTS, pool), states, strict=True):
        np.testing.assert_allclose(found.vectors, reduce(whole.vectors), atol=1e-6)


def test_an_unknown_pooling_is_rejected():
    with pytest.raises(ConfigError, match="Did you mean 'mean'"):
        MODEL.embed(["a"], pool="meen")


def test_a_text_longer_than_the_context_is_not_embedded():
    with pytest.raises(ConfigError, match=r"model.context=64"):
        MODEL.embed(["x" * 70])


# --- meshes and dtypes ---


def shard(model, **axes) -> LanguageModel:
    """Return the model with its parameters sharded over eight devices."""
    shapes, letters = abstract_params(model.config.model)
    shardings = make_shardings(shapes, letters, make_mesh(MeshConfig(**axes)))
    params = jax.device_put(model.params, shardings)
    assert not params["embed"]["table"].is_fully_replicated
    return LanguageModel(model.config, params, model.tokenizer)


AXES = [dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("objective", ["causal", "pairs"])
def test_a_sharded_model_gives_the_same_numbers(objective, axes):
    model = make_model(objective, seed=1)
    sharded = shard(model, **axes)
    prompts = TEXTS[::-1]
    rules = [SampleConfig(temperature=0, tokens=20), SampleConfig(tokens=20, top_k=9, seed=3)] * 3
    for a, b in zip(model.score(TEXTS, prompts), sharded.score(TEXTS, prompts), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    for a, b in zip(model.embed(TEXTS), sharded.embed(TEXTS), strict=True):
        np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-5)
    expected, found = model.generate(prompts, rules), sharded.generate(prompts, rules)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert all(len(row.tokens) > 3 for row in found)


def test_no_parameter_of_a_sharded_model_is_gathered_on_a_device():
    sharded = shard(MODEL, data=1, fsdp=8)
    for tree in (sharded.params, sharded.decode_params):
        for path, x in jax.tree.leaves_with_path(tree):
            if x.ndim > 1:
                assert x.addressable_shards[0].data.size == x.size // 8, path


def test_a_caller_keeps_its_own_mesh_between_pieces_of_a_stream():
    for _ in shard(MODEL, data=1, fsdp=8).stream(["hello"], tokens=40):
        assert jax.sharding.get_abstract_mesh().empty


def test_a_bfloat16_model_scores_close_to_the_float32_one(run):
    exact, rounded = (jaxgpt.load(run[0].run_folder, dtype=d) for d in (None, "bfloat16"))
    assert rounded.params["embed"]["table"].dtype == jnp.bfloat16
    (a,), (b,) = exact.score(["the cat sat"]), rounded.score(["the cat sat"])
    assert abs(a.mean - b.mean) < 0.02  # eight bits of mantissa
    assert rounded.generate(["the cat"], temperature=0, tokens=5)[0].ending
