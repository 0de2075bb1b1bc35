"""Beam search: the likeliest continuations that a search of limited width finds.

The semantics are those of `transformers` with early_stopping=False, of which beam search differs in
when it stops: if the best running beam, at its present length, is no better than the worst of the
finished ones.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.engine.programs import DecodeState, copy_row, init_state, prefill, run_tokens
from jaxgpt.engine.scheduler import round_up, split_prompt
from jaxgpt.hosts import fetch
from jaxgpt.model import Cache, compute_logits
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of

CHUNK = 256  # tokens of a prompt that are read at once


class Beam(NamedTuple):
    """A continuation: its tokens, the last of which may end it."""

    score: float  # sum of the log-probabilities, divided by length ** length_penalty
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class Running(NamedTuple):
    """A beam that goes on."""

    total: float  # sum of the log-probabilities
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@functools.partial(jax.jit, static_argnames=("cfg", "count"))
def rank_tokens(cfg: ModelConfig, scores, totals, allowed, count: int):
    """Return the best continuations of all beams by one token.

    Args:
        scores: float32 [B V], of the model.
        totals: float32 [B], of the beams so far.
        allowed: bool [V].

    Returns:
        (totals, beams, tokens, log-probabilities of the tokens), [count] each, the best first.
    """
    logprobs = jax.nn.log_softmax(scores, axis=-1)
    candidates = jnp.where(allowed, logprobs, -jnp.inf) + totals[:, None]
    best, index = jax.lax.top_k(candidates.reshape(-1), count)
    beams, tokens = index // scores.shape[1], index % scores.shape[1]
    return best, beams, tokens, logprobs[beams, tokens]


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache",))
def extend_beams(cfg: ModelConfig, params, cache: Cache, prefix, parents, tokens):
    """Append tokens [B] to the beams `parents` [B]. Return (cache, scores float32 [B V])."""
    cache = jax.tree.map(lambda x: x[parents], cache)
    hidden, cache = run_tokens(
        cfg, params, tokens[:, None], jnp.ones_like(tokens)[:, None] > 0, cache, prefix
    )
    return cache, compute_logits(cfg, params, hidden[:, 0])


def _read_prompt(
    cfg: ModelConfig, params, ids, source, beams: int, tokens: int, kind: str
) -> DecodeState:
    """Return a state whose rows have all read the prompt."""
    is_whole = "prefix" in cfg.pattern
    slots, sources = round_up(len(ids) + tokens), round_up(len(source)) if source else 0
    state = init_state(cfg, beams, slots, max(CHUNK, slots if is_whole else 0), sources, kind)
    whole = [(len(ids), round_up(len(ids)))]
    start = 0
    for count, size in whole if is_whole else split_prompt(len(ids), 0, CHUNK):
        chunk = np.zeros((1, size), np.int32)
        chunk[0, :count] = ids[start : start + count]
        memory = None
        if source and not start:
            padded = np.zeros((1, sources), np.int32)
            padded[0, : len(source)] = source
            memory = padded, np.int32(len(source))
        numbers = map(np.int32, (count, start, len(ids)))
        state = prefill(cfg, params, state, np.int32(0), chunk, *numbers, memory)
        start += count
    for row in range(1, beams):
        state = copy_row(cfg, state, np.int32(0), np.int32(row))
    return state


def search_beams(
    cfg: ModelConfig,
    params,
    ids: Sequence[int],
    source: Sequence[int] = (),
    *,
    beams: int,
    tokens: int,
    ends: Sequence[int],
    allowed: np.ndarray | None = None,
    length_penalty: float = 1.0,
    min_tokens: int = 0,
    cache: str = "model",
) -> list[Beam]:
    """Return the continuations of a prompt that beam search finds, the best first.

    Args:
        cfg, params: the model.
        ids: the prompt, or the start of an encoder-decoder's target.
        source: the source of an encoder-decoder.
        beams: how many beams run at once, and are returned.
        tokens: maximum length of a continuation.
        ends: the tokens that end one.
        allowed: bool [V], the tokens that may occur.
        length_penalty: scores are divided by length ** length_penalty.
        min_tokens: minimum length of a continuation.
        cache: how keys and values are stored, a value of `sample.cache`.

    Raises:
        ConfigError: the vocabulary is too small for so many beams.

    Source: Wu et al. 2016, arXiv:1609.08144, section 7, for the division by the length.
    """
    count = (len(ends) + 1) * beams
    allowed = np.ones(cfg.vocab, bool) if allowed is None else np.asarray(allowed)
    if allowed.sum() < count:
        raise ConfigError(f"beams={beams} need {count} tokens that can be generated.")
    without_ends = allowed & ~np.isin(np.arange(cfg.vocab), list(ends))
    with use_mesh_of(params):
        state = _read_prompt(cfg, params, list(ids), list(source), beams, tokens, cache)
        kept, scores = state.cache, state.scores
        prefix = np.full(beams, len(ids), np.int32)
        # All rows are alike at first: candidates come from one of them.
        running = [Running(0.0 if n == 0 else -1e9, (), ()) for n in range(beams)]
        finished: list[Beam] = []
        for length in range(1, tokens + 1):
            totals = np.array([beam.total for beam in running], np.float32)
            may = without_ends if length <= min_tokens else allowed
            candidates = _rank(cfg, scores, totals, may, count, running)
            is_last = length == tokens
            parents, running = _split(candidates, beams, ends, is_last, length_penalty, finished)
            finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
            if is_last or _is_hopeless(running, finished, beams, length, length_penalty):
                break
            last = np.array([beam.tokens[-1] for beam in running], np.int32)
            kept, scores = extend_beams(cfg, params, kept, prefix, parents, last)
    return finished


def _rank(cfg, scores, totals, allowed, count: int, running) -> list[tuple[int, Running]]:
    """Return (parent, beam) of the best continuations by one token."""
    found = fetch(rank_tokens(cfg, scores, totals, allowed, count))
    return [
        (
            parent,
            Running(total, (*running[parent].tokens, token), (*running[parent].logprobs, logprob)),
        )
        for total, parent, token, logprob in zip(*(x.tolist() for x in found), strict=True)
    ]


def _split(candidates, beams: int, ends, is_last: bool, length_penalty: float, finished):
    """Add those that end to `finished`. Return (parents int32 [B], beams) of the best others."""
    going = []
    for rank, (parent, beam) in enumerate(candidates):
        if not is_last and beam.tokens[-1] not in ends:
            going.append((parent, beam))
        elif rank < beams:  # worse ones are there for enough beams to go on
            score = beam.total / len(beam.tokens) ** length_penalty
            finished.append(Beam(score, beam.tokens, beam.logprobs))
    parents = np.array([parent for parent, _ in going[:beams]], np.int32)
    return parents, [beam for _, beam in going[:beams]]


def _is_hopeless(running, finished, beams: int, length: int, length_penalty: float) -> bool:
    """Return whether no running beam can be better than the worst finished one."""
    if len(finished) < beams:
        return False
    return running[0].total / length**length_penalty <= finished[-1].score
