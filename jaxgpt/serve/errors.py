"""Errors of requests, in the shape that clients of OpenAI read."""

from collections.abc import Mapping
from typing import Any

from jaxgpt.generate import LongPromptError
from jaxgpt.settings import ConfigError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what would be right.
        code: a word for programs.
        param: the field that is wrong, None if it is no field.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else
                         "invalid_request_error")  # fmt: skip
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def make_unavailable(message: str, code: str) -> RequestError:
    """Return the error of a server that takes no requests now."""
    return RequestError(503, message, code, headers={"Retry-After": "5"})


def convert(error: BaseException, param: str | None = None) -> RequestError:
    """Return the error of a request for one of the library.

    Args:
        error: a ConfigError is the client's; the message of any other one is not shown.
        param: the field that it is about, if that is known.
    """
    if isinstance(error, RequestError):
        return error
    if not isinstance(error, ConfigError):
        return RequestError(500, "the server failed to answer this request.", "internal_error")
    if isinstance(error, LongPromptError) or isinstance(error.__cause__, LongPromptError):
        return RequestError(400, str(error), "context_length_exceeded", param)
    message = str(error).replace("sample.json_schema", "response_format").replace("sample.", "")
    return RequestError(400, message, "invalid_value", param)
