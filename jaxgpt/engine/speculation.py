"""Speculation: guesses of the next tokens, which one pass of the model checks.

A guess never changes what is drawn, see `programs.verify`: a good one only saves passes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.engine.processors import choose_tokens
from jaxgpt.engine.programs import (
    DecodeState,
    Drawn,
    copy_row,
    init_state,
    prefill,
    run_tokens,
    verify,
)
from jaxgpt.engine.size import list_recurrent_mixers
from jaxgpt.model import compute_logits
from jaxgpt.settings import ConfigError

LONGEST_MATCH = 4  # tokens at the end of a row that are looked up in it
SHORTEST_MATCH = 2
LOOKBACK_TOKENS = 4096


def find_draft(ids: list[int], count: int) -> list[int]:
    """Return up to `count` tokens that followed the latest place like the end of a row.

    >>> find_draft([1, 2, 3, 4, 9, 1, 2], 3)
    [3, 4, 9]

    Source: Saxena 2023, "Prompt lookup decoding".
    """
    row = np.asarray(ids[-LOOKBACK_TOKENS:])
    for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        if len(row) <= size:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(row[:-1], size)
        found = np.flatnonzero((windows == row[-size:]).all(axis=1))
        if found.size:
            start = found[-1] + size
            return row[start : start + count].tolist()
    return []


@dataclass
class Acceptance:
    """How many guesses of a row were right. Too few, and it guesses no more for a while.

    A pass over a guess takes longer than one over a token, and fetches its result at once.
    """

    rate: float = 1.0  # a moving average of right guesses among all
    paused: int = 0  # calls until the next guess
    is_following: bool = True  # whether a draft model has read the row's tokens

    MIN_RATE = 0.2
    WEIGHT = 0.2
    PAUSE_CALLS = 8

    @property
    def is_worthwhile(self) -> bool:
        """Whether to guess in the next call."""
        if self.paused:
            self.paused -= 1
            return False
        return True

    def record(self, guessed: int, drawn: int):
        """Record a call that drew a token and guessed so many after it."""
        if guessed <= 0:
            return
        right = (drawn - 1) / guessed
        self.rate += self.WEIGHT * (right - self.rate)
        if self.rate < self.MIN_RATE:
            self.rate, self.paused = self.MIN_RATE + self.WEIGHT, self.PAUSE_CALLS
            self.is_following = False


class DraftModel:
    """A smaller model with the same vocabulary, whose guesses a larger one checks.

    It draws with the random keys of the rows, as the larger model does: so both draw the same token
    the more often, the closer their distributions are.

    Source: Daliri et al. 2024, arXiv:2408.07978, section 3.
    """

    def __init__(self, cfg: ModelConfig, params: Any):
        self.cfg, self.params = cfg, params
        self.state: Any = None

    def check(self, cfg: ModelConfig):
        """Raise ConfigError unless it can guess for a model."""
        if self.cfg.vocab != cfg.vocab:
            raise ConfigError(
                f"the draft model has model.vocab={self.cfg.vocab}, the model {cfg.vocab}: they "
                "need the same tokenizer."
            )
        if self.cfg.family != "decoder" or cfg.family != "decoder":
            raise ConfigError("a draft model and its model have model.family=decoder.")
        if recurrent := list_recurrent_mixers(self.cfg):
            raise ConfigError(f"a draft model cannot have model.mixers={recurrent[0]}.")

    def reset(self, rows: int, slots: int, chunk: int):
        """Allocate its state."""
        self.state = init_state(self.cfg, rows, slots, chunk)

    def prefill(self, *args):
        """Read a chunk of a prompt, as `programs.prefill`."""
        self.state = prefill(self.cfg, self.params, self.state, *args)

    def copy_row(self, source: int, row: int):
        """Copy the cache of a row."""
        self.state = copy_row(self.cfg, self.state, source, row)

    def speculate(
        self,
        cfg: ModelConfig,
        params,
        state: DecodeState,
        keep,
        mask,
        ends,
        guesses,
        count: int,
        top: int,
    ) -> tuple[DecodeState, Drawn]:
        """Draw up to count + 1 tokens per row; see `verify`. `guesses`: bool [B], rows to guess."""
        self.state, draft = propose(
            self.cfg, self.params, self.state, state, keep, mask, ends, count
        )
        drafted = np.where(guesses, count + 1, 0).astype(np.int32)
        forced = np.zeros(len(keep), np.int32)
        state, drawn = verify(cfg, params, state, keep, mask, ends, draft, drafted, forced, top=top)
        self.state = self.state.replace(
            cache=self.state.cache.replace(cursor=jnp.copy(state.cache.cursor))
        )
        return state, drawn


@functools.partial(jax.jit, static_argnames=("cfg", "count"), donate_argnames=("draft_state",))
def propose(
    cfg: ModelConfig, params, draft_state: DecodeState, state: DecodeState,
    keep, mask, ends, count: int,
) -> tuple[DecodeState, jax.Array]:  # fmt: skip
    """Draw the next token of every row, and guess `count` more with a draft model.

    Args:
        cfg, params, draft_state: of the draft model.
        state: of the model, whose scores, rules and histories are used.
        keep, mask, ends: as of `decode`.

    Returns:
        (draft state, draft int32 [B count+1]).
    """
    active = state.active & keep

    def step(carry, _):
        cache, scores, history = carry
        token = choose_tokens(scores, history, state.rules, mask, ends)
        hidden, cache = run_tokens(
            cfg, params, token[:, None], active[:, None], cache, state.prefix
        )
        carry = cache, compute_logits(cfg, params, hidden[:, 0]), history.push(token, active)
        return carry, token

    cache = draft_state.cache.replace(cursor=state.cache.cursor)
    carry = cache, state.scores, state.history
    (cache, _, _), tokens = jax.lax.scan(step, carry, length=count + 1)
    return draft_state.replace(cache=cache), tokens.T
