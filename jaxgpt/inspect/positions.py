"""What each position encoding adds or does, as matrices and curves to look at."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords
from jaxgpt.model.positions import POSITION_ENCODINGS, Learned, PositionEncoding
from jaxgpt.settings import ConfigError, choose


@dataclass(frozen=True)
class PositionPicture:
    """What a position encoding does to T positions.

    Attributes:
        name: in POSITION_ENCODINGS.
        matrix: what is added to the embedding [T D]; sines and cosines of a rotation [T K]; what is
            added to the logits of each head [H T T]; the factor of the queries [T 1].
        kind: "embedding", "rotation", "bias", "query_scale" or "none".
        similarity: float32 [T T], how alike positions are: dot products of the rows of an
            embedding over their mean square; the mean of q·k over random q = k that are rotated to
            them; the mean bias over heads.
    """

    name: str
    matrix: np.ndarray
    kind: str
    similarity: np.ndarray


def describe_positions(
    name: str, T: int = 64, cfg: ModelConfig | None = None, params=None
) -> PositionPicture:
    """Return what a position encoding does to the first T positions.

    Args:
        name: in POSITION_ENCODINGS: rope, alibi, t5, sinusoidal, learned, ...
        cfg: widths, heads, theta and scaling; the defaults without one.
        params: of the encoding (`params["stack"]["position"]`), for learned ones; random without.

    Raises:
        ConfigError: there is no such encoding, or T does not fit a learned table.
    """
    encoding_class = choose(POSITION_ENCODINGS, name, "position")
    cfg = replace(cfg or ModelConfig(), position=name)
    if issubclass(encoding_class, Learned) and cfg.context < T:
        raise ConfigError(f"T={T} positions do not fit the table of model.context={cfg.context}.")
    encoding = encoding_class(cfg)
    coords = Coords(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
    kind = "embedding" if encoding_class.ADDS_TO_EMBEDDING else encoding_class.ATTENTION_HOOK
    describe = DESCRIBERS.get(kind)
    if describe is None:
        return PositionPicture(name, np.zeros((T, 1), np.float32), "none", np.ones((T, T)))
    variables = {} if params is None else {"params": params}
    matrix, similarity = describe(encoding, variables, coords)
    return PositionPicture(name, np.asarray(matrix), kind, np.asarray(similarity))


def describe_model_positions(model: LanguageModel, T: int = 64) -> PositionPicture:
    """Return what the position encoding of a model's first layer does, with its own parameters."""
    params = fetch(model.params)["stack"].get("position")
    cfg = model.config.model.at_layer(model.config.model.layer_cycle[0])
    return describe_positions(str(cfg.position), min(T, cfg.context), cfg, params)


def _call(encoding: PositionEncoding, variables, method: str, *args):
    """Call a hook; without parameters they are initialized."""
    if not variables:
        return encoding.init_with_output(jax.random.key(0), *args, method=method)[0]
    return encoding.apply(variables, *args, method=method)


def _describe_embedding(encoding, variables, coords):
    zeros = jnp.zeros((1, coords.positions.shape[1], encoding.cfg.width))
    added = _call(encoding, variables, "embed", zeros, coords.positions)[0]
    return added, added @ added.T / jnp.mean(jnp.sum(added**2, -1))


def _describe_rotation(encoding, variables, coords):
    rotate = _call(encoding, variables, "make_rotation", coords.positions)
    T, K = coords.positions.shape[1], encoding.cfg.sizes["K"]
    ones = jnp.ones((1, T, 1, K))
    # A rotated pair (1, 0) is (cos, sin).
    half = jnp.concatenate([jnp.ones(K // 2), jnp.zeros(K - K // 2)])
    matrix = rotate(ones * half)[0, :, 0]
    # q·k of equal vectors, each pair of channels of length 1: its mean over directions.
    rotated = matrix
    return matrix, rotated @ rotated.T / jnp.sum(half)


def _describe_bias(encoding, variables, coords):
    bias = _call(encoding, variables, "make_bias")(coords, coords)[0]
    T = bias.shape[-1]
    bias = jnp.where(jnp.tril(jnp.ones((T, T), bool)), bias, jnp.nan)  # what a causal model reads
    return bias, bias.mean(0)


def _describe_query_scale(encoding, variables, coords):
    scale = _call(encoding, variables, "make_query_scale", coords.positions)[0]
    T = len(scale)
    return scale[:, None], jnp.broadcast_to(scale[:, None], (T, T))


DESCRIBERS: dict[str, Callable] = {
    "embedding": _describe_embedding,
    "rotation": _describe_rotation,
    "bias": _describe_bias,
    "query_scale": _describe_query_scale,
}


def rope_decay(distances: np.ndarray, head_width: int = 64, theta: float = 10_000.0) -> np.ndarray:
    """Return the mean of cos(distance * frequency) over the frequencies of RoPE: float64 [N].

    It is q·k over |q||k| for q = k with equal lengths of all pairs of channels.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.4.3.
    """
    frequencies = theta ** (-np.arange(0, head_width, 2) / head_width)
    return np.cos(np.asarray(distances)[:, None] * frequencies).mean(-1)
