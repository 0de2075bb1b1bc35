"""What the slow twins of mixers share: a mixer alone with random weights, and projections."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny

from jaxgpt.architecture import MixerConfig
from jaxgpt.dims import split
from jaxgpt.model import Coords
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.mixers.mixer import Sight

NUMBERS = dict(features=8, summary=2, chunk=3, hashes=2, buckets=4, bucket_window=2, memory=3)


def packed() -> Coords:
    """Two documents, one more of one token, and padding; a second row is one document."""
    position = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 0], [*range(14)]]
    document = [[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0], [1] * 14]
    return Coords(np.array(position), np.array(document))


def random_mixer(name: str, direction: str, kv_heads: int = 2, std: float = 0.4, **numbers):
    """(config, float64 parameters, input float64 [2 14 D]) of a mixer alone."""
    cfg = tiny(
        mixers=(name,),
        position="none",
        kv_heads=kv_heads,
        family={"causal": "decoder", "both": "encoder"}[direction],
        mixer=MixerConfig(**NUMBERS | numbers),
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 14, cfg.width))
    module = MIXERS[name](cfg, direction=direction)
    sight = Sight(packed(), packed())
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.float32(x), sight, None))
    shapes, _ = split(boxed["params"])
    # Through float32, so that both sides have the same numbers.
    draw = lambda s: np.float64(np.float32(std * rng.normal(size=s.shape)))  # noqa: E731
    return cfg, jax.tree.map(draw, shapes), np.float64(np.float32(x))


@partial(jax.jit, static_argnums=(0, 2))
def _apply(cfg, params, direction, x, at):
    module = MIXERS[cfg.mixers[0]](cfg, direction=direction)
    return module.apply({"params": params}, x, Sight(at, at), None)[0]


def apply(cfg, params, direction, x, at) -> np.ndarray:
    """The mixer in float32, without a state."""
    return np.asarray(_apply(cfg, jax.tree.map(jnp.float32, params), direction, jnp.float32(x), at))


def project(params, name: str, x):
    """[B T D] -> [B T H K]."""
    return np.einsum("btd,dhk->bthk", x, params[name]["w"])


def heads(cfg, x):
    """Keys or values [B T G K] as every query head sees them, [B T H K]."""
    return np.repeat(x, cfg.heads // x.shape[2], axis=2)


def visible(at, direction: str, H: int):
    """(row, query, head, its visible keys) of every token that there is."""
    for b, document in enumerate(at.document):
        for t in np.flatnonzero(document):
            keys = [s for s in np.flatnonzero(document == document[t])
                    if s <= t or direction == "both"]  # fmt: skip
            for h in range(H):
                yield b, t, h, np.array(keys)


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()
