"""Work that is done once and shared: by processes of this machine, and of others that see the disk.

A job leaves a record, a small JSON file that appears when everything else of the job is in place.
Nobody hands out jobs: each process goes through all of them and takes those that have no record
and that no other process holds the lock of. A killed process loses the job in its hands. Where
locks do not work, two may do the same job, and write the same.
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

from jaxgpt.settings import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

SMALL = 1 << 25  # bytes of work for which starting processes, a second each, does not pay
EVERY = 2.0  # seconds between lines of progress, at first
Say = Callable[[str], None]


def aloud(line: str):
    """Says it on the terminal, at once."""
    print(line, flush=True)


class Job(NamedTuple):
    """Something to be made once.

    Args:
        record: the path of its record; "" to make it anew every time, in the calling process.
        facts: what it is made of, a string. A record of other facts does not count.
        size: bytes to read, about.
        make: makes it and gives the record, a JSON object; it can be pickled.
    """

    record: str
    facts: str
    size: int
    make: Callable[[], dict[str, Any]]


def share(jobs: Sequence[Job], workers: int, what: str, say: Say) -> list[dict[str, Any]]:
    """Makes what is not there yet, together with whoever else is at it.

    Args:
        jobs: what is wanted.
        workers: processes to start if the work is not small, 0 = one for each core.
        what: names the work in lines of progress.
        say: takes these lines. There are none if there is nothing to do, or it is quick.

    Returns:
        The records, in the order of the jobs.

    Raises:
        ConfigError: a job refuses what it reads.
        OSError: a record can not be written.
    """
    records = [finished(job) for job in jobs]
    missing = [n for n, record in enumerate(records) if record is None]
    progress = _Progress(what, [job.size for job in jobs], missing, say)
    count = min(workers or _cores(), len(missing))
    if count > 1 and sum(jobs[n].size for n in missing) >= SMALL:
        kept = [n for n in missing if jobs[n].record]
        for place in _workers([jobs[n] for n in kept], count):
            progress.done(kept[place])
    for place, record in _work([jobs[n] for n in missing]):
        records[missing[place]] = record
        progress.done(missing[place])
    return [record for record in records if record is not None]


def finished(job: Job) -> dict[str, Any] | None:
    """The job's record, if it is there, of these facts, and all the files that it names are."""
    try:
        with open(job.record, encoding="utf-8") as file:
            record = json.load(file)
        files = (
            os.path.join(os.path.dirname(job.record), name) for name in record.get("files", ())
        )
        return record if record["facts"] == job.facts and all(map(os.path.exists, files)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_json(path: str, content: Any):
    """Writes the file whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def replacing(path: str) -> Iterator[Any]:
    """A file of bytes to write; it gets its name when the context ends well."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def alone(path: str, wait: bool = True) -> Iterator[bool]:
    """Whether we have the lock. The system gives it up for a process that is killed.

    The file is removed while it is locked. Who then waits for the old one, or makes a new one,
    finds the work done, or does it twice.
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


def _work(jobs: Sequence[Job], first: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Makes what nobody else is making, then waits for the rest: (place, record) of each job."""
    places = [*range(first, len(jobs)), *range(first)]
    for wait in (False, True):
        left = []
        for place in places:
            record = _make(jobs[place], wait)
            if record is None:
                left.append(place)
            else:
                yield place, record
        places = left


def _make(job: Job, wait: bool) -> dict[str, Any] | None:
    if not job.record:
        return job.make()
    os.makedirs(os.path.dirname(job.record), exist_ok=True)
    if record := finished(job):
        return record
    with alone(job.record, wait) as is_ours:
        if not is_ours:
            return None
        if record := finished(job):
            return record
        try:
            record = {"facts": job.facts} | job.make()
            write_json(job.record, record)
        except FileNotFoundError:  # swept away by who did the same, and finished, where locks lie
            record = finished(job)
            if record is None:
                raise
        return record


def _cores() -> int:
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


class _Progress:
    """Lines such as "tokenizing: 12 of 340 pieces, 768 of 21760 MB, 35.2 MB/s, 9:56 left"."""

    def __init__(self, what: str, sizes: list[int], missing: list[int], say: Say):
        self.what, self.sizes, self.say = what, sizes, say
        self.missing = set(missing)
        self.todo = self.left = sum(sizes[n] for n in missing)
        self.began = self.said = time.monotonic()

    def done(self, number: int):
        if number not in self.missing:
            return
        self.missing.discard(number)
        self.left -= self.sizes[number]
        now = time.monotonic()
        seconds = max(now - self.began, 1e-9)
        # Rarer and rarer, so that logs stay short.
        if not self.missing or now - self.said < max(EVERY, seconds / 20):
            return
        self.said = now
        rate = max(self.todo - self.left, 1) / seconds
        minutes, rest = divmod(int(self.left / rate), 60)
        pieces, total = len(self.sizes), sum(self.sizes)
        self.say(
            f"{self.what}: {pieces - len(self.missing)} of {pieces} pieces, "
            f"{(total - self.left) / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{minutes}:{rest:02} left"
        )


# --- processes ---


def _workers(jobs: Sequence[Job], count: int) -> Iterator[int]:
    """Starts processes that do the jobs; gives the places of those done, maybe more than once.

    They are plain interpreters that import this package's data side only, neither jax nor the
    program that called. All write short lines into one pipe, which ends when the last one has
    ended. What a process that died has left undone is for the caller to do.
    """
    read, write = os.pipe()
    started = []
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
                code = f"from jaxgpt.data.work import main; main({path!r}, {number / count})"
                command = [sys.executable, "-c", code]
                started.append(
                    # A session of its own: Ctrl-C is for the caller, who ends them.
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=write, env=environment,
                        start_new_session=True,
                    )
                )  # fmt: skip
            os.close(write)
            for line in lines:
                place, error = json.loads(line)
                if error:
                    raise ConfigError(error)
                yield place
        finally:
            for process in started:
                process.terminate()
                process.wait()


def main(path: str, first: float):
    """What a worker does: all jobs, beginning at this share of them."""
    with open(path, "rb") as file:
        jobs = pickle.load(file)
    try:
        for place, _ in _work(jobs, int(first * len(jobs))):
            _tell(place, "")
    except ConfigError as error:
        _tell(-1, str(error)[:600])  # the caller's own words, one line that no other cuts in two


def _tell(place: int, error: str):
    os.write(1, (json.dumps([place, error]) + "\n").encode())
