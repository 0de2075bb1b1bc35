"""Reformer: attention to what is alike, found by hashing.

A token is its own query, k = q / |q|, and R rounds of random rotations put it into a bucket each,
h(x) = argmax([x·A; -x·A]). A query sees the tokens of its own bucket, up to W of them; over the
rounds it sees the union, P:

    y_t = Σ_{s in P_t} softmax_s(q_t·k_s / √K) v_s,    itself only where there is nothing else.

Sorted by bucket, what a query sees is next to it: chunks of W tokens look at themselves and at
their neighbours. The paper's chunks depend on how many tokens come later, so that the future
decides which part of the past is seen. Here a query sees the W tokens of its bucket nearest to it
on either side: in a causal stack the latest W before it, whatever comes after.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import DTYPES, Linear, into_residual
from jaxgpt.model.masks import Coords
from jaxgpt.model.mixers.chunks import around, cut, join
from jaxgpt.model.mixers.mixer import KV, Mixer, Sight, write

ALONE = -1e5  # the logit of a token for itself: far below all others, and far above NEVER


@functools.cache
def rotations(size: int, rounds: int, buckets: int) -> np.ndarray:
    """A: float32 [K R buckets/2], the same ones always."""
    return np.random.default_rng(0).normal(size=(size, rounds, buckets // 2)).astype(np.float32)


class Marks(NamedTuple):
    """Where a token stands in each of the R rounds."""

    group: jax.Array  # int32 [... T R], its document and its bucket in one number
    place: jax.Array  # int32 [... T R], its rank when tokens are sorted by group, in their order


class Reformer(Mixer):
    """LSH attention with shared queries and keys. The values may be shared by heads, as in GQA.

    Source: Kitaev et al. 2020, arXiv:2001.04451, section 2 (equations 2 to 6, and the paragraph
    on causal masking); appendix A for what is seen in several rounds.
    """

    USES = ("rotation",)

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> KV:
        H, G, K = (cfg.sizes[letter] for letter in "HGK")
        empty = functools.partial(jnp.zeros, dtype=DTYPES[cfg.dtype])
        return KV(empty((batch, slots, H, K)), empty((batch, slots, G, K)))

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: KV | None):
        c, T = self.cfg, x.shape[1]
        q = Linear(c, "D>HK", name="q")(x)
        v = Linear(c, "D>GK", name="v")(x)
        q = sight.rotated(q)
        kept = KV(q, v) if state is None else write(state, KV(q, v), sight.cursor)
        k, v = (y.swapaxes(1, 2) for y in kept)  # [B H S K], [B G S K]
        v = jnp.repeat(v, c.heads // v.shape[1], axis=1)
        marks = self._marks(k, sight.k_at)
        if state is None:
            y = self._near(k, v, marks)
        else:
            cut_out = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=T, axis=2)
            here = jax.tree.map(lambda m: cut_out(m, sight.cursor), marks)
            times, is_self = self._times(here, marks)
            y, _ = self._attend(q.swapaxes(1, 2), k, v, times > 0, is_self)
        y = Linear(c, "HK>D", into_residual(c), name="o")(y.swapaxes(1, 2))
        return y, None if state is None else kept

    def _marks(self, x: jax.Array, at: Coords) -> Marks:
        """x [B H S K], at [B S] -> [B H S R]."""
        m = self.cfg.mixer
        a = rotations(x.shape[-1], m.hashes, m.buckets)
        turned = jnp.einsum("bhsk,krc->bhsrc", x.astype(jnp.float32), a)
        bucket = jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1)
        group = at.document[:, None, :, None] * m.buckets + bucket
        order = jnp.argsort(group, axis=2, stable=True)
        return Marks(group, jnp.argsort(order, axis=2))  # the inverse of a permutation

    def _sees(self, q: Marks, k: Marks) -> jax.Array:
        """Marks of one round, [... T] and [... S] -> bool [... T S]; a token sees itself."""
        m = self.cfg.mixer
        behind = q.place[..., :, None] - k.place[..., None, :]
        group = k.group[..., None, :]
        near = (behind if self.direction == "causal" else jnp.abs(behind)) <= m.bucket_window
        near &= (behind >= 0) | (self.direction == "both")
        return near & (q.group[..., :, None] == group) & (group >= m.buckets)  # below: no token

    def _times(self, q: Marks, k: Marks) -> tuple[jax.Array, jax.Array]:
        """Marks [... T R] and [... S R] -> [... T S]: in how many rounds seen, and is it itself?"""
        times = jnp.int32(0)
        for i in range(self.cfg.mixer.hashes):
            one, other = (jax.tree.map(lambda x, i=i: x[..., i], m) for m in (q, k))
            times += self._sees(one, other)
        return times, (one.place[..., :, None] == other.place[..., None, :]) & (times > 0)

    def _attend(self, q, k, v, mask, is_self, times=1):
        """q [... T K], k, v [... S K] -> ([... T K], the logarithm of its denominator [... T])."""
        wide = k.astype(jnp.float32)
        k = (wide * jax.lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + 1e-12)).astype(k.dtype)
        logits = jnp.einsum(
            "...tk,...sk->...ts",
            q * self.cfg.attention_scale,
            k,
            preferred_element_type=jnp.float32,
        )
        # What n rounds see counts n times: less log n, once in all.
        logits = jnp.where(is_self, ALONE, logits) - jnp.log(jnp.maximum(times, 1))
        logits = jnp.where(mask, logits, NEVER)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("...ts,...sk->...tk", weights, v), jax.nn.logsumexp(logits, axis=-1)

    def _near(self, q, v, marks: Marks) -> jax.Array:
        """q, v [B H T K], marks [B H T R] -> [B H T K], each round by chunks of what is sorted."""
        T = q.shape[2]
        place = jnp.moveaxis(marks.place, -1, 2)  # [B H R T]
        order = jnp.argsort(place, axis=-1)

        def by_group(x):  # [B H T ...] -> [B·H·R T ...]
            x = jnp.take_along_axis(x[:, :, None], order[..., None], axis=3)
            return x.reshape(-1, *x.shape[3:])

        group = jnp.take_along_axis(jnp.moveaxis(marks.group, -1, 2), order, axis=-1)
        own = Marks(
            group.reshape(-1, T), jnp.broadcast_to(jnp.arange(T), group.shape).reshape(-1, T)
        )
        q, v, marks = (jax.tree.map(by_group, x) for x in (q, v, marks))
        here = cut((q, own, marks), min(self.cfg.mixer.bucket_window, T))
        values = cut(v, min(self.cfg.mixer.bucket_window, T))
        (k, there, marks_there), values = around(
            (here, values), before=1, after=int(self.direction == "both")
        )
        q, own, marks = here
        times, is_self = self._times(marks, marks_there)
        y, size = self._attend(q, k, values, self._sees(own, there), is_self, times)
        y = join(y, T).reshape(*place.shape, -1)  # [B H R T K]
        size = join(size, T).reshape(place.shape)
        y = jnp.take_along_axis(y, place[..., None], axis=3)
        share = jax.nn.softmax(jnp.take_along_axis(size, place, axis=3), axis=2)
        return jnp.einsum("bhrt,bhrtk->bhtk", share.astype(y.dtype), y)
