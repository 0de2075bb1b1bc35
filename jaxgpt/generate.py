"""Text generation: one prefill of the prompts, then cached decoding in chunks of tokens.

A decoder continues a prompt; an encoder-decoder reads it as its source and generates the target.

Prompts of different lengths share one batch by left padding: a padded slot has segment id 0, so it
is masked in attention, and every row writes its next token into the same slot. Lengths are rounded
up to a few sizes, and the sampling parameters (temperature, top-k, ...) are traced, so that nothing
recompiles from one prompt to the next. A row depends on its own prompt, the seed and its index in
the list, never on the other rows.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxgpt.config import Config, ModelConfig, SampleConfig
from jaxgpt.hosts import fetch
from jaxgpt.model import (
    Cache,
    Coords,
    EncoderInput,
    build,
    compute_logits,
    init_cache,
    unstack_layers,
)
from jaxgpt.seeds import make_key
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import StreamDecoder, Tokenizer

CHUNK_TOKENS = 16  # tokens decoded per call: the granularity of streaming
MIN_BUCKET_TOKENS = 32  # prompts and outputs are padded to this times a power of two

# --- samplers: pure functions on scores ------------------------------------------------------
# Each returns a threshold [B 1]: the least score that is kept. `ranked` [B V] is sorted descending.


def top_k(ranked: jax.Array, k: jax.Array) -> jax.Array:
    """Keep the k likeliest tokens (and ties with the last of them); 0 keeps all."""
    last = jnp.where(k > 0, jnp.minimum(k, ranked.shape[-1]), ranked.shape[-1]) - 1
    return jnp.take_along_axis(ranked, jnp.full((ranked.shape[0], 1), last), axis=-1)


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
    """Make tokens that already occur in the row less likely. scores [B V], seen bool [B V].

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


class SamplingParams(struct.PyTreeNode):
    """The sampling parameters as arrays, so that changing them does not recompile."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    allowed: jax.Array  # bool [V], tokens that may be sampled at all

    @classmethod
    def from_config(cls, cfg: SampleConfig, allowed) -> "SamplingParams":
        names = cls.__annotations__.keys() - {"allowed"}
        values = {name: jnp.asarray(getattr(cfg, name)) for name in names}
        return cls(**values, allowed=jnp.asarray(allowed))


def sampleable_tokens(tokenizer: Tokenizer, vocab: int, masks: int = 0) -> np.ndarray:
    """Return which tokens may be sampled, bool [V]: those that represent text, and eos.

    The others are pad, unk and bos, and the rows of an embedding table larger than the tokenizer,
    except for the last `masks` of them: the sentinels that a span-corruption model generates.
    """
    ids = np.arange(vocab)
    is_text = np.isin(ids, np.flatnonzero(tokenizer.lengths))
    return is_text | (ids == tokenizer.eos) | (ids >= vocab - masks)


def warp_scores(scores: jax.Array, seen: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Return the scores [B V] of the distribution to sample from; -inf for excluded tokens."""
    chex.assert_equal_shape([scores, seen])
    scores = jnp.where(sampling.allowed, scores, -jnp.inf)
    scores = penalize_repetition(scores, seen, sampling.repetition_penalty)
    scores = scores / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)

    def truncate(scores):
        ranked = jnp.sort(scores, axis=-1, descending=True)
        for name, sampler in SAMPLERS.items():
            least = sampler(ranked, getattr(sampling, name))
            ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
        least = jnp.min(jnp.where(jnp.isfinite(ranked), ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= least, scores, -jnp.inf)

    is_truncated = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return jax.lax.cond(is_truncated, truncate, lambda scores: scores, scores)  # avoids the sort


def draw(
    scores: jax.Array, seen: jax.Array, sampling: SamplingParams, keys: jax.Array
) -> jax.Array:
    """Sample one token per row, int32 [B], with keys [B]; greedy at temperature 0."""
    chex.assert_shape(keys, scores.shape[:1])
    warped = warp_scores(scores, seen, sampling)

    def sample_categorical():  # random bits for [B V] cost as much as some layers
        return jax.vmap(jax.random.categorical)(keys, warped)

    take_best = functools.partial(jnp.argmax, warped, axis=-1)
    return jax.lax.cond(sampling.temperature > 0, sample_categorical, take_best).astype(jnp.int32)


# --- the two passes --------------------------------------------------------------------------


@struct.dataclass
class DecodeState:
    """The state of a batch between two decoding steps."""

    cache: Cache
    scores: jax.Array  # float32 [B V] for the next token
    seen: jax.Array  # bool [B V], tokens that occur in the row
    position: jax.Array  # int32 [B] of the next token
    drawn: jax.Array  # int32 [B], tokens sampled so far; folded into the random key
    prefix: jax.Array | None = None  # int32 [B], length of the prefix, for prefix language models


def _make_left_padded_coords(T: int, lengths: jax.Array) -> tuple[jax.Array, Coords]:
    """Return which of [B T] are tokens, and their coordinates: texts are aligned to the right."""
    position = jnp.arange(T)[None, :] - (T - lengths)[:, None]
    is_real = position >= 0
    return is_real, Coords(jnp.maximum(position, 0), is_real.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def prefill(
    cfg: ModelConfig, params, tokens, lengths, drawn, slots: int, source=None
) -> DecodeState:
    """Run the model over the prompts in one forward pass and fill the cache.

    Args:
        tokens: int32 [B T], left-padded prompts.
        lengths: int32 [B], tokens of each prompt.
        drawn: int32 [B], how many of them were generated.
        slots: size of the cache; at least T plus the tokens to generate.
        source: (tokens int32 [B S], lengths int32 [B]) of an encoder-decoder, or None.
    """
    B, T = tokens.shape
    chex.assert_shape([lengths, drawn], (B,))
    is_real, coords = _make_left_padded_coords(T, lengths)
    prefix = jnp.maximum(lengths - drawn, 0) if "prefix" in cfg.pattern else None
    if prefix is not None:
        coords = coords._replace(prefix=jnp.broadcast_to(prefix[:, None], (B, T)))
    cache = init_cache(cfg, B, slots, 0 if source is None else source[0].shape[1])
    more = {}
    if source is not None:
        more["source"] = EncoderInput(
            source[0], _make_left_padded_coords(source[0].shape[1], source[1])[1]
        )
    hidden, cache = build(cfg).apply({"params": params}, tokens, coords, cache, **more)
    seen = jnp.zeros((B, cfg.vocab), jnp.int32)
    seen = seen.at[jnp.arange(B)[:, None], tokens].max(is_real.astype(jnp.int32)) > 0
    return DecodeState(
        cache, compute_logits(cfg, params, hidden[:, -1]), seen, lengths, drawn, prefix
    )


@functools.partial(jax.jit, static_argnames=("cfg", "steps"), donate_argnames=("state",))
def decode(
    cfg: ModelConfig, params, sampling: SamplingParams, keys, state: DecodeState, steps: int
):
    """Sample `steps` tokens per row with keys [B]. Return (int32 [B steps], state).

    It is fastest with `unstack_layers(params)`.
    """
    rows = jnp.arange(state.position.shape[0])

    def decode_one(state: DecodeState, _):
        row_keys = jax.vmap(jax.random.fold_in)(keys, state.drawn)
        token = draw(state.scores, state.seen, sampling, row_keys)
        prefix = None if state.prefix is None else state.prefix[:, None]
        coords = Coords(state.position[:, None], jnp.ones_like(token)[:, None], prefix)
        hidden, cache = build(cfg).apply({"params": params}, token[:, None], coords, state.cache)
        seen = state.seen.at[rows, token].set(True)
        scores = compute_logits(cfg, params, hidden[:, 0])
        after = (cache, scores, seen, state.position + 1, state.drawn + 1, state.prefix)
        return DecodeState(*after), token

    state, tokens = jax.lax.scan(decode_one, state, length=steps)
    return tokens.T, state


# --- rows of text ----------------------------------------------------------------------------

MASK = "<mask>"  # how a masked token or span is written in a prompt


def encode_with_masks(tokenizer: Tokenizer, text: str, mask: Callable[[int], int]) -> np.ndarray:
    """Tokenize a text, with the token mask(i) for the i-th `<mask>`."""
    first, *others = (tokenizer.encode(piece) for piece in text.split(MASK))
    return np.concatenate([first, *(x for i, ids in enumerate(others) for x in ([mask(i)], ids))])


@dataclass
class Row:
    """One prompt and its continuation so far."""

    source: list[int]  # source tokens of an encoder-decoder
    ids: list[int]  # the tokens in the context window
    room: int  # tokens that may still be generated
    decoder: StreamDecoder
    stops: tuple[str, ...]
    drawn: list[int] = field(default_factory=list)
    held: str = ""  # text that may be the beginning of a stop string
    ending: str = ""  # why the row ended: "eos", "stop", "tokens" or "context"
    masks: dict[int, str] = field(default_factory=dict)  # sentinel token -> its text

    def push(self, token: int, eos: int) -> str:
        """Append a token and return the text that is now final."""
        if token == eos:
            return self.end("eos")
        self.ids.append(token)
        self.drawn.append(token)
        self.room -= 1
        mask = self.masks.get(token)
        self.held += self.decoder.push([token]) if mask is None else self.decoder.flush() + mask
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.ending = "stop"
            return self.held[: min(found)]
        if not self.room:
            return self.end("tokens")
        n_held = max((_count_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - n_held
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def end(self, reason: str) -> str:
        """End the row and return the rest of its text."""
        self.ending = reason
        return self.held + self.decoder.flush()


def _count_overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def round_up_to_bucket(length: int) -> int:
    """Round up to MIN_BUCKET_TOKENS times a power of two."""
    return MIN_BUCKET_TOKENS * 2 ** max(
        0, int(np.ceil(np.log2(max(1, length) / MIN_BUCKET_TOKENS)))
    )


def generate(
    cfg: ModelConfig,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sample: SampleConfig,
    masks: int = 0,
) -> Iterator[list[str]]:
    """Stream the continuation of each prompt, or its target if the model is an encoder-decoder.

    Args:
        params: of the model `cfg`.
        prompts: texts; an empty one starts a new document.
        sample: the sampling settings; `sample.prompt` is not used.
        masks: how many of the last token ids are sentinels for a `<mask>` of the prompt.

    Yields:
        The new piece of text of each row. Their concatenation is the whole continuation.

    Raises:
        ConfigError: a prompt does not fit the context and `sample.slide` is off.
    """
    for _, pieces in generate_rows(cfg, params, tokenizer, prompts, sample, masks):
        yield pieces


def generate_rows(
    cfg, params, tokenizer, prompts, sample, masks: int = 0
) -> Iterator[tuple[list[Row], list[str]]]:
    """Do as `generate`, and also yield the rows: their tokens, and why they ended."""
    rows = [_make_row(cfg, tokenizer, prompt, sample, masks) for prompt in prompts]
    sampling = SamplingParams.from_config(sample, sampleable_tokens(tokenizer, cfg.vocab, masks))
    root = make_key(sample.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(len(rows)))
    state, decode_params = None, unstack_layers(params)
    while any(not row.ending for row in rows):
        if state is None:
            state, left = _prefill_rows(cfg, params, rows)
        tokens, state = decode(cfg, decode_params, sampling, keys, state, CHUNK_TOKENS)
        left -= CHUNK_TOKENS
        pieces = [_extend_row(row, new, tokenizer.eos, cfg, sample) for row, new in
                  zip(rows, fetch(tokens).tolist(), strict=True)]  # fmt: skip
        yield rows, pieces
        if left < CHUNK_TOKENS or any(
            len(row.ids) >= cfg.context and not row.ending for row in rows
        ):
            state = None  # the window of a row has moved: prefill again


def add_bos_eos(cfg: ModelConfig, tokenizer: Tokenizer, text: np.ndarray) -> list[int]:
    """Return the tokens of a text between bos and eos, as an encoder reads it.

    Raises:
        ConfigError: it does not fit the context.
    """
    ids = [tokenizer.bos, *text.tolist(), tokenizer.eos]
    if len(ids) > cfg.context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it: "
            "shorten it."
        )
    return ids


def encode_prompts(config: Config, tokenizer: Tokenizer, prompts: Sequence[str], masks: int = 0):
    """Make a row of each prompt.

    Raises:
        ConfigError: a prompt is invalid or does not fit the context.
    """
    return [_make_row(config.model, tokenizer, prompt, config.sample, masks) for prompt in prompts]


def _make_row(
    cfg: ModelConfig, tokenizer: Tokenizer, prompt: str, sample: SampleConfig, masks: int
) -> Row:
    text = tokenizer.encode(prompt)
    if masks and prompt.count(MASK) > masks:
        raise ConfigError(f"the prompt has {prompt.count(MASK)} masks; the model has {masks}.")
    if masks:
        text = encode_with_masks(tokenizer, prompt, lambda i: cfg.vocab - 1 - i)
    source, ids = [], [tokenizer.bos, *text.tolist()]
    if cfg.family == "encoder_decoder":
        source, ids = add_bos_eos(cfg, tokenizer, text), ids[:1]
    if len(ids) >= cfg.context and not sample.slide:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it and "
            "at least one more: shorten it, or set slide=true to keep only its end."
        )
    names = {cfg.vocab - 1 - i: f"<{i}>" for i in range(masks)}
    return Row(source, ids, sample.tokens, StreamDecoder(tokenizer), sample.stop, masks=names)


def _prefill_rows(cfg: ModelConfig, params, rows: list[Row]) -> tuple[DecodeState, int]:
    """Prefill the windows of all rows. Return the state and how many tokens its cache can take."""
    for row in rows:
        if len(row.ids) >= cfg.context:
            row.ids = row.ids[-max(1, cfg.context // 2) :]  # a full window drops its first half
    length = round_up_to_bucket(max(len(row.ids) for row in rows))
    room = round_up_to_bucket(max(min(row.room, cfg.context - len(row.ids)) for row in rows))
    drawn = np.array([len(row.drawn) for row in rows], np.int32)
    source = _pad_left([row.source for row in rows]) if rows[0].source else None
    window = _pad_left([row.ids for row in rows])
    return prefill(cfg, params, *window, drawn, length + room, source), room


def _pad_left(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts as left-padded rows, int32 [B T], and their lengths, int32 [B]."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), round_up_to_bucket(lengths.max())), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[len(row) - len(text) :] = text
    return tokens, lengths


def _extend_row(
    row: Row, tokens: list[int], eos: int, cfg: ModelConfig, sample: SampleConfig
) -> str:
    """Append new tokens to a row until it ends. Return the text that is now final."""
    text = ""
    for token in tokens:
        if row.ending or len(row.ids) >= cfg.context:
            break
        text += row.push(token, eos)
    if len(row.ids) >= cfg.context and not sample.slide and not row.ending:
        text += row.end("context")
    return text
