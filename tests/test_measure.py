"""Measures, held against values worked out by hand, and against sacrebleu and scipy."""

import math

import numpy as np
import pytest

from jaxgpt import measure
from jaxgpt.settings import ConfigError


def test_entropies_of_the_course():
    assert measure.entropy(np.full(1000, 1e-3), base=2) == pytest.approx(9.9658, abs=5e-5)
    peaked = [0.9, 0.05, 0.03, 0.02]
    by_hand = -sum(p * math.log2(p) for p in peaked)
    assert measure.entropy(peaked, base=2) == pytest.approx(by_hand)
    assert measure.entropy([1.0, 0.0]) == 0
    np.testing.assert_allclose(measure.entropy([[0.5, 0.5], [1, 0]], base=2), [1, 0])


def test_cross_entropy_is_entropy_and_divergence():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.4, 0.2])
    by_hand = -(0.7 * math.log(0.4) + 0.2 * math.log(0.4) + 0.1 * math.log(0.2))
    assert measure.cross_entropy(p, q) == pytest.approx(by_hand)
    assert measure.kl_divergence(p, q) == pytest.approx(by_hand - measure.entropy(p))
    assert measure.kl_divergence(p, p) == pytest.approx(0)
    assert measure.kl_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf
    assert measure.perplexity(measure.entropy(np.full(8, 1 / 8))) == pytest.approx(8)


def test_softmax_of_the_course_and_temperature():
    logits = np.array([2.0, 1.0, 0.1])
    np.testing.assert_allclose(measure.softmax(logits), [0.659, 0.242, 0.099], atol=5e-4)
    np.testing.assert_allclose(measure.softmax(logits + 1000), measure.softmax(logits))
    np.testing.assert_allclose(measure.softmax(logits, 2.0), measure.softmax(logits / 2))


def test_vectors_by_hand():
    assert measure.cosine_similarity([1, 0], [1, 1]) == pytest.approx(math.sqrt(0.5))
    assert measure.cosine_similarity([0, 0], [1, 1]) == 0
    assert measure.euclidean_distance([0, 3], [4, 0]) == pytest.approx(5)
    assert measure.norm([3, -4]) == pytest.approx(5)
    assert measure.norm([3, -4], 1) == pytest.approx(7)
    assert measure.norm([3, -4], math.inf) == pytest.approx(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure.entropy([0.5, 0.6]), "sum to 1"),
        (lambda: measure.entropy([1.5, -0.5]), "sum to 1"),
        (lambda: measure.entropy([1.0], base=1), "base=1"),
        (lambda: measure.softmax([1.0], 0), "temperature=0"),
        (lambda: measure.norm([1.0], 0.5), "order=0.5"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog barked at me loudly"]
    first = ["the cat sat on a mat today", "a dog barked at me"]
    second = ["today the cat sat on the mat", "the dog barked at me loudly"]
    expected = sacrebleu.corpus_bleu(answers, [first, second]).score
    pairs = list(zip(first, second, strict=True))
    assert measure.bleu(answers, pairs) == pytest.approx(expected)
    assert measure.bleu(answers, first) < measure.bleu(answers, pairs)
    assert measure.bleu(first, first) == pytest.approx(100)
    assert measure.chrf(answers, first) == pytest.approx(
        sacrebleu.corpus_chrf(answers, [first]).score
    )
    with pytest.raises(ConfigError, match="2 answers have 1"):
        measure.bleu(answers, first[:1])
    with pytest.raises(ConfigError, match="same number"):
        measure.bleu(answers, [["a"], ["b", "c"]])
