"""A language model as one value, and what can be done with it.

    model = jaxgpt.load("runs/stdlib")
    model.generate(["def main("], temperature=0.7)[0].text
    model.score(["import os"])[0].mean
    model.embed(["import os"])[0].vectors

The methods are thin: `generate`, `score` and `predict` have the pure functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt import generate, predict, quantization, score
from jaxgpt.adapters import Adapter, make_nodes
from jaxgpt.config import Config, LoraConfig, SampleConfig
from jaxgpt.engine import DraftModel, Size
from jaxgpt.engine.worker import EngineWorker
from jaxgpt.generate import Generation, Prompt, check_vocab
from jaxgpt.hosts import fetch
from jaxgpt.lora import has_adapters, merge_params, stack_rows
from jaxgpt.model import unstack_layers
from jaxgpt.model.lowrank import attach
from jaxgpt.predict import DEFAULT_CANDIDATES, Classification, FilledMask
from jaxgpt.score import BATCH_TOKENS, Embedding, Score
from jaxgpt.settings import ConfigError, describe_unknown_key, list_fields, resolve_table
from jaxgpt.sharding import use_mesh_of
from jaxgpt.tokenizer import Tokenizer

AdapterChoice = str | None | Sequence[str | None]  # see `LanguageModel.generate`

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
        adapters: adapters that can be chosen, by name (see `with_adapters`).
        adapter: the choice that `params` has in it, such as "a" or "0.5 * a + b"; "" = none.
        base: the parameters without adapters, if there are any.
        unmerged: of a merged model, the model before.

    Raises:
        ConfigError: the tokenizer has ids that the model has no embedding for.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()
    step: int = 0
    origin: str = ""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    adapter: str = ""
    base: Any = None
    unmerged: "LanguageModel | None" = None

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
        if self.base is not None:
            return self._attach_decode(self._make_nodes([self.adapter]))
        with use_mesh_of(self.params):
            return generate.prepare_decode_params(self.config.model, self.params)

    @functools.cached_property
    def base_decode_params(self) -> Any:
        """As `decode_params`, without adapters; prepared once for all of them."""
        base = self.params if self.base is None else self.base
        with use_mesh_of(base):
            return generate.prepare_decode_params(self.config.model, base)

    @functools.cached_property
    def nonfinite_params(self) -> tuple[str, ...]:
        """The paths of the parameters with a NaN or an infinity; none can be computed with."""
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        flat = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
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
            self.config.model, self.params if self.base is None else self.base,
            kind, group, embeddings,
        )  # fmt: skip
        if self.base is None:
            return dataclasses.replace(self, params=params)
        return dataclasses.replace(self, params=params, base=params).switch(self.adapter)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sample: SampleConfig | Sequence[SampleConfig] | None = None,
        *,
        adapter: AdapterChoice = None,
        **settings,
    ) -> list[Generation]:
        """Generate the continuation of each prompt, or its target with an encoder-decoder.

        Args:
            prompts: texts, or token ids; an empty text starts a new document.
            sample: the sampling rules of all prompts, or of each; None = `config.sample`.
            adapter: the choice of adapters of all prompts, or of each: a name, "0.5 * a + b", ""
                for the base alone, None for that of the model.
            settings: changes to them, such as temperature=0.7.

        Raises:
            ConfigError: the model does not generate, a prompt does not fit the context, or there is
                no such adapter.
        """
        pieces = self.stream(prompts, sample, adapter=adapter, **settings)
        return [generate.join_pieces(row) for row in zip(*pieces, strict=True)]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sample: SampleConfig | Sequence[SampleConfig] | None = None,
        *,
        adapter: AdapterChoice = None,
        **settings,
    ) -> Iterator[list[Generation]]:
        """Do as `generate`, but yield the next piece of every row as soon as it is final."""
        self._check("generate", prompts)
        samples = self._make_samples(len(prompts), sample, settings)
        if isinstance(adapter, (list, tuple)) and len(adapter) != len(prompts):
            raise ConfigError(f"adapter has {len(adapter)} choices for {len(prompts)} prompts.")
        params, decode_params, numbers = self.select_adapters(adapter)
        return generate.stream(
            self.config, params, self.tokenizer, prompts, samples, decode_params, numbers
        )

    # --- adapters ---

    def with_adapters(self, adapters: Mapping[str, Any]) -> "LanguageModel":
        """Return this model with adapters to choose from, besides those that it has.

        Args:
            adapters: by name: an `Adapter`, a model with one, or the path of one (a run with
                adapters or a folder of peft). Each must be one of this model's parameters.

        Raises:
            ConfigError: an adapter is of another base, or does not fit.
        """
        found = resolve_table("jaxgpt.loading:load_adapters")(self, adapters)  # type: ignore
        base = self.params if self.base is None else self.base
        return self._replace(adapters={**self.adapters, **found}, base=base)

    def switch(self, adapter: str) -> "LanguageModel":
        """Return this model with another choice of its adapters in use: "" for the base alone."""
        nodes = self._make_nodes([adapter])
        return self if self.base is None else self._replace(
            adapter=adapter, params=attach(self.base, nodes)
        )  # fmt: skip

    def select_adapters(
        self, adapter: "AdapterChoice" = None
    ) -> tuple[Any, Any, Sequence[int] | None]:
        """Return the parameters with a choice of adapters in them.

        Args:
            adapter: see `generate`. If rows have different ones, each row gathers its factors: the
                batch is still one pass over the base.

        Returns:
            (the parameters, those for decoding, the number of each row's adapter if there are
            several).
        """
        choices = [adapter] if adapter is None or isinstance(adapter, str) else adapter
        rows = [self.adapter if choice is None else choice for choice in choices]
        if {*rows} <= {self.adapter}:
            return self.params, self.decode_params, None
        nodes, names = self._make_nodes(rows), list(dict.fromkeys(rows))
        numbers = [names.index(row) for row in rows] if len(names) > 1 else None
        return attach(self.base, nodes), self._attach_decode(nodes), numbers

    def _make_nodes(self, rows: Sequence[str]) -> Any:
        """Return the nodes of the choices of adapters of all rows, to be attached."""
        choices = list(dict.fromkeys(rows))
        with use_mesh_of(self.params):
            trees = [make_nodes(choice, self.adapters) for choice in choices]
            if len(trees) == 1:
                return trees[0]
            return stack_rows(trees, jnp.array([choices.index(row) for row in rows], jnp.int32))

    def _attach_decode(self, nodes: Any) -> Any:
        """Return the prepared parameters of the base with nodes in them."""
        with use_mesh_of(self.base):
            unstacked = unstack_layers(nodes) if "stack" in nodes else nodes
            return attach(self.base_decode_params, unstacked)

    def merge(
        self,
        adapter: str | None = None,
        *,
        dtype: str | None = None,
        log: Callable[[str], object] = lambda line: None,
    ) -> "LanguageModel":
        """Return this model with its adapters merged into the weights, W + scale · A B.

        They are added in float32, and cast to the dtype of the weights. A model without adapters is
        returned as it is. `unmerge` of the result gives this model back.

        Args:
            adapter: the choice to merge; None = that of the model.
            dtype: "float32" or "bfloat16", of all parameters; None = as the base is stored.
            log: takes a line about the largest rounding by the cast.
        """
        choice = self.adapter if adapter is None else adapter
        params = self.params
        if choice != self.adapter:
            params = attach(self.base, self._make_nodes([choice]))
        if not has_adapters(params) and self.base is None:
            return self
        with use_mesh_of(params):
            found = merge_params(self.config.model, params, dtype)
        log(
            f"merged {found.maps} adapted maps in float32: the largest change of a weight is "
            f"{found.change:.2g}, the largest rounding by the cast {found.rounding:.2g}"
        )
        model = found.config if dtype is None else dataclasses.replace(found.config, dtype=dtype)
        config = dataclasses.replace(self.config, model=model, lora=LoraConfig())
        return dataclasses.replace(
            self, config=config, params=found.params, adapters={}, adapter="", base=None,
            unmerged=self,
        )  # fmt: skip

    def unmerge(self) -> "LanguageModel":
        """Return the model that `merge` was called on, exactly.

        Raises:
            ConfigError: this model is not the result of a merge.
        """
        if self.unmerged is None:
            raise ConfigError("this model is not merged: only what `merge` returned is unmerged.")
        return self.unmerged

    def _replace(self, **changes) -> "LanguageModel":
        """Return a copy with changes, which keeps the prepared parameters of the base."""
        new = dataclasses.replace(self, **changes)
        before = self.__dict__
        name = "base_decode_params" if "base_decode_params" in before else "decode_params"
        if name in before and (self.base is not None) == (name == "base_decode_params"):
            new.__dict__["base_decode_params"] = before[name]
        return new

    def start_engine(
        self,
        rows: int = 8,
        slots: int | None = None,
        *,
        source: int | None = None,
        chunk: int = 256,
        speculate: int = 0,
        draft: "LanguageModel | None" = None,
        max_waiting: int = 1024,
        adapters: AdapterChoice = None,
    ) -> EngineWorker:
        """Start a thread that decodes requests of many threads at once; see `EngineWorker`.

            with model.start_engine(rows=8) as engine:
                for piece in engine.submit("def main(", model.config.sample):
                    print(piece.text)

        Args:
            rows: requests that decode at once.
            slots: tokens of a row, prompt and output; None = the context of the model.
            source: tokens of an encoder-decoder's source; None = the context.
            chunk: tokens of a prompt that are read at once.
            speculate: tokens that are guessed at once; 0 = none.
            draft: a smaller model with the same tokenizer that guesses; None looks them up.
            max_waiting: requests that may wait for a row.
            adapters: the choices of adapters that requests have by their number; see `generate`.

        All rows have the cache of `config.sample.cache`.

        Raises:
            ConfigError: the model does not generate, or cannot do this.
        """
        self._check("generate", [])
        cfg = self.config.model
        has_source = cfg.family == "encoder_decoder"
        size = Size(
            rows,
            min(slots or cfg.context, cfg.context),
            (source or cfg.context) if has_source else 0,
            chunk,
            speculate,
            self.config.sample.cache,
        )
        guesser = None if draft is None else DraftModel(draft.config.model, draft.decode_params)
        params = self.select_adapters(adapters)[1]
        return generate.start_worker(
            self.config, params, self.tokenizer, size, guesser, max_waiting
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
