"""Activation patching: which activations carry what makes two prompts differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.hosts import fetch
from jaxgpt.inspect.activations import EncodedText, capture, encode, in_float32
from jaxgpt.inspect.lens import require_vocab_scores
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import capture as capture_batch
from jaxgpt.model import make_head
from jaxgpt.score import make_whole_coords
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import use_mesh_of


@partial(jax.jit, static_argnums=(0, 1))
def _run_patched(cfg: ModelConfig, name: str, params, tokens, clean, masks, targets):
    """Return the logits of two tokens at the last position, one row for each mask: [B 2]."""
    B, T = len(masks), tokens.shape[0]
    rows = jnp.broadcast_to(tokens, (B, T))
    coords = make_whole_coords(cfg, rows)

    def put(x: jax.Array) -> jax.Array:
        return jnp.where(masks, clean, x)

    hidden, _ = capture_batch(cfg, params, rows, coords, [], patches={name: put})
    return make_head(cfg, params)(hidden)[:, -1][:, targets]


def activation_patching(
    model: LanguageModel,
    clean: str | EncodedText,
    corrupt: str | EncodedText,
    right: int,
    wrong: int,
    site: str = "residual_pre",
    over: str = "positions",
) -> np.ndarray:
    """Return how much of the logit difference each activation of the clean run restores.

    The corrupt prompt is run with one activation at a time taken from the run on the clean prompt.
    0: nothing is restored; 1: the logit of `right` less that of `wrong` is that of the clean run.

    Args:
        clean, corrupt: two texts of the same number of tokens.
        right, wrong: the tokens that follow the clean and the corrupt one.
        site: of each layer: "residual_pre", "mixer.out", "ffn.out", "mixer.z", ...
        over: "positions" for one activation a token, "heads" for one a head (of "mixer.z").

    Returns:
        float32 [L T], or [L H].

    Raises:
        ConfigError: the texts differ in length, or do not differ in their logit difference.

    Source: Meng et al. 2022, arXiv:2202.05262, section 2.1; Wang et al. 2022, arXiv:2211.00593.
    """
    require_vocab_scores(model)
    model = in_float32(model)
    texts = [t if isinstance(t, EncodedText) else encode(model, t) for t in (clean, corrupt)]
    sizes = [len(t.tokens) for t in texts]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"clean has {sizes[0]} tokens and corrupt {sizes[1]}: they must have the same number."
        )
    runs = [capture(model, t, [f"layers.*.{site}"]) for t in texts]
    differences = [float(r.logits[-1, right] - r.logits[-1, wrong]) for r in runs]
    if abs(differences[0] - differences[1]) < 1e-6:
        raise ConfigError("clean and corrupt have the same logit difference: nothing to restore.")
    rows = []
    with use_mesh_of(model.params):
        for name in runs[0]:
            value = jnp.asarray(runs[0][name])
            masks = _make_masks(value.shape, over, site)
            logits = _run_patched(
                model.config.model, name, model.params, jnp.asarray(texts[1].tokens), value,
                masks, jnp.array([right, wrong]),
            )  # fmt: skip
            found = np.asarray(fetch(logits), np.float64)
            rows.append(found[:, 0] - found[:, 1])
    return ((np.stack(rows) - differences[1]) / (differences[0] - differences[1])).astype(
        np.float32
    )


def _make_masks(shape: tuple[int, ...], over: str, site: str) -> jax.Array:
    """Return which numbers of an activation [T ...] each row replaces: bool [B T ...]."""
    if over == "positions":
        size = shape[0]
        return jnp.eye(size, dtype=bool).reshape(size, size, *[1] * (len(shape) - 1))
    if over != "heads" or len(shape) != 3:
        raise ConfigError(
            f"over={over!r} of {site!r} must be 'positions', or 'heads' of an activation [T H K] "
            "such as 'mixer.z'."
        )
    size = shape[1]
    return jnp.eye(size, dtype=bool).reshape(size, 1, size, 1)
