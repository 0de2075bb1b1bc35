"""Reformer against float64 loops of a softmax over the union of the rounds' keys."""

import math

import numpy as np
import pytest
from references import (
    apply,
    iterate_visible,
    make_packed_coords,
    make_random_mixer,
    project,
    repeat_heads,
)

from jaxgpt.model.mixers.reformer import draw_rotations


def hash_queries(cfg, q):
    """Compute h(x) = argmax([x·A; -x·A]) for every round: [B T H R]."""
    m = cfg.mixer
    rotated = np.einsum(
        "bthk,krc->bthrc", q, np.float64(draw_rotations(cfg.sizes["K"], m.hashes, m.buckets))
    )
    return np.concatenate([rotated, -rotated], -1).argmax(-1)


def find_keys(cfg, bucket, keys, b, t, h):
    """Return the keys that any round finds for query t: the nearest of its bucket."""
    keys_found, window = set(), cfg.mixer.bucket_window
    for r in range(cfg.mixer.hashes):
        same_bucket = [s for s in keys if bucket[b, s, h, r] == bucket[b, t, h, r]]
        keys_found |= set([s for s in same_bucket if s < t][-window:])
        keys_found |= set([s for s in same_bucket if s > t][:window])
    return sorted(keys_found) or [t]  # itself only where there is no other token


@pytest.mark.parametrize("direction", ["causal", "both"])
@pytest.mark.parametrize(
    ("hashes", "window", "kv_heads"), [(1, 2, 4), (2, 2, 2), (4, 3, 1), (3, 1, 4), (2, 64, 4)]
)
def test_reformer_equals_a_softmax_over_the_union_in_float64(direction, hashes, window, kv_heads):
    cfg, params, x = make_random_mixer(
        "reformer", direction, kv_heads=kv_heads, hashes=hashes, bucket_window=window
    )
    q, v = project(params, "q", x), repeat_heads(cfg, project(params, "v", x))
    bucket = hash_queries(cfg, q)
    out, union_sizes = np.zeros_like(q), set()
    for b, t, h, keys in iterate_visible(make_packed_coords(), direction, cfg.heads):
        union = find_keys(cfg, bucket, keys, b, t, h)
        union_sizes.add(len(union))
        score = [q[b, t, h] @ q[b, s, h] / np.linalg.norm(q[b, s, h]) for s in union]
        weight = np.exp(np.array(score) / math.sqrt(cfg.sizes["K"]))
        out[b, t, h] = weight @ v[b, union, h] / weight.sum()
    assert len(union_sizes) > 1
    expected = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    actual = apply(cfg, params, direction, x, make_packed_coords())
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5, rtol=1e-5)
