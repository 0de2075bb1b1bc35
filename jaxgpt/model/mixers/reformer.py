"""Reformer: attention to similar tokens, found by locality-sensitive hashing (LSH).

Queries and keys are shared, k = q / |q|. Each of R rounds of random rotations assigns a token to a
bucket, h(x) = argmax([x·A; -x·A]). A query attends to up to W tokens of its own bucket; over all
rounds it attends to their union, P:

    y_t = Σ_{s in P_t} softmax_s(q_t·k_s / √K) v_s,    t in P_t only where there is no other token.

Sorted by bucket, the keys of a query are next to it: chunks of W tokens attend to themselves and to
their neighbors. The paper's chunks depend on how many tokens come later, so that future tokens
determine which past tokens are attended to. Here a query attends to the W tokens of its bucket
nearest to it on either side: in a causal stack the latest W before it, whatever comes after.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import MASKED_LOGIT
from jaxgpt.model.layers import DTYPES, Linear, make_residual_init
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers.chunks import gather_neighbors, join_chunks, split_chunks
from jaxgpt.model.mixers.mixer import KV, LayerContext, Mixer, locate_slots, update_slots
from jaxgpt.model.taps import tap

SELF_LOGIT = (
    -1e5
)  # the logit of a token for itself: far below all others, and far above MASKED_LOGIT


@functools.cache
def draw_rotations(size: int, rounds: int, buckets: int) -> np.ndarray:
    """Draw A, float32 [K R buckets/2], with a fixed seed."""
    return np.random.default_rng(0).normal(size=(size, rounds, buckets // 2)).astype(np.float32)


class BucketRanks(NamedTuple):
    """The buckets and ranks of tokens in each of the R rounds."""

    bucket_id: jax.Array  # int32 [... T R], document and bucket in one number
    rank: jax.Array  # int32 [... T R], in a stable sort of the tokens by bucket_id


class Reformer(Mixer):
    """LSH attention with shared queries and keys. Heads may share values, as in GQA.

    Source: Kitaev et al. 2020, arXiv:2001.04451, section 2 (equations 2 to 6, and the paragraph
    on causal masking); appendix A for keys found in several rounds.
    """

    HAS_TOKEN_STATE = True
    USES = ("rotation",)

    @staticmethod
    def init_state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        H, G, K = (cfg.sizes[letter] for letter in "HGK")
        empty = functools.partial(jnp.zeros, dtype=DTYPES[cfg.dtype])
        return KV(empty((batch, slots, H, K)), empty((batch, slots, G, K)))

    @nn.compact
    def __call__(self, x: jax.Array, layer_context: LayerContext, state: KV | None):
        c, T = self.cfg, x.shape[1]
        q = Linear(c, "D>HK", name="q")(x)
        v = Linear(c, "D>GK", name="v")(x)
        q, v = tap(self, "q", layer_context.apply_rotation(q)), tap(self, "v", v)
        qv = KV(q, v) if state is None else update_slots(state, KV(q, v), layer_context.cursor)
        k, v = (y.swapaxes(1, 2) for y in qv)  # [B H S K], [B G S K]
        v = jnp.repeat(v, c.heads // v.shape[1], axis=1)
        ranks = self._rank_buckets(k, layer_context.k_coords)
        if state is None:
            y = self._attend_sorted(k, v, ranks)
        else:
            cursor = jnp.broadcast_to(layer_context.cursor, len(x))
            slots = locate_slots(cursor, T)[:, None, :, None]
            q_ranks = jax.tree.map(
                lambda m: jnp.take_along_axis(m, slots, axis=2, mode="clip"), ranks
            )
            counts, is_self = self._count_rounds(q_ranks, ranks)
            y, _ = self._attend(q.swapaxes(1, 2), k, v, counts > 0, is_self)
        y = tap(self, "z", y.swapaxes(1, 2))
        y = Linear(c, "HK>D", make_residual_init(c), name="o")(y)
        return y, None if state is None else qv

    def _rank_buckets(self, x: jax.Array, coords: Coords) -> BucketRanks:
        """Hash and rank the tokens x [B H S K], coords [B S]: [B H S R]."""
        m = self.cfg.mixer
        a = draw_rotations(x.shape[-1], m.hashes, m.buckets)
        rotated = jnp.einsum("bhsk,krc->bhsrc", x.astype(jnp.float32), a)
        bucket = jnp.argmax(jnp.concatenate([rotated, -rotated], axis=-1), axis=-1)
        bucket = tap(self, "buckets", bucket)
        bucket_id = coords.segment_ids[:, None, :, None] * m.buckets + bucket
        order = jnp.argsort(bucket_id, axis=2, stable=True)
        return BucketRanks(bucket_id, jnp.argsort(order, axis=2))  # the inverse permutation

    def _mask_window(self, q: BucketRanks, k: BucketRanks) -> jax.Array:
        """Compute the mask of one round, with the query itself: [... T], [... S] -> [... T S]."""
        m = self.cfg.mixer
        distance = q.rank[..., :, None] - k.rank[..., None, :]
        bucket_id = k.bucket_id[..., None, :]
        near = (distance if self.direction == "causal" else jnp.abs(distance)) <= m.bucket_window
        near &= (distance >= 0) | (self.direction == "both")
        is_token = bucket_id >= m.buckets  # segment 0 (no token) has the smaller ids
        return near & (q.bucket_id[..., :, None] == bucket_id) & is_token

    def _count_rounds(self, q: BucketRanks, k: BucketRanks) -> tuple[jax.Array, jax.Array]:
        """Count the rounds that find each key, and flag the query itself: [... T S] each."""
        counts = jnp.int32(0)
        for i in range(self.cfg.mixer.hashes):
            q_round, k_round = (jax.tree.map(lambda x, i=i: x[..., i], m) for m in (q, k))
            counts += self._mask_window(q_round, k_round)
        is_self = q_round.rank[..., :, None] == k_round.rank[..., None, :]
        return counts, is_self & (counts > 0)

    def _attend(self, q, k, v, mask, is_self, counts=1):
        """Attend: q [... T K], k, v [... S K] -> (y [... T K], log of its denominator [... T])."""
        k32 = k.astype(jnp.float32)
        k = (k32 * jax.lax.rsqrt(jnp.sum(k32 * k32, -1, keepdims=True) + 1e-12)).astype(k.dtype)
        logits = jnp.einsum(
            "...tk,...sk->...ts",
            q * self.cfg.attention_scale,
            k,
            preferred_element_type=jnp.float32,
        )
        # A key found in n rounds would count n times in the sum over rounds: subtract log n.
        logits = jnp.where(is_self, SELF_LOGIT, logits) - jnp.log(jnp.maximum(counts, 1))
        logits = jnp.where(mask, logits, MASKED_LOGIT)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("...ts,...sk->...tk", weights, v), jax.nn.logsumexp(logits, axis=-1)

    def _attend_sorted(self, q, v, ranks: BucketRanks) -> jax.Array:
        """Attend in chunks of sorted tokens per round: q, v [B H T K], ranks [B H T R] -> as q."""
        T = q.shape[2]
        rank = jnp.moveaxis(ranks.rank, -1, 2)  # [B H R T]
        order = jnp.argsort(rank, axis=-1)

        def sort_by_bucket(x):  # [B H T ...] -> [B·H·R T ...]
            x = jnp.take_along_axis(x[:, :, None], order[..., None], axis=3)
            return x.reshape(-1, *x.shape[3:])

        bucket_id = jnp.take_along_axis(jnp.moveaxis(ranks.bucket_id, -1, 2), order, axis=-1)
        sorted_ranks = BucketRanks(
            bucket_id.reshape(-1, T),
            jnp.broadcast_to(jnp.arange(T), bucket_id.shape).reshape(-1, T),
        )
        q, v, ranks = (jax.tree.map(sort_by_bucket, x) for x in (q, v, ranks))
        queries = split_chunks((q, sorted_ranks, ranks), min(self.cfg.mixer.bucket_window, T))
        values = split_chunks(v, min(self.cfg.mixer.bucket_window, T))
        (k, neighbors, neighbor_ranks), values = gather_neighbors(
            (queries, values), before=1, after=int(self.direction == "both")
        )
        q, sorted_ranks, ranks = queries
        counts, is_self = self._count_rounds(ranks, neighbor_ranks)
        y, log_denominator = self._attend(
            q, k, values, self._mask_window(sorted_ranks, neighbors), is_self, counts
        )
        y = join_chunks(y, T).reshape(*rank.shape, -1)  # [B H R T K]
        log_denominator = join_chunks(log_denominator, T).reshape(rank.shape)
        y = jnp.take_along_axis(y, rank[..., None], axis=3)
        round_weights = jax.nn.softmax(jnp.take_along_axis(log_denominator, rank, axis=3), axis=2)
        return jnp.einsum("bhrt,bhrtk->bhtk", round_weights.astype(y.dtype), y)
