"""Activations of a model on a text: read them, replace them.

    found = inspect.capture(model, "The cat sat on the mat", ["layers.*.mixer.weights"])
    found["layers.3.mixer.weights"]         [H T S]
    found.pieces                            the text of each token

Everything is computed in float32, whatever dtype the model computes in, and attention weights by
the reference kernel, whichever kernel the model was trained with.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import ModelConfig
from jaxgpt.generate import add_bos_eos, encode_text
from jaxgpt.hosts import fetch
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import Coords, EncoderInput, compute_logits
from jaxgpt.model import capture as capture_batch
from jaxgpt.score import make_whole_coords
from jaxgpt.settings import ConfigError, choose
from jaxgpt.sharding import use_mesh_of

# Of an activation [T ...]: its new value, a function of it, or a name of REPLACEMENTS.
Replacement = Callable[[jax.Array], jax.Array] | np.ndarray | jax.Array | float | str

# Of an activation [B T ...], by name. The mean is over the tokens of the text.
REPLACEMENTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "zero": jnp.zeros_like,
    "mean": lambda x: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
}


@dataclass(frozen=True)
class EncodedText:
    """A text as the tokens that a model reads: with bos, and with eos in an encoder.

    Attributes:
        tokens: int32 [T].
        pieces: what each token spells; the names of special tokens.
        source: int32 [S], the tokens of the source of an encoder_decoder, else None.
        source_pieces: what each of them spells.
    """

    tokens: np.ndarray
    pieces: tuple[str, ...]
    source: np.ndarray | None = None
    source_pieces: tuple[str, ...] = ()

    def make_batch(self, cfg: ModelConfig) -> tuple[jax.Array, Coords]:
        """Return the tokens as a batch of one row, int32 [1 T], and their coordinates."""
        row = jnp.asarray(self.tokens, jnp.int32)[None]
        return row, make_whole_coords(cfg, row)

    def make_inputs(self, cfg: ModelConfig) -> dict[str, Any]:
        """Return what the model takes beside tokens and coordinates."""
        if self.source is None:
            return {}
        row = jnp.asarray(self.source, jnp.int32)[None]
        return {"source": EncoderInput(row, make_whole_coords(cfg, row))}


def spell_tokens(model: LanguageModel, tokens: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """Return what each token spells; a part of a character is shown as its bytes, "\\xc3"."""
    tokenizer = model.tokenizer
    names = {getattr(tokenizer, kind): f"<{kind}>" for kind in ("unk", "pad", "eos", "bos")}
    names |= {token: name for name, token in tokenizer.special_ids.items()}
    spelled = []
    for token in map(int, tokens):
        if token >= tokenizer.vocab_size:
            spelled.append(f"<{model.config.model.vocab - 1 - token}>")  # a mask or a sentinel
            continue
        text = tokenizer.token_bytes[token]
        spelled.append(text.decode("utf-8", "backslashreplace") or names.get(token, f"<{token}>"))
    return tuple(spelled)


def encode(model: LanguageModel, text: str, source: str | None = None) -> EncodedText:
    """Return the tokens of a text as the model reads it.

    Args:
        text: the text; the target, for an encoder_decoder.
        source: the source of an encoder_decoder, which needs one.

    Raises:
        ConfigError: the text does not fit the context; a source is missing, or not expected.
    """
    config, tokenizer = model.config, model.tokenizer
    is_paired = config.model.family == "encoder_decoder"
    if is_paired != (source is not None):
        raise ConfigError(
            f"a model of family {config.model.family!r} "
            + ("reads a source and a target: give source=." if is_paired else "takes no source=.")
        )
    ids = encode_text(config, tokenizer, text)
    is_framed = config.model.family == "encoder"
    framed = add_bos_eos(config.model, tokenizer, ids)
    tokens = np.array(framed if is_framed else framed[:-1] or [tokenizer.bos])
    if source is None:
        return EncodedText(tokens, spell_tokens(model, tokens))
    read = np.array(add_bos_eos(config.model, tokenizer, encode_text(config, tokenizer, source)))
    return EncodedText(tokens, spell_tokens(model, tokens), read, spell_tokens(model, read))


class Activations(Mapping[str, np.ndarray]):
    """Activations of one text by name, without the batch axis: [T D], [H T S], ...

    Attributes:
        text: the tokens (`EncodedText`). tokens, pieces: of it.
        hidden: float32 [T D], the hidden states that the output head takes.
        logits: float32 [T V], of the next token; None for a model without vocabulary scores.
    """

    def __init__(self, text: EncodedText, hidden: np.ndarray, logits, found: dict):
        self.text, self.hidden, self.logits = text, hidden, logits
        self.tokens, self.pieces = text.tokens, text.pieces
        self._found = found

    def __getitem__(self, name: str) -> np.ndarray:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def stack(self, site: str, prefix: str = "") -> np.ndarray:
        """Return an activation of all layers that have it: `stack("mixer.weights")` is [L H T S].

        Args:
            site: the name after "layers.N.".
            prefix: "encoder." for the layers of the encoder of an encoder_decoder.

        Raises:
            KeyError: no layer has it, or it was not captured.
        """
        head, tail = f"{prefix}layers.", f".{site}"
        names = [n for n in self if n.startswith(head) and n[len(head) :].partition(".")[2] == site]
        if not names:
            raise KeyError(f"{head}*{tail} was not captured; there are: {', '.join(self)}.")
        return np.stack([self[name] for name in names])


def in_float32(model: LanguageModel) -> LanguageModel:
    """Return the model with all computation in float32."""
    cfg = dataclasses.replace(model.config.model, dtype="float32", products="plain")
    return dataclasses.replace(model, config=dataclasses.replace(model.config, model=cfg))


def has_vocab_scores(model: LanguageModel) -> bool:
    """Return whether the model scores the vocabulary: all but classifiers do."""
    return model.config.train.objective != "classify"


def capture(
    model: LanguageModel,
    text: str | EncodedText,
    sites: Sequence[str] = ("*",),
    *,
    source: str | None = None,
) -> Activations:
    """Return the activations of a model on a text.

    Args:
        text: a text, or what `encode` returned.
        sites: patterns of names (see `jaxgpt.model.capture`); all activations by default.
        source: of an encoder_decoder.

    Raises:
        ValueError: a pattern matches nothing in this model.
        ConfigError: see `encode`.
    """
    return patch(model, text, {}, sites, source=source)


def patch(
    model: LanguageModel,
    text: str | EncodedText,
    replacements: Mapping[str, Replacement],
    sites: Sequence[str] = (),
    *,
    source: str | None = None,
) -> Activations:
    """Run a model on a text with some activations replaced.

        inspect.patch(model, text, {"layers.1.ffn.out": "zero"}).logits
        inspect.patch(model, text, {"layers.0.mixer.z": lambda z: z.at[:, 5].set(0)})   # head 5

    Args:
        replacements: by name or pattern: a value (an array that broadcasts to the activation, or a
            number), a function from the activation, without the batch axis, to its replacement,
            "zero", or "mean" (over the tokens of this text).
        sites: what to capture of the changed run.

    Raises:
        ValueError: a name matches nothing in this model, or a replacement has another shape.
        ConfigError: see `encode`.
    """
    model = in_float32(model)
    text = text if isinstance(text, EncodedText) else encode(model, text, source)
    patches = {name: _make_patch(name, each) for name, each in replacements.items()}
    cfg = model.config.model
    tokens, coords = text.make_batch(cfg)
    with use_mesh_of(model.params):
        hidden, found = capture_batch(
            cfg, model.params, tokens, coords, list(sites), patches=patches, **text.make_inputs(cfg)
        )
        scored = jit_logits(cfg, model.params, hidden) if has_vocab_scores(model) else None
        names = list(found)  # by layer: of a tree they come back by spelling, 10 before 2
        hidden, scored, found = fetch((hidden, scored, found))
    rows = {name: np.asarray(found[name], np.float32)[0] for name in names}
    logits = None if scored is None else np.asarray(scored)[0]
    return Activations(text, np.asarray(hidden, np.float32)[0], logits, rows)


jit_logits = jax.jit(compute_logits, static_argnums=0)


def _make_patch(name: str, replacement: Replacement) -> Callable[[jax.Array], jax.Array]:
    """Return a function of the activation of a batch of one row [1 ...]."""
    if isinstance(replacement, str):
        return choose(REPLACEMENTS, replacement, f"the replacement of {name}")
    if callable(replacement):
        function = replacement
        return lambda x: jnp.asarray(function(x[0]))[None]
    value = jnp.asarray(replacement)

    def put(x: jax.Array) -> jax.Array:
        try:
            return jnp.broadcast_to(value, x.shape[1:])[None]
        except ValueError as error:
            raise ValueError(
                f"the replacement of {name} has the shape {list(value.shape)}, and the activation "
                f"{list(x.shape[1:])}."
            ) from error

    return put
