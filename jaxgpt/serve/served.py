"""What a server serves: a model, its adapters by name, and the engine that decodes with it."""

import contextlib
import dataclasses
import difflib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgpt.config import MAX_SEED, SampleConfig
from jaxgpt.data.conversations import with_answer_end
from jaxgpt.engine.worker import EngineWorker
from jaxgpt.language_model import LanguageModel
from jaxgpt.serve.errors import RequestError
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer.chat_templates import TEMPLATES

OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}  # of requests, where they are not `sample`'s
MODEL_ENDINGS = (".gguf", ".bin")


@dataclass(frozen=True, eq=False)
class Served:
    """A model with its engine.

    Attributes:
        model: its tokenizer has the chat template and all ends of an answer.
        choices: the choice of adapters of every name that a request may give as its `model`; the
            first is the model itself. The number of a choice is its place among all.
        engine: None if the model does not generate.
        rules: sampling rules of a request that does not give them.
        rows, slots: of the engine.
        created: when it was loaded, in seconds since 1970.
    """

    model: LanguageModel
    choices: Mapping[str, str]
    engine: EngineWorker | None
    rules: Mapping[str, Any]
    rows: int
    slots: int
    created: int

    @property
    def name(self) -> str:
        """The name of the model without any of `adapters`."""
        return next(iter(self.choices))

    @property
    def window(self) -> int:
        """The most tokens of a prompt and its continuation."""
        return min(self.slots, self.model.config.model.context)

    def find_number(self, name: str | None) -> int:
        """Return the number of the choice that a request names; None is the model itself.

        Raises:
            RequestError: there is none.
        """
        if name is None:
            return 0
        if name not in self.choices:
            near = difflib.get_close_matches(name, self.choices, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(self.choices)
            message = f"there is no model {name[:80]!r}.{hint} Known: {known}."
            raise RequestError(404, message, "model_not_found", "model")
        numbers = {choice: n for n, choice in enumerate(dict.fromkeys(self.choices.values()))}
        return numbers[self.choices[name]]

    def select(self, name: str | None) -> LanguageModel:
        """Return the model with the adapters that a request names."""
        self.find_number(name)
        choice = self.choices[name or self.name]
        return self.model if choice == self.model.adapter else self.model.switch(choice)

    def describe_models(self) -> list[dict[str, Any]]:
        """Return the rows of /v1/models."""
        row = {"object": "model", "created": self.created, "owned_by": "jaxgpt"}
        more = {"context": self.window, "abilities": list(self.model.abilities)}
        return [
            {"id": name, **row, **more, "parent": None if name == self.name else self.name}
            for name in self.choices
        ]


def name_model(path: str) -> str:
    """Return the name of a model by its path.

    >>> name_model("runs/stdlib/"), name_model("models/SmolLM2.Q4_1.gguf")
    ('stdlib', 'SmolLM2.Q4_1')
    """
    name = os.path.basename(os.path.normpath(path))
    ending = next((ending for ending in MODEL_ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending)


def prepare_tokenizer(model: LanguageModel, template: str) -> LanguageModel:
    """Return a model with a chat template, and with the token that ends an answer as an end.

    Args:
        template: the name of a built-in one, the path of a file with Jinja source, or the source;
            "" for that of the model.

    Raises:
        ConfigError: the tokenizer lacks the tokens of the template, the file cannot be read, or the
            template cannot write a message.
    """
    tokenizer = model.tokenizer
    if template:
        tokenizer = tokenizer.with_chat_template(read_template(template))
        tokenizer.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    with contextlib.suppress(ConfigError):  # without a template, or one without an end
        tokenizer = with_answer_end(tokenizer)
    return dataclasses.replace(model, tokenizer=tokenizer)


def read_template(template: str) -> str:
    """Return a template's name or source, read from a file if it is the path of one.

    Raises:
        ConfigError: it is none of these.
    """
    if template in TEMPLATES or "{{" in template or "{%" in template:
        return template
    try:
        with open(os.path.expanduser(template), encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--template {template!r:.80} is none of {', '.join(TEMPLATES)}, and no file with a "
            f"template: {error}."
        ) from error


def generate_first(engine: EngineWorker, model: LanguageModel):
    """Generate a token with a small and with a large seed, and wait for them.

    Programs that the engine has compiled may still run for the first time, and those of random keys
    are compiled by the first request of each kind: the first client would wait for them.
    """
    try:
        for seed in (0, MAX_SEED):
            engine.submit([model.tokenizer.bos], SampleConfig(tokens=1, seed=seed)).result()
    except BaseException:
        engine.close()
        raise


def serve_model(
    model: LanguageModel,
    name: str,
    *,
    rules: Mapping[str, Any] | None = None,
    template: str = "",
    adapters: Mapping[str, Any] | None = None,
    rows: int = 8,
    slots: int | None = None,
    queue: int = 256,
    chunk: int = 256,
    speculate: int = 0,
    draft: LanguageModel | None = None,
) -> Served:
    """Start the engine of a model.

    Args:
        name: of the model in /v1/models.
        rules: settings of `SampleConfig` for requests that do not give them.
        template: see `prepare_tokenizer`.
        adapters: by name, see `LanguageModel.with_adapters`; each is a model of its own.
        rows, slots, chunk, speculate, draft: see `LanguageModel.start_engine`.
        queue: requests that may wait besides those in the rows.

    Raises:
        ConfigError: the model cannot do this, or a name is given twice.
    """
    given = {**OPENAI_DEFAULTS, **(rules or {})}
    sample = SampleConfig(**given)
    if sample.beams > 1:
        raise ConfigError("beam search needs all rows: a server samples, leave sample.beams out.")
    if name in (adapters or {}):
        raise ConfigError(f"--adapter {name} has the name of the model: give another one.")
    model = prepare_tokenizer(model, template)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sample=sample))
    if adapters:
        model = model.with_adapters(adapters)
    choices = {name: model.adapter, **{key: key for key in adapters or {}}}
    has_engine = "generate" in model.abilities
    slots = min(slots or model.config.model.context, model.config.model.context)
    engine = None
    if has_engine:
        engine = model.start_engine(
            rows, slots, chunk=chunk, speculate=speculate, draft=draft, max_waiting=rows + queue,
            adapters=list(choices.values()) if adapters else None,
        )  # fmt: skip
        generate_first(engine, model)
    return Served(model, choices, engine, given, rows, slots, int(time.time()))
