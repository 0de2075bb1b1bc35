"""Both Linformers against their formulas in float64, document by document."""

import numpy as np
import pytest
from twins import apply, heads, packed, project, random_mixer, softmax

from jaxgpt.model import Coords


def documents(at):
    """(row, the columns of a document), of every one."""
    for b, row in enumerate(at.document):
        for d in sorted(set(row) - {0}):
            yield b, np.flatnonzero(row == d)


def projected(cfg, params, x):
    q, k, v = (project(params, name, x) for name in "qkv")
    return q, heads(cfg, k), heads(cfg, v)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_linformer_equals_its_formula_in_float64(chunk, kv_heads):
    """softmax(q (E K)ᵀ / √K) (F V), with the first rows of E and F for a short document."""
    cfg, params, x = random_mixer("linformer", "both", kv_heads=kv_heads, chunk=chunk)
    q, k, v = projected(cfg, params, x)
    out = np.zeros_like(q)
    for b, at in documents(packed()):
        E, F = params["E"][: len(at)], params["F"][: len(at)]
        for h in range(cfg.heads):
            keys, values = E.T @ k[b, at, h], F.T @ v[b, at, h]  # [P K]
            for t in at:
                out[b, t, h] = softmax(keys @ q[b, t, h] / np.sqrt(cfg.sizes["K"])) @ values
    wanted = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    found = apply(cfg, params, "both", x, packed())
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("chunk", "kv_heads"), [(3, 2), (2, 1), (64, 4)])
def test_causal_linformer_equals_its_formula_in_float64(chunk, kv_heads):
    cfg, params, x = random_mixer("linformer_causal", "causal", kv_heads=kv_heads, chunk=chunk)
    q, k, v = projected(cfg, params, x)
    out = np.zeros_like(q)
    for b, at in documents(packed()):
        for place, t in enumerate(at):
            begin = place - place % chunk
            for h in range(cfg.heads):
                keys = [k[b, s, h] for s in at[begin : place + 1]]
                values = [v[b, s, h] for s in at[begin : place + 1]]
                for first in range(0, begin, chunk):
                    block = at[first : first + chunk]
                    keys += list(params["E"].T @ k[b, block, h])
                    values += list(params["F"].T @ v[b, block, h])
                weight = softmax(np.array(keys) @ q[b, t, h] / np.sqrt(cfg.sizes["K"]))
                out[b, t, h] = weight @ np.array(values)
    wanted = np.einsum("bthk,hkd->btd", out, params["o"]["w"])
    found = apply(cfg, params, "causal", x, packed())
    np.testing.assert_allclose(found[:, :12], wanted[:, :12], atol=1e-5, rtol=1e-5)


def test_tokens_beyond_the_context_go_into_no_summary():
    cfg, params, x = random_mixer("linformer", "both")
    at = Coords(packed().position[1:] + cfg.context - 9, packed().document[1:])
    loud = x.copy()
    loud[:, 9:] *= 100
    a, b = (apply(cfg, params, "both", y[1:], at) for y in (x, loud))
    np.testing.assert_array_equal(a[:, :9], b[:, :9])
    assert np.isfinite(b).all()
