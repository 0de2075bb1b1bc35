"""HTTP below the routes: who may ask, bodies, JSON, event streams, and clients that leave."""

import asyncio
import contextlib
import hmac
import json
import sys
import time
import traceback
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

from jaxgpt.optional import require
from jaxgpt.script import print_text
from jaxgpt.serve.errors import RequestError, convert
from jaxgpt.serve.metrics import USER
from jaxgpt.serve.service import Service

MAX_BODY_BYTES = 4 * 2**20
MAX_DISCARDED_BYTES = 2**27  # of a body that is refused, so that the client reads why
BODY_SECONDS = 30  # in which a body must arrive
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")
OPEN_PATHS = ("/", "/health")  # that need no key
# The names of routes in metrics; every other path is "other".
PATHS = (
    *OPEN_PATHS, "/metrics", "/look", "/v1/models", "/v1/completions", "/v1/chat/completions",
    "/v1/embeddings",
)  # fmt: skip
CLIENT_LEFT = 499  # the status in metrics of a request whose client left

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ClientLeftError(Exception):
    """The client has closed the connection."""


# --- who may ask -------------------------------------------------------------------------------


def read_host(value: str) -> str:
    """Return the name of a Host header, without its port.

    >>> read_host("localhost:8000"), read_host("[::1]:80"), read_host("Example.org")
    ('localhost', '[::1]', 'example.org')
    """
    name = value.strip().lower()
    return name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]


def check_host(headers: Mapping[bytes, bytes], hosts: Sequence[str]):
    """Check that a request names this server: a page of another name may not reach it.

    Raises:
        RequestError: its Host is none of `hosts`.
    """
    host = read_host(headers.get(b"host", b"").decode("latin1"))
    if host not in hosts:
        message = f"the Host header names {host[:80]!r}: start the server with --allow-host NAME."
        raise RequestError(403, message, "host_not_allowed")


def check_key(headers: Mapping[bytes, bytes], keys: Sequence[str]):
    """Check the key of a request, in a time that does not depend on it.

    Raises:
        RequestError: it has none of `keys`, if there are any.
    """
    kind, _, given = headers.get(b"authorization", b"").partition(b" ")
    found = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
    if keys and not (kind.lower() == b"bearer" and any(found)):
        message = "the key is missing or wrong: send it as `Authorization: Bearer KEY`."
        raise RequestError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def check_content_type(headers: Mapping[bytes, bytes]):
    """Check that a body is JSON: pages of other sites cannot send that without being asked.

    Raises:
        RequestError: it is not.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        message = "a body is JSON: send it with Content-Type: application/json."
        raise RequestError(415, message, "unsupported_media_type")


class Gate:
    """Checks requests before any route sees them, counts them and writes a line about each.

    Args:
        app: takes the requests that pass.
        service: counts them.
        keys: of which a request needs one; none = nobody needs one.
        hosts: names of this server.
        log: takes lines, which never quote a request.
    """

    def __init__(
        self,
        app: Any,
        service: Service,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = LOOPBACK_HOSTS,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.app, self.service, self.log = app, service, log
        self.keys, self.hosts = tuple(keys), tuple(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        """Answer a request."""
        if scope["type"] != "http":
            return
        begin, status = time.monotonic(), [CLIENT_LEFT]

        async def send_counted(message: MutableMapping[str, Any]):
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        self.service.active += 1
        try:
            await self._pass(scope, receive, send_counted)
        finally:
            self.service.active -= 1
            self._count(scope, status[0], time.monotonic() - begin)

    async def _pass(self, scope: Scope, receive: Receive, send: Send):
        headers = dict(scope["headers"])
        try:
            check_host(headers, self.hosts)
            if scope["path"] not in OPEN_PATHS:
                check_key(headers, self.keys)
            if scope["method"] == "POST":
                check_content_type(headers)
                self.service.get_served()
        except RequestError as error:
            await discard_body(receive)
            await respond_error(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _count(self, scope: Scope, status: int, seconds: float):
        path = scope["path"]
        route = path if path in PATHS else "other"
        self.service.metrics.requests.labels(route, str(status)).inc()
        if scope["method"] == "POST":
            self.service.metrics.duration.labels(route).observe(seconds)
            self.log(f"POST {route} {status} {seconds:.3f} s")


# --- bodies and answers ------------------------------------------------------------------------


async def discard_body(receive: Receive):
    """Read the body of a request that is refused, within limits."""
    size, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            while more and size < MAX_DISCARDED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)


async def read_body(receive: Receive) -> bytes:
    """Return the body of a request.

    Raises:
        RequestError: it is too large, or too slow.
        ClientLeftError: it does not arrive.
    """
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientLeftError
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    if more:
                        await discard_body(receive)
                    most = f"a body has {MAX_BODY_BYTES:,} bytes at most."
                    raise RequestError(413, most, "body_too_large")
    except TimeoutError:
        late = f"the body did not arrive in {BODY_SECONDS} seconds."
        raise RequestError(408, late, "body_timeout") from None
    return b"".join(parts)


def parse_json(data: bytes) -> Any:
    """Return a body as JSON.

    Raises:
        RequestError: it is none.
    """

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # of UTF-8 too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        message = f"the body is not JSON: {str(reason)[:200]}"
        raise RequestError(400, message, "invalid_json") from error


def format_json(value: Any) -> bytes:
    """Return JSON as UTF-8; "?" for half a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def respond(
    data: bytes,
    status: int = 200,
    kind: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Return a response with a body of this media type."""
    require("starlette", USER)
    from starlette.responses import Response

    return Response(data, status, {"X-Content-Type-Options": "nosniff", **(headers or {})}, kind)


def respond_json(value: Any, status: int = 200) -> Any:
    """Return a response with JSON."""
    return respond(format_json(value), status)


def respond_error(error: RequestError) -> Any:
    """Return the response of an error."""
    return respond(format_json(error.body), error.status, headers=error.headers)


def log_failure(error: BaseException):
    """Write where an internal error came from, without its message, which may quote a prompt."""
    if isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = "".join(traceback.format_tb(error.__traceback__))
    print_text(f"{lines}{type(error).__name__} in a request", sys.stderr)


def convert_and_log(error: Exception) -> RequestError:
    """Return the error of a request for any other one, which is logged if it is internal."""
    found = convert(error)
    if found.status == 500:
        log_failure(error)
    return found


# --- clients that leave ------------------------------------------------------------------------


async def wait_for_disconnect(receive: Receive):
    """Return when the client has closed the connection. Its body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of some work, which is cancelled if the client leaves.

    Raises:
        ClientLeftError: it has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream:
    """A response of server-sent events: each is a JSON object, and the last is [DONE].

    Args:
        events: JSON objects; None is a comment, which shows that the connection is alive.
        close: is called at the end, also if the client leaves.
    """

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], object]):
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        """Send the events until they end or the client leaves."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # for nginx
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            with contextlib.suppress(ClientLeftError):
                await run_until_disconnect(receive, self._write(send))
        finally:
            self.close()

    async def _write(self, send: Send):
        async for data in self._format():
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _format(self) -> AsyncIterator[bytes]:
        try:
            async for event in self.events:
                yield b": wait\n\n" if event is None else b"data: " + format_json(event) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield b"data: " + format_json(convert_and_log(error).body) + b"\n\n"
