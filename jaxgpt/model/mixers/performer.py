"""Performer: softmax attention in linear time, by random features.

For w drawn from a standard normal distribution, exp(q·k) = E[exp(w·q - |q|²/2) exp(w·k - |k|²/2)].
With m such w, φ(x)_i = exp(w_i·x - |x|²/2) / √m, attention is a quotient of sums over keys,

    y_t = φ(q_t)·Σ_s φ(k_s) v_s / φ(q_t)·Σ_s φ(k_s),

and sums over the keys before a chunk are told in m x K numbers instead of all keys and values.
Inside a chunk the products φ(q_t)·φ(k_s) are made one by one, and masked.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.model.kernels import NEVER
from jaxgpt.model.layers import Linear, into_residual
from jaxgpt.model.masks import layer_mask
from jaxgpt.model.mixers.chunks import carried, cut, edge, join, seen, segments
from jaxgpt.model.mixers.mixer import Mixer, Sight


@functools.cache
def directions(features: int, size: int) -> np.ndarray:
    """The w: float32 [m K], the same ones always; orthogonal by blocks of K, as long as normals.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4.
    """
    rng = np.random.default_rng(0)
    q, r = np.linalg.qr(rng.normal(size=(-(-features // size), size, size)))
    # LAPACK chooses the signs of r; with them all positive, no direction is preferred.
    blocks = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = np.linalg.norm(rng.normal(size=(features, size)), axis=1, keepdims=True)
    return (blocks.reshape(-1, size)[:features] * lengths).astype(np.float32)


def log_features(x: jax.Array, w: np.ndarray) -> jax.Array:
    """log φ(x) + log √m, which cancels: [... K] -> [... m].

    Source: Choromanski et al. 2021, arXiv:2009.14794, lemma 1.
    """
    return x @ w.T - jnp.sum(x * x, axis=-1, keepdims=True) / 2


class Memory(NamedTuple):
    """What is known of the keys before: their sums, in units that keep them from overflowing."""

    sums: jax.Array  # float32 [B G m K+1], Σ φ(k) (v, 1) / exp(top)
    top: jax.Array  # float32 [B G], the largest log feature of any of the keys


def merge(a: Memory, b: Memory) -> Memory:
    top = jnp.maximum(a.top, b.top)
    a_sums, b_sums = (jnp.exp(x.top - top)[..., None, None] * x.sums for x in (a, b))
    return Memory(a_sums + b_sums, top)


def _exp_where(condition, x):
    return jnp.exp(jnp.where(condition, x, NEVER))


class Performer(Mixer):
    """FAVOR+: attention with positive orthogonal random features, in time linear in T.

    Everything is multiplied by exp(-top), with a top that is the largest of what a query sees and
    of nothing else: it cancels in the quotient, and no token after the query has a say in it.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.3 and appendix B.1 (the prefix
    sums of the causal case).
    """

    USES = ("rotation",)

    @staticmethod
    def state(cfg: ModelConfig, batch: int, slots: int) -> Memory:
        m, G, K = cfg.mixer.features, cfg.sizes["G"], cfg.sizes["K"]
        return Memory(jnp.zeros((batch, G, m, K + 1)), jnp.full((batch, G), NEVER))

    @nn.compact
    def __call__(self, x: jax.Array, sight: Sight, state: Memory | None):
        c, T = self.cfg, x.shape[1]
        H, G, K = (c.sizes[letter] for letter in "HGK")
        q = Linear(c, "D>HK", name="q")(x)
        k = Linear(c, "D>GK", name="k")(x)
        v = Linear(c, "D>GK", name="v")(x).astype(jnp.float32)
        q, k = sight.rotated(q), sight.rotated(k)
        # Each takes half of the scale, so that q·k is the logit.
        half = c.attention_scale**0.5
        w = directions(c.mixer.features, K)
        q, k = (log_features(half * y.astype(jnp.float32), w) for y in (q, k))
        q = jnp.exp(q - jax.lax.stop_gradient(q.max(-1, keepdims=True)))  # cancels by itself
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # sums above, and below
        q, k, v, at = cut((q, k, v, sight.q_at), min(c.mixer.chunk, T))
        q = q.reshape(*q.shape[:3], G, H // G, -1)  # [B n Q G M m]
        sums, state = self._attend(q, k, v, at, state)
        above, below = sums[..., :K], sums[..., K:]
        y = above / jnp.where(below > 0, below, 1)  # 0 where there is no token
        y = join(y.reshape(*y.shape[:3], H, K), T).astype(x.dtype)
        return Linear(c, "HK>D", into_residual(c), name="o")(y), state

    def _attend(self, q, log_k, v, at, state):
        """-> (both sums of every query [B n Q G M K+1], what is known after the last chunk)."""
        top = jax.lax.stop_gradient(log_k.max(-1))  # [B n Q G], of each key
        k = jnp.exp(log_k - top[..., None])
        segment = segments(at)
        ways = (False,) if self.direction == "causal" else (False, True)
        told = [self._tell(k, v, top, at, segment, state, reverse) for reverse in ways]
        mask = seen(layer_mask(self.cfg, self.pattern, self.direction), at, at)[..., None]
        heard = [(of[..., None] == segment)[..., None] for _, of, _ in told]  # [B n Q 1]
        tops = [jnp.where(mask, top[:, :, None], NEVER).max(3)]  # [B n Q G]
        for h, (memory, _, _) in zip(heard, told, strict=True):
            tops.append(jnp.where(h, memory.top[:, :, None], NEVER))
        most = functools.reduce(jnp.maximum, tops)
        weights = _exp_where(mask, top[:, :, None] - most[:, :, :, None])  # [B n Q S G]
        weights = weights[..., None] * jnp.einsum("bntgmf,bnsgf->bntsgm", q, k)
        sums = jnp.einsum("bntsgm,bnsgk->bntgmk", weights, v)
        for h, (memory, _, _) in zip(heard, told, strict=True):
            share = _exp_where(h, memory.top[:, :, None] - most)[..., None, None]
            sums += share * jnp.einsum("bntgmf,bngfk->bntgmk", q, memory.sums)
        return sums, None if state is None else told[0][2]

    def _tell(self, k, v, top, at, segment, state, reverse):
        """What each chunk is told of the tokens outside of it; see `carried`."""
        last = (segment == edge(segment, reverse)[:, :, None]) & (at.document > 0)
        last = last[..., None]  # [B n Q 1]
        most = jnp.where(last, top, NEVER).max(2)  # [B n G]
        share = _exp_where(last, top - most[:, :, None])
        parts = Memory(jnp.einsum("bnsg,bnsgf,bnsgk->bngfk", share, k, v), most)
        empty = self.state(self.cfg, len(k), 0)
        return carried(parts, segment, merge, empty, state, reverse)
