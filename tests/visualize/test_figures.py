"""Figures show the numbers that they are given."""

import matplotlib
import numpy as np
import pytest
from inspected import TEXT, make_model

from jaxgpt import inspect, visualize


@pytest.fixture(scope="module")
def model():
    return make_model()


def read_image(axis):
    return np.ma.filled(axis.images[0].get_array(), np.nan)


def test_attention_of_each_head(model):
    weights = inspect.attention(model, TEXT)[0]
    pieces = inspect.encode(model, TEXT).pieces
    figure = visualize.draw_attention(weights, pieces)
    for h in range(4):
        np.testing.assert_array_equal(read_image(figure.axes[h]), weights[h])
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert labels == list(pieces)
    single = visualize.draw_attention(weights[2], pieces, title="one")
    np.testing.assert_array_equal(read_image(single.axes[0]), weights[2])


def test_no_grid_hides_an_image_whatever_the_style_of_the_user():
    with matplotlib.rc_context({"axes.grid": True}):
        figure = visualize.draw_attention(np.eye(3), ["a", "b", "c"])
    assert not [line for line in figure.axes[0].get_xgridlines() if line.get_visible()]


def test_the_lens_has_a_cell_for_each_layer_and_token(model):
    lens = inspect.logit_lens(model, TEXT)
    figure = visualize.draw_lens(lens)
    np.testing.assert_array_equal(read_image(figure.axes[0]), lens.probs[..., 0])
    assert len(figure.axes[0].texts) == 3 * len(lens.text.pieces)


def test_bars_have_their_lengths(model):
    losses = inspect.token_losses(model, TEXT)
    bars = visualize.draw_losses(losses, inspect.encode(model, TEXT).pieces).axes[0].patches
    np.testing.assert_allclose([b.get_height() for b in bars][1:], losses[1:])
    found = inspect.attribute_logit(model, TEXT)
    widths = [b.get_width() for b in visualize.draw_attribution(found, 5).axes[0].patches]
    np.testing.assert_allclose(widths[::-1], sorted(found.values, key=abs, reverse=True)[:5])


def test_numbers_of_heads_are_written(model):
    scores = inspect.induction_scores(model, 6, 2)
    figure = visualize.draw_heads(scores, "induction")
    assert [t.get_text() for t in figure.axes[0].texts] == [f"{v:.2f}" for v in scores.flat]


@pytest.mark.parametrize("name", ["none", "sinusoidal", "learned", "rope", "alibi", "t5",
                                  "temperature"])  # fmt: skip
def test_position_encodings_are_drawn(name, tmp_path):
    picture = inspect.describe_positions(name, 8)
    figure = visualize.draw_positions(picture)
    figure.savefig(tmp_path / "pe.png")
    expected = picture.matrix[0] if picture.kind == "bias" else picture.matrix
    np.testing.assert_array_equal(read_image(figure.axes[0]), expected)


def test_curves_sizes_and_maps(model):
    figure = visualize.draw_curves({"a": ([0, 1], [2.0, 1.0]), "b": ([0, 2], [3.0, 2.0])})
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), [3, 2])
    streams = np.ones((3, 4, 9))
    (*_, mean) = visualize.draw_sizes(streams).axes[0].lines
    np.testing.assert_allclose(mean.get_ydata(), 3)
    points = np.array([[0.0, 1], [2, 3]])
    texts = visualize.draw_map(points, ["$a", "b"]).axes[0].texts
    assert [t.get_text() for t in texts] == [r"\$a", "b"]
