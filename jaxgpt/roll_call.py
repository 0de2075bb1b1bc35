"""Check of the process ids of a run on several hosts, before JAX connects the processes.

JAX's coordinator ends the program with a C++ stack trace if two processes have the same id, and
Ctrl-C does not end the wait for processes that are missing. So the processes first meet here, at
the same address: process 0 listens, each process sends its id and the number of processes as a line
of JSON, and gets a line back once all have come, or once something is wrong. Then the address is
free for JAX.
"""

import json
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

from jaxgpt.settings import ConfigError

MAX_LINE_BYTES = 4096
RETRY_SECONDS = 0.1  # between attempts to connect
READ_SECONDS = 5.0  # for the line of a process, and for those that come after an error


def check_process_ids(address: str, processes: int, process: int, timeout: float):
    """Wait until all processes have come, each with an id of its own.

    Args:
        address: host:port of process 0.
        processes: number of processes.
        process: index of this process.
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: in every process that has come: an id is given twice, the numbers of processes
            differ, or some processes are missing after `timeout`.
    """
    if processes == 1:
        return
    host, _, port = address.rpartition(":")
    entry = {"process": process, "processes": processes, "nonce": secrets.token_hex(8)}
    deadline = time.monotonic() + timeout
    place = (host.strip("[]"), int(port))
    error = _listen(place, entry, deadline) if process == 0 else _report(place, entry, deadline)
    if error is None:
        error = (
            f"process {process} of {processes} waited {timeout:g} s for the others at {address}: "
            "is every process started, with the same --coordinator, and can they reach it? "
            "--timeout gives them more time."
        )
    if error:
        raise ConfigError(error)


# --- process 0 -------------------------------------------------------------------------------


def _listen(place: tuple[str, int], entry: dict, deadline: float) -> str | None:
    """Collect the lines of all; return "", an error message, or None if some are missing."""
    try:
        server = _open_server(place[1])
    except OSError as reason:
        # Another process 0 that listens answers that there are two.
        answer = _ask(place, entry, min(deadline, time.monotonic() + READ_SECONDS))
        return answer or (
            f"process 0 cannot listen at port {place[1]}: {reason.strerror or reason}. Is "
            "--process 0 given to another process too, or is the port in use?"
        )
    peers: dict[str, Peer] = {entry["nonce"]: Peer(0, entry["processes"], None)}
    with closing(server):
        error = _check_address(place, server, entry)
        while len(peers) < entry["processes"] and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            with suppress(TimeoutError):
                _add(peers, server.accept()[0])
            if not error and (error := _compare(peers.values())):  # those to come hear of it too
                deadline = min(deadline, time.monotonic() + READ_SECONDS)
        is_missing = not error and len(peers) < entry["processes"]
        answer = "other processes did not start in time." if is_missing else error
        for peer in peers.values():
            _answer(peer.connection, answer)
    return None if is_missing else error


class Peer(NamedTuple):
    """A process that has come."""

    process: int
    processes: int
    connection: socket.socket | None  # None for process 0 itself


def _open_server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _check_address(place: tuple[str, int], server: socket.socket, entry: dict) -> str:
    """Return an error message if another process 0 is at the address of the coordinator.

    This process may be unable to reach itself by that address, which does not matter.
    """
    with suppress(OSError), closing(socket.create_connection(place, timeout=1.0)) as connection:
        _write_line(connection, entry)
        server.settimeout(0.2)
        with suppress(TimeoutError), closing(server.accept()[0]) as own:
            line = _read_line(own, READ_SECONDS)
            if line.get("nonce") == entry["nonce"]:
                return ""
        return str(_read_line(connection, READ_SECONDS).get("error") or "")
    return ""


def _add(peers: dict[str, Peer], connection: socket.socket):
    """Read the line of a process that has connected; ignore what is not a process of a run."""
    line = _read_line(connection, READ_SECONDS)
    process, processes = line.get("process"), line.get("processes")
    if isinstance(process, int) and isinstance(processes, int):
        peers[str(line.get("nonce"))] = Peer(process, processes, connection)
    else:
        connection.close()


def _compare(peers: Iterable[Peer]) -> str:
    """Return an error message if these cannot be processes of one run, or ""."""
    first, *others = peers
    ids = [first.process]
    for peer in others:
        if peer.processes != first.processes:
            return (
                f"--processes is {first.processes} in process 0, and {peer.processes} in process "
                f"{peer.process}."
            )
        if peer.process in ids:
            return (
                f"--process {peer.process} is given to two processes: each has a number of its "
                f"own, from 0 to {first.processes - 1}."
            )
        ids.append(peer.process)
    return ""


# --- the other processes ---------------------------------------------------------------------


def _report(place: tuple[str, int], entry: dict, deadline: float) -> str | None:
    """Report to process 0, again until it answers; return as `_listen`."""
    while time.monotonic() < deadline:
        answer = _ask(place, entry, deadline)
        if answer is not None:
            return answer
        time.sleep(RETRY_SECONDS)
    return None


def _ask(place: tuple[str, int], entry: dict, deadline: float) -> str | None:
    """Send the line of this process once; return the answer, or None if there is none."""
    with suppress(OSError):
        left = max(deadline - time.monotonic(), 0.001)
        with closing(socket.create_connection(place, timeout=min(left, READ_SECONDS))) as peer:
            _write_line(peer, entry)
            answer = _read_line(peer, max(deadline - time.monotonic(), 0.001)).get("error")
            return answer if isinstance(answer, str) else None
    return None


# --- lines of JSON ---------------------------------------------------------------------------


def _write_line(connection: socket.socket, value: dict):
    connection.sendall(json.dumps(value).encode() + b"\n")


def _answer(connection: socket.socket | None, error: str):
    """Send the answer to a process that may be gone, and close."""
    if connection is not None:
        with suppress(OSError), closing(connection):
            _write_line(connection, {"error": error})


def _read_line(connection: socket.socket, seconds: float) -> dict:
    """Return the line that a process sends; {} for anything that is not a line of JSON."""
    data = b""
    with _time_limit(connection, seconds) as set_limit:
        while not data.endswith(b"\n") and len(data) < MAX_LINE_BYTES:
            set_limit()
            part = connection.recv(MAX_LINE_BYTES)
            if not part:
                return {}
            data += part
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


@contextmanager
def _time_limit(connection: socket.socket, seconds: float) -> Iterator:
    """Bound all reads inside the context together; afterwards there is what has been read."""
    end = time.monotonic() + seconds
    with suppress(OSError):
        yield lambda: connection.settimeout(max(end - time.monotonic(), 0.001))
