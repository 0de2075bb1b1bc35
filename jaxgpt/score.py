"""Log-probabilities of texts, and their hidden states: the model as a function of given text.

Rows of similar length share a batch of a fixed shape, so that one program is compiled for every
length bucket, however many texts there are.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.backend import get_backend
from jaxgpt.config import Config, ModelConfig, choose
from jaxgpt.engine import check_scores
from jaxgpt.generate import (
    Prompt,
    add_bos_eos,
    encode_text,
    is_cutting,
    name_text,
    read_ids,
    round_up_to_bucket,
)
from jaxgpt.hosts import fetch
from jaxgpt.model import Coords, EncoderInput, build, make_head
from jaxgpt.model.layers import check_token_ids
from jaxgpt.prompts import shorten
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import constrain, use_mesh_of
from jaxgpt.tokenizer import Tokenizer

BATCH_TOKENS = 2048  # of a batch: rows times their padded length


@dataclass(frozen=True)
class Score:
    """The log-probability of every scored token of a text, given the tokens before it."""

    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n], nats
    is_greedy: bool  # every token is the likeliest one: greedy decoding generates this text

    @property
    def total(self) -> float:
        """The log-probability of the text, nats."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def mean(self) -> float:
        """The mean log-probability of a token, nats: minus the training loss."""
        return self.total / len(self.logprobs)


@dataclass(frozen=True)
class Embedding:
    """The hidden states of a text after the last layer, before the output head."""

    tokens: np.ndarray  # int32 [n], with the bos and eos that frame the text
    vectors: np.ndarray  # float32 [n D], or [D] if they are pooled


# --- batches ---------------------------------------------------------------------------------


def make_batches(
    lengths: Sequence[int], context: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Group rows by length.

    Yields:
        (the numbers of at most B rows, (B, T)). T is a bucket that holds them, at most the context;
        B follows from T.
    """
    buckets = defaultdict(list)
    for number, length in enumerate(lengths):
        buckets[min(round_up_to_bucket(length), context)].append(number)
    for T, numbers in sorted(buckets.items()):
        B = max(1, batch_tokens // T)
        for first in range(0, len(numbers), B):
            yield numbers[first : first + B], (B, T)


def pad_right(rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Return rows as int32 [B T], padded on the right and by empty rows, and their lengths [B]."""
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], lengths[number] = row, len(row)
    return tokens, lengths


def make_coords(tokens: jax.Array, lengths: jax.Array) -> Coords:
    """Return the coordinates of right-padded rows [B T] of these lengths [B]."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Coords(position, (position < lengths[:, None]).astype(jnp.int32))


def add_prefix(cfg: ModelConfig, coords: Coords, prefix: jax.Array) -> Coords:
    """Add the length of the prefix of every row, [B], if the model is a prefix language model."""
    if "prefix" not in cfg.pattern:
        return coords
    return coords._replace(prefix=jnp.broadcast_to(prefix[:, None], coords.positions.shape))


def make_whole_coords(cfg: ModelConfig, tokens: jax.Array) -> Coords:
    """Return the coordinates of rows [B T] that are one text each, without padding or a prompt."""
    B, T = tokens.shape
    coords = make_coords(tokens, jnp.full(B, T, jnp.int32))
    return add_prefix(cfg, coords, jnp.zeros(B, jnp.int32))


# --- scores ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a text that fits the context, of which some targets are scored."""

    text: int  # number of the text
    begin: int  # its first input is this token of the text
    inputs: list[int]
    targets: list[int]
    first: int  # targets from here on are scored
    prefix: int  # inputs that belong to the prompt
    source: list[int]  # source tokens of an encoder-decoder


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg",))
def score_batch(cfg: ModelConfig, params, tokens, targets, lengths, prefix, source=None):
    """Return the log-probability of every target, and whether it is the likeliest: [B T] each.

    Args:
        tokens, targets: int32 [B T], right-padded.
        lengths, prefix: int32 [B], tokens of a row and of its prompt.
        source: (tokens int32 [B S], lengths int32 [B]) of an encoder-decoder, or None.
    """
    chex.assert_equal_shape([tokens, targets])
    chex.assert_shape([lengths, prefix], tokens.shape[:1])
    more = {}
    if source is not None:
        more["source"] = EncoderInput(source[0], make_coords(*source))
    coords = add_prefix(cfg, make_coords(tokens, lengths), prefix)
    hidden, _ = build(cfg).apply({"params": params}, tokens, coords, **more)
    head = make_head(cfg, params)

    def score_chunk(chunk):
        hidden, targets = chunk  # [B C D], [B C]
        scores = constrain(head(hidden), "BTV")
        hit = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return hit - jax.nn.logsumexp(scores, axis=-1), hit >= jnp.max(scores, axis=-1)

    B, T = tokens.shape
    limit = get_backend().max_chunk_scores
    counts = (n for n in range(1, T + 1) if T % n == 0 and B * (T // n) * cfg.vocab <= limit)
    count = next(counts, T)  # the logits of all tokens are never in memory at once
    chunks = [
        jnp.moveaxis(x.reshape(B, count, T // count, *x.shape[2:]), 1, 0) for x in (hidden, targets)
    ]
    return [jnp.moveaxis(x, 0, 1).reshape(B, T) for x in jax.lax.map(score_chunk, tuple(chunks))]


def score(
    config: Config,
    params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    eos: bool | None = None,
    stride: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Score]:
    """Score every token of texts, or of the continuations of prompts.

    A text begins as every document does in training, after bos; if the tokenizer adds none, only a
    text without a prompt does, since its first token needs one before it. A prompt and its
    continuation are tokenized separately, as they are when the continuation is generated.

    Args:
        config, params: the model.
        texts: the texts to score; targets, for an encoder-decoder.
        prompts: what comes before each text and is not scored; the sources of an encoder-decoder,
            which needs them.
        eos: also score the end of the text. None: of whole texts and of targets, as in training,
            but not of the continuations of a prompt.
        stride: a text longer than the context is scored in windows, each of which begins this many
            tokens after the one before, and scores what that one did not; 0 rejects it. Windows of
            `stride=model.context` do not overlap, as in training.
        batch_tokens: tokens of a batch.

    Raises:
        ConfigError: a text is longer than the context and `stride` is 0; an argument is invalid.
    """
    is_paired = config.model.family == "encoder_decoder"
    if is_paired and prompts is None:
        raise ConfigError("an encoder_decoder scores a target given its source: give prompts=.")
    if prompts is not None and len(prompts) != len(texts):
        raise ConfigError(f"prompts has {len(prompts)} texts for the {len(texts)} to score.")
    if not 0 <= stride <= config.model.context:
        raise ConfigError(
            f"stride={stride} must be 0 (off) to model.context={config.model.context} tokens."
        )
    has_eos = (prompts is None or is_paired) if eos is None else eos
    pairs = list(zip(texts, prompts if prompts is not None else [""] * len(texts), strict=True))
    encoded: list[tuple[list[int], int, list[int]]] = []
    windows: list[Window] = []
    for number, pair in enumerate(pairs):
        with name_text(texts, number):
            encoded.append(_encode_pair(config, tokenizer, *pair, has_eos))
            windows += _cut_windows(config.model, number, *encoded[-1], stride)
    logprobs = [np.zeros(len(ids), np.float32) for ids, *_ in encoded]
    is_best = [np.ones(len(ids), bool) for ids, *_ in encoded]
    for window, *scored in _score_windows(config.model, params, windows, batch_tokens):
        found = slice(window.first, len(window.inputs))
        target = slice(window.begin + 1 + window.first, window.begin + 1 + len(window.inputs))
        for values, new in zip((logprobs, is_best), scored, strict=True):
            values[window.text][target] = new[found]
    return [
        Score(np.array(ids[given:], np.int32), logprobs[i][given:], bool(is_best[i][given:].all()))
        for i, (ids, given, _) in enumerate(encoded)
    ]


def _encode_pair(config: Config, tokenizer: Tokenizer, text: str, prompt: str, has_eos: bool):
    """Return (tokens from bos on, how many of them are given, tokens of the source)."""
    is_paired = config.model.family == "encoder_decoder"
    place = "inside" if prompt and not is_paired else "start"
    ids = encode_text(config, tokenizer, text, place).tolist() + [tokenizer.eos] * has_eos
    given = encode_text(config, tokenizer, prompt)
    if not ids:
        raise ConfigError(f"the text {shorten(text)} has no token to score.")
    if is_paired:
        source = add_bos_eos(config.model, tokenizer, given, is_cutting(config))
        return [config.model.get_start_token(tokenizer.bos), *ids], 1, source
    before = [*tokenizer.prefix, *given.tolist()] or [tokenizer.bos]
    return [*before, *ids], len(before), []


def _cut_windows(
    cfg: ModelConfig, number: int, ids: list[int], given: int, source: list[int], stride: int
) -> Iterator[Window]:
    """Cut a text into windows that fit the context and score each token after `given` once."""
    size, end = len(ids) - 1, 0  # the last token is no input
    if size > cfg.context and not stride:
        raise ConfigError(
            f"the text has {size} tokens before its last, but model.context={cfg.context} must "
            f"hold them: shorten it, or set stride= (such as {max(1, cfg.context // 2)}) to score "
            "it in windows."
        )
    for begin in range(0, size, stride or size):
        scored = max(end, given - 1)
        end = min(begin + cfg.context, size)
        if end > scored:
            inputs, targets = ids[begin:end], ids[begin + 1 : end + 1]
            prefix = max(0, given - begin)
            yield Window(number, begin, inputs, targets, scored - begin, prefix, source)
        if end == size:
            return


def _score_windows(cfg: ModelConfig, params, windows: Sequence[Window], batch_tokens: int):
    """Yield (window, logprobs, is_best) of every window, with arrays [T]."""
    lengths = [max(len(window.inputs), len(window.source)) for window in windows]
    for numbers, shape in make_batches(lengths, cfg.context, batch_tokens):
        rows = [windows[number] for number in numbers]
        tokens, size = pad_right([row.inputs for row in rows], shape)
        targets, _ = pad_right([row.targets for row in rows], shape)
        source = pad_right([row.source for row in rows], shape) if rows[0].source else None
        prefix = np.zeros(shape[0], np.int32)
        prefix[: len(rows)] = [row.prefix for row in rows]
        with use_mesh_of(params):
            scored = fetch(score_batch(cfg, params, tokens, targets, size, prefix, source))
        for row, logprobs in zip(rows, scored[0], strict=False):
            check_scores(logprobs[: len(row.inputs)])
        yield from zip(rows, *scored, strict=False)  # the batch may end in empty rows


# --- hidden states ---------------------------------------------------------------------------

# How the hidden states [n D] of a text become its vectors.
POOLINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda states: states.mean(axis=0),
    "first": lambda states: states[0],
    "last": lambda states: states[-1],
    "none": lambda states: states,
}


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg",))
def embed_batch(cfg: ModelConfig, params, tokens, lengths) -> jax.Array:
    """Return the hidden states of right-padded rows, float32 [B T D]."""
    coords = add_prefix(cfg, make_coords(tokens, lengths), lengths)
    hidden = build(cfg).apply({"params": params}, tokens, coords, method="encode")
    return hidden.astype(jnp.float32)


def embed(
    config: Config,
    params,
    tokenizer: Tokenizer,
    texts: Sequence[Prompt],
    pool: str = "mean",
    batch_tokens: int = BATCH_TOKENS,
) -> list[Embedding]:
    """Return the hidden states of texts.

    A decoder reads bos and the text; an encoder, also that of an encoder-decoder, bos, the text and
    eos. All of them are pooled.

    Args:
        texts: texts, or token ids, which are read as they are.
        pool: "mean", "first", "last", or "none" for one vector a token.
        batch_tokens: tokens of a batch.

    Raises:
        ConfigError: a text does not fit the context.
    """
    cfg, pool_states = config.model, choose(POOLINGS, pool, "pool")
    is_framed = cfg.family != "decoder"
    rows = []
    for number, text in enumerate(texts):
        with name_text(texts, number):
            if not isinstance(text, str):
                rows.append(read_ids(cfg, text, cfg.context).tolist())
                continue
            ids = encode_text(config, tokenizer, text) if cfg.family == "encoder_decoder" else (
                tokenizer.encode(text))  # fmt: skip
            row = add_bos_eos(cfg, tokenizer, ids)
            rows.append(row if is_framed else row[:-1] or [tokenizer.bos])
    found: dict[int, Embedding] = {}
    for numbers, shape in make_batches([len(row) for row in rows], cfg.context, batch_tokens):
        with use_mesh_of(params):
            tokens, lengths = pad_right([rows[number] for number in numbers], shape)
            hidden = fetch(embed_batch(cfg, params, tokens, lengths))
        for number, states in zip(numbers, hidden, strict=False):  # there may be empty rows
            check_scores(states[: len(rows[number])])
            vectors = pool_states(states[: len(rows[number])])
            found[number] = Embedding(np.array(rows[number], np.int32), vectors)
    return [found[number] for number in range(len(rows))]
