"""Jobs done once and shared by processes, on this machine or on others that see the same disk.

A job leaves a record, a small JSON file that appears once all other output of the job is in place.
There is no scheduler: each process goes through all jobs and takes those that have no record and
whose lock is free. A killed process loses only the job it was running. On file systems without
working locks, two processes may do the same job and write the same files.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxgpt.script import print_text
from jaxgpt.settings import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

# Bytes of input below which starting processes, a second each, does not pay.
MIN_PARALLEL_BYTES = 1 << 25
MIN_LOG_SECONDS = 2.0  # between progress lines, at first
LogFn = Callable[[str], None]


def print_line(line: str):
    """Print the line and flush it."""
    print_text(line)


class Job(NamedTuple):
    """Something to be made once.

    Args:
        record: the path of its record; "" to make it anew every time, in the calling process.
        facts: a string that identifies its inputs. A record with other facts is stale.
        size: approximate bytes to read.
        make: makes it and returns the record, a JSON object; it can be pickled.
    """

    record: str
    facts: str
    size: int
    make: Callable[[], dict[str, Any]]


def run_jobs(jobs: Sequence[Job], workers: int, title: str, log: LogFn) -> list[dict[str, Any]]:
    """Run the jobs that have no record yet, sharing them with other processes that do the same.

    Args:
        jobs: all jobs.
        workers: processes to start if there is much to read, 0 = one per core.
        title: names the work in progress lines.
        log: receives these lines. There are none if there is nothing to do, or it is quick.

    Returns:
        The records, in the order of the jobs.

    Raises:
        ConfigError: a job rejects its input.
        OSError: a record cannot be written.
    """
    records = [read_record(job) for job in jobs]
    missing = [n for n, record in enumerate(records) if record is None]
    progress = _Progress(title, [job.size for job in jobs], missing, log)
    count = min(workers or _count_cores(), len(missing))
    if count > 1 and sum(jobs[n].size for n in missing) >= MIN_PARALLEL_BYTES:
        recorded = [n for n in missing if jobs[n].record]
        for index in _run_in_workers([jobs[n] for n in recorded], count):
            progress.mark_done(recorded[index])
    for index, record in _run_jobs_here([jobs[n] for n in missing]):
        records[missing[index]] = record
        progress.mark_done(missing[index])
    return [record for record in records if record is not None]


def read_record(job: Job) -> dict[str, Any] | None:
    """Return the job's record if it exists, has the job's facts, and all files it lists exist."""
    try:
        with open(job.record, encoding="utf-8") as file:
            record = json.load(file)
        files = (
            os.path.join(os.path.dirname(job.record), name) for name in record.get("files", ())
        )
        return record if record["facts"] == job.facts and all(map(os.path.exists, files)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_json_atomically(path: str, content: Any):
    """Write the file whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[Any]:
    """Open a binary file for writing; it is renamed to `path` if the context exits normally."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def file_lock(path: str, wait: bool = True) -> Iterator[bool]:
    """Lock `path`.lock and yield whether we hold it. The system releases it if we are killed.

    The file is removed while it is locked. A process that then waits for the removed file, or
    creates a new one, finds the job done, or does it twice.
    """
    with open(path + ".lock", "wb") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:  # this file system has no locks
            pass
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):
                os.remove(path + ".lock")


def _run_jobs_here(jobs: Sequence[Job], first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run the jobs that no other process is running, then wait for the rest.

    Yields (index, record) of each job.
    """
    indexes = [*range(first, len(jobs)), *range(first)]
    for wait in (False, True):
        remaining = []
        for index in indexes:
            record = _run_job(jobs[index], wait)
            if record is None:
                remaining.append(index)
            else:
                yield index, record
        indexes = remaining


def _run_job(job: Job, wait: bool) -> dict[str, Any] | None:
    """Return the job's record, made if missing; None if another process is making it."""
    if not job.record:
        return job.make()
    os.makedirs(os.path.dirname(job.record), exist_ok=True)
    if record := read_record(job):
        return record
    with file_lock(job.record, wait) as is_locked:
        if not is_locked:
            return None
        if record := read_record(job):
            return record
        try:
            record = {"facts": job.facts} | job.make()
            write_json_atomically(job.record, record)
        except FileNotFoundError:
            # Another process finished this job and removed the temporary file; locks are
            # unreliable on some network file systems.
            record = read_record(job)
            if record is None:
                raise
        return record


def _count_cores() -> int:
    get_affinity = getattr(os, "sched_getaffinity", None)
    return len(get_affinity(0)) if get_affinity else os.cpu_count() or 1


class _Progress:
    """Lines such as "tokenizing: 12 of 340 pieces, 768 of 21760 MB, 35.2 MB/s, 9:56 left"."""

    def __init__(self, title: str, sizes: list[int], missing: list[int], log: LogFn):
        self.title, self.sizes, self.log = title, sizes, log
        self.missing = set(missing)
        self.total_todo = self.bytes_left = sum(sizes[n] for n in missing)
        self.start_time = self.log_time = time.monotonic()

    def mark_done(self, number: int):
        if number not in self.missing:
            return
        self.missing.discard(number)
        self.bytes_left -= self.sizes[number]
        now = time.monotonic()
        seconds = max(now - self.start_time, 1e-9)
        # At growing intervals, so that logs stay short.
        if not self.missing or now - self.log_time < max(MIN_LOG_SECONDS, seconds / 20):
            return
        self.log_time = now
        rate = max(self.total_todo - self.bytes_left, 1) / seconds
        minutes, rest = divmod(int(self.bytes_left / rate), 60)
        pieces, total = len(self.sizes), sum(self.sizes)
        self.log(
            f"{self.title}: {pieces - len(self.missing)} of {pieces} pieces, "
            f"{(total - self.bytes_left) / 1e6:.0f} of {total / 1e6:.0f} MB, "
            f"{rate / 1e6:.1f} MB/s, {minutes}:{rest:02} left"
        )


# --- processes ---


def _run_in_workers(jobs: Sequence[Job], count: int) -> Iterator[int]:
    """Start processes that run the jobs; yield the index of each finished one, maybe repeatedly.

    They are plain interpreters that import only this package's data modules, neither jax nor the
    calling program. All write short lines into one pipe, which ends when the last process has
    ended. The caller does what a process that died has left undone.
    """
    read, write = os.pipe()
    processes = []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAYON_NUM_THREADS": "1",  # one core each
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as folder, os.fdopen(read, encoding="utf-8") as lines:
        path = os.path.join(folder, "jobs")
        with open(path, "wb") as file:
            pickle.dump(jobs, file)
        try:
            for number in range(count):
                call = f"run_worker({path!r}, {number / count})"
                code = f"from jaxgpt.data.work import run_worker; {call}"
                command = [sys.executable, "-c", code]
                processes.append(
                    # A new session: the caller handles Ctrl-C and terminates the workers.
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=write, env=environment,
                        start_new_session=True,
                    )
                )  # fmt: skip
            os.close(write)
            for line in lines:
                index, error = json.loads(line)
                if error:
                    raise ConfigError(error)
                yield index
        finally:
            for process in processes:
                process.terminate()
                process.wait()


def run_worker(path: str, start: float):
    """Run all jobs in a worker process, starting at this fraction of the list."""
    with open(path, "rb") as file:
        jobs = pickle.load(file)
    try:
        for index, _ in _run_jobs_here(jobs, int(start * len(jobs))):
            _report(index, "")
    except ConfigError as error:
        _report(-1, str(error)[:600])  # short enough for one atomic write to the pipe


def _report(index: int, error: str):
    """Send one line to the parent process."""
    os.write(1, (json.dumps([index, error]) + "\n").encode())
