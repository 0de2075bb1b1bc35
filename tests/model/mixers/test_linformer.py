"""Both Linformers against their formulas in float64, per document."""

import numpy as np
import pytest
from references import apply, make_packed_coords, make_random_mixer, project, repeat_heads, softmax

from jaxgpt.model import Coords


def iterate_documents(columns):
    """Yield (row, the columns of a document) for every document."""
    for b, segment_ids in enumerate(columns.segment_ids):
        for d in sorted(set(segment_ids) - {0}):
            yield b, np.flatnonzero(segment_ids == d)


def project_qkv(cfg, params, x):
    q, k, v = (project(params, name, x) for name in "qkv")
    return q, repeat_heads(cfg, k), repeat_heads(cfg, v)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_linformer_equals_its_formula_in_float64(chunk, kv_heads):
    """softmax(q (E K)ᵀ / √K) (F V), with the first rows of E and F for a short document."""
    cfg, params, x = make_random_mixer("linformer", "both", kv_heads=kv_heads, chunk=chunk)
    q, k, v = project_qkv(cfg, params, x)
    out = np.zeros_like(q)
    for b, columns in iterate_documents(make_packed_coords()):
        E, F = params["E"][: len(columns)], params["F"][: len(columns)]
        for h in range(cfg.heads):
            keys, values = E.T @ k[b, columns, h], F.T @ v[b, columns, h]  # [P K]
            for t in columns:
                out[b, t, h] = softmax(keys @ q[b, t, h] / np.sqrt(cfg.sizes["K"])) @ values
    expected = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    actual = apply(cfg, params, "both", x, make_packed_coords())
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("chunk", "kv_heads"), [(3, 2), (2, 1), (64, 4)])
def test_causal_linformer_equals_its_formula_in_float64(chunk, kv_heads):
    cfg, params, x = make_random_mixer("linformer_causal", "causal", kv_heads=kv_heads, chunk=chunk)
    q, k, v = project_qkv(cfg, params, x)
    out = np.zeros_like(q)
    for b, columns in iterate_documents(make_packed_coords()):
        for position, t in enumerate(columns):
            begin = position - position % chunk
            for h in range(cfg.heads):
                keys = [k[b, s, h] for s in columns[begin : position + 1]]
                values = [v[b, s, h] for s in columns[begin : position + 1]]
                for first in range(0, begin, chunk):
                    block = columns[first : first + chunk]
                    keys += list(params["E"].T @ k[b, block, h])
                    values += list(params["F"].T @ v[b, block, h])
                weight = softmax(np.array(keys) @ q[b, t, h] / np.sqrt(cfg.sizes["K"]))
                out[b, t, h] = weight @ np.array(values)
    expected = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    actual = apply(cfg, params, "causal", x, make_packed_coords())
    np.testing.assert_allclose(actual[:, :12], expected[:, :12], atol=1e-5, rtol=1e-5)


def test_tokens_beyond_the_context_enter_no_summary():
    cfg, params, x = make_random_mixer("linformer", "both")
    coords = Coords(
        make_packed_coords().positions[1:] + cfg.context - 9, make_packed_coords().segment_ids[1:]
    )
    scaled = x.copy()
    scaled[:, 9:] *= 100
    a, b = (apply(cfg, params, "both", y[1:], coords) for y in (x, scaled))
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.isfinite(b).all()
