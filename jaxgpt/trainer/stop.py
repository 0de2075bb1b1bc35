"""Ctrl-C and SIGTERM: the run ends after the step in hand, the same step in every process.

Where there are several processes, the one that hears a signal tells the others, and each says in
which step it is. They stop after the one that follows the furthest of them. JAX's preemption
service does the same, but swallows SIGTERM outside of the loop, and does not know Ctrl-C.
"""

import signal
import threading
from contextlib import suppress
from typing import Any

from jaxgpt import hosts


class Stop:
    """Hears the signals. The first one is kept in `name`; a second one is obeyed."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.name = ""  # of the signal that the run stops for
        self._before: dict[int, Any] = {}

    def __enter__(self):
        with suppress(ValueError):  # only the main thread may listen
            self._before = {s: signal.signal(s, self._hear) for s in self.SIGNALS}
        return self

    def _hear(self, number, frame):
        self.heard(signal.Signals(number).name)
        self._deaf()

    def _deaf(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._deaf()

    def heard(self, name: str):
        """A signal has come to this process."""
        self.name = name

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, which has been begun. To be asked at every step."""
        return bool(self.name)


class StopTogether(Stop):
    """As `Stop`, for several processes: `name` is set in the step in which all of them stop.

    No process waits for the devices of another here. The thread that exchanges the steps holds the
    lock meanwhile, so no process begins more than one step after it has told its own.
    """

    def __init__(self, step: int):
        super().__init__()
        self._heard = ""
        self._step, self._last, self._why = step, -1, ""
        self._lock = threading.Lock()
        self._call = hosts.Call("stop")
        self._thread = threading.Thread(target=self._agree, name="stop", daemon=True)

    def __enter__(self):
        self._thread.start()
        return super().__enter__()

    def __exit__(self, kind, *_):
        super().__exit__()
        if kind is None:  # otherwise the others may never come
            self._call.say("")
            self._thread.join()

    def heard(self, name: str):
        self._heard = name

    def reached(self, step: int) -> bool:
        if self._heard:
            self._call.say(self._heard)
            self._heard = ""
        with self._lock:
            self._step = step
            if step == self._last:
                self.name = self._why
        return bool(self.name)

    def _agree(self):
        why = self._call.wait()
        with self._lock:
            steps = hosts.exchange("stop after", str(self._step))
            self._last, self._why = max(map(int, steps)) + 1, why


def listen(step: int) -> Stop:
    """What hears signals for a run that has done so many steps: use it in a `with`."""
    return StopTogether(step) if hosts.count() > 1 else Stop()
