"""The state of a server: what it serves, how much runs, and whether it takes requests.

All methods are called on the event loop, unless they say otherwise.
"""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxgpt.engine.worker import EngineWorker
from jaxgpt.serve.errors import RequestError, make_unavailable
from jaxgpt.serve.metrics import Metrics
from jaxgpt.serve.served import Served

STALE_SECONDS = 5  # a step of the engine that takes longer is not healthy
MAX_SLOW = 32  # embeddings, prompts and pages that wait for their turn

T = TypeVar("T")


class SerialRunner:
    """Runs slow functions in a thread, one at a time."""

    def __init__(self, name: str):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"jaxgpt-{name}")
        self._waiting = 0

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function returns.

        Raises:
            RequestError: too many wait.
        """
        if self._waiting >= MAX_SLOW:
            raise RequestError(
                429, f"{self._waiting} requests wait already: try again.", "queue_full",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        finally:
            self._waiting -= 1

    def close(self):
        """Drop what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Service:
    """A server's state.

    Attributes:
        served: the model; None while it loads.
        state: "loading", "ready" or "draining".
        rows, queue: texts that decode at once, and that may wait besides.
        metrics: see `Metrics`.
        active: requests that are being answered.
        runner, page_runner: for what computes beside the engine: embeddings and the
            log-probabilities of prompts; look-inside pages.
    """

    def __init__(self, rows: int = 8, queue: int = 256):
        self.served: Served | None = None
        self.state: str = "loading"
        self.rows: int = rows
        self.queue: int = queue
        self.active = 0
        self.runner, self.page_runner = SerialRunner("embed"), SerialRunner("page")
        self.metrics = Metrics(self)
        self._texts = 0  # in the engine, or on their way to it
        self._text_seconds = 1.0  # that a text takes, about

    @property
    def engine(self) -> EngineWorker | None:
        """The engine, None if there is none (yet)."""
        return self.served.engine if self.served else None

    @property
    def slots(self) -> int:
        """Tokens that all rows of the engine hold."""
        return self.served.slots * self.rows if self.served else 0

    def open(self, served: Served):
        """Take requests for a model. It may be called from any thread."""
        self.served = served
        if self.state == "loading":
            self.state = "ready"

    def drain(self):
        """Take no more requests."""
        self.state = "draining"

    def close(self):
        """End the engine and all that waits. It may be called from any thread, and blocks."""
        self.drain()
        for runner in (self.runner, self.page_runner):
            runner.close()
        if self.engine:
            self.engine.close()

    def get_served(self) -> Served:
        """Return what is served.

        Raises:
            RequestError: it loads, or the server shuts down.
        """
        if self.state == "draining":
            raise make_unavailable("the server is shutting down.", "shutting_down")
        if self.served is None:
            raise make_unavailable("the model is being loaded: try again soon.", "loading")
        return self.served

    def describe_health(self) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of /health."""
        engine, state = self.engine, self.state
        if state == "ready" and engine is not None:
            is_stale = engine.seconds_since_step > STALE_SECONDS
            state = "stalled" if is_stale else "ok" if engine.is_alive else "failed"
        elif state == "ready":
            state = "ok"
        more = {"running": engine.running, "waiting": engine.waiting} if engine else {}
        return (200 if state == "ok" else 503), {"status": state, **more}

    # --- texts in the engine ---

    def reserve(self, count: int):
        """Count texts that are submitted next.

        Raises:
            RequestError: there is no room for them.
        """
        most = self.rows + self.queue
        if count > most:
            message = f"the request asks for {count} texts, and this server takes {most} at most."
            raise RequestError(400, message, "too_many_texts", "n")
        if self._texts + count > most:
            waiting = max(1.0, self._texts / self.rows) * self._text_seconds
            headers = {"Retry-After": str(min(60, max(1, math.ceil(waiting))))}
            message = f"{self._texts} texts are generated or wait already: try again."
            raise RequestError(429, message, "queue_full", headers=headers)
        self._texts += count

    def release(self, count: int, seconds: float | None = None):
        """Count texts that are over.

        Args:
            seconds: that one took.
        """
        self._texts -= count
        if seconds is not None:
            self._text_seconds += 0.1 * (seconds - self._text_seconds)


def now() -> float:
    """Return a time in seconds, for differences."""
    return time.monotonic()
