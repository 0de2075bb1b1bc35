"""Text out of a model: a prefill of the prompts, then decoding with the cache, a chunk at a time.

A decoder goes on with a prompt; an encoder-decoder reads it as its source and writes the answer.

Prompts of different length share one batch by padding on the left: a padded slot belongs to no
document, so nobody looks at it, and every row writes its next token into the same slot. Lengths
are rounded up to a few sizes, and all that a user may turn (temperature, top-k, ...) is traced, so
that nothing recompiles from one prompt to the next. A row depends on its own prompt, the seed and
its place in the list, never on the rows beside it.
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
from jaxgpt.model import Cache, Coords, Source, build, init_cache, layer_by_layer, logits
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import StreamDecoder, Tokenizer

CHUNK = 16  # tokens decoded per call: the grain of streaming
SMALLEST = 32  # prompts and answers are padded to this times a power of two

# --- samplers: pure functions on scores ------------------------------------------------------
# Each gives a floor, [B 1]: the least score that stays. `ranked` [B V] is sorted, best first.


def top_k(ranked: jax.Array, k: jax.Array) -> jax.Array:
    """The k likeliest tokens stay (and ties with the last of them); 0 keeps all."""
    last = jnp.where(k > 0, jnp.minimum(k, ranked.shape[-1]), ranked.shape[-1]) - 1
    return jnp.take_along_axis(ranked, jnp.full((ranked.shape[0], 1), last), axis=-1)


def top_p(ranked: jax.Array, p: jax.Array) -> jax.Array:
    """The likeliest tokens stay until they hold probability p together.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The sum is rounded: of p = 1 it may reach all before it has passed all.
    kept = ((before < p) | (p >= 1)).at[:, 0].set(True)
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)


def min_p(ranked: jax.Array, p: jax.Array) -> jax.Array:
    """Tokens at least p times as likely as the likeliest stay.

    Source: Nguyen et al. 2024, arXiv:2407.01082, equation 1.
    """
    return ranked[:, :1] + jnp.log(p)


SAMPLERS = {"top_k": top_k, "top_p": top_p, "min_p": min_p}  # applied in this order


def penalise(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes tokens that were seen less likely. scores [B V], seen bool [B V].

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


class Rules(struct.PyTreeNode):
    """What the user may turn, as arrays, so that turning it does not recompile."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    allowed: jax.Array  # bool [V], tokens that may be drawn at all

    @classmethod
    def of(cls, cfg: SampleConfig, allowed) -> "Rules":
        knobs = cls.__annotations__.keys() - {"allowed"}
        values = {name: jnp.asarray(getattr(cfg, name)) for name in knobs}
        return cls(**values, allowed=jnp.asarray(allowed))


def drawable(tokenizer: Tokenizer, vocab: int, masks: int = 0) -> np.ndarray:
    """Which tokens may be drawn, bool [V]: those that stand for text, and the one that ends it.

    The others are pad, unk and bos, and rows of a table that is larger than the tokenizer; but for
    the last `masks` of them, where a model writes what was behind masks.
    """
    ids = np.arange(vocab)
    is_text = np.isin(ids, np.flatnonzero(tokenizer.lengths))
    return is_text | (ids == tokenizer.eos) | (ids >= vocab - masks)


def warp(scores: jax.Array, seen: jax.Array, rules: Rules) -> jax.Array:
    """The scores [B V] of the distribution that is drawn from; -inf where nothing may be drawn."""
    chex.assert_equal_shape([scores, seen])
    scores = jnp.where(rules.allowed, scores, -jnp.inf)
    scores = penalise(scores, seen, rules.repetition_penalty)
    scores = scores / jnp.where(rules.temperature > 0, rules.temperature, 1.0)

    def cut(scores):
        ranked = jnp.sort(scores, axis=-1, descending=True)
        for name, sampler in SAMPLERS.items():
            least = sampler(ranked, getattr(rules, name))
            ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
        least = jnp.min(jnp.where(jnp.isfinite(ranked), ranked, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= least, scores, -jnp.inf)

    is_cut = (rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)
    return jax.lax.cond(is_cut, cut, lambda scores: scores, scores)  # spares the sort


def draw(scores: jax.Array, seen: jax.Array, rules: Rules, keys: jax.Array) -> jax.Array:
    """One token per row, int32 [B]: keys [B]; greedy at temperature 0."""
    chex.assert_shape(keys, scores.shape[:1])
    warped = warp(scores, seen, rules)

    def chosen():  # randomness for [B V] takes as long as some layers
        return jax.vmap(jax.random.categorical)(keys, warped)

    best = functools.partial(jnp.argmax, warped, axis=-1)
    return jax.lax.cond(rules.temperature > 0, chosen, best).astype(jnp.int32)


# --- the two passes --------------------------------------------------------------------------


@struct.dataclass
class Decoding:
    """Where a batch stands between two tokens."""

    cache: Cache
    scores: jax.Array  # float32 [B V] for the next token
    seen: jax.Array  # bool [B V], tokens that stand in the row
    position: jax.Array  # int32 [B] of the next token
    drawn: jax.Array  # int32 [B], tokens drawn so far: what the randomness is folded with
    prefix: jax.Array | None = None  # int32 [B], tokens that all may see, if the model cares


def _left_padded(T: int, lengths: jax.Array) -> tuple[jax.Array, Coords]:
    """Which of [B T] are tokens, and where: each text stands at the right end of its row."""
    position = jnp.arange(T)[None, :] - (T - lengths)[:, None]
    is_real = position >= 0
    return is_real, Coords(jnp.maximum(position, 0), is_real.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def prefill(cfg: ModelConfig, params, tokens, lengths, drawn, slots: int, source=None) -> Decoding:
    """Reads the prompts in one pass.

    Args:
        tokens: int32 [B T], each prompt at the right end of its row.
        lengths: int32 [B], tokens of each prompt.
        drawn: int32 [B], how many of them were drawn by us.
        slots: size of the cache; at least T plus the tokens to come.
        source: (tokens int32 [B S], lengths int32 [B]) for an encoder-decoder to read, or None.
    """
    B, T = tokens.shape
    chex.assert_shape([lengths, drawn], (B,))
    is_real, at = _left_padded(T, lengths)
    prefix = jnp.maximum(lengths - drawn, 0) if "prefix" in cfg.pattern else None
    if prefix is not None:
        at = at._replace(prefix=jnp.broadcast_to(prefix[:, None], (B, T)))
    cache = init_cache(cfg, B, slots, 0 if source is None else source[0].shape[1])
    more = {}
    if source is not None:
        more["source"] = Source(source[0], _left_padded(source[0].shape[1], source[1])[1])
    hidden, cache = build(cfg).apply({"params": params}, tokens, at, cache, **more)
    seen = jnp.zeros((B, cfg.vocab), jnp.int32)
    seen = seen.at[jnp.arange(B)[:, None], tokens].max(is_real.astype(jnp.int32)) > 0
    return Decoding(cache, logits(cfg, params, hidden[:, -1]), seen, lengths, drawn, prefix)


@functools.partial(jax.jit, static_argnames=("cfg", "steps"), donate_argnames=("state",))
def decode(cfg: ModelConfig, params, rules: Rules, keys, state: Decoding, steps: int):
    """Draws `steps` tokens per row. keys [B]. Returns (int32 [B steps], state).

    It is fastest with `layer_by_layer(params)`.
    """
    rows = jnp.arange(state.position.shape[0])

    def one(state: Decoding, _):
        fold = jax.vmap(jax.random.fold_in)(keys, state.drawn)
        token = draw(state.scores, state.seen, rules, fold)
        prefix = None if state.prefix is None else state.prefix[:, None]
        at = Coords(state.position[:, None], jnp.ones_like(token)[:, None], prefix)
        hidden, cache = build(cfg).apply({"params": params}, token[:, None], at, state.cache)
        seen = state.seen.at[rows, token].set(True)
        scores = logits(cfg, params, hidden[:, 0])
        after = (cache, scores, seen, state.position + 1, state.drawn + 1, state.prefix)
        return Decoding(*after), token

    state, tokens = jax.lax.scan(one, state, length=steps)
    return tokens.T, state


# --- rows of text ----------------------------------------------------------------------------

MASK = "<mask>"  # how a hidden place is written in a prompt


def with_masks(tokenizer: Tokenizer, text: str, mask: Callable[[int], int]) -> np.ndarray:
    """The tokens of a text in which the i-th `<mask>` is the token mask(i)."""
    first, *others = (tokenizer.encode(piece) for piece in text.split(MASK))
    return np.concatenate([first, *(x for i, ids in enumerate(others) for x in ([mask(i)], ids))])


@dataclass
class Row:
    """One prompt and what has been drawn after it."""

    source: list[int]  # what an encoder-decoder reads
    ids: list[int]  # the window that the model sees
    room: int  # tokens that may still be drawn
    decoder: StreamDecoder
    stops: tuple[str, ...]
    drawn: list[int] = field(default_factory=list)
    held: str = ""  # text that may yet turn out to begin a stop string
    ending: str = ""  # why the row ended: "eos", "stop", "tokens" or "context"
    masks: dict[int, str] = field(default_factory=dict)  # tokens that say a mask, and how

    def push(self, token: int, eos: int) -> str:
        """Takes a token and returns the text that is now certain."""
        if token == eos:
            return self.end("eos")
        self.ids.append(token)
        self.drawn.append(token)
        self.room -= 1
        said = self.masks.get(token)
        self.held += self.decoder.push([token]) if said is None else self.decoder.flush() + said
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.ending = "stop"
            return self.held[: min(found)]
        if not self.room:
            return self.end("tokens")
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def end(self, why: str) -> str:
        self.ending = why
        return self.held + self.decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def bucket(length: int) -> int:
    """The next size of SMALLEST times a power of two."""
    return SMALLEST * 2 ** max(0, int(np.ceil(np.log2(max(1, length) / SMALLEST))))


def generate(
    cfg: ModelConfig,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sample: SampleConfig,
    masks: int = 0,
) -> Iterator[list[str]]:
    """Continues each prompt, or answers it if the model is an encoder-decoder; streaming.

    Args:
        params: of the model `cfg`.
        prompts: texts; an empty one starts a new document.
        sample: how to draw. `sample.prompt` is not read here.
        masks: how many of the last tokens stand for what is behind a `<mask>` of the prompt.

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
    """As `generate`, and tells the rows as well: their tokens, and why they ended."""
    rows = [_row(cfg, tokenizer, prompt, sample, masks) for prompt in prompts]
    rules = Rules.of(sample, drawable(tokenizer, cfg.vocab, masks))
    root = jax.random.key(sample.seed)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(len(rows)))
    state, apart = None, layer_by_layer(params)
    while any(not row.ending for row in rows):
        if state is None:
            state, left = _prefill_rows(cfg, params, rows)
        tokens, state = decode(cfg, apart, rules, keys, state, CHUNK)
        left -= CHUNK
        pieces = [_take(row, new, tokenizer.eos, cfg, sample) for row, new in
                  zip(rows, fetch(tokens).tolist(), strict=True)]  # fmt: skip
        yield rows, pieces
        if left < CHUNK or any(len(row.ids) >= cfg.context and not row.ending for row in rows):
            state = None  # a row has slid: read the windows anew


def framed(cfg: ModelConfig, tokenizer: Tokenizer, text: np.ndarray) -> list[int]:
    """The tokens of a text as an encoder reads it: from bos to eos.

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


def questions(config: Config, tokenizer: Tokenizer, prompts: Sequence[str], masks: int = 0):
    """The rows that prompts make. Raises ConfigError if they can not."""
    return [_row(config.model, tokenizer, prompt, config.sample, masks) for prompt in prompts]


def _row(
    cfg: ModelConfig, tokenizer: Tokenizer, prompt: str, sample: SampleConfig, masks: int
) -> Row:
    text = tokenizer.encode(prompt)
    if masks and prompt.count(MASK) > masks:
        raise ConfigError(f"the prompt has {prompt.count(MASK)} masks; the model knows {masks}.")
    if masks:
        text = with_masks(tokenizer, prompt, lambda i: cfg.vocab - 1 - i)
    source, ids = [], [tokenizer.bos, *text.tolist()]
    if cfg.family == "encoder_decoder":
        source, ids = framed(cfg, tokenizer, text), ids[:1]
    if len(ids) >= cfg.context and not sample.slide:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, but model.context={cfg.context} must hold it and "
            "at least one more: shorten it, or pass slide=true to keep only its end."
        )
    names = {cfg.vocab - 1 - i: f"<{i}>" for i in range(masks)}
    return Row(source, ids, sample.tokens, StreamDecoder(tokenizer), sample.stop, masks=names)


def _prefill_rows(cfg: ModelConfig, params, rows: list[Row]) -> tuple[Decoding, int]:
    """Reads the windows of all rows. Returns the state and how many tokens its cache can take."""
    for row in rows:
        if len(row.ids) >= cfg.context:
            row.ids = row.ids[-max(1, cfg.context // 2) :]  # a full window drops its older half
    length = bucket(max(len(row.ids) for row in rows))
    room = bucket(max(min(row.room, cfg.context - len(row.ids)) for row in rows))
    drawn = np.array([len(row.drawn) for row in rows], np.int32)
    source = _padded([row.source for row in rows]) if rows[0].source else None
    window = _padded([row.ids for row in rows])
    return prefill(cfg, params, *window, drawn, length + room, source), room


def _padded(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Texts at the right ends of rows, int32 [B T], and their lengths, int32 [B]."""
    lengths = np.array([len(text) for text in texts], np.int32)
    tokens = np.zeros((len(texts), bucket(lengths.max())), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[len(row) - len(text) :] = text
    return tokens, lengths


def _take(row: Row, tokens: list[int], eos: int, cfg: ModelConfig, sample: SampleConfig) -> str:
    """Gives a row its new tokens, as far as it may go. Returns the text that is now certain."""
    text = ""
    for token in tokens:
        if row.ending or len(row.ids) >= cfg.context:
            break
        text += row.push(token, eos)
    if len(row.ids) >= cfg.context and not sample.slide and not row.ending:
        text += row.end("context")
    return text
