"""The compiled programs of the engine: pure functions from the state of all rows to the next.

    prefill    run the model over a chunk of one row's prompt
    insert     set the rules of a row, which then decodes
    copy_row   copy the cache of a row to another
    decode     draw tokens for all rows
    verify     draw tokens, and take a draft of those after them as far as it agrees

Shapes never change: a row is a number, and joins and leaves as data. Every row has its own cursor,
and token p of a row is in slot p of its cache. So what a row can see follows from how many tokens
it has, and neither a row that left nor a draft that was rejected has to be cleared. The bits of a
row do not depend on the other rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config import ModelConfig
from jaxgpt.engine.processors import (
    MAX_BANNED,
    MAX_BANNED_TOKENS,
    NO_TOKEN,
    History,
    Rules,
    choose_tokens,
)
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
from jaxgpt.model.lowrank import choose_rows
from jaxgpt.quantization import constrain_param
from jaxgpt.sharding import constrain

CHUNK_TOKENS = 16  # tokens decoded per call, at most: the granularity of streaming


class DecodeState(struct.PyTreeNode):
    """The state of all rows between two calls."""

    cache: Cache
    scores: jax.Array  # float32 [B V] for the next token
    history: History
    left: jax.Array  # int32 [B], tokens that may still be drawn
    active: jax.Array  # bool [B], whether the row decodes
    prefix: jax.Array  # int32 [B], length of the prefix, for prefix language models
    adapter: jax.Array  # int32 [B], which of several adapters in the parameters, if there are any
    rules: Rules


class Drawn(NamedTuple):
    """What a call has drawn for every row."""

    tokens: jax.Array  # int32 [B T]
    logprobs: jax.Array  # float32 [B T], in the distribution of the model
    counts: jax.Array  # int32 [B], how many of them are drawn
    top_tokens: jax.Array  # int32 [B T N], the likeliest tokens
    top_logprobs: jax.Array  # float32 [B T N]


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


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots", "chunk", "source", "kind"))
def init_state(
    cfg: ModelConfig, rows: int, slots: int, chunk: int, source: int = 0, kind: str = "model"
) -> DecodeState:
    """Return the state of empty rows.

    Args:
        rows: B.
        slots: tokens that a row may have.
        chunk: tokens of a call, at most.
        source: tokens of an encoder-decoder's source, at most.
        kind: of the cache, a value of `sample.cache`.
    """
    B, V = rows, cfg.vocab
    zeros, floats = jnp.zeros(B, jnp.int32), jnp.zeros(B)
    history = History(
        jnp.zeros((B, V), bool),
        jnp.zeros((B, V), jnp.int32),
        jnp.full((B, MAX_BANNED_TOKENS - 1), NO_TOKEN, jnp.int32),
        zeros,
    )
    rules = Rules(
        **dict.fromkeys(("temperature", "min_p", "presence_penalty", "frequency_penalty"), floats),
        **dict.fromkeys(("top_p", "repetition_penalty"), floats + 1),
        **dict.fromkeys(("top_k", "min_tokens"), zeros),
        bias=jnp.zeros((B, V)),
        banned=jnp.full((B, MAX_BANNED, MAX_BANNED_TOKENS), NO_TOKEN, jnp.int32),
        key_data=jax.random.key_data(jax.random.split(jax.random.key(0), B)),
    )
    cache = init_cache(cfg, B, slots, source, kind, chunk)
    more = (zeros, zeros > 0, zeros, zeros, rules)
    state = DecodeState(cache, jnp.zeros((B, V)), history, *more)
    return _pin(cfg, state)


def _pin(cfg: ModelConfig, state: DecodeState) -> DecodeState:
    """Fix the sharding of a state, the same after every call: keys and values by their heads."""

    def pin(x):
        has_heads = x.ndim == 4 and x.shape[1] == cfg.sizes["G"]
        return constrain(x, ".G.." if has_heads else "." * x.ndim)

    return jax.tree.map(pin, state)


def run_tokens(cfg: ModelConfig, params, tokens, is_token, cache: Cache, prefix, source=None):
    """Run the model on the next tokens [B T] of rows. Return (hidden [B T D], cache)."""
    T = tokens.shape[1]
    positions = cache.cursor[:, None] + jnp.arange(T)
    lengths = jnp.broadcast_to(prefix[:, None], positions.shape)
    prefix = lengths if "prefix" in cfg.pattern else None
    coords = Coords(positions, is_token.astype(jnp.int32), prefix)
    more = {} if source is None else {"source": source}
    return build(cfg).apply({"params": params}, tokens, coords, cache, **more)


def _take_row(cache: Cache, row: jax.Array) -> Cache:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)


def _put_row(cache: Cache, one: Cache, row: jax.Array) -> Cache:
    def put(x, new):
        return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), row, 0)

    return jax.tree.map(put, cache, one)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def prefill(
    cfg: ModelConfig,
    params,
    state: DecodeState,
    row,
    tokens,
    length,
    start,
    prefix,
    source=None,
    adapter=0,
) -> DecodeState:
    """Run the model over a chunk of the prompt of one row, which does not decode meanwhile.

    Args:
        row: int32 [], which.
        tokens: int32 [1 T], with padding at the end.
        length: int32 [], how many of them are tokens.
        start: int32 [], tokens of the row before the chunk: what its cache has beyond is forgotten.
        prefix: int32 [], length of the prefix, for prefix language models.
        source: (tokens int32 [1 S], length int32 []) of an encoder-decoder, with the first chunk.
        adapter: int32 [], the number of the row's adapter.
    """
    params = choose_rows(params, jnp.int32(adapter)[None])
    cache = _take_row(state.cache, row).replace(cursor=start[None])
    if source is not None:
        is_real = jnp.arange(source[0].shape[1])[None] < source[1]
        positions = jnp.broadcast_to(jnp.arange(source[0].shape[1]), is_real.shape)
        source = EncoderInput(source[0], Coords(positions, is_real.astype(jnp.int32)))
    is_token = jnp.arange(tokens.shape[1])[None] < length
    hidden, cache = run_tokens(cfg, params, tokens, is_token, cache, prefix[None], source)
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, 1, keepdims=False)
    state = state.replace(
        cache=_put_row(state.cache, cache, row),
        scores=state.scores.at[row].set(compute_logits(cfg, params, last)[0]),
        active=state.active.at[row].set(False),
        adapter=state.adapter.at[row].set(adapter),
    )
    return _pin(cfg, state)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def insert(
    cfg: ModelConfig, state: DecodeState, row, history: History, left, prefix, rules: Rules
) -> DecodeState:
    """Let a row decode whose prompt is in the cache: its history and rules have no B."""

    def put(x, new):
        return x.at[row].set(new)

    state = state.replace(
        history=jax.tree.map(put, state.history, history),
        left=put(state.left, left),
        active=put(state.active, True),
        prefix=put(state.prefix, prefix),
        rules=jax.tree.map(put, state.rules, rules),
    )
    return _pin(cfg, state)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def copy_row(cfg: ModelConfig, state: DecodeState, source, row) -> DecodeState:
    """Copy the cache and the scores of the row `source` to another."""
    state = state.replace(
        cache=_put_row(state.cache, _take_row(state.cache, source), row),
        scores=state.scores.at[row].set(state.scores[source]),
    )
    return _pin(cfg, state)


def _score_drawn(scores: jax.Array, token: jax.Array, top: int) -> tuple:
    """Return the log-probability of tokens [B], and the likeliest ones [B top] with theirs."""
    total = jax.nn.logsumexp(scores, axis=-1)
    logprob = jnp.take_along_axis(scores, token[:, None], axis=-1)[:, 0] - total
    if not top:
        empty = scores[:, :0]
        return logprob, empty.astype(jnp.int32), empty
    values, tokens = jax.lax.top_k(scores, top)
    return logprob, tokens, values - total[:, None]


def _push(state: DecodeState, token: jax.Array, is_alive: jax.Array, ends) -> DecodeState:
    """Append a token [B] to rows that are alive; it may end them."""
    is_kept = is_alive & ~ends[token]
    left = state.left - is_kept
    return state.replace(
        history=state.history.push(token, is_kept), left=left, active=is_kept & (left > 0)
    )


@functools.partial(jax.jit, static_argnames=("cfg", "top", "limit"), donate_argnames=("state",))
def decode(
    cfg: ModelConfig,
    params,
    state: DecodeState,
    keep,
    mask,
    ends,
    steps,
    top: int = 0,
    limit: int = CHUNK_TOKENS,
) -> tuple[DecodeState, Drawn]:
    """Draw up to `steps` tokens per row, fewer if all rows end before.

    It is fastest with the parameters of `prepare_decode_params`.

    Args:
        keep: bool [B], rows that take part.
        mask: uint32 [B W], the tokens that may be drawn.
        ends: bool [V], the tokens that end a row.
        steps: int32 [], up to `limit`.
        top: how many of the likeliest tokens to return at each place.
    """
    params, B = choose_rows(params, state.adapter), len(state.scores)
    empty = [jnp.zeros((B, limit), jnp.int32), jnp.zeros((B, limit)), jnp.zeros(B, jnp.int32)]
    empty += [jnp.zeros((B, limit, top), jnp.int32), jnp.zeros((B, limit, top))]
    resting = state.active & ~keep
    state = state.replace(active=state.active & keep)

    def is_unfinished(carry):
        i, state, _ = carry
        return (i < steps) & state.active.any()

    def decode_one(carry):
        i, state, out = carry
        token = choose_tokens(state.scores, state.history, state.rules, mask, ends)
        logprob, top_tokens, top_logprobs = _score_drawn(state.scores, token, top)
        out = Drawn(
            out.tokens.at[:, i].set(token),
            out.logprobs.at[:, i].set(logprob),
            out.counts + state.active,
            out.top_tokens.at[:, i].set(top_tokens),
            out.top_logprobs.at[:, i].set(top_logprobs),
        )

        def read(carry):
            _, state = carry
            hidden, cache = run_tokens(
                cfg, params, token[:, None], state.active[:, None], state.cache, state.prefix
            )
            scores = compute_logits(cfg, params, hidden[:, 0])
            scores = jnp.where(state.active[:, None], scores, state.scores)
            return jnp.array(False), _pin(cfg, state.replace(cache=cache, scores=scores))

        state = _push(state, token, state.active, ends)
        # A loop of one turn, or of none if all rows have ended: a condition would copy the cache.
        turn = (state.active.any(), _pin(cfg, state))
        _, state = jax.lax.while_loop(lambda turn: turn[0], read, turn)
        return i + 1, state, out

    first = (jnp.int32(0), _pin(cfg, state), Drawn(*empty))
    _, state, out = jax.lax.while_loop(is_unfinished, decode_one, first)
    return state.replace(active=state.active | resting), out


@functools.partial(jax.jit, static_argnames=("cfg", "top"), donate_argnames=("state",))
def verify(
    cfg: ModelConfig,
    params,
    state: DecodeState,
    keep,
    mask,
    ends,
    draft,
    drafted,
    forced,
    top: int = 0,
) -> tuple[DecodeState, Drawn]:
    """Draw up to T tokens per row in one pass of the model over a draft of them.

    The token at each place is drawn as `decode` draws it, with the same key, and the draft is only
    compared with it: from a difference on, it is dropped. So the tokens are those of `decode`. A
    draft is taken with the probability that rejection sampling has for a deterministic draft.

    Args:
        draft: int32 [B T], the next tokens as they are guessed.
        drafted: int32 [B], how many of them there are.
        forced: int32 [B], how many of them are taken whatever is drawn.
        keep, mask, ends, top: as of `decode`.

    Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, of which this is the coupling for
    deterministic drafts; Daliri et al. 2024, arXiv:2408.07978, for drafts with shared randomness.
    """
    params, (B, T) = choose_rows(params, state.adapter), draft.shape
    resting = state.active & ~keep
    state = state.replace(active=state.active & keep)
    places = jnp.arange(T)

    def draw_next(state: DecodeState, i, is_alive):
        """Draw the token at place i where it is guessed, or the first: (state, what is drawn)."""
        token = choose_tokens(state.scores, state.history, state.rules, mask, ends)
        token = jnp.where(i < forced, draft[:, i], token)
        is_drawn = is_alive & ((token == draft[:, i]) | (i == 0))
        logprob, *tops = _score_drawn(state.scores, token, top)
        return _push(state, token, is_drawn, ends), (token, logprob, is_drawn, *tops)

    state, first = draw_next(state, 0, state.active)
    is_guessed = (first[0] == draft[:, 0]) & (drafted > 0)
    is_token = (places == 0) | (is_guessed[:, None] & (places < drafted[:, None]))
    hidden, cache = run_tokens(
        cfg,
        params,
        draft.at[:, 0].set(first[0]),
        is_token & state.active[:, None],
        state.cache,
        state.prefix,
    )
    logits = compute_logits(cfg, params, hidden)  # [B T V]

    def follow(carry, i):
        """Take the scores after place i - 1, if its token was drawn; draw place i if it agrees.

        A token that does not is not returned: the next call draws it, with the same key.
        """
        state, kept, paused = carry
        scores = jnp.where(state.active[:, None], logits[:, i - 1], state.scores)
        state, kept = state.replace(scores=scores), kept + state.active
        goes_on = state.active & is_guessed & (i < drafted)
        before = state.active
        state, out = draw_next(state, i, goes_on)
        return (state, kept, paused | (before & ~out[2])), out

    none = jnp.zeros(B, jnp.int32)
    (state, kept, paused), rest = jax.lax.scan(follow, (state, none, none > 0), places[1:])
    scores = jnp.where(state.active[:, None], logits[:, T - 1], state.scores)
    cursor = state.cache.cursor + kept + state.active
    state = state.replace(
        scores=scores, cache=cache.replace(cursor=cursor), active=state.active | paused | resting
    )
    tokens, logprobs, is_drawn, *tops = (
        jnp.concatenate([a[:, None], jnp.moveaxis(b, 0, 1)], axis=1)
        for a, b in zip(first, rest, strict=True)
    )
    return _pin(cfg, state), Drawn(tokens, logprobs, is_drawn.sum(axis=1), *tops)
