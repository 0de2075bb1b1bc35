"""Contestants in processes of their own, so that a benchmark can ask JAX and PyTorch in turn.

A side (JAX, PyTorch) is a process that makes contestants and runs them when asked, by lines of JSON
through a pipe. So each has its own threads, its own memory on the accelerator and its own start;
what takes too long is ended with its process, and what fails costs one line of the table.
"""

import contextlib
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

PARENT_CHECK_SECONDS = 0.5
DATA_TOKENS = 1 << 22  # that a run of the data pipeline makes into batches

Run = Callable[[], Any]  # does the work once, and returns what to wait for


@dataclass(frozen=True)
class Case:
    """A model and a batch, described by plain numbers for both sides."""

    name: str
    B: int
    T: int
    L: int
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    dtype: str  # of the arithmetic; parameters are float32
    is_llama: bool  # RMSNorm, RoPE and a gate, else GPT-2's blocks with biases
    config: Mapping[str, Any]  # of jaxgpt
    scratch: str = ""  # a folder for files

    @property
    def N(self) -> int:  # noqa: N802
        return self.B * self.T

    @property
    def products(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one block."""
        ffn = [(self.D, self.F)] * (2 if self.is_llama else 1) + [(self.F, self.D)]
        heads, kv = self.H * self.K, self.G * self.K
        return [(self.D, heads), (self.D, kv), (self.D, kv), (heads, self.D), *ffn]

    @property
    def prompt(self) -> int:
        """Number of prompt tokens."""
        return min(64, self.T // 4)

    @property
    def new(self) -> int:
        """Number of decoded tokens."""
        return min(128, self.T // 2)


@dataclass(frozen=True)
class Contestant:
    """A contestant: what it runs, with its number of parameters and peak memory."""

    run: Run
    parameters: int = 0
    peak: int = 0  # bytes of memory, if known before it runs


@dataclass(frozen=True)
class Side:
    """The contestants of a process.

    Args:
        makers: row -> name -> what makes the contestant.
        wait: until a result is there.
        is_queue: the device works off what it is given in order, so that only the end of a turn is
            awaited. On a CPU two calls would run at once.
        free: gives memory back, once all that was made is dropped.
        peak: bytes that the device held at most since this was last asked, 0 if it can not tell.
    """

    makers: Mapping[str, Mapping[str, Callable[[Case], Contestant]]]
    wait: Callable[[Any], Any]
    about: Mapping[str, str]
    is_queue: bool = False
    free: Callable[[], Any] = gc.collect
    peak: Callable[[], int] = lambda: 0


class FailedError(RuntimeError):
    """A contestant that gave no figure, and why."""


def count_cores() -> int:
    """Count the cores that this process may use."""
    has = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1


def describe_processor() -> str:
    """Return the name of the processor, its vector width as it is used, and its cores."""
    flags = os.environ.get("XLA_FLAGS", "")
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value for key, value in fields.items()}
    is_wide = "avx512f" in fields.get("flags", "") and "max_isa=AVX2" not in flags
    vectors = "AVX-512" if is_wide else "AVX2 or less"
    return f"{fields.get('model name', '?').strip()}, {vectors}, {count_cores()} cores"


# --- in the process of a side ---


def serve(side: Side, requests: IO[str], answers: IO[str]) -> None:
    """Handle requests until there are no more."""
    made: dict[str, Contestant] = {}
    for line in requests:
        try:
            answer = _handle_request(side, made, **json.loads(line))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


def end_with_parent() -> None:
    """End this process, and those that it started, when the one that asks has ended.

    A killed parent leaves its end of the pipe closed, but a contestant that runs does not read:
    so a thread watches, and the pipe itself is left to `serve`.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        if os.getpgid(0) == os.getpid():  # `Worker` starts a session for each side
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def serve_pipe(side: Callable[[], Side]) -> None:
    """`serve` on stdin and stdout; what libraries print there goes to stderr."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(side(), sys.stdin, answers)


def _handle_request(
    side: Side, made: dict[str, Contestant], do: str, row="", name="", case=None, times=1
):
    if do == "about":
        rows = {row: list(names) for row, names in side.makers.items()}
        return {"about": dict(side.about), "makers": rows}
    if do == "drop":
        made.clear()
        side.free()
        return {}
    key = f"{row}/{name}"
    if do == "make":
        side.peak()
        made[key] = one = side.makers[row][name](Case(**case))
        return {"parameters": one.parameters, "peak": one.peak}
    one = made[key]
    return {"seconds": time_runs(one.run, side, times), "peak": one.peak or side.peak()}


def time_runs(run: Run, side: Side, times: int) -> float:
    """Seconds per run."""
    start, out = time.perf_counter(), None
    for _ in range(times):
        out = run()
        if not side.is_queue:
            side.wait(out)
    side.wait(out)
    return (time.perf_counter() - start) / times


# --- in the process that asks ---


class Worker:
    """The process of a side, started at the first question and again after it was ended."""

    def __init__(self, module: str, log: IO[str], environment: Mapping[str, str] | None = None):
        self._command = [sys.executable, "-m", module]
        self._log, self._environment = log, {**os.environ, **(environment or {})}
        self._process: subprocess.Popen | None = None

    def ask(self, limit: float, **request) -> dict[str, Any]:
        """Raises FailedError if there is no answer within so many seconds, or none at all."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._log, text=True,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        process, late = self._process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            late.set()
            _kill_process_group(process)

        timer = threading.Timer(max(limit, 0.1), end)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.close()
            why = f"not done in {limit:.0f} s" if late.is_set() else "its process ended"
            raise FailedError(why)
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer

    def make(self, limit: float, row: str, name: str, case: Case) -> dict[str, Any]:
        return self.ask(limit, do="make", row=row, name=name, case=asdict(case))

    def run(self, limit: float, row: str, name: str, times: int = 1) -> dict[str, Any]:
        return self.ask(limit, do="run", row=row, name=name, times=times)

    def drop(self) -> None:
        """Drop all contestants."""
        if self._process is not None:
            self.ask(60, do="drop")

    def close(self) -> None:
        if self._process is not None:
            _kill_process_group(self._process)
            self._process.communicate()
            self._process = None


def _kill_process_group(process: subprocess.Popen) -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
