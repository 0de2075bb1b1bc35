"""Log-likelihoods of continuations: the one computation that most benchmarks are made of.

    log p(continuation | context) = sum_i log p(c_i | context, c_1 ... c_(i-1))

Four things make it fast, and none of them changes a number:

- Pairs with the same input share a row: the four letters that may answer a question are four
  columns of one distribution.
- Rows that begin with the same tokens, such as five worked examples, share one prefill: see
  prefixes.py. The cache of the prefix is repeated for every row of a batch.
- Rows of similar length share a batch whose shape is one of few buckets, so that one program is
  compiled for each bucket. A program takes as long to compile as a thousand tokens to compute.
- The logits of the continuation alone are computed, in float32, and never those of the context.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.backend import get_backend
from jaxgpt.config import Config, ModelConfig
from jaxgpt.engine import check_scores
from jaxgpt.evaluate.prefixes import MIN_PREFIX, find_shared_prefixes
from jaxgpt.hosts import fetch
from jaxgpt.model import Cache, Coords, build, init_cache, make_head
from jaxgpt.model.layers import check_token_ids
from jaxgpt.prompts import shorten
from jaxgpt.score import BATCH_TOKENS, add_prefix, make_coords, pad_right, score
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import Tokenizer

MAX_CACHE_TOKENS = 1 << 14  # slots of the caches of a batch: rows times their slots
COMPILE_BATCHES = 8
MIN_ROW_TOKENS = 8  # shorter rows are padded to it


class Pair(NamedTuple):
    """A continuation and what comes before it."""

    context: tuple[int, ...]  # at least one token, such as bos
    continuation: tuple[int, ...]  # the tokens that are scored


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation.

    Attributes:
        logprobs: float32 [n], of each of its tokens, nats.
        is_best: bool [n], the token is the likeliest one; of an encoder-decoder bool [1], all are.
        is_cut: the context was too long, and only its end was read.
    """

    logprobs: np.ndarray
    is_best: np.ndarray
    is_cut: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding generates the continuation."""
        return bool(self.is_best.all())

    @property
    def total(self) -> float:
        """The log-likelihood of the continuation, nats."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        """Tokens of the continuation."""
        return len(self.logprobs)


@dataclass(frozen=True)
class Row:
    """The input of pairs that differ in their last token alone."""

    tokens: tuple[int, ...]  # of the input: context and continuation without its last token
    first: int  # the place in them whose output scores the first token of the continuation
    pairs: list[int] = field(default_factory=list)  # numbers of the pairs, one for each column
    targets: list[tuple[int, ...]] = field(default_factory=list)  # their continuations

    @property
    def count(self) -> int:
        """Tokens of the continuation."""
        return len(self.tokens) - self.first


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Tokenize a continuation in its context, as lm-evaluation-harness does.

    Both are tokenized as one text, which is cut where the tokens of the context end, so that a word
    at the border is spelled as in any text. Spaces at the end of the context belong to the
    continuation. An empty context is the token bos.

    Raises:
        ConfigError: the continuation has no token.
    """
    if not context:
        before, after = [tokenizer.bos], tokenizer.encode(continuation).tolist()
    else:
        border = len(context.rstrip())
        continuation = context[border:] + continuation
        context = context[:border]
        before = [*tokenizer.prefix, *tokenizer.encode(context).tolist()]
        whole = [*tokenizer.prefix, *tokenizer.encode(context + continuation).tolist()]
        after = whole[len(before) :]
        before = before or [tokenizer.bos]  # the context was nothing but spaces
    if not after:
        raise ConfigError(f"the continuation {shorten(continuation)} has no token to score.")
    return Pair(tuple(before), tuple(after))


def compute_likelihoods(
    config: Config,
    params,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[str, str]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    shares_prefixes: bool = True,
) -> list[Likelihood]:
    """Return the log-likelihood of each (context, continuation) of texts.

    Args:
        config, params, tokenizer: the model, a decoder or an encoder-decoder; the source of the
            latter is the context.
        batch_tokens: of a batch, its rows times their padded length.
        shares_prefixes: compute what rows have in common once.

    Raises:
        ConfigError: the model does not score text, or a continuation is longer than its context.
    """
    if config.model.family == "encoder_decoder":
        texts = [continuation for _, continuation in requests]
        sources = [context for context, _ in requests]
        found = score(
            config, params, tokenizer, texts, sources, eos=False, batch_tokens=batch_tokens
        )
        return [Likelihood(x.logprobs, np.array([x.is_greedy])) for x in found]
    if config.model.family != "decoder":
        raise ConfigError(
            f"a model of model.family={config.model.family!r} has no likelihood of a text: "
            "benchmarks are for decoders and encoder-decoders."
        )
    pairs = [encode_pair(tokenizer, *request) for request in requests]
    return score_pairs(config.model, params, pairs, batch_tokens, shares_prefixes)


def score_pairs(
    cfg: ModelConfig,
    params,
    pairs: Sequence[Pair],
    batch_tokens: int = BATCH_TOKENS,
    shares_prefixes: bool = True,
) -> list[Likelihood]:
    """Return the log-likelihood of pairs of tokens, in their order; see `compute_likelihoods`."""
    rows, is_cut = merge_pairs(pairs, cfg.context)
    found: list[Likelihood | None] = [None] * len(pairs)
    for group in share_shapes(list(plan_groups(cfg, rows, batch_tokens, shares_prefixes))):
        cache = None
        for batch in group.batches:
            with use_mesh_of(params):
                if group.prefix and cache is None:
                    cache = _fill_prefix(cfg, params, group)
                logprobs, is_best = fetch(_run_batch(cfg, params, batch, group, cache))
            for row, values, best in zip(batch.rows, logprobs, is_best, strict=False):  # [C M]
                for column, number in enumerate(row.pairs):
                    scored, greedy = values[: row.count, column], best[: row.count, column]
                    check_scores(scored)
                    found[number] = Likelihood(scored, greedy, is_cut[number])
    return [x for x in found if x is not None]


def merge_pairs(pairs: Sequence[Pair], context: int) -> tuple[list[Row], list[bool]]:
    """Return the rows of pairs, and whether the context of each pair is cut.

    A pair that does not fit `context` tokens loses the beginning of its context.

    Raises:
        ConfigError: a continuation alone does not fit.
    """
    rows: dict[tuple[tuple[int, ...], int], Row] = {}
    is_cut = []
    for number, pair in enumerate(pairs):
        if len(pair.continuation) > context:
            raise ConfigError(
                f"a continuation has {len(pair.continuation)} tokens, and model.context={context} "
                "must hold it: this task needs a model with a longer context."
            )
        tokens = (pair.context + pair.continuation)[-context - 1 : -1]
        first = len(tokens) - len(pair.continuation)
        row = rows.setdefault((tokens, first), Row(tokens, first))
        row.pairs.append(number)
        row.targets.append(pair.continuation)
        is_cut.append(len(tokens) < len(pair.context) + len(pair.continuation) - 1)
    return list(rows.values()), is_cut


# --- batches ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows that run together."""

    rows: list[Row]
    shape: tuple[int, int, int, int]  # R, T without the prefix, C, M


class Group(NamedTuple):
    """Batches whose rows share a prefix: its tokens, and the slots of its cache."""

    prefix: tuple[int, ...]
    slots: int
    batches: list[Batch]


def round_up(count: int) -> int:
    """Round up to 1, 2, 3, 4, 6, 8, 12, 16, ...: powers of two, and three quarters of them."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def round_up_coarsely(count: int, base: int) -> int:
    """Round up to a power of the base: what costs little to pad has few shapes to compile."""
    power = 1
    while power < count:
        power *= base
    return power


def can_share_prefixes(cfg: ModelConfig) -> bool:
    """Return whether the cache of a prefix can be continued by several tokens at once."""
    return "prefix" not in cfg.pattern and all(
        layer.mixer == "attention" for layer in cfg.list_layers(cfg.layers)
    )


def plan_groups(
    cfg: ModelConfig, rows: Sequence[Row], batch_tokens: int, shares_prefixes: bool
) -> Iterator[Group]:
    """Yield the groups of all rows, with batches of few shapes; see `score_pairs`."""
    groups = [(0, list(range(len(rows))))]
    if shares_prefixes and can_share_prefixes(cfg):
        limits = [row.first for row in rows]
        cost = 2 * get_backend().batch_cost_tokens  # one more batch, and the prefix
        groups = find_shared_prefixes([row.tokens for row in rows], limits, cost)
    for prefix, numbers in groups:
        buckets = defaultdict(list)
        for number in numbers:
            length = max(len(rows[number].tokens) - prefix, MIN_ROW_TOKENS)
            buckets[min(round_up(length), cfg.context)].append(rows[number])
        slots = round_up_coarsely(round_up_prefix(prefix) + max(buckets), 2) if prefix else 0

        def limit_rows(T: int, slots: int = slots) -> int:
            by_cache = MAX_CACHE_TOKENS // slots if slots else batch_tokens
            return max(1, min(batch_tokens // T, by_cache))

        batches = []
        for T, R, members in merge_buckets(buckets, limit_rows):
            longest = max(row.count for row in members)
            C = min(T, round_up_coarsely(max(longest, 16), 4)) if longest > 1 else 1
            M = round_up_coarsely(max(4, *(len(row.pairs) for row in members)), 4)
            batches += [Batch(members[i : i + R], (R, T, C, M)) for i in range(0, len(members), R)]
        yield Group(rows[numbers[0]].tokens[:prefix], slots, batches)


def merge_buckets(
    buckets: dict[int, list[Row]], limit_rows: Callable[[int], int]
) -> list[tuple[int, int, list[Row]]]:
    """Return (T, R, rows) of all buckets; the rows of few are padded to the next longer ones.

    Args:
        buckets: rows by T.
        limit_rows: T -> the rows of a batch, at most.
    """
    merged: list[tuple[int, int, list[Row]]] = []
    for T, members in sorted(buckets.items()):
        cost, R = choose_batch_rows(len(members), T, limit_rows(T))
        if merged:
            before = merged[-1][2]
            shorter = merged[-1][0]
            separate, _ = choose_batch_rows(len(before), shorter, limit_rows(shorter))
            joint, R_joint = choose_batch_rows(len(before) + len(members), T, limit_rows(T))
            if joint <= separate + cost:
                merged[-1] = (T, R_joint, before + members)
                continue
        merged.append((T, R, members))
    return merged


def share_shapes(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with fewer shapes: a batch takes a larger one rather than one of its own.

    It does where the padding of all such batches costs less than to compile another program, which
    takes about COMPILE_BATCHES times what a batch costs beside its tokens.
    """
    limit = COMPILE_BATCHES * get_backend().batch_cost_tokens
    known: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)  # by slots
    new = {}
    counts = Counter((group.slots, batch.shape) for group in groups for batch in group.batches)
    for slots, shape in sorted(counts, key=lambda x: (-x[1][0] * x[1][1], x)):
        larger = [x for x in known[slots] if all(a >= b for a, b in zip(x, shape, strict=True))]
        best = min(larger, key=lambda x: x[0] * x[1], default=None)
        padding = (best[0] * best[1] - shape[0] * shape[1]) * counts[slots, shape] if best else 0
        if best is None or padding > limit:
            known[slots].append(shape)
            best = shape
        new[slots, shape] = best
    return [
        group._replace(batches=[b._replace(shape=new[group.slots, b.shape]) for b in group.batches])
        for group in groups
    ]


def choose_batch_rows(count: int, T: int, most: int) -> tuple[int, int]:
    """Return (tokens, R), so that batches of R padded rows cost least for `count` rows of T.

    132 rows of 8 tokens are 3 batches of 48 on a CPU, in place of one of 192.
    """
    largest = round_up(math.ceil(count / math.ceil(count / most)))  # batches of equal size
    sizes = [R for R in range(largest, 0, -1) if round_up(R) == R]
    cost = get_backend().batch_cost_tokens
    return min(((math.ceil(count / R) * (R * T + cost), R) for R in sizes), key=lambda x: x[0])


def round_up_prefix(prefix: int) -> int:
    """Return the slots of a prefix in its cache, which it fills from the right."""
    return max(MIN_PREFIX, round_up(prefix)) if prefix else 0


def _run_batch(cfg: ModelConfig, params, batch: Batch, group: Group, cache: Cache | None):
    """Dispatch a batch. Return the logprobs, and whether they are the highest, [R C M] each."""
    (R, T, C, M), prefix = batch.shape, len(group.prefix)
    tokens, lengths = pad_right([row.tokens[prefix:] for row in batch.rows], (R, T))
    first, targets = np.zeros(R, np.int32), np.zeros((R, C, M), np.int32)
    for number, row in enumerate(batch.rows):
        first[number] = row.first - prefix
        targets[number, : row.count, : len(row.pairs)] = np.array(row.targets).T
    return score_rows(cfg, params, tokens, lengths, first, targets, cache, np.int32(prefix))


def _fill_prefix(cfg: ModelConfig, params, group: Group) -> Cache:
    """Return a cache [1 ...] that holds the prefix of a group."""
    P, length = round_up_prefix(len(group.prefix)), len(group.prefix)
    tokens = np.zeros((1, P), np.int32)
    tokens[0, P - length :] = group.prefix
    return fill_cache(cfg, params, tokens, np.int32(length), group.slots)


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg", "slots"))
def fill_cache(cfg: ModelConfig, params, tokens, length, slots: int) -> Cache:
    """Return the cache of one left-padded text.

    Args:
        tokens: int32 [1 P].
        length: int32 [], its tokens without the padding.
        slots: of the cache, at least P.
    """
    position = jnp.arange(tokens.shape[1])[None] - (tokens.shape[1] - length)
    coords = Coords(jnp.maximum(position, 0), (position >= 0).astype(jnp.int32))
    cache = init_cache(cfg, 1, slots)
    return build(cfg).apply({"params": params}, tokens, coords, cache)[1]


@check_token_ids
@functools.partial(jax.jit, static_argnames=("cfg",))
def score_rows(cfg: ModelConfig, params, tokens, lengths, first, targets, cache=None, prefix=0):
    """Return the log-probability of every target, and whether none is likelier, [R C M] each.

    Args:
        tokens: int32 [R T], right-padded, after the prefix.
        lengths: int32 [R], tokens of each row.
        first: int32 [R], the place in a row whose output scores its first target.
        targets: int32 [R C M]: M alternatives for each of C tokens that follow each other.
        cache: of the prefix, [1 ...], or None.
        prefix: int32 [], its tokens.
    """
    R, C, M = targets.shape
    chex.assert_shape([lengths, first], (R,))
    chex.assert_shape(tokens, (R, None))
    coords = add_prefix(cfg, make_coords(tokens, lengths), first + 1)
    if cache is not None:
        positions = jnp.minimum(coords.positions + prefix, cfg.context - 1)  # of padding
        coords = coords._replace(positions=positions)
        cache = jax.tree.map(lambda x: jnp.repeat(x, R, axis=0) if x.ndim else x, cache)
    hidden, _ = build(cfg).apply({"params": params}, tokens, coords, cache)
    places = jnp.minimum(first[:, None] + jnp.arange(C), tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)  # [R C D]
    head = make_head(cfg, params)

    def score_chunk(chunk):
        hidden, targets = chunk  # [1 N D], [1 N M]
        scores = head(hidden)  # float32 [1 N V]
        found = jnp.take_along_axis(scores, targets, axis=-1)
        best = jnp.max(scores, axis=-1, keepdims=True)
        return found - jax.nn.logsumexp(scores, axis=-1, keepdims=True), found >= best

    limit = get_backend().max_chunk_scores  # the logits of all tokens are never in memory at once
    counts = (n for n in range(1, R * C + 1) if not R * C % n and R * C // n * cfg.vocab <= limit)
    n = next(counts, R * C)
    chunks = [x.reshape(n, 1, R * C // n, x.shape[-1]) for x in (hidden, targets)]
    return [x.reshape(R, C, M) for x in jax.lax.map(score_chunk, tuple(chunks))]
