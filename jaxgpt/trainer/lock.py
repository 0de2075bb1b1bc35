"""The lock of a run folder: one run writes into a folder, readers need no lock.

The first process of a run holds `run.lock`, with its host, process id and the time. Three things
show that the holder is alive, from the surest to the slowest:

1. The system's lock on the file, which ends with the process however it ends. It is valid between
   the processes and containers of one machine, and on network file systems that support it.
2. On a file system without such locks, on the same machine: a process with that id which started
   at that time. A process id alone may have been given to another process.
3. From another machine: the holder touches the file every few seconds. Whoever finds the file
   waits for a sign of life before it takes over; clocks are not compared.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jaxgpt import hosts
from jaxgpt.settings import ConfigError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
BEAT_SECONDS = 5.0
# Without a sign of life for this long, a holder on another machine is gone. NFS caches the time of
# a file for a few seconds.
STALE_SECONDS = 30.0


_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_in_child():
    """Close the locks in a forked process, which must not hold them longer than its parent."""
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Holds the lock of a run folder, in the first process of the run.

    Args:
        run_folder: it is created.
        log: receives a line before a wait for the holder's sign of life.

    Raises:
        ConfigError: another run holds it; the message gives which one, and how to take it anyway.
        OSError: the folder cannot be written.
    """

    def __init__(self, run_folder: str, log: Callable[[str], object] = print):
        self.path = os.path.join(run_folder, NAME)
        self._fd, self._stop = -1, threading.Event()
        if hosts.process_index() > 0:
            return
        self._is_new_folder = not os.path.isdir(run_folder)
        os.makedirs(run_folder, exist_ok=True)
        self._fd = self._acquire(log)
        _held.add(self._fd)
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()

    def _acquire(self, log: Callable[[str], object]) -> int:
        """Return the descriptor of the file, locked and with this process's record in it."""
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                has_locks = _lock(fd, self.path)
                if os.fstat(fd).st_ino != _read_inode(self.path):
                    os.close(fd)  # its holder has just removed it
                    continue
                _wait_for_holder(fd, self.path, has_locks, log)
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(describe_process()).encode(), 0)
                return fd
            except BaseException:
                with suppress(OSError):
                    os.close(fd)
                raise

    def is_held(self) -> bool:
        """Return whether no other run has taken the folder: someone may have deleted the lock."""
        try:
            return self._fd < 0 or _read_inode(self.path) in (0, os.fstat(self._fd).st_ino)
        except OSError:  # a disk that cannot be reached is no sign of another run
            return True

    def _beat(self):
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):  # the disk may be full, or gone
                os.utime(self._fd)

    def close(self):
        """Release the lock and remove its file."""
        self._stop.set()
        if self._fd < 0:
            return
        with suppress(OSError):
            if self.is_held():
                os.remove(self.path)
        _held.discard(self._fd)
        with suppress(OSError):
            os.close(self._fd)
        self._fd = -1
        if self._is_new_folder:
            with suppress(OSError):  # not if anything was written
                os.rmdir(os.path.dirname(self.path))


def describe_process() -> dict[str, Any]:
    """Return what identifies this process: host, boot, pid, when it started; and the time."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "namespace": _read_namespace(),
        "pid": pid,
        "started": read_start_time(pid),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def read_start_time(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if it does not run."""
    text = _read_text(f"/proc/{pid}/stat")
    return text.rpartition(")")[2].split()[19] if text else ""  # its name may have spaces


def _read_text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _read_namespace() -> str:
    """Return which process ids are visible here: containers number theirs separately."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def _lock(fd: int, path: str) -> bool:
    """Lock an open file; return whether this file system has locks.

    Raises:
        ConfigError: another process holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_describe_holder(path, read_holder(fd))) from None
    except OSError:
        return False
    return True


def read_holder(fd: int) -> dict[str, Any]:
    """Return the record of the process that has written a lock; nothing if there is none."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _wait_for_holder(fd: int, path: str, has_locks: bool, log: Callable[[str], object]):
    """Return if the process that has written a lock is gone.

    Raises:
        ConfigError: it is alive.
    """
    holder, here = read_holder(fd), describe_process()
    if not holder:
        return
    if holder.get("boot") == here["boot"]:
        if has_locks:
            return  # it would hold the system's lock
        if holder.get("namespace") == here["namespace"]:
            started = read_start_time(holder.get("pid", 0))
            if started and started == holder.get("started"):
                raise ConfigError(_describe_holder(path, holder))
            return
    log(f"waiting up to {STALE_SECONDS:.0f} s for a sign of life of {_format_holder(holder)}")
    first, deadline = _read_beat(path), time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 5))
        if _read_beat(path) != first:
            raise ConfigError(_describe_holder(path, holder))


def _read_beat(path: str) -> float:
    """Return when a file was last touched. Opening it makes NFS ask the server."""
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0


def _format_holder(holder: dict[str, Any]) -> str:
    known = {"pid": "?", "host": "an unknown host", "time": "an unknown time"} | holder
    return "process {pid} on {host}, which has held the lock since {time}".format_map(known)


def _describe_holder(path: str, holder: dict[str, Any]) -> str:
    return (
        f"another run trains in {os.path.dirname(path)}: {_format_holder(holder)}. Give this one "
        f"its own name=..., or end the other one. If it has certainly ended, delete {path}."
    )
