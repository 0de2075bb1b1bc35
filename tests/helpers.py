"""Tiny models for tests, with no value that would hide a mistake (such as equal sizes)."""

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import plugins
from jaxgpt.config import ModelConfig, list_tables
from jaxgpt.model import Coords, abstract_params, build
from jaxgpt.model import compute_logits as score
from jaxgpt.settings import resolve_table

TINY = ModelConfig(vocab=61, context=32, width=16, layers=2, heads=4, kv_heads=2, ffn=24)

# Before any test: what `--plugins` has added stays.
ROWS = {table: dict(resolve_table(table)) for table in list_tables()}
PLUGINS = frozenset(plugins._loaded)


def forget_plugins():
    """Remove the rows and modules of the plugins of tests, as in a new process."""
    for table, rows in ROWS.items():
        for name in resolve_table(table).keys() - rows.keys():
            del resolve_table(table)[name]
    for name in plugins._loaded - PLUGINS:
        sys.modules.pop(name, None)
        plugins._loaded.remove(name)


def tiny(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def random_params(cfg: ModelConfig, seed: int = 0, std: float = 0.2):
    """Return large random weights, with biases and norms away from their initial 0 and 1.

    They are sampled by NumPy: jax.random would be recompiled for every config, in seconds each.
    """
    rng = np.random.default_rng(seed)
    shapes, _ = abstract_params(cfg)

    def draw(path, x):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + std * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map_with_path(draw, shapes)


def random_tokens(cfg: ModelConfig, seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab, shape), jnp.int32)


def single_document_coords(tokens) -> Coords:
    """Return the coordinates of rows [B T] of one document each."""
    return Coords(
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens)
    )


@partial(jax.jit, static_argnames="cfg")
def forward(cfg: ModelConfig, params, tokens, at: Coords, cache=None):
    """Return (hidden [B T D], cache)."""
    return build(cfg).apply({"params": params}, tokens, at, cache)


@partial(jax.jit, static_argnames="cfg")
def compute_logits(cfg: ModelConfig, params, tokens, at: Coords):
    """Return the logits [B T V]."""
    return score(cfg, params, build(cfg).apply({"params": params}, tokens, at)[0])
