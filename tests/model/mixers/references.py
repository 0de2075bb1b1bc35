"""Shared by the reference implementations of mixers: a mixer with random weights, projections."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny

from jaxgpt.architecture import MixerConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import LayerContext

MIXER_SIZES = dict(features=8, summary=2, chunk=3, hashes=2, buckets=4, bucket_window=2, memory=3)


def make_packed_coords() -> Coords:
    """Return coordinates of two rows: three documents and padding, and one document."""
    positions = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 0], [*range(14)]]
    segment_ids = [[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0], [1] * 14]
    return Coords(np.array(positions), np.array(segment_ids))


def make_random_mixer(name: str, direction: str, kv_heads: int = 2, std: float = 0.4, **sizes):
    """Return (config, float64 parameters, input float64 [2 14 D]) of one mixer."""
    cfg = tiny(
        mixers=(name,),
        position="none",
        kv_heads=kv_heads,
        family={"causal": "decoder", "both": "encoder"}[direction],
        mixer=MixerConfig(**MIXER_SIZES | sizes),
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 14, cfg.width))
    module = MIXERS[name](cfg, direction=direction)
    layer_context = LayerContext(make_packed_coords(), make_packed_coords())
    boxed = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.float32(x), layer_context, None)
    )
    shapes, _ = split(boxed["params"])
    # Rounded to float32, so that both sides have the same numbers.
    draw = lambda s: np.float64(np.float32(std * rng.normal(size=s.shape)))  # noqa: E731
    return cfg, jax.tree.map(draw, shapes), np.float64(np.float32(x))


@partial(jax.jit, static_argnums=(0, 2))
def _apply(cfg, params, direction, x, coords):
    module = MIXERS[cfg.mixers[0]](cfg, direction=direction)
    return module.apply({"params": params}, x, LayerContext(coords, coords), None)[0]


def apply(cfg, params, direction, x, coords) -> np.ndarray:
    """Apply the mixer in float32, without a state."""
    return np.asarray(
        _apply(cfg, jax.tree.map(jnp.float32, params), direction, jnp.float32(x), coords)
    )


def project(params, name: str, x):
    """Project [B T D] to [B T H K]."""
    return np.einsum("btd,dhk->bthk", x, params[name]["w"])


def repeat_heads(cfg, x):
    """Repeat keys or values [B T G K] for the query heads: [B T H K]."""
    return np.repeat(x, cfg.heads // x.shape[2], axis=2)


def iterate_visible(coords, direction: str, H: int):
    """Yield (row, query, head, its visible keys) for every token."""
    for b, segment_ids in enumerate(coords.segment_ids):
        for t in np.flatnonzero(segment_ids):
            keys = [s for s in np.flatnonzero(segment_ids == segment_ids[t])
                    if s <= t or direction == "both"]  # fmt: skip
            for h in range(H):
                yield b, t, h, np.array(keys)


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()
