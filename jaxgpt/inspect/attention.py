"""Attention of a model to a text, and what its heads do: rollout, flow, scores, ablation."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.hosts import fetch
from jaxgpt.inspect.activations import EncodedText, capture, in_float32, jit_logits
from jaxgpt.inspect.lens import require_vocab_scores
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import capture as capture_batch
from jaxgpt.model import list_activations
from jaxgpt.score import make_whole_coords
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of


def list_attention_layers(model: LanguageModel, prefix: str = "", site: str = "mixer") -> list[int]:
    """Return the numbers of the layers with attention weights; see `attention`."""
    head, tail = f"{prefix}layers.", f".{site}.weights"
    names = list_activations(model.config.model)
    found = [n for n in names if n.startswith(head) and n.endswith(tail)]
    return [int(n.removeprefix(head).removesuffix(tail)) for n in found]


def find_attention_layers(model: LanguageModel, prefix: str = "") -> list[int]:
    """Return the numbers of the layers with attention weights.

    Args:
        prefix: "encoder." for the encoder of an encoder_decoder.

    Raises:
        ConfigError: no layer has any, as with recurrent mixers.
    """
    found = list_attention_layers(model, prefix)
    if not found:
        raise ConfigError(
            f"no layer of this model has attention weights: its mixers are "
            f"{', '.join(model.config.model.mixers)}."
        )
    return found


def attention(
    model: LanguageModel,
    text: str | EncodedText,
    *,
    source: str | None = None,
    site: str = "mixer",
    prefix: str = "",
) -> np.ndarray:
    """Return the attention weights of all layers and heads: float32 [L H T S].

    They are computed by the reference kernel, whichever kernel the model uses. Layers without
    attention are left out (see `find_attention_layers`).

    Args:
        site: "mixer", or "cross" for the attention of a decoder to its source.
        prefix: "encoder." for the encoder of an encoder_decoder.

    Raises:
        ConfigError: the model has no attention.
    """
    if site == "mixer":
        find_attention_layers(model, prefix)
    found = capture(model, text, [f"{prefix}layers.*.{site}.weights"], source=source)
    return found.stack(f"{site}.weights", prefix)


# --- through all layers ----------------------------------------------------------------------


def _mix_residual(weights: np.ndarray) -> np.ndarray:
    """Return (mean over heads + identity) / 2 of weights [L H T T], rows summing to 1: [L T T]."""
    mixed = weights.astype(np.float64).mean(1) + np.eye(weights.shape[-1])
    return mixed / mixed.sum(-1, keepdims=True)


def rollout(weights: np.ndarray) -> np.ndarray:
    """Return attention rollout: how much each token draws on each input, through all layers.

    Args:
        weights: [L H T T], of `attention`.

    Returns:
        float64 [L T T] after each layer; every row sums to 1.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    layers = _mix_residual(weights)
    for n in range(1, len(layers)):
        layers[n] = layers[n] @ layers[n - 1]
    return layers


def flow(weights: np.ndarray, position: int = -1) -> np.ndarray:
    """Return attention flow: the maximum flow from a token of the last layer to each input.

    Args:
        weights: [L H T T], of `attention`.
        position: of the token.

    Returns:
        float64 [T].

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    layers = _mix_residual(weights)
    L, T, _ = layers.shape
    unit = 1 << 20  # the library's flows are integers
    n, query, key = np.nonzero(np.round(layers * unit))
    # Node (n, t) is token t before layer n; edges go from after a layer to before it.
    edges = (np.round(layers[n, query, key] * unit).astype(np.int32),
             ((n + 1) * T + query, n * T + key))  # fmt: skip
    graph = coo_array(edges, shape=((L + 1) * T, (L + 1) * T)).tocsr()
    start = L * T + position % T
    return np.array([maximum_flow(graph, start, t).flow_value for t in range(T)]) / unit


# --- what heads do ---------------------------------------------------------------------------


def previous_token_scores(weights: np.ndarray) -> np.ndarray:
    """Return the mean weight on the token just before, of weights [L H T T]: [L H]."""
    return np.diagonal(weights, -1, axis1=-2, axis2=-1).mean(-1)


def make_repeated_tokens(
    model: LanguageModel, length: int = 25, rows: int = 4, seed: int = 0
) -> np.ndarray:
    """Return bos and random tokens that occur twice: int32 [B 1+2*length].

    Raises:
        ConfigError: they do not fit the context.
    """
    cfg, tokenizer = model.config.model, model.tokenizer
    if 2 * length + 1 > cfg.context:
        raise ConfigError(
            f"length={length} twice and bos do not fit model.context={cfg.context}: "
            f"at most {(cfg.context - 1) // 2}."
        )
    ids = np.flatnonzero(tokenizer.lengths)  # special tokens have no bytes
    half = np.random.default_rng(seed).choice(ids, (rows, length))
    return np.concatenate([np.full((rows, 1), tokenizer.bos), half, half], 1).astype(np.int32)


def induction_scores(
    model: LanguageModel, length: int = 25, rows: int = 4, seed: int = 0
) -> np.ndarray:
    """Return for every head the mean weight on the token that followed last time: float32 [L H].

    On random tokens that are repeated, an induction head looks from a token to the one after its
    earlier occurrence.

    Args:
        length: tokens before they are repeated. rows: texts. seed: of the random tokens.

    Source: Olsson et al. 2022, arXiv:2209.11895, "prefix matching".
    """
    find_attention_layers(model)
    model = in_float32(model)
    cfg = model.config.model
    tokens = jnp.asarray(make_repeated_tokens(model, length, rows, seed))
    with use_mesh_of(model.params):
        _, found = capture_batch(
            cfg, model.params, tokens, make_whole_coords(cfg, tokens),
            ["layers.*.mixer.weights"],
        )  # fmt: skip
        layers = np.stack([np.asarray(x).mean(0) for x in fetch(found).values()])  # [L H T T]
    stripe = np.diagonal(layers, 1 - length, axis1=-2, axis2=-1)  # query t, key t - length + 1
    return stripe[..., 2:].mean(-1)  # from the first query of the second half on


def induction_loss(
    model: LanguageModel,
    ablate: Iterable[tuple[int, int]] = (),
    length: int = 25,
    rows: int = 4,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the mean loss on random tokens, the first time and when they are repeated, nats.

    A model that copies from its context has a far lower second loss.

    Args:
        ablate: heads (layer, head) whose outputs are replaced by their mean over the tokens.
    """
    require_vocab_scores(model)
    model = in_float32(model)
    cfg = model.config.model
    tokens = jnp.asarray(make_repeated_tokens(model, length, rows, seed))
    with use_mesh_of(model.params):
        hidden, _ = capture_batch(
            cfg, model.params, tokens, make_whole_coords(cfg, tokens), [],
            patches=ablate_heads(ablate),
        )  # fmt: skip
        logp = jax.nn.log_softmax(jit_logits(cfg, model.params, hidden)[:, :-1], axis=-1)
        losses = -np.asarray(fetch(jnp.take_along_axis(logp, tokens[:, 1:, None], -1)))[..., 0]
    return float(losses[:, 1:length].mean()), float(losses[:, length + 1 :].mean())


def ablate_heads(heads: Iterable[tuple[int, int]]) -> dict[str, "MeanHeads"]:
    """Return patches that replace the outputs of heads (layer, head) by their mean over tokens."""
    by_layer: dict[int, list[int]] = {}
    for n, head in heads:
        by_layer.setdefault(int(n), []).append(int(head))
    return {f"layers.{n}.mixer.z": MeanHeads(tuple(hs)) for n, hs in by_layer.items()}


class MeanHeads:
    """Replace z [B T H K] of some heads by its mean over tokens. Equal ones compile once."""

    def __init__(self, heads: tuple[int, ...]):
        self.heads = heads

    def __call__(self, z: jax.Array) -> jax.Array:
        at = jnp.array(self.heads)
        return z.at[:, :, at].set(z[:, :, at].mean(1, keepdims=True))

    def __eq__(self, other) -> bool:
        return isinstance(other, MeanHeads) and other.heads == self.heads

    def __hash__(self) -> int:
        return hash(self.heads)
