"""From the fields of a request to rows of the engine: what is refused is refused here."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import MAX_SEED, SampleConfig
from jaxgpt.engine import Row
from jaxgpt.generate import LongPromptError, encode_prompts
from jaxgpt.serve.errors import RequestError, convert
from jaxgpt.serve.served import Served
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import StreamDecoder
from jaxgpt.tokenizer.chat_templates import TEMPLATES

COMPLETION_TOKENS = 16  # of a completion that does not give max_tokens, as OpenAI's
MIN_TEMPERATURE = 1e-4  # below it only the likeliest token has a probability
MIN_TOP_P = 1e-6  # only the likeliest token
COPIED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "regex", "grammar", "stop",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Job:
    """A text to generate.

    Attributes:
        row, sample, index, bias, top, adapter: what the engine's `submit` takes.
        decoder: decodes the tokens a second time, to find where each stands in the text; None if
            nobody asks.
        prompt: the number of its prompt in the request.
    """

    row: Row
    sample: SampleConfig
    index: int
    bias: Mapping[int, float]
    top: int
    adapter: int
    decoder: StreamDecoder | None
    prompt: int


@dataclass(eq=False)
class Plan:
    """What a request asks for.

    Attributes:
        model: the name that the answer has.
        jobs: the texts to generate, those of a prompt after each other; none if no token is asked
            for.
        count: texts in the answer.
        prompts: the tokens of every prompt.
        hidden: how many tokens at the start of every prompt are not of its text: bos.
        echo: the text of every prompt, if the answer repeats it.
        logprobs: how many of the likeliest tokens to return at each place; None = no
            log-probabilities.
        is_stream, has_usage: of a stream, and whether its last chunk has the usage.
    """

    model: str
    jobs: list[Job]
    count: int
    prompts: list[list[int]]
    hidden: list[int] = field(default_factory=list)
    echo: list[str] | None = None
    logprobs: int | None = None
    is_stream: bool = False
    has_usage: bool = False


def plan_completion(served: Served, body: Mapping[str, Any]) -> Plan:
    """Return the plan of a request of /v1/completions.

    Raises:
        RequestError: it cannot be done.
    """
    return _make_plan(
        served, body, body["prompt"], "prompt", body["max_tokens"], COMPLETION_TOKENS,
        body["logprobs"], body["echo"], "",
    )  # fmt: skip


def plan_chat(served: Served, body: Mapping[str, Any]) -> Plan:
    """Return the plan of a request of /v1/chat/completions.

    Raises:
        RequestError: it cannot be done.
    """
    limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if body[name]]
    if len(set(limits)) > 1:
        message = "max_tokens and max_completion_tokens differ: give one of them."
        raise RequestError(400, message, "invalid_value", "max_tokens")
    if body["top_logprobs"] is not None and not body["logprobs"]:
        message = "top_logprobs needs logprobs=true."
        raise RequestError(400, message, "invalid_value", "top_logprobs")
    prompt = encode_messages(served, body["messages"])
    limit = limits[0] if limits else None
    logprobs = (body["top_logprobs"] or 0) if body["logprobs"] else None
    schema = body["response_format"] or ""
    return _make_plan(
        served, body, [prompt], "messages", limit, served.window, logprobs, False, schema
    )


def encode_messages(served: Served, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the tokens of a conversation by the chat template, which writes its own bos.

    Raises:
        RequestError: there is no template, or it refuses the conversation.
    """
    check_template(served)
    try:
        tokenizer = served.model.tokenizer
        return tokenizer.encode_chat(messages, add_generation_prompt=True).tolist()
    except ConfigError as error:
        raise convert(error, "messages") from error


def check_template(served: Served):
    """Raise RequestError if the model has no chat template."""
    if not served.model.tokenizer.chat_template:
        names = "|".join(TEMPLATES)
        message = f"the model has no chat template: start the server with --template {names}."
        raise RequestError(400, message, "no_chat_template", "messages")


def _make_plan(
    served: Served, body: Mapping[str, Any], prompts: Sequence[str | Sequence[int]], param: str,
    limit: int | None, default: int, logprobs: int | None, has_echo: bool, schema: str,
) -> Plan:  # fmt: skip
    """Return the plan of prompts.

    Args:
        param: the field that has the prompts.
        limit: tokens to generate, at most; None = the server's setting, or `default`.
        logprobs, has_echo: see `Plan`.
        schema: the JSON schema of the text, "" = none.
    """
    adapter, options = served.find_number(body["model"]), body["stream_options"] or {}
    if served.engine is None:
        message = f"this model generates no text: it can {', '.join(served.model.abilities)}."
        raise RequestError(400, message, "unsupported_model", "model")
    if body["stream_options"] and not body["stream"]:
        message = "stream_options needs stream=true."
        raise RequestError(400, message, "invalid_value", "stream_options")
    if has_echo and served.model.config.model.family != "decoder":
        message = "echo: the text of an encoder_decoder does not begin with its prompt."
        raise RequestError(400, message, "unsupported_field", "echo")
    tokens = served.rules.get("tokens", default) if limit is None else limit
    sample = make_sample(served, body, max(1, min(tokens, served.window)), schema)
    bias, n = check_bias(served, body["logit_bias"]), body["n"]
    plan = Plan(
        body["model"] or served.name, [], n * len(prompts), [], logprobs=logprobs,
        is_stream=body["stream"], has_usage=options.get("include_usage", False),
    )  # fmt: skip
    for number, prompt in enumerate(prompts):
        rows = encode(served, prompt, sample, n, param)
        plan.prompts.append(list(rows[0].source or rows[0].ids))
        is_text = isinstance(prompt, str)
        plan.hidden.append((len(served.model.tokenizer.prefix) or not prompt) if is_text else 0)
        plan.jobs += [
            Job(rows[i], sample, number * n + i, bias, logprobs or 0, adapter,
                None if logprobs is None else rows[i].decoder.restart(), number)
            for i in range(n if tokens else 0)
        ]  # fmt: skip
    if has_echo:
        plan.echo = [decode_prompt(served, prompt) for prompt in prompts]
    return plan


def decode_prompt(served: Served, prompt: str | Sequence[int]) -> str:
    """Return a prompt as text.

    Raises:
        RequestError: a token of it is none of the tokenizer.
    """
    if isinstance(prompt, str):
        return prompt
    size = served.model.tokenizer.vocab_size
    if wrong := [token for token in prompt if token >= size]:
        message = f"prompt: the token {wrong[0]} has no text to echo: the tokenizer has {size}."
        raise RequestError(400, message, "invalid_value", "prompt")
    return served.model.tokenizer.decode(prompt)


def make_sample(
    served: Served, body: Mapping[str, Any], tokens: int, schema: str = ""
) -> SampleConfig:
    """Return the sampling rules of a request: its own, else those of the server.

    Raises:
        RequestError: they contradict each other.
    """
    given = {name: body[name] for name in COPIED if body[name] is not None}
    rules = {**served.rules, **given, "tokens": tokens}
    seed = body["seed"]
    if seed is not None:
        rules["seed"] = seed % (MAX_SEED + 1)
    rules.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    if schema:
        rules["json_schema"] = schema
    if rules["temperature"] < MIN_TEMPERATURE:
        rules["temperature"] = 0.0
    rules["top_p"] = max(rules["top_p"], MIN_TOP_P)
    for name, most in (("top_k", served.model.config.model.vocab), ("min_tokens", tokens)):
        rules[name] = min(rules.get(name, 0), most)
    try:
        return SampleConfig(**rules)
    except ConfigError as error:
        raise convert(error) from error


def check_bias(served: Served, bias: Mapping[int, float]) -> Mapping[int, float]:
    """Return what is added to the scores of tokens.

    Raises:
        RequestError: there is no such token.
    """
    vocab = served.model.config.model.vocab
    if wrong := [token for token in bias if token >= vocab]:
        message = f"logit_bias of token {wrong[0]}: the model has 0 to {vocab - 1}."
        raise RequestError(400, message, "invalid_value", "logit_bias")
    return bias


def encode(
    served: Served, prompt: str | Sequence[int], sample: SampleConfig, count: int, param: str
) -> list[Row]:
    """Return rows of a prompt.

    Raises:
        RequestError: it is not valid, or leaves no room for a token.
    """
    model = served.model
    try:
        rows = encode_prompts(model.config, model.tokenizer, [prompt] * count, [sample] * count)
        if len(rows[0].ids) >= served.window and not sample.slide:
            raise LongPromptError(
                f"the prompt has {len(rows[0].ids)} tokens, but {served.window} must hold it and "
                "at least one more: shorten it."
            )
    except ConfigError as error:
        cause = error.__cause__  # that of one text among several
        raise convert(cause if isinstance(cause, ConfigError) else error, param) from error
    return rows
