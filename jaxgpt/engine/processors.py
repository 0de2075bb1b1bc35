"""Score processors: pure functions on the scores of the next token, with rules of every row.

They come between the model and the sampler. Log-probabilities are those of the scores before them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxgpt.config import SampleConfig
from jaxgpt.sampling import SamplingParams, draw
from jaxgpt.settings import ConfigError

MAX_BANNED = 64  # sequences of tokens that a row may ban
MAX_BANNED_TOKENS = 8  # tokens of each
NO_TOKEN = -1


class Rules(struct.PyTreeNode):
    """The rules of rows, [B ...] each; those of one row have no B."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    min_tokens: jax.Array
    bias: jax.Array  # float32 [B V], added to the scores
    banned: jax.Array  # int32 [B N L], sequences aligned to the right, NO_TOKEN before them
    key_data: jax.Array  # uint32 [B 2], the random key

    @property
    def keys(self) -> jax.Array:
        """The random keys, [B]."""
        return jax.random.wrap_key_data(self.key_data)

    def make_sampling_params(self, allowed: jax.Array) -> SamplingParams:
        """Return the rules of the sampler, for tokens `allowed`, bool [B V]."""
        names = SamplingParams.__annotations__.keys() - {"allowed"}
        return SamplingParams(**{name: getattr(self, name) for name in names}, allowed=allowed)


class History(struct.PyTreeNode):
    """What the rules need of the tokens of rows so far."""

    seen: jax.Array  # bool [B V], tokens that occur in the row
    counts: jax.Array  # int32 [B V], how often each was generated
    recent: jax.Array  # int32 [B L-1], the last tokens
    drawn: jax.Array  # int32 [B], tokens generated; folded into the random key

    def push(self, token: jax.Array, is_kept: jax.Array) -> "History":
        """Append a token [B] to the rows in which it is kept, bool [B]."""
        rows = jnp.arange(len(token))
        shifted = jnp.concatenate([self.recent[:, 1:], token[:, None]], axis=1)
        return History(
            self.seen.at[rows, token].max(is_kept),
            self.counts.at[rows, token].add(is_kept),
            jnp.where(is_kept[:, None], shifted, self.recent),
            self.drawn + is_kept,
        )


def make_rules(
    sample: SampleConfig,
    vocab: int,
    key: jax.Array,
    bias: Mapping[int, float] | None = None,
    banned: Sequence[Sequence[int]] = (),
) -> Rules:
    """Return the rules of one row.

    Args:
        key: its random key.
        bias: what is added to the scores of tokens.
        banned: sequences of tokens that are never completed.

    Raises:
        ConfigError: there are too many or too long sequences, or a token is not in the vocabulary.
    """
    table = np.full((MAX_BANNED, MAX_BANNED_TOKENS), NO_TOKEN, np.int32)
    if len(banned) > MAX_BANNED:
        raise ConfigError(f"{len(banned)} banned sequences of tokens: at most {MAX_BANNED} fit.")
    for row, tokens in zip(table, banned, strict=False):
        if not 0 < len(tokens) <= MAX_BANNED_TOKENS:
            raise ConfigError(
                f"a banned sequence has 1 to {MAX_BANNED_TOKENS} tokens, not {len(tokens)}."
            )
        row[-len(tokens) :] = tokens
    values = np.zeros(vocab, np.float32)
    for token, value in (bias or {}).items():
        if not 0 <= token < vocab:
            raise ConfigError(f"logit bias of token {token}: the model has 0 to {vocab - 1}.")
        values[token] = value
    given: dict[str, Any] = dict(
        bias=values, banned=table, key_data=np.asarray(jax.random.key_data(key))
    )
    for name in Rules.__annotations__.keys() - given.keys():
        make = np.int32 if name in ("top_k", "min_tokens") else np.float32
        given[name] = make(getattr(sample, name))
    return Rules(**given)


def count_occurrences(ids: Sequence[int], drawn: Sequence[int], vocab: int) -> History:
    """Return the history of one row: its tokens, and which of them were generated."""
    seen: Any = np.zeros(vocab, bool)
    recent: Any = np.full(MAX_BANNED_TOKENS - 1, NO_TOKEN, np.int32)
    seen[np.asarray(ids, int)] = True
    last = list(ids)[-len(recent) :]
    recent[len(recent) - len(last) :] = last
    counts: Any = np.bincount(np.asarray(drawn, int), minlength=vocab).astype(np.int32)
    total: Any = np.int32(len(drawn))
    return History(seen, counts, recent, total)


# --- the processors, in the order in which they are applied ------------------------------------
# (scores [B V], history, rules, ends bool [V]) -> scores


def add_bias(scores, history: History, rules: Rules, ends):
    """Add the bias of each token."""
    return scores + rules.bias


def penalize_generated(scores, history: History, rules: Rules, ends):
    """Subtract a penalty from generated tokens, and another one for every time.

    Source: the API reference of OpenAI, presence and frequency penalties.
    """
    counts = history.counts
    penalty = rules.presence_penalty[:, None] * (counts > 0)
    return scores - penalty - rules.frequency_penalty[:, None] * counts


def keep_min_tokens(scores, history: History, rules: Rules, ends):
    """Exclude the tokens that end a text until it has its minimum length."""
    is_short = history.drawn < rules.min_tokens
    return jnp.where(is_short[:, None] & ends, -jnp.inf, scores)


def exclude_banned(scores, history: History, rules: Rules, ends):
    """Exclude the last token of every banned sequence whose other tokens were the last ones."""
    before, last = rules.banned[..., :-1], rules.banned[..., -1]
    matches = ((before == history.recent[:, None]) | (before == NO_TOKEN)).all(axis=-1)
    token = jnp.where(matches & (last != NO_TOKEN), last, scores.shape[-1])  # [B N]
    return scores.at[jnp.arange(len(scores))[:, None], token].set(-jnp.inf, mode="drop")


PROCESSORS = (add_bias, penalize_generated, keep_min_tokens, exclude_banned)


def unpack_mask(bits: jax.Array, vocab: int) -> jax.Array:
    """Unpack a mask of tokens, uint32 [B W], lowest bit first: bool [B V]."""
    flags = (bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return flags.reshape(len(bits), -1)[:, :vocab] > 0


def pack_mask(allowed: np.ndarray) -> np.ndarray:
    """Pack a mask of tokens, bool [V], into uint32 [W]: the inverse of `unpack_mask`."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def choose_tokens(scores, history: History, rules: Rules, mask: jax.Array, ends) -> jax.Array:
    """Draw the next token of every row, int32 [B].

    Args:
        scores: float32 [B V], of the model.
        mask: uint32 [B W], the tokens that may be drawn.
        ends: bool [V], the tokens that end a text.
    """
    for process in PROCESSORS:
        scores = process(scores, history, rules, ends)
    keys = jax.vmap(jax.random.fold_in)(rules.keys, history.drawn)
    allowed = unpack_mask(mask, scores.shape[-1])
    return draw(scores, history.seen, rules.make_sampling_params(allowed), keys)


def check_scores(values):
    """Raise ConfigError unless what a model has computed is finite, an array of any shape."""
    if not np.isfinite(values).all():
        raise ConfigError(
            "the model computed scores that are not finite (NaN or infinite), and no text has a "
            "meaning then: its parameters are not finite, or a value overflows in model.dtype."
        )
