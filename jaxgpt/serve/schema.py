"""The fields of every route: a name, what it reads and what it means. The rest is refused."""

import json
from typing import Any

from jaxgpt.serve.errors import RequestError
from jaxgpt.serve.fields import (
    Field,
    biases,
    boolean,
    integer,
    make_error,
    nested,
    number,
    one_of,
    prompts,
    read_object,
    refused,
    text,
    texts,
)

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_INPUTS = 2048  # of embeddings
SEEDS = (-(2**63), 2**64 - 1)
NO_TOOLS = "this server calls no tools"


def read_content(value: Any, name: str) -> str:
    """Read the content of a message: a text, or parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise make_error(name, value, "a string or a list of parts")
    parts = [read_object(PART, part, f"{name}[{i}].") for i, part in enumerate(value)]
    return "".join(part["text"] for part in parts)


def read_messages(value: Any, name: str) -> list[dict[str, str]]:
    """Read the messages of a conversation, as chat templates take them."""
    if not isinstance(value, list) or not value:
        raise make_error(name, value, "a list of messages, at least one")
    found = [read_object(MESSAGE, message, f"{name}[{i}].") for i, message in enumerate(value)]
    return [{key: x for key, x in message.items() if x is not None} for message in found]


def read_role(value: Any, name: str) -> str:
    """Read the role of a message; the developer's instructions are those of the system."""
    role = one_of("system", "developer", "user", "assistant")(value, name)
    return "system" if role == "developer" else role


def read_response_format(value: Any, name: str) -> str:
    """Read the format of an answer: a JSON schema as text, "" for any text."""
    found = read_object(RESPONSE_FORMAT, value, f"{name}.")
    schema = found["json_schema"]
    if (schema is None) == (found["type"] == "json_schema"):
        message = f"{name}.json_schema belongs to type json_schema, and to no other."
        raise RequestError(400, message, "invalid_value", f"{name}.json_schema")
    schemas = {"text": "", "json_object": '{"type": "object"}'}
    return schemas[found["type"]] if schema is None else json.dumps(schema["schema"])


def read_schema(value: Any, name: str) -> Any:
    """Read a JSON schema: an object, or true."""
    if not isinstance(value, dict) and value is not True:
        raise make_error(name, value, "a JSON schema")
    return value


PART = {
    "type": Field(one_of("text"), "the kind of a part: this server reads text", is_required=True),
    "text": Field(text, "the text of a part", is_required=True),
}

MESSAGE = {
    "role": Field(read_role, "system, developer, user or assistant", is_required=True),
    "content": Field(read_content, "a text, or a list of parts of type text", is_required=True),
    "name": Field(text, "of the participant, for templates that write it"),
    "tool_calls": Field(refused(NO_TOOLS), ""),
    "tool_call_id": Field(refused(NO_TOOLS), ""),
    "function_call": Field(refused(NO_TOOLS), ""),
    "refusal": Field(refused("write it as content"), ""),
    "annotations": Field(refused("messages are texts"), ""),
    "audio": Field(refused("messages are texts"), ""),
}

JSON_SCHEMA = {
    "name": Field(text, "of the schema", is_required=True),
    "schema": Field(read_schema, "the JSON schema that the answer follows", is_required=True),
    "description": Field(text, "of the schema; the model does not read it"),
    "strict": Field(boolean, "answers follow the schema in any case"),
}

RESPONSE_FORMAT = {
    "type": Field(
        one_of("text", "json_object", "json_schema"), "what an answer is", is_required=True
    ),
    "json_schema": Field(nested(JSON_SCHEMA), "the schema of type json_schema"),
}

STREAM_OPTIONS = {
    "include_usage": Field(boolean, "whether a last chunk has the numbers of tokens", False),
}

MODEL = {
    "model": Field(text, "a name of /v1/models: the model, or one of its adapters"),
    "user": Field(text, "a name of the caller's user; without effect"),
}

SAMPLING = {
    **MODEL,
    "temperature": Field(number(0, 2), "softmax temperature; 0 takes the likeliest token"),
    "top_p": Field(number(0, 1), "total probability of the likeliest tokens to sample from"),
    "top_k": Field(integer(0), "sample from the k likeliest tokens; 0 = all"),
    "min_p": Field(number(0, 1), "least probability of a token, relative to the likeliest"),
    "presence_penalty": Field(number(-2, 2), "subtracted from tokens that were generated"),
    "frequency_penalty": Field(number(-2, 2), "subtracted for every time it was generated"),
    "repetition_penalty": Field(number(0.01, 100), "divides the scores of tokens that occurred"),
    "logit_bias": Field(biases, "what is added to the scores of tokens, by id", {}),
    "min_tokens": Field(integer(0), "least number of tokens before the text may end"),
    "regex": Field(text, "a regular expression that the text matches"),
    "grammar": Field(text, "a Lark grammar that the text follows"),
    "stop": Field(texts(MAX_STOPS), "strings that end the text, and are not part of it"),
    "seed": Field(integer(*SEEDS), "the same seed gives the same text; a random one by default"),
    "n": Field(integer(1, MAX_CHOICES), "texts for each prompt", 1),
    "stream": Field(boolean, "whether the text is sent as it is generated", False),
    "stream_options": Field(nested(STREAM_OPTIONS), "of a stream"),
}

COMPLETION = {
    "prompt": Field(prompts, "a text, token ids, or a list of either", is_required=True),
    "max_tokens": Field(integer(0), "most tokens to generate: 16 by default"),
    "echo": Field(boolean, "whether the text begins with the prompt", False),
    "logprobs": Field(integer(0, 5), "the likeliest tokens to return at each place"),
    **SAMPLING,
    "suffix": Field(refused("the model continues a text, and does not fill one"), ""),
    "best_of": Field(refused("ask for n texts"), ""),
}

CHAT = {
    "messages": Field(read_messages, "the conversation so far", is_required=True),
    "max_completion_tokens": Field(integer(1), "most tokens of the answer: what the context has"),
    "max_tokens": Field(integer(1), "the same, by its older name"),
    "logprobs": Field(boolean, "whether to return the log-probabilities of tokens", False),
    "top_logprobs": Field(integer(0, 20), "the likeliest tokens to return at each place"),
    "response_format": Field(read_response_format, "text, json_object or json_schema"),
    **SAMPLING,
    "tools": Field(refused(NO_TOOLS), ""),
    "tool_choice": Field(refused(NO_TOOLS), ""),
    "parallel_tool_calls": Field(refused(NO_TOOLS), ""),
    "functions": Field(refused(NO_TOOLS), ""),
    "function_call": Field(refused(NO_TOOLS), ""),
}

EMBEDDING = {
    "input": Field(prompts, "a text, token ids, or a list of either", is_required=True),
    "encoding_format": Field(one_of("float", "base64"), "of the numbers", "float"),
    "dimensions": Field(integer(1), "the width of the model: it has no other"),
    **MODEL,
}

LOOK = {
    "messages": Field(read_messages, "a conversation"),
    "prompt": Field(text, "a text, instead of a conversation"),
    **MODEL,
}
