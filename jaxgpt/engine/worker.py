"""A thread that owns an engine, for requests of many threads."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxgpt.engine.engine import Engine
from jaxgpt.engine.request import Request
from jaxgpt.engine.text import Generation, join_pieces
from jaxgpt.settings import ConfigError


class EngineBusyError(ConfigError):
    """Too many requests wait, or the engine does not accept any more."""


class Handle:
    """A request that was submitted: iterate over its pieces, or wait for its `result`.

    Attributes:
        request: what was submitted.
    """

    def __init__(self, request: Request, cancel: Callable[["Handle"], None]):
        self.request = request
        self._cancel = cancel
        self._pieces: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._receiver: Callable[[Generation | BaseException], object] | None = None
        self._is_over = False

    def __iter__(self) -> Iterator[Generation]:
        """Yield the pieces as soon as they are final; the last has an `ending`.

        A request that was cancelled ends with the ending "cancelled".

        Raises:
            Exception: what the request has failed with.
        """
        while not self._is_over:
            yield self.get()

    def get(self, timeout: float | None = None) -> Generation:
        """Return the next piece.

        Args:
            timeout: seconds to wait for it, at most; None = no limit.

        Raises:
            queue.Empty: there was none in time.
            Exception: what the request has failed with.
        """
        piece = self._pieces.get(timeout=timeout)
        if isinstance(piece, BaseException):
            self._is_over = True
            raise piece
        self._is_over = bool(piece.ending)
        return piece

    def result(self) -> Generation:
        """Wait for the end, and return all pieces as one."""
        return join_pieces(list(self))

    def forward(self, receive: Callable[[Generation | BaseException], object]):
        """Call a function with every piece, or with the error, instead of keeping them.

        Args:
            receive: is called in the engine's thread, in order: it must return at once.
        """
        with self._lock:
            while not self._pieces.empty():
                receive(self._pieces.get())
            self._receiver = receive

    def cancel(self):
        """End the request. It may be called from any thread, and more than once."""
        self._cancel(self)

    def _put(self, piece: Generation | BaseException):
        with self._lock:
            put = self._receiver or self._pieces.put
            put(piece)


class EngineWorker:
    """A thread with an engine. All methods may be called from any thread.

    An error of one request is raised by its handle. An error of a program fails the requests that
    were in the engine; the thread goes on with an empty state.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        make_request: Callable[..., Request],
        max_waiting: int = 1024,
    ):
        """Start the thread, and wait until it has an engine.

        Args:
            make_engine: makes the engine, in the thread.
            make_request: makes a request of what is submitted, in the caller's thread.
            max_waiting: requests that may wait for a slot.

        Raises:
            Exception: what `make_engine` has raised.
        """
        self._make_request, self._max_waiting = make_request, max_waiting
        self._condition = threading.Condition()
        self._inbox: list[Handle] = []
        self._cancelled: list[Handle] = []
        self._handles: dict[Request, Handle] = {}
        self._is_closing, self._is_draining = False, False
        self._heartbeat = time.monotonic()
        self._started: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine,), name="jaxgpt-engine", daemon=True
        )
        self._thread.start()
        error = self._started.get()
        if error is not None:
            self._thread.join()
            raise error

    def __enter__(self) -> "EngineWorker":
        return self

    def __exit__(self, *error):
        self.close()

    def submit(self, prompt: Any, *args, **kwargs) -> Handle:
        """Submit a request; the arguments are those of `make_request`.

        Raises:
            ConfigError: it is not valid.
            EngineBusyError: too many requests wait, or the worker closes.
        """
        handle = Handle(self._make_request(prompt, *args, **kwargs), self._request_cancel)
        with self._condition:
            if self._is_draining or self._is_closing:
                raise EngineBusyError("the engine is shutting down: it accepts no requests.")
            if self.waiting >= self._max_waiting:
                raise EngineBusyError(f"{self._max_waiting} requests wait already: try again.")
            if self.is_idle:  # it waits, and has no heartbeat
                self._heartbeat = time.monotonic()
            self._inbox.append(handle)
            self._condition.notify()
        return handle

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._inbox) + len(self._engine.scheduler.waiting)

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return sum(slot.request is not None for slot in self._engine.scheduler.slots)

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return not self._inbox and self._engine.is_idle

    @property
    def seconds_since_step(self) -> float:
        """How long the step takes that runs now; 0 if there is nothing to do."""
        return 0.0 if self.is_idle else time.monotonic() - self._heartbeat

    @property
    def slots_used(self) -> int:
        """How many tokens the rows of running requests hold."""
        requests = [slot.request for slot in self._engine.scheduler.slots]
        return sum(len(request.row.ids) for request in requests if request is not None)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, drain: bool = False):
        """End the thread; the requests that are left are cancelled.

        Args:
            drain: whether they are finished first.
        """
        with self._condition:
            self._is_draining = True
            self._is_closing = self._is_closing or not drain
            self._condition.notify()
        self._thread.join()

    def _request_cancel(self, handle: Handle):
        with self._condition:
            self._cancelled.append(handle)
            self._condition.notify()

    # --- in the thread ---

    def _run(self, make_engine: Callable[[], Engine]):
        try:
            self._engine = make_engine()
        except BaseException as error:
            self._started.put(error)
            return
        self._started.put(None)
        last: Generation | BaseException = Generation("", (), (), "cancelled")
        try:
            self._serve()
        except BaseException as error:  # no empty state can be made: nothing can go on
            last = error
        with self._condition:
            self._is_closing = True
            self._handles |= {handle.request: handle for handle in self._inbox}
        for request in list(self._handles):
            self._deliver(request, last)

    def _serve(self):
        """Run the engine until the worker closes."""
        while self._take_messages():
            self._heartbeat = time.monotonic()
            try:
                pieces = self._engine.step()
            except Exception as error:
                self._fail_all(error)
                continue
            for request, piece in pieces:
                self._deliver(request, piece)

    def _deliver(self, request: Request, piece: Generation | BaseException):
        handle = self._handles.get(request)
        if handle is None:
            return
        if request.error is not None:
            piece = request.error
        if isinstance(piece, BaseException) or piece.ending:
            del self._handles[request]
        handle._put(piece)

    def _take_messages(self) -> bool:
        """Take what was submitted and cancelled. Return whether to go on; wait if idle."""
        with self._condition:
            while not (self._inbox or self._cancelled or self._is_closing):
                if not self._engine.is_idle:
                    break
                if self._is_draining:
                    return False
                self._condition.wait()
            inbox, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            if self._is_closing:
                self._inbox = inbox
                return False
        for handle in inbox:
            self._handles[handle.request] = handle
            try:
                self._engine.submit(handle.request)
            except Exception as error:
                self._deliver(handle.request, error)
        for handle in cancelled:
            if handle.request in self._handles:
                self._engine.cancel(handle.request)
                self._deliver(handle.request, Generation("", (), (), "cancelled"))
        return True

    def _fail_all(self, error: Exception):
        """Fail the requests that were in the engine: its state is lost."""
        failed = self._engine.list_requests()
        self._engine.drop_all()
        for request in failed:
            self._deliver(request, error)
