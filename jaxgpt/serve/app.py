"""The routes of a server."""

import asyncio
import base64
import contextlib
import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgpt.generate import TextError
from jaxgpt.optional import require
from jaxgpt.score import embed
from jaxgpt.serve import results, schema
from jaxgpt.serve.choices import Choices
from jaxgpt.serve.errors import RequestError, convert
from jaxgpt.serve.fields import Field, read_object
from jaxgpt.serve.http import (
    LOOPBACK_HOSTS,
    USER,
    ClientLeftError,
    EventStream,
    Gate,
    convert_and_log,
    log_failure,
    parse_json,
    read_body,
    respond,
    respond_error,
    respond_json,
    run_until_disconnect,
)
from jaxgpt.serve.jobs import check_template, plan_chat, plan_completion
from jaxgpt.serve.results import Flavor, Place
from jaxgpt.serve.served import Served
from jaxgpt.serve.service import Service
from jaxgpt.serve.writer import Writer, list_places
from jaxgpt.settings import ConfigError

# Pages run what is in them, and talk to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; frame-src 'self' blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
LONG_BODY_BYTES = 2**16  # are parsed in a thread
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}


def make_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = LOOPBACK_HOSTS,
    origins: Sequence[str] = (),
    log: Callable[[str], object] = lambda line: None,
) -> Any:
    """Return the ASGI application of a service.

    Args:
        keys, hosts, log: see `Gate`.
        origins: sites whose pages may read answers.

    Raises:
        ConfigError: the packages of the extra `serve` are not installed.
    """
    require("starlette", USER)
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    routes = Routes(service)
    app = Starlette(
        routes=[
            Route("/", routes.show_page),
            Route("/health", routes.show_health),
            Route("/metrics", routes.show_metrics),
            Route("/v1/models", routes.list_models),
            Route("/v1/models/{name:path}", routes.show_model),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/embeddings", routes.embed, methods=["POST"]),
            Route("/look", routes.look, methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _handle_error, HTTPException: _handle_missing,
            ClientLeftError: _handle_left, Exception: _handle_failure,
        },
    )  # fmt: skip
    gate = Gate(_without_reraise(app), service, keys, hosts, log)
    if not origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )


def _without_reraise(app: Any) -> Any:
    """Return an application that does not raise what it has answered by a status of 500."""

    async def run(scope, receive, send):
        with contextlib.suppress(Exception):
            await app(scope, receive, send)

    return run


async def _handle_left(request: Any, error: Exception) -> None:
    """Answer nothing: nobody reads it."""


async def _handle_error(request: Any, error: Any) -> Any:
    if error.status >= 500 and error.__cause__ is not None:
        log_failure(error)
    return respond_error(error)


async def _handle_missing(request: Any, error: Any) -> Any:
    path = request.url.path
    if error.status_code == 405:
        message, code = f"{path} does not take {request.method}.", "method_not_allowed"
    else:
        message, code = f"there is no {path[:80]!r}: /v1/models lists what is served.", "not_found"
    found = RequestError(error.status_code, message, code, headers=error.headers)
    return respond_error(found)


async def _handle_failure(request: Any, error: Exception) -> Any:
    return respond_error(convert_and_log(error))


class Routes:
    """The functions of the routes: each takes a request and returns a response."""

    def __init__(self, service: Service):
        self.service = service

    async def show_page(self, request: Any) -> Any:
        """Return the chat page."""
        page = importlib.resources.files("jaxgpt.serve").joinpath("page.html").read_bytes()
        return respond(page, 200, "text/html; charset=utf-8", PAGE_HEADERS)

    async def show_health(self, request: Any) -> Any:
        """Return whether the server answers requests."""
        status, found = self.service.describe_health()
        return respond_json(found, status)

    async def show_metrics(self, request: Any) -> Any:
        """Return the metrics, for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return respond(self.service.metrics.format(), 200, kind)

    async def list_models(self, request: Any) -> Any:
        """Return the model and its adapters."""
        rows = self.service.get_served().describe_models()
        return respond_json({"object": "list", "data": rows})

    async def show_model(self, request: Any) -> Any:
        """Return one of them."""
        served = self.service.get_served()
        name = request.path_params["name"]
        served.find_number(name)
        return respond_json(next(x for x in served.describe_models() if x["id"] == name))

    async def complete(self, request: Any) -> Any:
        """Continue texts."""
        return await self._generate(request, schema.COMPLETION, plan_completion, results.COMPLETION)

    async def chat(self, request: Any) -> Any:
        """Answer a conversation."""
        return await self._generate(request, schema.CHAT, plan_chat, results.CHAT)

    async def embed(self, request: Any) -> Any:
        """Return vectors of texts."""
        served, body = await self._read(request, schema.EMBEDDING)
        work = self.service.runner.run(embed_texts, served, body)
        return respond_json(await run_until_disconnect(request.receive, work))

    async def look(self, request: Any) -> Any:
        """Return the page of a conversation, or of a text, that shows the inside of the model."""
        served, body = await self._read(request, schema.LOOK)
        work = self.service.page_runner.run(make_page, served, body)
        page = await run_until_disconnect(request.receive, work)
        return respond(page.encode(), 200, "text/html; charset=utf-8", PAGE_HEADERS)

    async def _read(self, request: Any, fields: dict[str, Field]) -> tuple[Served, dict[str, Any]]:
        """Return what is served, and the fields of a request."""
        served = self.service.get_served()
        data = await read_body(request.receive)
        is_long = len(data) > LONG_BODY_BYTES
        body = await _run(is_long, lambda: read_object(fields, parse_json(data)))
        served.find_number(body["model"])
        return served, body

    async def _generate(
        self, request: Any, fields: dict[str, Field], make_plan: Any, flavor: Flavor
    ) -> Any:
        """Answer a request for text."""
        served, body = await self._read(request, fields)
        writer = await run_until_disconnect(
            request.receive, self._start(served, body, make_plan, flavor)
        )
        if writer.plan.is_stream:
            return EventStream(writer.stream(), writer.choices.cancel)
        try:
            return respond_json(await run_until_disconnect(request.receive, writer.collect()))
        finally:
            writer.choices.cancel()

    async def _start(self, served: Served, body: dict, make_plan: Any, flavor: Flavor) -> Writer:
        plan = await asyncio.to_thread(make_plan, served, body)
        prompt_places: list[list[Place]] = []
        if plan.echo is not None and plan.logprobs is not None:
            model = served.select(body["model"])
            prompt_places = await self.service.runner.run(list_places, model, plan)
        choices = Choices(self.service, plan.jobs)
        await choices.start()
        self.service.metrics.prompt_tokens.inc(sum(map(len, plan.prompts)))
        return Writer(served, plan, flavor, choices, prompt_places)


async def _run(is_slow: bool, function: Callable[[], Any]) -> Any:
    """Return what a function returns; a slow one runs in a thread."""
    return await asyncio.to_thread(function) if is_slow else function()


def embed_texts(served: Served, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of /v1/embeddings.

    Raises:
        RequestError: a text does not fit, or the model has no such vectors.
    """
    model, inputs = served.select(body["model"]), body["input"]
    width, wanted = model.config.model.width, body["dimensions"]
    if wanted not in (None, width):
        message = f"dimensions={wanted}: the vectors of this model have {width}."
        raise RequestError(400, message, "invalid_value", "dimensions")
    if len(inputs) > schema.MAX_INPUTS:
        message = f"input has {len(inputs)} texts: at most {schema.MAX_INPUTS} are read at once."
        raise RequestError(400, message, "invalid_value", "input")
    try:
        found = embed(model.config, model.params, model.tokenizer, inputs)
    except ConfigError as error:
        number = error.number if isinstance(error, TextError) else None
        raise convert(error, "input" if number is None else f"input[{number}]") from error
    vectors = [np.asarray(each.vectors, "<f4") for each in found]
    encode = {
        "float": lambda vector: vector.tolist(),
        "base64": lambda vector: base64.b64encode(vector.tobytes()).decode(),
    }[body["encoding_format"]]
    tokens = sum(len(each.tokens) for each in found)
    return results.make_embeddings(
        [encode(vector) for vector in vectors], body["model"] or served.name, tokens
    )


def make_page(served: Served, body: dict[str, Any]) -> str:
    """Return the look-inside page of a conversation or of a text.

    Raises:
        RequestError: neither is given, or both; or it does not fit the page.
    """
    from jaxgpt.serve.look import make_look_page

    messages, prompt = body["messages"], body["prompt"]
    if (messages is None) == (prompt is None):
        message = "give messages or prompt, one of them."
        raise RequestError(400, message, "invalid_value", "messages")
    if messages is not None:
        check_template(served)
    try:
        return make_look_page(served.select(body["model"]), messages=messages, prompt=prompt)
    except ConfigError as error:
        raise convert(error, "messages" if messages else "prompt") from error
