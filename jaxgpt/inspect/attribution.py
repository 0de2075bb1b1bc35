"""Which parts of a model, and which tokens of a text, make a logit what it is."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.inspect.activations import Activations, EncodedText, capture, encode, in_float32
from jaxgpt.inspect.lens import require_next_tokens, require_vocab_scores
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import capture as capture_batch
from jaxgpt.model import list_activations, make_head
from jaxgpt.model.block import WIRINGS_WITHOUT_FINAL_NORM
from jaxgpt.model.capture import find_groups
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of

SUBLAYERS = ("mixer", "cross", "ffn")
# As far as a model has them.
ATTRIBUTION_SITES = (
    "embedding", *(f"layers.*.{site}.{x}" for site in SUBLAYERS for x in ("out", "z"))
)  # fmt: skip


def get_layer_params(params, n: int, stack: str = "stack") -> Any:
    """Return the parameters of layer n of a stack, "stack" or "encoder", without the axis L."""
    for (name, key), group in find_groups(params).items():
        repeat, block = divmod(n - group.first, group.size)
        if name == stack and 0 <= repeat < group.repeats:
            return jax.tree.map(lambda x: x[repeat], params[stack][key][f"block_{block}"])  # noqa: B023
    raise IndexError(f"there is no layer {n} in {stack}.")


# --- norms with frozen statistics ------------------------------------------------------------

Linear = Callable[[np.ndarray], np.ndarray]  # [... D] -> [... D]


def freeze_rms_norm(params, x: np.ndarray, eps: float) -> tuple[Linear, np.ndarray]:
    """Return (f, c) with f linear, and f(x) + c = RMSNorm(x), x [... D]."""
    rate = np.asarray(params["scale"], np.float64) / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return lambda y: y * rate, np.zeros_like(x)


def freeze_layer_norm(params, x: np.ndarray, eps: float) -> tuple[Linear, np.ndarray]:
    """Return (f, c) with f linear, and f(x) + c = LayerNorm(x), x [... D]."""
    rate = np.asarray(params["scale"], np.float64) / np.sqrt(x.var(-1, keepdims=True) + eps)
    bias = np.asarray(params.get("bias", 0.0), np.float64) + np.zeros_like(x)
    return lambda y: (y - y.mean(-1, keepdims=True)) * rate, bias


FROZEN_NORMS: dict[str, Callable[..., tuple[Linear, np.ndarray]]] = {
    "rms": freeze_rms_norm,
    "layer": freeze_layer_norm,
}


def _freeze(cfg: ModelConfig, params, x: np.ndarray) -> tuple[Linear, np.ndarray]:
    return FROZEN_NORMS[cfg.norm](params, x, cfg.norm_eps)


# --- direct logit attribution ----------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """A logit as a sum over the parts that write into the residual stream.

    Attributes:
        names: "embedding", "layers.0.mixer.head.0", ..., "layers.0.mixer.bias", "layers.0.ffn",
            ..., "final_norm.bias", "head.bias"; a mixer without heads is one part.
        values: float32 [P], what each part adds. They sum to `logit`.
        logit: of the token, before the soft cap if the model has one.
    """

    names: tuple[str, ...]
    values: np.ndarray
    logit: float

    def by_head(self) -> np.ndarray:
        """Return the values of the attention heads, [L H]; 0 where a layer has no heads."""
        found = {}
        for name, value in zip(self.names, self.values, strict=True):
            match name.split("."):
                case ["layers", n, "mixer", "head", h]:
                    found[int(n), int(h)] = value
        size = tuple(max(axis) + 1 for axis in zip(*found, strict=True)) if found else (0, 0)
        grid = np.zeros(size, np.float32)
        for at, value in found.items():
            grid[at] = value
        return grid


def attribute_logit(
    model: LanguageModel,
    text: str | EncodedText,
    target: int | None = None,
    baseline: int | None = None,
    position: int = -1,
    *,
    source: str | None = None,
) -> Attribution:
    """Return direct logit attribution: what each head and feed-forward adds to a logit.

    The statistics of the norms that a part passes through are those of this run.

    Args:
        target: a token id; None is the likeliest one.
        baseline: a token id whose logit is subtracted: the logit difference.
        position: of the token after which the logit is taken.

    Raises:
        ConfigError: see `decompose_logits`.

    Source: Elhage et al. 2021, "A mathematical framework for Transformer circuits".
    """
    parts = decompose_logits(model, text, source=source, position=position)
    logits = parts.found.logits[position]
    target = int(np.argmax(logits)) if target is None else target
    tokens = [target] if baseline is None else [target, baseline]
    values = parts.score(np.array(tokens))  # [P N]
    values = values[:, 0] if baseline is None else values[:, 0] - values[:, 1]
    return Attribution(parts.names, values.astype(np.float32), float(values.sum()))


@dataclass(frozen=True)
class LogitParts:
    """What the parts of a model write into the hidden states that the head scores."""

    names: tuple[str, ...]  # P of them, "head.bias" last if the head has one
    values: np.ndarray  # float64 [P ... D], without "head.bias"
    rows: np.ndarray  # float64 [V D], the output embedding times the scale of the head
    bias: np.ndarray | None  # float64 [V]
    found: Activations

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Return what each part adds to the logits of tokens: float64 [P ... N]."""
        values = self.values @ self.rows[tokens].T
        if self.bias is None:
            return values
        bias = np.broadcast_to(self.bias[tokens], values.shape[1:])
        return np.concatenate([values, bias[None]])

    def score_each(self, tokens: np.ndarray) -> np.ndarray:
        """Return what each part adds to the logit of one token a position [T]: float64 [P T]."""
        values = np.einsum("ptd,td->pt", self.values, self.rows[tokens])
        return values if self.bias is None else np.concatenate([values, self.bias[tokens][None]])


def decompose_logits(
    model: LanguageModel,
    text: str | EncodedText,
    *,
    source: str | None = None,
    position: int | slice = slice(None),
) -> LogitParts:
    """Return the logits as sums over the parts that write into the residual stream.

    Raises:
        ConfigError: the head of the model is not linear (masked language models), or it has none.
    """
    require_vocab_scores(model)
    head = model.config.model.head
    if head != "linear":
        raise ConfigError(
            f"model.head={head!r} is not linear: its logits are no sum over parts of the "
            "model. Use `gradient_x_input`."
        )
    known = list_activations(model.config.model)
    sites = [site for site in ATTRIBUTION_SITES if fnmatch.filter(known, site)]
    return decompose_captured(model, capture(model, text, sites, source=source), position)


def decompose_captured(
    model: LanguageModel, found: Activations, position: int | slice = slice(None)
) -> LogitParts:
    """Decompose the logits of a capture that has ATTRIBUTION_SITES; see `decompose_logits`."""
    model = model.merge()  # weights are read below
    cfg = model.config.model
    with use_mesh_of(model.params):
        head, params = fetch((make_head(cfg, model.params), model.params))
    names, parts = decompose_residual(cfg, params, found, position)
    if cfg.wiring not in WIRINGS_WITHOUT_FINAL_NORM:
        linear, constant = _freeze(cfg, params["stack"]["norm"], parts.sum(0))
        names, parts = [*names, "final_norm.bias"], np.stack([*map(linear, parts), constant])
    rows = np.asarray(head.table, np.float64) * (head.scale or 1)
    if head.bias is None:
        return LogitParts(tuple(names), parts, rows, None, found)
    bias = np.asarray(head.bias, np.float64)
    return LogitParts((*names, "head.bias"), parts, rows, bias, found)


def decompose_residual(
    cfg: ModelConfig, params, found: Activations, position: int | slice = slice(None)
) -> tuple[list[str], np.ndarray]:
    """Return the final residual stream as a sum of parts: names, float64 [P ... D].

    Args:
        found: a capture with the embedding and, of all sublayers, outputs and z.
        position: of one token, or of several.
    """
    names, parts = ["embedding"], [found["embedding"][position].astype(np.float64)]
    for n in range(cfg.layers):
        layer = {k.removeprefix(f"layers.{n}."): v[position].astype(np.float64)
                 for k, v in found.items() if k.startswith(f"layers.{n}.")}  # fmt: skip
        weights = get_layer_params(params, n)
        sites = [s for s in SUBLAYERS if f"{s}.out" in layer]
        for site in sites:
            if cfg.wiring == "no_residual":  # what came before is not in the stream
                names, parts = [], []
            out = layer[f"{site}.out"]
            label = f"layers.{n}.{site}"
            new = _split_heads(weights.get(site, {}), layer.get(f"{site}.z"), out)
            if cfg.wiring in ("sandwich", "reordered"):
                linear, constant = _freeze(cfg, weights[f"{site}_norm_out"], out)
                new = {k: linear(v) for k, v in new.items()} | {"norm.bias": constant}
            for name, value in new.items():
                names.append(f"{label}.{name}" if name else label)
                parts.append(value)
            if cfg.wiring == "post":
                linear, constant = _freeze(cfg, weights[f"{site}_norm_out"], np.sum(parts, axis=0))
                names.append(f"{label}.norm.bias")
                parts = [*map(linear, parts), constant]
    return names, np.stack(parts)


def _split_heads(weights, z: np.ndarray | None, out: np.ndarray) -> dict[str, np.ndarray]:
    """Return what each head, and the bias, adds to the output of attention [... D]; z [... H K]."""
    if z is None or "o" not in weights:
        return {"": out}
    heads = np.einsum("...hk,hkd->h...d", z, np.asarray(weights["o"]["w"], np.float64))
    named = {f"head.{h}": row for h, row in enumerate(heads)}
    if "b" in weights["o"]:
        named["bias"] = np.broadcast_to(np.asarray(weights["o"]["b"], np.float64), out.shape)
    return named


# --- attribution to tokens -------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1))
def _compute_gradient(cfg: ModelConfig, position: int, params, batch, inputs, embedding, target):
    """Return (logit, its gradient) by the embedding [B T D], which replaces the model's own."""
    tokens, coords = batch

    def compute_logit(x):
        hidden, _ = capture_batch(
            cfg, params, tokens, coords, [], patches={"embedding": lambda _: x}, **inputs
        )
        logits = make_head(cfg, params)(hidden)
        return logits[:, position, target].sum()

    return jax.value_and_grad(compute_logit)(embedding)


def gradient_x_input(
    model: LanguageModel,
    text: str | EncodedText,
    target: int | None = None,
    position: int = -1,
    *,
    source: str | None = None,
) -> np.ndarray:
    """Return gradient times input of each token for the logit of a token: float32 [T].

    Args:
        target, position: as of `attribute_logit`.

    Source: Shrikumar et al. 2017, arXiv:1605.01713; on token embeddings Denil et al. 2014.
    """
    return integrated_gradients(model, text, target, position, source=source, steps=0)


def integrated_gradients(
    model: LanguageModel,
    text: str | EncodedText,
    target: int | None = None,
    position: int = -1,
    *,
    source: str | None = None,
    steps: int = 32,
) -> np.ndarray:
    """Return integrated gradients of each token for the logit of a token: float32 [T].

    They sum to the logit less that of embeddings that are all 0, up to the error of the sum.

    Args:
        target, position: as of `attribute_logit`.
        steps: points of the midpoint rule; 0 is the gradient at the text itself.

    Source: Sundararajan et al. 2017, arXiv:1703.01365, equation 3.
    """
    require_vocab_scores(model)
    model = in_float32(model)
    cfg = model.config.model
    text = text if isinstance(text, EncodedText) else encode(model, text, source)
    found = capture(model, text, ["embedding"])
    target = int(np.argmax(found.logits[position])) if target is None else target
    embedding = jnp.asarray(found["embedding"])[None]
    points = [1.0] if not steps else [(i + 0.5) / steps for i in range(steps)]
    total = np.zeros(embedding.shape[1:], np.float64)
    batch, inputs = text.make_batch(cfg), text.make_inputs(cfg)
    with use_mesh_of(model.params):
        for point in points:
            _, gradient = _compute_gradient(
                cfg, position, model.params, batch, inputs, point * embedding, target
            )
            total += np.asarray(fetch(gradient), np.float64)[0] / len(points)
    return (total * found["embedding"]).sum(-1).astype(np.float32)


# --- how far back a loss reaches -------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _compute_loss_gradient(cfg: ModelConfig, params, batch, inputs, embedding, position, target):
    """Return the gradient of -log p(target) at a position by the embedding [1 T D]."""
    tokens, coords = batch

    def compute_loss(x):
        hidden, _ = capture_batch(
            cfg, params, tokens, coords, [], patches={"embedding": lambda _: x}, **inputs
        )
        return -jax.nn.log_softmax(make_head(cfg, params)(hidden[0, position]))[target]

    return jax.grad(compute_loss)(embedding)


def gradient_by_position(
    model: LanguageModel,
    text: str | EncodedText,
    position: int = -1,
    *,
    source: str | None = None,
) -> np.ndarray:
    """Return how much each token moves the loss of a later one: gradient norms, float32 [T].

    The norm at t is |d loss / d x_t|, with x_t the embedding of token t as the first block takes
    it, and the loss -log p of the token at `position` given those before it. Through attention it
    hardly depends on the distance; through the state of a recurrent mixer it shrinks with every
    step, the vanishing gradient.

    Args:
        text: two tokens or more.
        position: of the token whose loss it is, the last by default. The gradient is 0 from it on.

    Raises:
        ConfigError: the model does not predict a next token, nothing precedes the position, or
            see `encode`.

    Source: Bengio et al. 1994, IEEE Trans. Neural Networks 5(2), section III; Pascanu et al. 2013,
    arXiv:1211.5063, section 2.
    """
    require_next_tokens(model)
    model = in_float32(model)
    cfg = model.config.model
    text = text if isinstance(text, EncodedText) else encode(model, text, source)
    T = len(text.tokens)
    if not (1 <= position < T or 1 - T <= position < 0):
        raise ConfigError(
            f"position={position} of {T} tokens: the loss is of a token with another before it, "
            f"1 to {T - 1}, or counted from the end, -1 to {1 - T}."
        )
    embedding = jnp.asarray(capture(model, text, ["embedding"])["embedding"])[None]
    position %= T
    with use_mesh_of(model.params):
        gradient = _compute_loss_gradient(
            cfg, model.params, text.make_batch(cfg), text.make_inputs(cfg), embedding,
            position - 1, int(text.tokens[position]),
        )  # fmt: skip
        return np.asarray(jnp.linalg.norm(fetch(gradient)[0], axis=-1))
