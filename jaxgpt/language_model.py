"""A language model as one value, and what can be done with it.

    model = jaxgpt.load("runs/stdlib")
    model.generate(["def main("], temperature=0.7)[0].text
    model.score(["import os"])[0].mean
    model.embed(["import os"])[0].vectors

The methods are thin: `generate`, `score` and `predict` have the pure functions.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxgpt import generate, predict, quantization, score
from jaxgpt.config import Config, SampleConfig
from jaxgpt.generate import Generation, Prompt, check_vocab
from jaxgpt.hosts import fetch
from jaxgpt.predict import DEFAULT_CANDIDATES, Classification, FilledMask
from jaxgpt.score import BATCH_TOKENS, Embedding, Score
from jaxgpt.settings import ConfigError, describe_unknown_key, list_fields
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import Tokenizer

_GENERATORS = ("generate", "stream", "score", "embed")
# What a model can do: by its family, and by objectives that train it for something else.
FAMILY_ABILITIES = {"decoder": _GENERATORS, "encoder_decoder": _GENERATORS, "encoder": ("embed",)}
ABILITIES: dict[str, tuple[str, ...]] = {
    "masked": ("fill", "embed"),
    "classify": ("classify", "embed"),
}


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A model: its config, its parameters and its tokenizer.

    Attributes:
        config: of the experiment that trained it; `config.sample` has the default sampling rules.
        params: the parameters, float32 or bfloat16, of which `quantize` makes integers; on one
            device or sharded over a mesh. The methods activate that mesh themselves.
        tokenizer: from text to tokens and back.
        labels: names of the classes of a classifier.
        step: training steps that the parameters have had.
        origin: the checkpoint that they were loaded from, "" if none; messages name it.

    Raises:
        ConfigError: the tokenizer has ids that the model has no embedding for.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()
    step: int = 0
    origin: str = ""

    def __post_init__(self):
        check_vocab(self.config, self.tokenizer)

    def __repr__(self) -> str:
        size, kind = quantization.count_weights(self.params), self.quantized
        kind = f" in {kind}" if kind else ""
        return f"LanguageModel({self.config.name!r}, {size:,} parameters{kind}, step {self.step})"

    @property
    def quantized(self) -> str:
        """How the parameters are quantized: "int8", "int4", or "" if they are not."""
        return quantization.find_kind(self.params)

    @functools.cached_property
    def decode_params(self) -> Any:
        """The parameters as decoding reads them, prepared once: they take memory a second time."""
        with use_mesh_of(self.params):
            return generate.prepare_decode_params(self.config.model, self.params)

    @functools.cached_property
    def nonfinite_params(self) -> tuple[str, ...]:
        """The paths of the parameters with a NaN or an infinity; none can be computed with."""
        flat = flatten_dict(self.params, sep=".")
        with use_mesh_of(self.params):
            finite = fetch(_are_finite(flat))
        return tuple(path for path in flat if not finite[path])

    @property
    def abilities(self) -> tuple[str, ...]:
        """The names of the methods that this model supports."""
        by_family = FAMILY_ABILITIES[self.config.model.family]
        return ABILITIES.get(self.config.train.objective, by_family)

    def quantize(
        self, kind: str, group: int | None = None, embeddings: bool = False
    ) -> "LanguageModel":
        """Return this model with quantized kernels, for inference in less memory.

        Args:
            kind: "int8" or "int4".
            group: inputs that share a scale; see `quantization.quantize_params`.
            embeddings: quantize the token embeddings, and so the head, to int8 as well.

        Raises:
            ConfigError: the kind or group is not known, or the model is quantized already.
        """
        self.check_finite()
        params = quantization.quantize_params(
            self.config.model, self.params, kind, group, embeddings
        )
        return dataclasses.replace(self, params=params)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sample: SampleConfig | Sequence[SampleConfig] | None = None,
        **settings,
    ) -> list[Generation]:
        """Generate the continuation of each prompt, or its target with an encoder-decoder.

        Args:
            prompts: texts, or token ids; an empty text starts a new document.
            sample: the sampling rules of all prompts, or of each; None = `config.sample`.
            settings: changes to them, such as temperature=0.7.

        Raises:
            ConfigError: the model does not generate, or a prompt does not fit the context.
        """
        return [generate.join_pieces(row) for row in
                zip(*self.stream(prompts, sample, **settings), strict=True)]  # fmt: skip

    def stream(
        self,
        prompts: Sequence[Prompt],
        sample: SampleConfig | Sequence[SampleConfig] | None = None,
        **settings,
    ) -> Iterator[list[Generation]]:
        """Do as `generate`, but yield the next piece of every row as soon as it is final."""
        self._check("generate", prompts)
        samples = self._make_samples(len(prompts), sample, settings)
        return generate.stream(
            self.config, self.params, self.tokenizer, prompts, samples, self.decode_params
        )

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        sample: SampleConfig | None = None,
        **settings,
    ) -> Generation:
        """Answer a conversation, in the words of the model's chat template.

        Args:
            messages: dicts with `role` and `content`, or one text of the user.
            sample, settings: as of `generate`.

        Raises:
            ConfigError: there is no chat template (see `Tokenizer.with_chat_template`), it refuses
                the conversation, or this does not fit the context.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
        return self.generate([prompt], sample, **settings)[0]

    def score(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        eos: bool | None = None,
        stride: int = 0,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[Score]:
        """Return the log-probability of every token of texts; see `score.score`."""
        self._check("score", texts)
        return score.score(
            self.config, self.params, self.tokenizer, texts, prompts,
            eos=eos, stride=stride, batch_tokens=batch_tokens,
        )  # fmt: skip

    def embed(
        self, texts: Sequence[str], pool: str = "mean", batch_tokens: int = BATCH_TOKENS
    ) -> list[Embedding]:
        """Return the hidden states of texts; see `score.embed`."""
        self._check("embed", texts)
        return score.embed(self.config, self.params, self.tokenizer, texts, pool, batch_tokens)

    def fill(self, texts: Sequence[str], count: int = DEFAULT_CANDIDATES) -> list[list[FilledMask]]:
        """Return the likeliest tokens at every `<mask>` of texts; see `predict.fill`."""
        self._check("fill", texts)
        return predict.fill(self.config, self.params, self.tokenizer, texts, count)

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """Return the classes of texts; see `predict.classify`."""
        self._check("classify", texts)
        return predict.classify(self.config, self.params, self.tokenizer, texts, self.labels)

    def _make_samples(self, rows: int, sample, settings: dict) -> list[SampleConfig]:
        """Return the sampling rules of each row."""
        sample = self.config.sample if sample is None else sample
        samples = [sample] * rows if isinstance(sample, SampleConfig) else list(sample)
        if len(samples) != rows:
            raise ConfigError(f"sample has {len(samples)} sets of rules for {rows} prompts.")
        known = list_fields(SampleConfig)
        for key in settings.keys() - known.keys():
            raise ConfigError(describe_unknown_key(key, known))
        return [dataclasses.replace(each, **settings) for each in samples]

    def _check(self, ability: str, texts):
        """Raise ConfigError unless the model has the ability, and `texts` is a list of texts."""
        if ability not in self.abilities:
            raise ConfigError(
                f"a model of train.objective={self.config.train.objective!r} cannot {ability}: "
                f"it can {', '.join(self.abilities)}."
            )
        if isinstance(texts, str):
            raise ConfigError(f"expected a list of texts, got one text: use [{texts[:40]!r}].")
        for text in texts:
            if not isinstance(text, str) and ability != "generate":
                raise ConfigError(f"expected a list of texts, got {text!r:.60} in it.")
        self.check_finite()

    def check_finite(self):
        """Raise ConfigError if a parameter is not finite; it names them and the checkpoint."""
        if names := self.nonfinite_params:
            few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ConfigError(
                f"{self.origin or 'this model'} has parameters with NaN or infinite values: {few} "
                f"({len(names)} of {len(jax.tree.leaves(self.params))} arrays). Nothing can be "
                "computed with them: use another checkpoint (best or latest), or train again with "
                f"a lower optimizer.lr={self.config.optimizer.lr:g}."
            )


@jax.jit
def _are_finite(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    """Return whether all values of each array, or of the parts of a quantized one, are finite."""

    def is_finite(array) -> jax.Array:
        return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(array)]).all()

    return {path: is_finite(array) for path, array in arrays.items()}
