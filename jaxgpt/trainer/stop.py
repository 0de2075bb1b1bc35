"""Ctrl-C, SIGTERM and SIGHUP: the run ends after the current step, the same in every process.

A signal is acknowledged at once, although Python handles it only when the step, a call into XLA,
returns: the system writes its number to a socket, which a thread reads.

With several processes, the one that receives a signal broadcasts it, and all of them all-gather
their current steps. They stop one step after the maximum. JAX's preemption service does the same,
but swallows SIGTERM outside of the training loop, and does not handle Ctrl-C.
"""

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from jaxgpt import hosts


class StopSignal:
    """Signal handlers. The first signal is recorded in `name`; a second Ctrl-C interrupts at once.

    Other signals after the first have no effect: schedulers repeat SIGTERM while a run is saving.

    Args:
        log: prints a line.
    """

    # SIGHUP: the terminal is gone, as when an ssh connection is lost.
    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, log: Callable[[str], None] = print):
        self.name = ""  # of the signal for which the run stops
        self._log = log
        self._previous_handlers: dict[int, Any] = {}
        self._previous_fd = -1
        self._sockets: tuple[socket.socket, ...] = ()

    def __enter__(self):
        with suppress(ValueError):  # only the main thread may set handlers
            # A command under nohup ignores SIGHUP, and goes on doing so.
            signals = [s for s in self.SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._previous_handlers = {s: signal.signal(s, self._handle) for s in signals}
            self._sockets = read, write = socket.socketpair()
            write.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
            threading.Thread(
                target=self._acknowledge, args=[read], name="signals", daemon=True
            ).start()
        return self

    def _acknowledge(self, numbers: socket.socket):
        """Print a line for the first signal, as soon as it arrives."""
        with numbers:
            while number := numbers.recv(1):
                if number[0] in self._previous_handlers:
                    name = signal.Signals(number[0]).name
                    self._log(f"{name}: stopping after the current step, and saving")
                    return

    def _handle(self, number, frame):
        self.record_signal(signal.Signals(number).name)
        self._restore_handlers(signal.SIGINT)

    def _restore_handlers(self, *numbers: int):
        for number in numbers or self._previous_handlers:
            if number in self._previous_handlers:
                signal.signal(number, self._previous_handlers[number])

    def __exit__(self, *_):
        self._restore_handlers()
        if self._sockets:
            signal.set_wakeup_fd(self._previous_fd)
            self._sockets[1].close()

    def record_signal(self, name: str):
        """Record a signal that this process has received."""
        self.name = self.name or name

    def is_last_step(self, step: int) -> bool:
        """Return whether to stop after this step, already dispatched. Call it at every step."""
        return bool(self.name)


class SyncedStopSignal(StopSignal):
    """`StopSignal` for several processes: `name` is set in the step after which all of them stop.

    No process waits for the devices of another. The thread that all-gathers the steps holds the
    lock meanwhile, so no process starts more than one step after it has sent its own.
    """

    def __init__(self, step: int, log: Callable[[str], None] = print):
        super().__init__(log)
        self._received, self._has_ended = "", False
        self._step, self._last_step, self._agreed_name = step, -1, ""
        self._lock = threading.Lock()
        self._broadcast = hosts.Broadcast("stop")
        self._thread = threading.Thread(target=self._agree_on_last_step, name="stop", daemon=True)

    def __enter__(self):
        self._thread.start()
        return super().__enter__()

    def __exit__(self, kind, *_):
        super().__exit__()
        self._has_ended = True
        if kind is None:  # after an error, the peers may never reach this point
            self._broadcast.send("")
            self._thread.join()

    def record_signal(self, name: str):
        self._received = name

    def is_last_step(self, step: int) -> bool:
        if self._received:
            self._broadcast.send(self._received)
            self._received = ""
        with self._lock:
            self._step = step
            if step == self._last_step:
                self.name = self._agreed_name
        return bool(self.name)

    def _agree_on_last_step(self):
        try:
            name = self._broadcast.wait()
        except jax.errors.JaxRuntimeError:
            if self._has_ended:  # by an error, so that nothing was sent
                return
            raise
        with self._lock:
            steps = hosts.all_gather_text("stop after", str(self._step))
            self._last_step, self._agreed_name = max(map(int, steps)) + 1, name


def make_stop_signal(step: int, log: Callable[[str], None] = print) -> StopSignal:
    """Return the context manager that handles signals, for a run that has done `step` steps."""
    return SyncedStopSignal(step, log) if hosts.process_count() > 1 else StopSignal(log)
