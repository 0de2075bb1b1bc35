"""Loss by position: whether a model makes use of a long context, and how far.

    rows = inspect.read_long_rows(model, length=1024)
    found = inspect.loss_by_position(model, rows)
    visualize.draw_context({"before": found}).savefig("context.png")

Every row is one stretch of a document, so that the token at position t is predicted from t tokens.
A model that was not trained on rows so long is worse at later positions; one that has learned to
use them is better there.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt.data import Tokens, prepare, prepare_evaluation
from jaxgpt.data.work import print_line
from jaxgpt.hosts import fetch
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import abstract_params
from jaxgpt.score import BATCH_TOKENS, score_batch
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of

DEFAULT_ROWS = 64


class PositionBin(NamedTuple):
    """Positions from `first` up to and without `end`: mean loss, and its standard error."""

    first: int
    end: int
    loss: float  # nats
    error: float


class LossByPosition(NamedTuple):
    """The loss of a model at every position of rows.

    Attributes:
        losses: float32 [R T], nats, of the token after t + 1 tokens of a row.
        context: `model.context` of the model.
    """

    losses: np.ndarray
    context: int

    @property
    def mean(self) -> np.ndarray:
        """The mean loss at every position, float64 [T]."""
        return self.losses.mean(0, dtype=np.float64)

    @property
    def bins(self) -> list[PositionBin]:
        """The losses of positions 0 to 15, 16 to 31, 32 to 63 and on, each twice as many.

        A standard error is over rows, of which each has one mean: tokens of one row are alike.
        """
        (R, T), found = self.losses.shape, []
        edges = [0, *(16 * 2**i for i in range(32) if 16 * 2**i < T), T]
        for first, end in itertools.pairwise(edges):
            means = self.losses[:, first:end].mean(1, dtype=np.float64)
            error = means.std(ddof=1) / R**0.5 if R > 1 else float("nan")
            found.append(PositionBin(first, end, float(means.mean()), float(error)))
        return found


def read_long_rows(
    model: LanguageModel,
    length: int,
    rows: int = DEFAULT_ROWS,
    setting: str = "",
    log: Callable[[str], None] = print_line,
) -> np.ndarray:
    """Return stretches of documents of the text that the config of a model names.

    Args:
        length: T of a row, which has one more token.
        rows: at most so many; they are spread evenly over the text.
        setting: "source" or "test" for all of that text, "" for what training held out.
        log: receives progress lines of tokenizing.

    Returns:
        int32 [R T+1].

    Raises:
        ConfigError: no document is that long, or the text cannot be read.
    """
    cfg = model.config
    if setting:
        corpus = prepare_evaluation(cfg.data, model.tokenizer, setting=setting, log=log)
    else:
        corpus = prepare(cfg.data, cfg.tokenizer_vocab, tokenizer=model.tokenizer, log=log)
    firsts = np.array([*_find_stretches(corpus.held_out, length + 1)])
    if not len(firsts):
        longest = int(np.diff(corpus.held_out.starts).max(initial=0))
        raise ConfigError(
            f"no document of {corpus.source!r} has {length + 1} tokens; the longest has {longest}: "
            f"use --length {max(1, longest - 1)} or less, or another data.source."
        )
    chosen = np.unique(np.linspace(0, len(firsts) - 1, min(rows, len(firsts))).astype(int))
    return corpus.held_out.gather_windows(firsts[chosen], length + 1)


def _find_stretches(tokens: Tokens, size: int) -> Iterator[int]:
    """Yield where stretches of `size` tokens begin that do not overlap, each in one document."""
    for start, end in zip(tokens.starts, tokens.starts[1:], strict=False):
        yield from range(int(start), int(end) - size + 1, size)


def loss_by_position(model: LanguageModel, rows: np.ndarray) -> LossByPosition:
    """Return the loss at every position of rows, which may be longer than the model's context.

    Args:
        model: a causal language model.
        rows: int32 [R T+1] token ids, each row one document.

    Raises:
        ConfigError: the model is no such model, or has parameters for every position and fewer of
            them than the rows.
    """
    cfg, (R, T) = model.config.model, (rows.shape[0], rows.shape[1] - 1)
    check_length(model, T)
    size = max(1, BATCH_TOKENS // T)
    losses = np.zeros((R, T), np.float32)
    for first in range(0, R, size):
        part = np.zeros((size, T + 1), np.int32)  # the last batch is filled up, to one shape
        taken = rows[first : first + size]
        part[: len(taken)] = taken
        lengths = np.full(size, T, np.int32)
        with use_mesh_of(model.params):
            logprobs, _ = score_batch(
                cfg, model.params, part[:, :-1], part[:, 1:], lengths, lengths * 0
            )
        losses[first : first + len(taken)] = -fetch(logprobs)[: len(taken)]
    return LossByPosition(losses, cfg.context)


def check_length(model: LanguageModel, length: int):
    """Raise ConfigError unless a model can compute the loss of rows of this length."""
    cfg = model.config
    if cfg.model.family != "decoder" or "score" not in model.abilities:
        raise ConfigError(
            f"the loss by position is of a decoder, which predicts each token from those before; "
            f"this is model.family={cfg.model.family!r} of train.objective="
            f"{cfg.train.objective!r}."
        )
    if length < 1:
        raise ConfigError(f"--length {length} must be at least 1.")
    letters = jax.tree.leaves(abstract_params(cfg.model)[1])
    if length > cfg.model.context and any("C" in dims for dims in letters):
        raise ConfigError(
            f"--length {length}: this model has parameters for each of model.context="
            f"{cfg.model.context} positions (model.position={cfg.model.position!r}) and none for "
            "later ones. Use that length or less."
        )


def format_bins(found: dict[str, LossByPosition]) -> str:
    """Format the losses of several models on the same rows as a table, a row for each bin."""
    columns = [x.bins for x in found.values()]
    width = max(14, *(len(name) for name in found))
    lines = ["positions".ljust(12) + "".join(f"  {name:>{width}}" for name in found)]
    for row in zip(*columns, strict=True):
        numbers = (f"{x.loss:.4f} ± {x.error:.4f}" for x in row)
        name = f"{row[0].first}-{row[0].end - 1}"
        lines.append(f"{name:12}" + "".join(f"  {text:>{width}}" for text in numbers))
    return "\n".join(lines)
