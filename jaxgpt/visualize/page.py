"""One offline HTML page that shows what a model does with a text.

    page = visualize.look(model, "The cat sat on the mat")
    page.save("page.html")

The page is one file: its data, style and script are inside, and nothing is requested from anywhere.
In a notebook a page shows itself.
"""

import base64
import fnmatch
import html
import importlib.resources
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxgpt import inspect
from jaxgpt.data.work import atomic_write
from jaxgpt.inspect.activations import has_vocab_scores
from jaxgpt.inspect.attention import list_attention_layers
from jaxgpt.inspect.attribution import ATTRIBUTION_SITES, decompose_captured
from jaxgpt.inspect.lens import LENS_SITES, apply_lens
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import list_activations
from jaxgpt.settings import ConfigError

GUESSES = 5  # shown for each token
PARTS = 12  # of a logit
NEURONS = 8  # of a layer
MAX_TOKENS = 512  # the weights of all heads are in the page: their bytes grow with the square


@dataclass(frozen=True, repr=False)
class Page:
    """An HTML page.

    Attributes:
        html: its whole text.
    """

    html: str

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to a file, under its name only when it is complete."""
        try:
            with atomic_write(os.fspath(path)) as file:
                file.write(self.html.encode())
        except OSError as error:
            raise ConfigError(f"{os.fspath(path)} cannot be written: {error.strerror}.") from error

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html, quote=True)}" title="Inside a model" '
            'style="width:100%;height:48rem;border:1px solid #8888"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({len(self.html):,} characters)"


def look(
    model: LanguageModel,
    text: str | inspect.EncodedText,
    *,
    source: str | None = None,
    title: str = "",
    note: str = "",
) -> Page:
    """Return a page that shows what a model does with a text.

    It has the tokens by surprisal with the likeliest others, the attention of every head, the logit
    lens, what adds to the logit of the likeliest token, the sizes of the residual stream and the
    most active neurons, as far as the model has them.

    Args:
        text: a text, or its tokens as `inspect.encode` returns them.
        source: of an encoder_decoder.
        title: of the page; the name of the model by default.
        note: a sentence below the title, such as what was left out.

    Raises:
        ConfigError: the text has more than 512 tokens, or does not fit the context.
    """
    encoded = inspect.encode(model, text, source) if isinstance(text, str) else text
    longest = max(len(encoded.tokens), 0 if encoded.source is None else len(encoded.source))
    if longest > MAX_TOKENS:
        raise ConfigError(
            f"the text has {longest} tokens, and a page shows at most {MAX_TOKENS}: shorten it."
        )
    data = {
        "title": title or f"Inside {model.config.name or 'a model'}",
        "about": describe_model(model),
        "note": note,
        "ids": encoded.tokens.tolist(),
        "pieces": list(encoded.pieces),
        "isEncoder": model.config.model.family == "encoder",
    }
    found = inspect.capture(model, encoded, _list_sites(model))
    for part in PARTS_OF_PAGE:
        data |= part(model, found)
    template = importlib.resources.files("jaxgpt.visualize").joinpath("page.html")
    text_of_data = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return Page(template.read_text(encoding="utf-8").replace("/*DATA*/", text_of_data))


def describe_model(model: LanguageModel) -> str:
    """Return one line about a model: its family, layers and parameters."""
    cfg = model.config.model
    size = sum(x.size for x in jax.tree.leaves(model.params))
    trained = f", after {model.step:,} steps" if model.step else ""
    return (
        f"{cfg.family}, {cfg.layers} layers of width {cfg.width}, {cfg.heads} heads, "
        f"{size:,} parameters{trained}"
    )


# --- the parts of its data -------------------------------------------------------------------

# All that the parts read, as far as a model has it: the model runs once.
SITES = (*LENS_SITES, *ATTRIBUTION_SITES, "*layers.*.weights", "layers.*.ffn.hidden")


def _list_sites(model: LanguageModel) -> list[str]:
    names = list_activations(model.config.model)
    return [site for site in dict.fromkeys(SITES) if fnmatch.filter(names, site)]


def _round(x: np.ndarray, digits: int = 4) -> list:
    """Return an array as nested lists of few digits; NaN becomes None."""
    rounded = np.round(np.asarray(x, np.float64), digits)
    values = rounded.astype(object)
    values[np.isnan(rounded)] = None
    return values.tolist()


def _add_predictions(model: LanguageModel, found: inspect.Activations) -> dict[str, Any]:
    if not has_vocab_scores(model):
        return {"surprisal": None, "guesses": None, "lens": None}
    lens = apply_lens(model, found, GUESSES)
    is_causal = model.config.model.family != "encoder"
    surprisal = np.concatenate([[np.nan], -lens.target_logprobs[-1]])
    guesses = [
        [[piece, round(float(p), 5)] for piece, p in zip(pieces, probs, strict=True)]
        for pieces, probs in zip(lens.top_pieces[-1], lens.probs[-1], strict=True)
    ]
    return {
        "surprisal": _round(surprisal) if is_causal else None,
        "guesses": guesses,
        "lens": {
            "names": [name.removeprefix("layers.") for name in lens.names],
            "top": [[pieces[0] for pieces in layer] for layer in lens.top_pieces],
            "probs": _round(lens.probs[..., 0]),
            "entropy": _round(lens.entropy, 3),
            "kl": _round(lens.kl, 3),
        },
    }


# Kinds of attention: their name on the page, the prefix and the site of their activations.
ATTENTIONS = (
    ("the text to itself", "", "mixer"),
    ("the text to its source", "", "cross"),
    ("the source to itself", "encoder.", "mixer"),
)


def _add_attention(model: LanguageModel, found: inspect.Activations) -> dict[str, Any]:
    text, shown = found.text, []
    for name, prefix, site in ATTENTIONS:
        layers = list_attention_layers(model, prefix, site)
        if not layers:
            continue
        weights = found.stack(f"{site}.weights", prefix)
        queries = text.source_pieces if prefix else text.pieces
        keys = text.pieces if (prefix, site) == ("", "mixer") else text.source_pieces
        shown.append(
            {
                "name": name,
                "isSelf": site == "mixer",
                "layers": layers,
                "heads": weights.shape[1],
                "queries": list(queries),
                "keys": list(keys),
                "data": base64.b64encode(
                    np.round(255 * weights).astype(np.uint8).tobytes()
                ).decode(),
            }
        )
    return {"attention": shown}


def _add_attribution(model: LanguageModel, found: inspect.Activations) -> dict[str, Any]:
    if not has_vocab_scores(model) or model.config.model.head != "linear":
        return {"attribution": None}
    parts = decompose_captured(model, found)
    targets = parts.found.logits.argmax(-1)
    values = parts.score_each(targets)  # [P T]
    best = np.argsort(-np.abs(values), axis=0)[:PARTS]
    return {
        "attribution": {
            "names": list(parts.names),
            "targets": list(inspect.spell_tokens(model, targets)),
            "logits": _round(values.sum(0)),
            "values": [
                [[int(p), round(float(values[p, t]), 3)] for p in best[:, t]]
                for t in range(values.shape[1])
            ],
        }
    }


def _add_sizes(model: LanguageModel, found: inspect.Activations) -> dict[str, Any]:
    streams = [found["embedding"], *found.stack("residual_post")]
    names = ["in", *(str(n) for n in range(len(streams) - 1))]
    return {"norms": {"names": names, "values": _round(np.linalg.norm(streams, axis=-1), 3)}}


def _add_neurons(model: LanguageModel, found: inspect.Activations) -> dict[str, Any]:
    sites = [n for n in found if n.startswith("layers.") and n.endswith(".ffn.hidden")]
    if not sites:
        return {"neurons": None}
    layers = []
    for name in sites:
        hidden = found[name]  # [T F]
        best = np.argsort(-np.abs(hidden), axis=-1)[:, :NEURONS]
        top = [
            [[int(i), round(float(row[i]), 3)] for i in at]
            for row, at in zip(hidden, best, strict=True)
        ]
        layers.append({"layer": int(name.split(".")[1]), "top": top})
    return {"neurons": layers}


PARTS_OF_PAGE: Sequence = (
    _add_predictions,
    _add_attention,
    _add_attribution,
    _add_sizes,
    _add_neurons,
)
