"""Text generation: one prefill of the prompts, then decoding with a KV cache, in chunks of tokens.

A decoder continues a prompt; an encoder-decoder reads it as its source and generates the target.

Prompts of different lengths share one batch by left padding: a padded slot has segment id 0, so it
is masked in attention, and every row writes its next token into the same slot. Lengths are rounded
up to a few sizes, and the sampling rules (temperature, top-k, ...) are traced, so that nothing
recompiles from one prompt to the next. A row depends on its own prompt, its rules and its index in
the list, never on the other rows.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
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
    abstract_params,
    build,
    compute_logits,
    init_cache,
    unstack_layers,
)
from jaxgpt.model.layers import check_token_ids
from jaxgpt.prompts import shorten
from jaxgpt.quantization import constrain_param
from jaxgpt.sampling import SamplingParams, draw, make_row_keys, sampleable_tokens
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import StreamDecoder, Tokenizer

CHUNK_TOKENS = 16  # tokens decoded per call: the granularity of streaming
MIN_BUCKET_TOKENS = 32  # prompts and outputs are padded to this times a power of two


Prompt = str | Sequence[int] | np.ndarray  # a text, or token ids


@dataclass(frozen=True)
class Generation:
    """Generated text, or in a stream the next piece of one."""

    text: str
    tokens: tuple[
        int, ...
    ]  # without the one that ends the text; the text ends before a stop string, the tokens after it
    logprobs: tuple[float, ...]  # of every token in the model's own distribution, in nats
    ending: str  # "eos", "stop", "tokens" (as many as requested) or "context" (full); "" = goes on


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


@functools.partial(jax.jit, static_argnames=("cfg",))
def prepare_decode_params(cfg: ModelConfig, params):
    """Return parameters for `decode`: one tree a layer, each sharded as the stacked layers are.

    They are copies. From stacked layers, every token would copy the parameters of each layer.
    """
    _, letters = abstract_params(cfg)
    params = unstack_layers(params)
    stack = dict(params["stack"])
    for group in {"layers", "tail"} & stack.keys():
        stack[group] = {
            name: _constrain_layer(layer, letters["stack"][group])
            for name, layer in stack[group].items()
        }
    return params | {"stack": stack}


def _constrain_layer(layer, letters):
    """Constrain the arrays of one layer that `letters`, of stacked layers, has; not adapters."""
    if isinstance(letters, str):
        return constrain_param(layer, letters.removeprefix("L"))
    return {
        key: _constrain_layer(value, letters[key]) if key in letters else value
        for key, value in layer.items()
    }


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg", "slots", "kind"))
def prefill(
    cfg: ModelConfig, params, tokens, lengths, drawn, slots: int, source=None, kind: str = "model"
) -> DecodeState:
    """Run the model over the prompts in one forward pass and fill the cache.

    Args:
        tokens: int32 [B T], left-padded prompts.
        lengths: int32 [B], tokens of each prompt.
        drawn: int32 [B], how many of them were generated.
        slots: size of the cache; at least T plus the tokens to generate.
        source: (tokens int32 [B S], lengths int32 [B]) of an encoder-decoder, or None.
        kind: of the cache, a value of `sample.cache`.
    """
    B, T = tokens.shape
    chex.assert_shape([lengths, drawn], (B,))
    is_real, coords = _make_left_padded_coords(T, lengths)
    prefix = jnp.maximum(lengths - drawn, 0) if "prefix" in cfg.pattern else None
    if prefix is not None:
        coords = coords._replace(prefix=jnp.broadcast_to(prefix[:, None], (B, T)))
    cache = init_cache(cfg, B, slots, 0 if source is None else source[0].shape[1], kind)
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
    """Sample `steps` tokens per row with keys [B].

    It is fastest with the parameters of `prepare_decode_params`.

    Returns:
        (tokens int32 [B steps]; their log-probabilities in the distribution of the model, before
        the sampling rules, float32 [B steps]; state).
    """
    rows = jnp.arange(state.position.shape[0])

    def decode_one(state: DecodeState, _):
        row_keys = jax.vmap(jax.random.fold_in)(keys, state.drawn)
        token = draw(state.scores, state.seen, sampling, row_keys)
        prefix = None if state.prefix is None else state.prefix[:, None]
        coords = Coords(state.position[:, None], jnp.ones_like(token)[:, None], prefix)
        hidden, cache = build(cfg).apply({"params": params}, token[:, None], coords, state.cache)
        seen = state.seen.at[rows, token].set(True)
        logprob = state.scores[rows, token] - jax.nn.logsumexp(state.scores, axis=-1)
        scores = compute_logits(cfg, params, hidden[:, 0])
        after = (cache, scores, seen, state.position + 1, state.drawn + 1, state.prefix)
        return DecodeState(*after), (token, logprob)

    state, (tokens, logprobs) = jax.lax.scan(decode_one, state, length=steps)
    return tokens.T, logprobs.T, state


# --- rows of text ----------------------------------------------------------------------------

MASK = "<mask>"  # how a masked token or span is written in a prompt


def encode_with_masks(tokenizer: Tokenizer, text: str, mask: Callable[[int], int]) -> np.ndarray:
    """Tokenize a text, with the token mask(i) for the i-th `<mask>`."""
    start, *rest = text.split(MASK)
    first, others = tokenizer.encode(start), [tokenizer.encode(x, "section") for x in rest]
    return np.concatenate([first, *(x for i, ids in enumerate(others) for x in ([mask(i)], ids))])


@dataclass
class Row:
    """One prompt and its continuation so far."""

    sample: SampleConfig
    source: list[int]  # source tokens of an encoder-decoder
    ids: list[int]  # the tokens in the context window
    decoder: StreamDecoder
    drawn: list[int] = field(default_factory=list)
    held: str = ""  # text that may be the beginning of a stop string
    ending: str = ""  # see `Generation`
    masks: dict[int, str] = field(default_factory=dict)  # sentinel token -> its text

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.sample.tokens - len(self.drawn)

    def push(self, token: int, eos: Collection[int]) -> str:
        """Append a token, of which `eos` end the text, and return the text that is now final."""
        if token in eos:
            return self.end("eos")
        self.ids.append(token)
        self.drawn.append(token)
        mask = self.masks.get(token)
        self.held += self.decoder.push([token]) if mask is None else self.decoder.flush() + mask
        stops = self.sample.stop
        found = [self.held.find(stop) for stop in stops if stop in self.held]
        if found:
            self.ending = "stop"
            return self.held[: min(found)]
        if not self.room:
            return self.end("tokens")
        n_held = max((_count_overlap(self.held, stop) for stop in stops), default=0)
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


def stream(
    config: Config,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: Sequence[SampleConfig],
    decode_params=None,
) -> Iterator[list[Generation]]:
    """Stream the continuation of each prompt, or its target if the model is an encoder-decoder.

    Args:
        config, params: the model.
        prompts: texts, or token ids; an empty text starts a new document.
        samples: the sampling rules of each prompt; their `prompt` is not used.
        decode_params: `prepare_decode_params` of the parameters, if they are at hand.

    Yields:
        The next piece of every prompt; a row that has ended gives empty pieces.

    Raises:
        ConfigError: a prompt does not fit the context and `slide` of its rules is off.
    """
    cfg, rows = config.model, encode_prompts(config, tokenizer, prompts, samples)
    if not rows:
        return
    allowed = sampleable_tokens(tokenizer, cfg.vocab, list_masks(config))
    sampling, keys = SamplingParams.from_configs(samples, allowed), make_row_keys(samples)
    state, left = None, 0
    while any(not row.ending for row in rows):
        with use_mesh_of(params):  # never while the caller has control
            if decode_params is None:
                decode_params = prepare_decode_params(cfg, params)
            if state is None:
                state, left = _prefill_rows(cfg, params, rows)
            *drawn, state = decode(cfg, decode_params, sampling, keys, state, CHUNK_TOKENS)
            tokens, logprobs = (x.tolist() for x in fetch(drawn))
        left -= CHUNK_TOKENS
        yield [
            _extend_row(row, new, values, tokenizer.ends, cfg)
            for row, new, values in zip(rows, tokens, logprobs, strict=True)
        ]
        is_full = any(len(row.ids) >= cfg.context and not row.ending for row in rows)
        if left < CHUNK_TOKENS or is_full:
            state = None  # the window of a row moves: prefill again


def check_scores(values):
    """Raise ConfigError unless what a model has computed is finite, an array of any shape."""
    if not np.isfinite(values).all():
        raise ConfigError(
            "the model computed scores that are not finite (NaN or infinite), and no text has a "
            "meaning then: its parameters are not finite, or a value overflows in model.dtype."
        )


def generate(
    config: Config,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: Sequence[SampleConfig],
    decode_params=None,
) -> list[Generation]:
    """Return the whole continuations, or targets, that `stream` yields in pieces."""
    pieces = stream(config, params, tokenizer, prompts, samples, decode_params)
    return [join_pieces(row) for row in zip(*pieces, strict=True)]


def join_pieces(pieces: Sequence[Generation]) -> Generation:
    """Join the pieces of one row of a stream."""
    return Generation(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
        ending=pieces[-1].ending,
    )


def count_masks(config: Config) -> int:
    """Return how many token ids of a model stand for a `<mask>`."""
    return config.objective.task.count_mask_tokens(config)


def list_masks(config: Config) -> range:
    """Return the token ids that stand for a `<mask>`, in the order of a text's masks."""
    first = config.model.first_mask
    return range(first, first - count_masks(config), -1)


class TextError(ConfigError):
    """A text that a model cannot read, among several.

    Attributes:
        number: of the text, from 0.
        text: the text.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, text: str, reason: str):
        super().__init__(f"text {number + 1} ({shorten(text)}): {reason}")
        self.number, self.text, self.reason = number, text, reason


@contextmanager
def name_text(texts: Sequence[Prompt], number: int) -> Iterator[None]:
    """Make a ConfigError about one of several texts a `TextError`, which says which."""
    try:
        yield
    except ConfigError as error:
        if len(texts) == 1:
            raise
        raise TextError(number, str(texts[number]), str(error)) from error


def is_cutting(config: Config) -> bool:
    """Return whether the task cuts texts that are longer than the context, as in training."""
    return config.objective.task.IS_PAIRED


def find_cut_texts(config: Config, tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Return the numbers of the texts of which an encoder reads the beginning only."""
    if not is_cutting(config):
        return []
    frame = len(tokenizer.prefix) + 1  # bos and eos
    lengths = [len(ids) + frame for ids in tokenizer.encode_batch(texts)]
    return [number for number, n in enumerate(lengths) if n > config.model.context]


def check_vocab(config: Config, tokenizer: Tokenizer):
    """Raise ConfigError if a tokenizer has ids beyond those of the model, or of its masks."""
    vocab, masks = config.model.vocab, config.model.vocab - config.tokenizer_vocab
    if tokenizer.vocab_size > vocab - masks:
        room = f" less {masks} for masks" if masks else ""
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and the model model.vocab={vocab}"
            f"{room}: it is not the tokenizer of this model."
        )


def add_bos_eos(
    cfg: ModelConfig, tokenizer: Tokenizer, text: np.ndarray, is_cut: bool = False
) -> list[int]:
    """Return the tokens of a text between bos and eos, as an encoder reads it.

    There is no bos if the texts of the tokenizer do not begin with it.

    Args:
        is_cut: what does not fit the context is left out, as in training on pairs and classes.

    Raises:
        ConfigError: it does not fit the context.
    """
    ids = [*tokenizer.prefix, *text.tolist(), tokenizer.eos]
    if is_cut:
        return ids[: cfg.context]
    if len(ids) > cfg.context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it: "
            "shorten it."
        )
    return ids


def encode_prompts(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt], samples: Sequence[SampleConfig]
) -> list[Row]:
    """Make a row of each prompt.

    Raises:
        ConfigError: a prompt is invalid or does not fit the context.
    """
    rows = []
    for number, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        with name_text(prompts, number):
            rows.append(_make_row(config, tokenizer, prompt, sample))
    return rows


def encode_text(
    config: Config, tokenizer: Tokenizer, text: str, place: str = "start"
) -> np.ndarray:
    """Tokenize a text for an objective whose model generates: each `<mask>` is its own sentinel.

    Args:
        place: where the text stands; see `Tokenizer.encode`.

    Raises:
        ConfigError: it has more masks than the model.
    """
    masks = list_masks(config)
    if not masks:
        return tokenizer.encode(text, place)
    if text.count(MASK) > len(masks):
        raise ConfigError(f"the prompt has {text.count(MASK)} masks; the model has {len(masks)}.")
    return encode_with_masks(tokenizer, text, lambda i: masks[i])


def _make_row(config: Config, tokenizer: Tokenizer, prompt: Prompt, sample: SampleConfig) -> Row:
    cfg = config.model
    if isinstance(prompt, str):
        text, prefix = encode_text(config, tokenizer, prompt), tokenizer.prefix
    else:  # the whole prompt: a chat template writes its own bos
        text, prefix = _read_ids(cfg, prompt), []
    source, ids = [], [*prefix, *text.tolist()] or [tokenizer.bos]
    is_start = not len(prompt)  # of the text that is generated
    if cfg.family == "encoder_decoder":
        source = add_bos_eos(cfg, tokenizer, text, is_cutting(config))
        ids = [cfg.get_start_token(tokenizer.bos)]
        is_start = True
    if len(ids) >= cfg.context and not sample.slide:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it and "
            "at least one more: shorten it, or set slide=true to keep only its end."
        )
    names = {token: f"<{i}>" for i, token in enumerate(list_masks(config))}
    return Row(sample, source, ids, StreamDecoder(tokenizer, is_start), masks=names)


def _read_ids(cfg: ModelConfig, prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the ids of a prompt, int32 [T].

    Raises:
        ConfigError: they are no integers of the vocabulary.
    """
    ids = np.asarray(prompt)
    is_valid = ids.ndim == 1 and (not ids.size or ids.dtype.kind in "iu")
    if not is_valid or ((ids < 0) | (ids >= cfg.vocab)).any():
        raise ConfigError(
            f"a prompt is a text or a list of token ids from 0 to {cfg.vocab - 1}, not "
            f"{prompt!r:.60}."
        )
    return ids.astype(np.int32)


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
    kind = choose_cache([row.sample for row in rows])
    return prefill(cfg, params, *window, drawn, length + room, source, kind), room


def choose_cache(samples: Sequence[SampleConfig]) -> str:
    """Return the `sample.cache` of rows that are decoded together.

    Raises:
        ConfigError: they have several.
    """
    kinds = {sample.cache for sample in samples}
    if len(kinds) > 1:
        raise ConfigError(f"rows of one batch share a cache: sample.cache is {sorted(kinds)}.")
    return kinds.pop()


def _pad_left(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts as left-padded rows, int32 [B T], and their lengths, int32 [B]."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), round_up_to_bucket(lengths.max())), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[len(row) - len(text) :] = text
    return tokens, lengths


def _extend_row(
    row: Row,
    tokens: list[int],
    logprobs: list[float],
    eos: Collection[int],
    cfg: ModelConfig,
) -> Generation:
    """Append new tokens to a row until it ends. Return what is now final."""
    text, before = "", len(row.drawn)
    for token, logprob in zip(tokens, logprobs, strict=True):
        if row.ending or len(row.ids) >= cfg.context:
            break
        check_scores(logprob)
        text += row.push(token, eos)
    if len(row.ids) >= cfg.context and not row.sample.slide and not row.ending:
        text += row.end("context")
    new = tuple(row.drawn[before:])
    return Generation(text, new, tuple(logprobs[: len(new)]), row.ending)
