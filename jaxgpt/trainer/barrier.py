"""A barrier that a process which has failed breaks, so that no other waits for it.

Orbax ends a save when all processes have written their part. If one of them cannot, the others
would wait for it until a timeout of 20 minutes, and it would wait for them at the next place. Here
each process leaves a mark in the key-value store of the coordinator, and looks there for those of
the others, or for that of a failure.
"""

import collections
import time
from typing import Any

from jaxgpt import hosts

MAX_PAUSE_SECONDS = 0.5  # between two looks at the marks of the others
# Keys of Orbax that a process which cannot write passes by: it goes on to the end of the save.
PASSED_BY_FAILURE = ("async_write_complete", "async_commit_complete")
BROKEN = "broken"  # the place of a process that has failed


class BrokenBarrierError(RuntimeError):
    """Another process has failed."""


class Barrier:
    """A barrier for the saves of one folder, one after the other.

    Args:
        name: of the folder.
        client: of the coordinator; by default JAX's.
    """

    def __init__(self, name: str, client: Any = None):
        self._key, self._client = hosts.make_unique_key(f"barrier/{name}"), client
        self._round = self._broken_round = 0
        self._uses: collections.Counter[str] = collections.Counter()  # of the keys of this save
        self._visited: set[str] = set()  # places of this save

    @property
    def _prefix(self) -> str:
        return f"{self._key}/{self._round}/"

    def _get_client(self) -> Any:
        return hosts.get_client() if self._client is None else self._client

    def _mark(self, name: str):
        self._get_client().key_value_set(f"{self._prefix}{name}/{hosts.process_index()}", "")

    def begin(self):
        """Begin another save, in all processes, when the one before has ended in all of them."""
        if self._round and hosts.process_count() > 1 and hosts.process_index() == 0:
            self._get_client().key_value_delete(self._prefix)
        self._round += 1
        self._uses.clear()
        self._visited.clear()

    def break_it(self):
        """Make all processes fail that wait in this save, or will."""
        if hosts.process_count() > 1 and self._broken_round < self._round:
            self._broken_round = self._round
            self._mark(BROKEN)

    def wait(self, *, key: str, timeout_ms: int):
        """Wait until every process has come here. The arguments are those of Orbax.

        A key that is used again in one save is another place: the processes come in one order.

        Raises:
            BrokenBarrierError: another process has failed in this save.
            TimeoutError: it has taken too long.
        """
        self._uses[key] += 1
        place = f"{key}/{self._uses[key]}"
        self._visited.add(place)
        self._mark(place)
        end, pause = time.monotonic() + timeout_ms / 1000, 0.01
        while True:
            arrived, others = self._read_marks(place)
            is_passed = any(name in key for name in PASSED_BY_FAILURE) and others - self._visited
            if is_passed or BROKEN in others:
                raise BrokenBarrierError("another process has failed")
            if len(arrived) == hosts.process_count():
                return
            if time.monotonic() > end:
                raise TimeoutError(f"{len(arrived)} of {hosts.process_count()} processes have come")
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _read_marks(self, place: str) -> tuple[set[str], set[str]]:
        """Return the processes that have come to a place, and where those are that have not."""
        prefix = self._prefix
        found = self._get_client().key_value_dir_get(prefix)
        marks = [mark.removeprefix(prefix).rpartition("/") for mark, _ in found]
        arrived = {process for where, _, process in marks if where == place}
        others = {where for where, _, process in marks if process not in arrived or where == BROKEN}
        return arrived, others
