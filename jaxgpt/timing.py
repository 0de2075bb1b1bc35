"""How fast text is generated: the time to the first token and the decoding rate, apart.

Compilation happens once in a process, so it is measured and named, and in neither.
"""

import functools
import time
from collections.abc import Callable

import jax

_COMPILE_EVENTS = "/jax/core/compile/"


class CompileClock:
    """The seconds that this process has spent on tracing and compiling.

    JAX reports each part of a compilation when it ends, and a part may lie inside another: time
    that is counted already is not counted again.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.seconds, self._end = now, 0.0, 0.0
        self._spans: list[tuple[float, float]] = []

    def add(self, event: str, duration_secs: float, **_: str | int):
        """Count a part of a compilation that ends now."""
        if not event.startswith(_COMPILE_EVENTS):
            return
        end = self.now()
        begin = end - duration_secs
        while self._spans and self._spans[-1][0] >= begin:  # parts of this one
            first, last = self._spans.pop()
            self.seconds -= last - first
        begin = max(begin, self._spans[-1][1]) if self._spans else begin
        self._spans.append((begin, end))
        self.seconds += end - begin


@functools.cache
def get_compile_clock() -> CompileClock:
    """Return the clock of this process, which starts when it is first asked for."""
    clock = CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock.add)
    return clock


class SpeedMeter:
    """Measures a generation: begin, and `mark` whenever tokens arrive.

    Args:
        now: seconds of a clock.
        compiled: seconds spent on compilation until now.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        compiled: Callable[[], float] | None = None,
    ):
        self._now = now
        self._compiled = compiled or (lambda: get_compile_clock().seconds)
        self._begin, self._compiled_before = now(), self._compiled()
        self.marks: list[tuple[float, int]] = []  # (seconds without compilation, tokens) of a part

    def mark(self, tokens: int):
        """Count tokens that have arrived since the last mark."""
        self.marks.append((self.total_seconds - sum(s for s, _ in self.marks), tokens))

    @property
    def compile_seconds(self) -> float:
        """Seconds of compilation since the beginning."""
        return self._compiled() - self._compiled_before

    @property
    def total_seconds(self) -> float:
        """Seconds since the beginning, without compilation."""
        return max(0.0, self._now() - self._begin - self.compile_seconds)

    def format(self) -> str:
        """Format as "200 tokens: the first in 0.05 s, then 870 tokens/s; compilation 2.1 s".

        Tokens arrive in parts, so that the first one takes as long as its part, with the prefill.
        """
        (first, count), *later = self.marks or [(0.0, 0)]
        rest, seconds = sum(n for _, n in later), sum(duration for duration, _ in later)
        text = f"{count + rest} tokens in {first:.2f} s"
        if rest and seconds > 0:
            text = f"{count + rest} tokens: the first in {first:.2f} s, then "
            text += f"{rest / seconds:,.0f} tokens/s"
        compiled = self.compile_seconds
        return text + (f"; compilation {compiled:.1f} s" if compiled >= 0.05 else "")
