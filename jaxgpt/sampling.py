"""Sampling rules: pure functions from the scores of the next token to a token of every row.

Every row of a batch has its own rules, seed and random key, so that a row's tokens do not depend on
the rows beside it. Rules are arrays, so that changing them does not recompile.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxgpt.config import SampleConfig
from jaxgpt.seeds import make_key
from jaxgpt.tokenizer import Tokenizer

# --- truncations: pure functions on scores ---------------------------------------------------
# Each returns a threshold [B 1]: the least score that is kept. `ranked` [B V] is sorted descending,
# the setting is [B 1].


def top_k(ranked: jax.Array, k: jax.Array) -> jax.Array:
    """Keep the k likeliest tokens (and ties with the last of them); 0 keeps all."""
    last = jnp.where(k > 0, jnp.minimum(k, ranked.shape[-1]), ranked.shape[-1]) - 1
    return jnp.take_along_axis(ranked, jnp.broadcast_to(last, (ranked.shape[0], 1)), axis=-1)


def top_p(ranked: jax.Array, p: jax.Array) -> jax.Array:
    """Keep the fewest likeliest tokens whose probabilities sum to p (nucleus sampling).

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The sum is rounded: it may reach p = 1 before the last token.
    kept = ((before < p) | (p >= 1)).at[:, 0].set(True)
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)


def min_p(ranked: jax.Array, p: jax.Array) -> jax.Array:
    """Keep the tokens that are at least p times as likely as the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082, equation 1.
    """
    return ranked[:, :1] + jnp.log(p)


SAMPLERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}  # applied in this order


def penalize_repetition(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Make tokens that already occur in the row less likely.

    scores [B V], seen bool [B V], penalty [B 1].

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


class SamplingParams(struct.PyTreeNode):
    """The sampling rules of the rows, [B] each; [1] applies to every row."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    allowed: jax.Array  # bool [V], tokens that may be sampled at all

    @classmethod
    def from_configs(cls, samples: Sequence[SampleConfig], allowed) -> "SamplingParams":
        """Return the rules of as many rows as there are configs."""
        names = cls.__annotations__.keys() - {"allowed"}
        values = {
            name: jnp.asarray(np.array([getattr(cfg, name) for cfg in samples])) for name in names
        }
        return cls(**values, allowed=jnp.asarray(allowed))


def make_row_keys(samples: Sequence[SampleConfig]) -> jax.Array:
    """Return the random key of every row, [B]: its seed, folded with the index of the row."""
    roots = {seed: make_key(seed) for seed in {sample.seed for sample in samples}}
    keys = jnp.stack([roots[sample.seed] for sample in samples])
    return jax.vmap(jax.random.fold_in)(keys, jnp.arange(len(samples)))


def sampleable_tokens(tokenizer: Tokenizer, vocab: int, masks: Sequence[int] = ()) -> np.ndarray:
    """Return which tokens may be sampled, bool [V]: those that represent text or end it.

    The others are pad, unk and bos, and the rows of an embedding table larger than the tokenizer,
    except for the ids `masks`: the sentinels that a span-corruption model generates.
    """
    ids = np.arange(vocab)
    is_text = np.isin(ids, np.flatnonzero(tokenizer.lengths))
    return is_text | np.isin(ids, tokenizer.ends) | np.isin(ids, masks)


def warp_scores(scores: jax.Array, seen: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Return the scores [B V] of the distribution to sample from; -inf for excluded tokens."""
    chex.assert_equal_shape([scores, seen])
    temperature = sampling.temperature[:, None]
    scores = jnp.where(sampling.allowed, scores, -jnp.inf)
    scores = penalize_repetition(scores, seen, sampling.repetition_penalty[:, None])
    scores = scores / jnp.where(temperature > 0, temperature, 1.0)

    def truncate(scores):
        ranked = jnp.sort(scores, axis=-1, descending=True)
        for name, sampler in SAMPLERS.items():
            least = sampler(ranked, getattr(sampling, name)[:, None])
            ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
        least = jnp.min(jnp.where(jnp.isfinite(ranked), ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= least, scores, -jnp.inf)

    is_truncated = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    # Avoids the sort where no row needs it; a row without truncation keeps all its tokens.
    return jax.lax.cond(jnp.any(is_truncated), truncate, lambda scores: scores, scores)


def draw(
    scores: jax.Array, seen: jax.Array, sampling: SamplingParams, keys: jax.Array
) -> jax.Array:
    """Sample one token per row, int32 [B], with keys [B]; greedy at temperature 0."""
    chex.assert_shape(keys, scores.shape[:1])
    warped = warp_scores(scores, seen, sampling)

    def take_best():
        return jnp.argmax(warped, axis=-1)

    def sample_categorical():  # random bits for [B V] cost as much as some layers
        drawn = jax.vmap(jax.random.categorical)(keys, warped)
        return jnp.where(sampling.temperature > 0, drawn, take_best())

    is_random = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(is_random, sample_categorical, take_best).astype(jnp.int32)
