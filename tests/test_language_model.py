"""The methods of a model: what each family can do, and results as numbers."""

import dataclasses
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params, tiny

from jaxgpt import console, predict, score
from jaxgpt import generate as g
from jaxgpt.config import Config, SampleConfig, TrainConfig
from jaxgpt.data import Tokens
from jaxgpt.data.tasks import PairRows
from jaxgpt.generate import join_pieces
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, build, compute_logits
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()


def make_model(objective="causal", labels=(), **changes) -> LanguageModel:
    cfg = tiny(vocab=300, family=OBJECTIVES[objective].family, **changes)
    config = Config(
        model=cfg,
        train=TrainConfig(objective=objective),
        sample=SampleConfig(tokens=8, temperature=0.7, seed=4),
    )
    return LanguageModel(config, random_params(cfg, std=0.3), TOKENIZER, labels)


ABILITIES = ("classify", "embed", "fill", "generate", "score", "stream")
CHANGES = {
    "prefix": dict(pattern=("prefix",)),
    "span": dict(position="t5"),
    "classify": dict(classes=3),
}
TEXTS = {"masked": "the <mask>", "span": "the <mask>"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_does_what_its_objective_allows_and_refuses_the_rest_by_name(objective):
    model = make_model(objective, **CHANGES.get(objective, {}))
    texts = [TEXTS.get(objective, "the cat")]
    arguments = {"score": (texts, texts)}
    for ability in ABILITIES:
        method = getattr(model, ability)
        if ability in model.abilities:
            assert len(list(method(*arguments.get(ability, (texts,))))) == 1
        else:
            with pytest.raises(ConfigError, match=rf"'{objective}' cannot .*: it can .*embed"):
                method(*arguments.get(ability, (texts,)))


def test_the_rules_are_those_of_the_config_unless_they_are_given():
    model, sample = make_model(), SampleConfig(tokens=5, seed=9)
    assert len(model.generate(["a"])[0].tokens) <= 8
    assert model.generate(["a"]) == model.generate(["a"], model.config.sample)
    given = model.generate(["a"], seed=4, tokens=5, temperature=0.5, top_p=0.95)
    assert model.generate(["a"], sample, seed=4) == given
    mixed = model.generate(["a", "b"], [sample, model.config.sample])
    assert mixed[0].tokens == model.generate(["a"], sample)[0].tokens
    with pytest.raises(ConfigError, match="1 sets of rules for 2 prompts"):
        model.generate(["a", "b"], [sample])


def test_the_pieces_of_a_stream_join_to_the_generation():
    model, prompts = make_model(), ["hello", ""]
    pieces = list(model.stream(prompts, tokens=25))
    assert len(pieces) == 2  # of 16 tokens and of 9
    joined = [join_pieces(row) for row in zip(*pieces, strict=True)]
    assert joined == model.generate(prompts, tokens=25)


def test_weights_are_prepared_for_decoding_once(monkeypatch):
    calls, prepare = [], g.prepare_decode_params
    monkeypatch.setattr(g, "prepare_decode_params", lambda *a: calls.append(a) or prepare(*a))
    model = make_model()
    model.score(["a"])
    assert len(calls) == 0
    for _ in range(3):
        model.generate(["a"])
    assert len(calls) == 1


def apply_encoder(model, text, mask=None, method="__call__"):
    ids = [TOKENIZER.bos, *g.encode_with_masks(TOKENIZER, text, lambda i: mask), TOKENIZER.eos]
    tokens = np.array([ids])
    coords = Coords(np.arange(len(ids))[None], np.ones_like(tokens))
    return ids, build(model.config.model).apply(
        {"params": model.params}, tokens, coords, method=method
    )


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def test_masks_are_filled_with_the_likeliest_tokens_and_their_probabilities():
    model, texts = make_model("masked"), ["a <mask> b<mask>", "<mask>", "the c<mask>t"]
    for text, filled in zip(texts, model.fill(texts, count=7), strict=True):
        ids, (hidden, _) = apply_encoder(model, text, mask=299)
        scores = np.array(compute_logits(model.config.model, model.params, hidden[0]))
        places = np.flatnonzero(np.array(ids) == 299)
        assert len(filled) == len(places) == text.count("<mask>")
        for place, found in zip(places, filled, strict=True):
            scores[place, [0, 1, 2, 3, *range(260, 300)]] = -np.inf  # specials, and no tokens
            p = softmax(scores[place])
            best = np.argsort(-p)[:7]
            assert [c.token for c in found.candidates] == best.tolist()
            assert [c.text for c in found.candidates] == [TOKENIZER.decode([t]) for t in best]
            np.testing.assert_allclose([c.probability for c in found.candidates], p[best], 1e-4)


def test_classes_have_the_probabilities_of_the_model_by_label():
    model = make_model("classify", labels=("x", "y", "z"), classes=3)
    texts = ["the cat", "a", "dogs" * 4]
    for text, found in zip(texts, model.classify(texts), strict=True):
        p = softmax(apply_encoder(model, text, method="classify")[1][0])
        assert {*found.probabilities} == {"x", "y", "z"}
        np.testing.assert_allclose([found.probabilities[n] for n in "xyz"], p, rtol=1e-4)
        assert found.label == "xyz"[p.argmax()] == next(iter(found.probabilities))


def test_classes_without_labels_are_numbered():
    (found,) = make_model("classify", classes=3).classify(["the cat"])
    assert {*found.probabilities} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("objective", "pattern"),
    [
        ("causal", r"the <mask>.+"),
        ("pairs", r"the <mask>\n.+"),
        ("masked", r"the <mask>\n<mask>  '.*' \d+\.\d%(  .* \d+\.\d%){4}"),
        ("classify", r"the <mask>\n\d \d+\.\d%(  \d \d+\.\d%){2}"),
    ],
)
def test_the_console_formats_a_sample_of_every_kind(objective, pattern):
    model = make_model(objective, **CHANGES.get(objective, {}))

    assert re.fullmatch(pattern, console.format_sample(model, "the <mask>"), re.DOTALL)


# --- what cannot be computed with ------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(objective, value):
    model = make_model(objective, **CHANGES.get(objective, {}))
    params = jax.tree.map(jnp.asarray, model.params)
    params["embed"]["table"] = params["embed"]["table"].at[3, 1].set(value)
    model = dataclasses.replace(model, params=params, origin="runs/x/best/7")
    assert model.nonfinite_params == ("embed.table",)
    texts = [TEXTS.get(objective, "the cat")]
    for ability in model.abilities:
        arguments = (texts, texts) if ability == "score" else (texts,)
        with pytest.raises(ConfigError, match=r"runs/x/best/7 has .*: embed\.table \(1 of "):
            getattr(model, ability)(*arguments)


def test_scores_that_overflow_are_no_text():
    model = make_model()
    params = jax.tree.map_with_path(
        lambda path, x: x * 1e38 if path[-1].key == "scale" else x, model.params
    )
    model = dataclasses.replace(model, params=params)
    assert not model.nonfinite_params
    for method in (model.generate, model.score):
        with pytest.raises(ConfigError, match="scores that are not finite"):
            method(["the cat"])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    model = make_model()
    config = dataclasses.replace(
        model.config, model=dataclasses.replace(model.config.model, vocab=260)
    )
    assert LanguageModel(config, {}, TOKENIZER).config.model.vocab == 260
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tokenizer="other"),
        model=dataclasses.replace(config.model, vocab=259),
    )
    with pytest.raises(ConfigError, match="the tokenizer has 260 ids, and the model"):
        LanguageModel(config, {}, TOKENIZER)


@pytest.mark.parametrize("wrong", [-1, 300])
def test_token_ids_outside_of_the_vocabulary_are_refused_where_they_are_known(wrong):
    model = make_model()
    cfg, tokens = model.config.model, np.array([[5, wrong, 6]])
    position = np.arange(3)[None]
    lengths = np.array([3])
    with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
        build(cfg).apply({"params": model.params}, tokens, Coords(position, position * 0 + 1))
    with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
        score.embed_batch(cfg, model.params, tokens, lengths)


def test_positions_beyond_a_learned_table_are_refused_where_they_are_known():
    cfg = make_model(position="learned").config.model
    params, tokens = random_params(cfg, std=0.3), np.array([[5, 6]])
    for last, is_refused in ((cfg.context - 1, False), (cfg.context, True)):
        coords = Coords(np.array([[0, last]]), np.ones((1, 2), int))
        with pytest.raises(ValueError, match="position") if is_refused else nullcontext():
            build(cfg).apply({"params": params}, tokens, coords)


# --- long texts, among others ----------------------------------------------------------------


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_text_that_does_not_fit_is_named_among_the_others(objective):
    model, text = make_model(objective), TEXTS.get(objective, "the cat")
    texts = [text, text, "z" * 90 + text]
    method = model.generate if objective == "causal" else model.fill
    with pytest.raises(g.TextError, match=r"text 3 \('zzzz.*model.context") as error:
        method(texts)
    assert error.value.number == 2
    with pytest.raises(g.TextError, match="text 3"):
        model.embed(texts)


def test_a_classifier_reads_the_beginning_of_a_long_text_as_in_training():
    model = make_model("classify", ("x", "y", "z"), classes=3)
    T = model.config.model.context
    text = "abcdefgh" * T
    documents = [[TOKENIZER.bos, *TOKENIZER.encode(t), TOKENIZER.eos] for t in (text, "x")]
    starts = np.cumsum([0, *map(len, documents)])
    tokens = Tokens(np.concatenate(documents).astype(np.uint16), starts)
    row = PairRows(tokens, T, TOKENIZER.pad).pack_side(np.arange(1), 0)
    probabilities = predict.compute_class_probabilities(
        model.config.model, model.params, row.tokens, np.array([T])
    )[0]
    found = model.classify([text, "x"])[0].probabilities
    assert [found[label] for label in "xyz"] == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert g.find_cut_texts(model.config, TOKENIZER, ["x", text, "y" * (T - 2)]) == [1]


def test_wrong_arguments_are_named():
    model = make_model()
    with pytest.raises(ConfigError, match=r"there is no setting 'temp'.*temperature"):
        model.generate(["a"], temp=0.5)
    with pytest.raises(ConfigError, match="expected a list of texts, got 5"):
        model.score([5])
    assert repr(model).startswith("LanguageModel('")


def test_a_prompt_of_token_ids_is_the_whole_prompt():
    model = make_model()
    text = "ab"
    ids = [model.tokenizer.bos, *model.tokenizer.encode(text).tolist()]
    (found,) = model.generate([ids], temperature=0, tokens=5)
    assert found.tokens == model.generate([text], temperature=0, tokens=5)[0].tokens
    without = model.generate([np.array(ids[1:])], temperature=0, tokens=5)[0]
    assert without.logprobs != found.logprobs
    for wrong in ([model.config.model.vocab], [-1], [0.5], [[1]]):
        with pytest.raises(ConfigError, match="a list of token ids from 0 to"):
            model.generate([wrong])


def test_a_chat_is_the_prompt_that_the_template_writes():
    model = make_model()
    with pytest.raises(ConfigError, match="template"):
        model.chat("hi")
    model = dataclasses.replace(model, tokenizer=model.tokenizer.with_chat_template("plain"))
    messages = [{"role": "user", "content": "hi"}]
    prompt = model.tokenizer.encode_chat(messages, add_generation_prompt=True)
    (expected,) = model.generate([prompt], temperature=0, tokens=4)
    assert model.chat(messages, temperature=0, tokens=4) == expected
    assert model.chat("hi", temperature=0, tokens=4) == expected
