"""Standard errors, perplexities, contamination and emergence, on numbers that are known."""

import math
import re

import numpy as np
import pytest
from tiny_decoders import make_model

from jaxgpt.evaluate import contamination, emergence, texts
from jaxgpt.evaluate.metrics import (
    estimate_calibration,
    estimate_mean,
    estimate_perplexity,
)
from jaxgpt.evaluate.tasks import Question
from jaxgpt.settings import ConfigError


def test_the_error_of_a_mean_is_its_textbook_one():
    values = [1, 0, 1, 1, 0, 1, 0, 1]
    found = estimate_mean(values)
    assert found.value == 0.625
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(8))
    assert math.isnan(estimate_mean([1.0]).error)


def test_a_stratified_mean_weighs_groups_by_their_size():
    values, groups = [1, 1, 0, 0, 1, 0], ["a", "a", "a", "b", "b", "b"]
    found = estimate_mean(values, groups, {"a": 300, "b": 100})
    assert found.value == pytest.approx(0.75 * 2 / 3 + 0.25 * 1 / 3)
    variance = (0.75**2 + 0.25**2) * (1 / 3) / 3
    assert found.error == pytest.approx(math.sqrt(variance))


def test_the_error_of_a_stratified_mean_is_what_samples_show():
    """Of 2,000 samples of 4 from each of three groups."""
    rng = np.random.default_rng(0)
    shares, sizes = {"a": 0.1, "b": 0.5, "c": 0.8}, {"a": 500, "b": 300, "c": 200}
    groups = [name for name in shares for _ in range(4)]
    means, errors = [], []
    for _ in range(2000):
        found = estimate_mean([float(rng.random() < shares[g]) for g in groups], groups, sizes)
        means.append(found.value)
        errors.append(found.error**2)
    assert np.mean(means) == pytest.approx(0.5 * 0.1 + 0.3 * 0.5 + 0.2 * 0.8, abs=0.02)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.06)


def test_groups_of_one_question_share_the_variance_of_the_others():
    found = estimate_mean([1, 0, 1], ["a", "a", "b"])
    pooled = 0.5
    expected = (2 / 3) ** 2 * 0.5 / 2 + (1 / 3) ** 2 * pooled
    assert found.error == pytest.approx(math.sqrt(expected))
    single = estimate_mean([1, 0, 1, 1], list("abcd"))
    assert single.error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)


def test_perplexity_is_per_unit_and_its_error_that_of_a_ratio():
    nats, tokens = [-10.0, -14.0, -9.0], [5.0, 6.0, 4.0]
    found = estimate_perplexity(nats, tokens, total=60.0)
    assert found.value == pytest.approx(math.exp(33 / 60))
    rate = -33 / 15
    residuals = np.array(nats) - rate * np.array(tokens)
    error = math.sqrt(3 / 2 * np.sum(residuals**2)) / 15
    assert found.error == pytest.approx(found.value * error * 15 / 60)


def test_calibration_compares_confidence_and_accuracy_by_bins():
    found = estimate_calibration([0.95, 0.95, 0.55, 0.55], [1, 1, 0, 1])
    assert found.value == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert estimate_calibration([0.9] * 10, [0] * 10).value == pytest.approx(0.9)
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    calibrated = estimate_calibration(confidence, (rng.random(20_000) < confidence).astype(float))
    assert calibrated.value < 5 * calibrated.error


# --- perplexity of texts ---------------------------------------------------------------------


def test_windows_score_each_token_once_after_a_full_context():
    ids = list(range(10, 31))
    windows = texts.roll_windows(ids, 2, 8)
    assert [t for w in windows for t in w.continuation] == ids
    assert windows[0].context == (2,)
    assert all(len(w.context + w.continuation) == 9 for w in windows)  # 8 inputs, and a target
    whole = [2, *ids]
    for window in windows:
        joined = list(window.context + window.continuation)
        at = whole.index(joined[0])
        assert whole[at : at + 9] == joined


def test_the_perplexity_of_a_text_is_that_of_its_score():
    model = make_model()
    text = "the cat sat on the mat, and the dog ran up the hill. " * 3
    found = texts.measure_perplexity(model, [text]).metrics
    ids = [*model.tokenizer.prefix, *model.tokenizer.encode(text).tolist()]
    total = -sum(x.sum() for x in texts.score_rolling(model, [text]))
    assert found["perplexity"].value == pytest.approx(math.exp(total / len(ids)))
    assert found["byte_perplexity"].value == pytest.approx(math.exp(total / len(text.encode())))
    words = len(re.split(r"\s+", text))
    assert found["word_perplexity"].value == pytest.approx(math.exp(total / words))
    assert all(x.error > 0 for x in found.values())


def test_texts_are_read_from_a_file_or_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert texts.read_texts(str(tmp_path)) == ["one", "two"]
    assert texts.read_texts(str(tmp_path / "a.txt")) == ["one"]
    with pytest.raises(ConfigError, match="no such file"):
        texts.read_texts(str(tmp_path / "c"))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        texts.read_texts(str(tmp_path))
    with pytest.raises(ConfigError, match="empty"):
        texts.measure_perplexity(make_model(), [""])


# --- contamination ---------------------------------------------------------------------------


def ask(*sentences: str) -> list[Question]:
    return [Question(str(n), "", (("", text),)) for n, text in enumerate(sentences)]


def test_a_question_in_the_training_text_is_found_whatever_its_punctuation():
    questions = ask(
        "The quick brown fox jumps over the lazy dog",
        "A completely different sentence of many words about nothing at all",
        "The quick brown fox jumps under the lazy dog",
        "too short",
    )
    training = ["Once, the QUICK brown\nfox -- jumps over: the lazy dog!", "nothing else"]
    found = contamination.find_contamination(questions, iter(training), words=5)
    assert (found.questions, found.contaminated, found.short) == (3, 2, 1)
    assert found.ids == ("0", "2")
    assert found.share == pytest.approx((1 + 0 + 1 / 5) / 3)
    assert "2 of 3 questions (66.67%)" in found.format()
    none = contamination.find_contamination(questions, iter(training), words=9)
    assert none.ids == ("0",)
    assert contamination.find_contamination(questions, iter([]), words=5).contaminated == 0


def test_equal_hashes_are_no_match(monkeypatch):
    """A hash is only where to look: the words decide."""
    monkeypatch.setattr(contamination, "_hash", lambda grams: np.zeros(len(grams), np.uint64))
    found = contamination.find_contamination(ask("a b c d"), iter(["d c b a"]), words=3)
    assert found.contaminated == 0


# --- emergence -------------------------------------------------------------------------------


def make_points(shares, places=4000):
    """Return points of models whose tokens are right with these probabilities, independently."""
    rng = np.random.default_rng(0)
    points = []
    for number, p in enumerate(shares):
        is_best = rng.random((places, 8)) < p
        logprobs = np.full((places, 8), math.log(p)) + 0.1 * rng.normal(size=(places, 8))
        points.append(emergence.make_point(f"m{number}", 10**number, logprobs, is_best))
    return points


def test_exact_match_jumps_where_the_likelihood_moves_smoothly():
    shares = [0.3, 0.42, 0.54, 0.66, 0.78, 0.9]
    points = make_points(shares)
    for point, p in zip(points, shares, strict=True):
        assert point.matches[8].value == pytest.approx(p**8, abs=4 * point.matches[8].error + 0.002)
        assert point.log_likelihood.value == pytest.approx(math.log(p), abs=0.01)
    smooth = emergence.find_largest_step([p.log_likelihood.value for p in points])
    sharp = emergence.find_largest_step([p.matches[8].value for p in points])
    assert np.isnan(emergence.find_largest_step([0.1, 0.1, 0.1]))
    assert smooth < 0.35  # log(0.42 / 0.3) / log(0.9 / 0.3) is 0.31; the deviation is 0.001
    assert sharp > 0.55  # (0.9**8 - 0.78**8) / (0.9**8 - 0.3**8) is 0.68; the deviation is 0.014
    text = emergence.format_points(points)
    assert "8 exact" in text
    assert "largest step" in text


def test_emergence_is_measured_on_models_and_drawn(tmp_path):
    models = {"large": make_model(seed=2, layers=4), "small": make_model(seed=2)}
    text = "the cat sat on the mat. " * 12
    points = emergence.measure_emergence(models, [text], places=16)
    assert [point.name for point in points] == ["small", "large"]
    assert all(point.log_likelihood.value < 0 for point in points)
    assert all(p.matches[1].value >= p.matches[4].value >= p.matches[8].value for p in points)
    emergence.plot_emergence(points, str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="too short"):
        emergence.measure_emergence({"small": models["small"]}, ["short"])
