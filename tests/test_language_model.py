"""The methods of a model: what each family can do, and results as numbers."""

import re

import numpy as np
import pytest
from helpers import random_params, tiny

from jaxgpt import console
from jaxgpt import generate as g
from jaxgpt.config import Config, SampleConfig, TrainConfig
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
