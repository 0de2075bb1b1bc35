"""The log-probabilities of a prompt's own tokens, for a completion that echoes it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.engine import check_scores
from jaxgpt.generate import round_up_to_bucket
from jaxgpt.hosts import fetch
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import build, make_head
from jaxgpt.model.layers import check_token_ids
from jaxgpt.score import add_prefix, make_coords
from jaxgpt.sharding import use_mesh_of

PLACES = 32  # whose scores are in memory at once: the smallest bucket is a multiple


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg", "top"))
def score_places(cfg: ModelConfig, params, tokens, length, top: int):
    """Return the log-probability of every next token, and the likeliest ones.

    Args:
        tokens: int32 [1 T], right-padded; T is a multiple of PLACES, or less.
        length: int32 [1].
        top: k, how many of the likeliest.

    Returns:
        float32 [T], of the token after each place; int32 [T k] and float32 [T k].
    """
    coords = add_prefix(cfg, make_coords(tokens, length), length)
    hidden, _ = build(cfg).apply({"params": params}, tokens, coords)  # [1 T D]
    head, T = make_head(cfg, params), tokens.shape[1]
    targets = jnp.roll(tokens[0], -1)
    size = PLACES if T % PLACES == 0 else T

    def score_group(group):
        hidden, targets = group  # [C D], [C]
        logprobs = jax.nn.log_softmax(head(hidden[None])[0].astype(jnp.float32))  # [C V]
        best = jax.lax.top_k(logprobs, top)
        return jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0], best[1], best[0]

    groups = hidden[0].reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)
    return [x.reshape(T, *x.shape[2:]) for x in jax.lax.map(score_group, groups)]


def score_prompt(
    model: LanguageModel, ids: Sequence[int], top: int
) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """Return for each token of a prompt its log-probability, and the likeliest in its place.

    The first token has none.
    """
    cfg = model.config.model
    T = min(round_up_to_bucket(len(ids)), cfg.context)
    tokens = np.zeros((1, T), np.int32)
    tokens[0, : len(ids)] = ids
    length = np.array([len(ids)], np.int32)
    with use_mesh_of(model.params):
        found = fetch(score_places(cfg, model.params, tokens, length, max(top, 1)))
    values, best, scores = (x[: len(ids) - 1].tolist() for x in found)
    check_scores(np.array(values))
    rows = zip(values, best, scores, strict=True)
    tops = [(value, tuple(zip(a[:top], b[:top], strict=True))) for value, a, b in rows]
    return [(None, ()), *tops]
