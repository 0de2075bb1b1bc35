"""The texts of one request in the engine, as an asynchronous iterator of their pieces."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from jaxgpt.engine import Generation
from jaxgpt.engine.worker import EngineBusyError, Handle
from jaxgpt.serve.errors import convert, make_unavailable
from jaxgpt.serve.jobs import Job
from jaxgpt.serve.service import Service, now

PING_SECONDS = 10.0  # without a piece, after which a stream shows that it is alive


class Choices:
    """The texts of one request.

    It is used on the event loop; `cancel` when the client has left, and at the end in any case.
    """

    def __init__(self, service: Service, jobs: Sequence[Job]):
        self._service, self._jobs = service, jobs
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Generation | BaseException]] = asyncio.Queue()
        self._lock = threading.Lock()
        self._handles: list[Handle] = []
        self._is_cancelled = False
        self._begin = now()
        self._first: dict[int, float] = {}  # when the first token of a text came
        self._tokens = [0] * len(jobs)
        self._open = set(range(len(jobs)))

    @property
    def reused(self) -> int:
        """How many tokens of the prompts the engine found in its cache."""
        first = {job.prompt: handle for job, handle in zip(self._jobs, self._handles, strict=False)}
        return sum(handle.request.reused for handle in first.values())

    async def start(self):
        """Submit all texts.

        Raises:
            RequestError: one is refused; then none is left in the engine.
        """
        self._service.reserve(len(self._jobs))
        try:
            await asyncio.to_thread(self._submit)
        except BaseException as error:
            self.cancel()
            if isinstance(error, EngineBusyError):
                raise make_unavailable("the server is shutting down.", "shutting_down") from error
            if isinstance(error, Exception):
                raise convert(error) from error
            raise

    def _submit(self):
        """Submit the texts, in a thread of its own: constraints are compiled here."""
        engine, count = self._service.engine, 0
        try:
            for number, job in enumerate(self._jobs):
                if self._is_cancelled:
                    return
                handle = engine.submit(
                    job.row, job.sample, job.index, job.bias, job.top, job.adapter
                )
                count += 1
                with self._lock:
                    self._handles.append(handle)
                    is_late = self._is_cancelled
                handle.forward(partial(self._post, self._receive, number))
                if is_late:
                    handle.cancel()
        finally:
            self._post(self._service.release, len(self._jobs) - count)

    def _post(self, function: Callable, *args):
        """Call a function on the event loop, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(function, *args)

    def _receive(self, number: int, piece: Generation | BaseException):
        """Take a piece of a text, and count it."""
        metrics, time = self._service.metrics, now()
        if isinstance(piece, Generation):
            metrics.generated_tokens.inc(len(piece.tokens))
            self._tokens[number] += len(piece.tokens)
            if number not in self._first and piece.ending != "cancelled":
                self._first[number] = time
                metrics.first_token.observe(time - self._begin)
        if isinstance(piece, BaseException) or piece.ending:
            self._open.discard(number)
            self._service.release(1, time - self._begin)
            self._count_end(number, time)
        self._queue.put_nowait((number, piece))

    def _count_end(self, number: int, time: float):
        metrics, request = self._service.metrics, self._handles[number].request
        metrics.reused_tokens.inc(request.reused)
        metrics.prefix_hits.inc(bool(request.reused))
        later = self._tokens[number] - 1
        if number in self._first and later > 0:
            metrics.next_token.observe((time - self._first[number]) / later)

    async def iterate(self) -> AsyncIterator[tuple[int, Generation] | None]:
        """Yield (number of a text, its next piece) until all texts have ended.

        None stands for PING_SECONDS without a piece.

        Raises:
            RequestError: a text has failed.
        """
        left = len(self._jobs)
        while left:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    number, piece = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(piece, BaseException):
                raise convert(piece) from piece
            if piece.ending == "cancelled":
                raise make_unavailable("the server is shutting down.", "shutting_down")
            left -= bool(piece.ending)
            yield number, piece

    def cancel(self):
        """End the texts that are left: their rows are free after the next step."""
        with self._lock:
            self._is_cancelled = True
            handles = list(enumerate(self._handles))
        for number, handle in handles:
            if number in self._open:
                handle.cancel()
                self._service.metrics.cancelled.inc()
