"""Figures of what `jaxgpt.inspect` returns, by matplotlib. Each function returns a Figure.

figure = visualize.draw_attention(weights[3], found.pieces)
figure.savefig("attention.png")
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.inspect import Attribution, Lens, LossByPosition, PositionPicture
from jaxgpt.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Figure


def _make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return (figure, axes [rows columns]), not known to pyplot: nothing has to be closed."""
    require("matplotlib", "a figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(False)  # whatever the user's style: lines over an image hide it
    return figure, axes


def _show_piece(piece: str) -> str:
    """Return a token as a label; $ would begin a formula."""
    return piece.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")


def _label_tokens(axis, pieces: Sequence[str], **style):
    axis.set_ticks(range(len(pieces)), [_show_piece(p) for p in pieces], **style)


def draw_attention(
    weights: np.ndarray, pieces: Sequence[str], keys: Sequence[str] | None = None, title: str = ""
) -> "Figure":
    """Draw the attention weights of each head of a layer [H T S], or of one head [T S].

    Args:
        pieces: of the queries. keys: of the keys, if they are others.
    """
    weights = weights if weights.ndim == 3 else weights[None]
    count, keys = len(weights), pieces if keys is None else keys
    columns = min(count, 4)
    rows = -(-count // columns)
    size = max(2.2, 0.22 * len(keys))
    figure, axes = _make_figure(size * columns + 1, size * rows + 0.6, rows, columns)
    for h, axis in enumerate(axes.flat):
        if h >= count:
            axis.set_axis_off()
            continue
        image = axis.imshow(weights[h], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        _label_tokens(axis.xaxis, keys, rotation=90, fontsize=7)
        _label_tokens(axis.yaxis, pieces, fontsize=7)
        if count > 1:
            axis.set_title(f"head {h}", fontsize=9)
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.7)
    figure.suptitle(title or "What each token (row) looks at (column)")
    return figure


def draw_lens(lens: Lens) -> "Figure":
    """Draw a logit lens as a table: the likeliest next token after each layer, by probability."""
    L, T = lens.probs.shape[:2]
    figure, axes = _make_figure(max(5, 0.75 * T + 1.5), 0.38 * L + 1.4)
    axis = axes[0, 0]
    image = axis.imshow(lens.probs[..., 0], vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for layer in range(L):
        for t in range(T):
            color = "white" if lens.probs[layer, t, 0] > 0.6 else "black"
            piece = _show_piece(lens.top_pieces[layer][t][0])
            axis.text(t, layer, piece, ha="center", va="center", fontsize=7, color=color)
    _label_tokens(axis.xaxis, lens.text.pieces, rotation=60, fontsize=8)
    axis.set_yticks(range(L), lens.names, fontsize=8)
    axis.set_title("Logit lens: the likeliest next token after each layer")
    figure.colorbar(image, ax=axis, label="probability")
    return figure


def draw_losses(losses: np.ndarray, pieces: Sequence[str]) -> "Figure":
    """Draw the loss of each token [T] of a text, in nats; the first may be NaN."""
    figure, axes = _make_figure(max(5, 0.3 * len(pieces) + 1), 3)
    axis = axes[0, 0]
    axis.bar(range(len(pieces)), np.nan_to_num(losses), color="tab:red")
    _label_tokens(axis.xaxis, pieces, rotation=90, fontsize=8)
    axis.set_ylabel("loss, nats")
    axis.set_title(f"Surprisal of each token (mean {np.nanmean(losses):.3f})")
    return figure


def draw_attribution(found: Attribution, count: int = 15, title: str = "") -> "Figure":
    """Draw the parts of a model that add most to a logit, the largest first."""
    best = np.argsort(-np.abs(found.values))[:count][::-1]
    figure, axes = _make_figure(7, 0.28 * len(best) + 1.2)
    axis = axes[0, 0]
    colors = ["tab:blue" if v >= 0 else "tab:red" for v in found.values[best]]
    axis.barh([found.names[i] for i in best], found.values[best], color=colors)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xlabel(f"adds to the logit ({found.logit:.2f} in all)")
    axis.set_title(title or "Direct logit attribution")
    return figure


def draw_heads(scores: np.ndarray, title: str, label: str = "score") -> "Figure":
    """Draw one number for each head, [L H]."""
    L, H = scores.shape
    figure, axes = _make_figure(max(4, 0.5 * H + 2), max(2.4, 0.45 * L + 1.2))
    axis = axes[0, 0]
    size = max(float(np.abs(scores).max()), 1e-9)
    signed = (scores < 0).any()
    image = axis.imshow(
        scores, vmin=-size if signed else 0, vmax=size, cmap="RdBu_r" if signed else "Blues"
    )
    for (layer, head), value in np.ndenumerate(scores):
        color = "white" if abs(value) > 0.6 * size else "black"
        axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(H))
    axis.set_yticks(range(L))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(title)
    figure.colorbar(image, ax=axis, label=label)
    return figure


def draw_sizes(streams: np.ndarray) -> "Figure":
    """Draw the length of the residual stream of every token by layer: streams [L+1 T D]."""
    figure, axes = _make_figure(6, 3.5)
    axis, sizes = axes[0, 0], np.linalg.norm(streams, axis=-1)
    axis.plot(sizes, color="tab:blue", alpha=0.25, linewidth=1)
    axis.plot(sizes.mean(-1), color="black", label="mean over the tokens")
    axis.set_xticks(range(len(sizes)), ["in", *map(str, range(len(sizes) - 1))])
    axis.set_xlabel("after layer")
    axis.set_ylabel("length")
    axis.set_title("Size of the residual stream")
    axis.legend()
    return figure


def draw_positions(picture: PositionPicture) -> "Figure":
    """Draw a position encoding: what it adds or does, and how alike positions are to it."""
    figure, axes = _make_figure(11, 4.2, 1, 2)
    left, right = axes[0]
    matrix = picture.matrix[0] if picture.kind == "bias" else picture.matrix
    image = left.imshow(matrix, aspect="auto", cmap="RdBu_r")
    labels = {
        "embedding": ("channel", "position", "added to the embedding"),
        "rotation": ("channel", "position", "cosines and sines that rotate queries and keys"),
        "bias": ("key", "query", "added to the logits of head 0"),
        "query_scale": ("", "position", "factor of the queries"),
        "none": ("", "position", "nothing is added"),
    }
    x, y, what = labels[picture.kind]
    left.set_xlabel(x)
    left.set_ylabel(y)
    left.set_title(f"{picture.name}: {what}")
    figure.colorbar(image, ax=left)
    image = right.imshow(picture.similarity, aspect="auto", cmap="viridis")
    right.set_xlabel("position")
    right.set_ylabel("position")
    right.set_title("how alike two positions are")
    figure.colorbar(image, ax=right)
    return figure


def draw_map(points: np.ndarray, labels: Sequence[str], title: str = "") -> "Figure":
    """Draw vectors that were projected to two dimensions [N 2], with a label each."""
    figure, axes = _make_figure(7, 6)
    axis = axes[0, 0]
    axis.scatter(points[:, 0], points[:, 1], s=8, color="tab:blue")
    for (x, y), label in zip(points, labels, strict=True):
        axis.annotate(
            _show_piece(label), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8
        )
    axis.set_title(title or "Embeddings")
    return figure


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ylabel: str = "held-out loss",
    title: str = "",
) -> "Figure":
    """Draw curves over steps: {name: (steps, values)}."""
    figure, axes = _make_figure(8, 4.5)
    axis = axes[0, 0]
    for name, (steps, values) in curves.items():
        axis.plot(steps, values, marker="o", markersize=3, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(ylabel)
    axis.set_title(title or ylabel)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_context(found: Mapping[str, LossByPosition], title: str = "") -> "Figure":
    """Draw the loss by position of models, on the same rows; a dotted line ends a context."""
    figure, axes = _make_figure(8, 4.5)
    axis = axes[0, 0]
    for i, (name, one) in enumerate(found.items()):
        bins, color = one.bins, f"C{i}"
        middles = [(x.first + x.end) / 2 for x in bins]
        losses, errors = np.array([(x.loss, x.error) for x in bins]).T
        axis.plot(middles, losses, marker="o", markersize=3, color=color, label=name)
        axis.fill_between(middles, losses - errors, losses + errors, color=color, alpha=0.2)
        axis.axvline(one.context, color=color, linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("position in the row, tokens")
    axis.set_ylabel("loss, nats")
    axis.set_title(title or "Loss by position (dotted: the context of the model)")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
