"""Reformer against a softmax over the union of what its rounds see, written as float64 loops."""

import math

import numpy as np
import pytest
from twins import apply, heads, packed, project, random_mixer, visible

from jaxgpt.model.mixers.reformer import rotations


def buckets_of(cfg, q):
    """h(x) = argmax([x·A; -x·A]) of every round: [B T H R]."""
    m = cfg.mixer
    turned = np.einsum(
        "bthk,krc->bthrc", q, np.float64(rotations(cfg.sizes["K"], m.hashes, m.buckets))
    )
    return np.concatenate([turned, -turned], -1).argmax(-1)


def sees(cfg, bucket, keys, b, t, h):
    """The keys that any round shows to query t: the nearest ones of its bucket, on either side."""
    found, window = set(), cfg.mixer.bucket_window
    for r in range(cfg.mixer.hashes):
        alike = [s for s in keys if bucket[b, s, h, r] == bucket[b, t, h, r]]
        found |= set([s for s in alike if s < t][-window:])
        found |= set([s for s in alike if s > t][:window])
    return sorted(found) or [t]  # itself only where there is nothing else


@pytest.mark.parametrize("direction", ["causal", "both"])
@pytest.mark.parametrize(
    ("hashes", "window", "kv_heads"), [(1, 2, 4), (2, 2, 2), (4, 3, 1), (3, 1, 4), (2, 64, 4)]
)
def test_reformer_equals_a_softmax_over_the_union_in_float64(direction, hashes, window, kv_heads):
    cfg, params, x = random_mixer(
        "reformer", direction, kv_heads=kv_heads, hashes=hashes, bucket_window=window
    )
    q, v = project(params, "q", x), heads(cfg, project(params, "v", x))
    bucket = buckets_of(cfg, q)
    out, sizes = np.zeros_like(q), set()
    for b, t, h, keys in visible(packed(), direction, cfg.heads):
        union = sees(cfg, bucket, keys, b, t, h)
        sizes.add(len(union))
        score = [q[b, t, h] @ q[b, s, h] / np.linalg.norm(q[b, s, h]) for s in union]
        weight = np.exp(np.array(score) / math.sqrt(cfg.sizes["K"]))
        out[b, t, h] = weight @ v[b, union, h] / weight.sum()
    assert len(sizes) > 1
    wanted = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    found = apply(cfg, params, direction, x, packed())
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5, rtol=1e-5)
