"""Processes with wrong numbers are refused by one line in each of them, before JAX connects."""

import socket
import threading

import pytest

from jaxgpt.roll_call import check_process_ids
from jaxgpt.settings import ConfigError


def find_free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call_all(numbers, timeout=30.0, host="127.0.0.1"):
    """Call the roll in a thread for each (process, processes); return the messages."""
    address = f"{host}:{find_free_port()}"
    messages: list[str | None] = [None] * len(numbers)

    def call(i, process, processes):
        try:
            check_process_ids(address, processes, process, timeout)
        except ConfigError as error:
            messages[i] = str(error)
        else:
            messages[i] = ""

    threads = [threading.Thread(target=call, args=[i, *n]) for i, n in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return messages


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_different_processes_go_on(order):
    assert call_all([(process, 3) for process in order]) == ["", "", ""]


@pytest.mark.parametrize(("ids", "twice"), [([0, 1, 1], 1), ([0, 0], 0), ([0, 2, 2], 2)])
def test_the_same_process_id_given_twice_is_one_line_in_every_process(ids, twice):
    messages = call_all([(i, len(ids)) for i in ids])
    assert len(messages) == len(ids)
    for message in messages:
        assert message.startswith(f"--process {twice} is given to two processes")
        assert "\n" not in message


def test_different_numbers_of_processes_are_refused():
    messages = call_all([(0, 3), (1, 2), (2, 3)])
    assert set(messages) == {"--processes is 3 in process 0, and 2 in process 1."}


def test_a_missing_process_is_named_after_the_timeout():
    first, second = call_all([(0, 3), (1, 3)], timeout=1.0)
    assert "process 0 of 3 waited 1 s for the others at 127.0.0.1:" in first
    assert second in (
        first.replace("process 0", "process 1"),
        "other processes did not start in time.",
    )


def test_strangers_at_the_port_are_ignored():
    address = f"127.0.0.1:{find_free_port()}"
    done = []

    def listen():
        done.append(check_process_ids(address, 2, 0, 30.0))

    thread = threading.Thread(target=listen)
    thread.start()
    place = ("127.0.0.1", int(address.rpartition(":")[2]))
    for data in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b'{"process": "x"}\n', b""):
        for _ in range(200):
            try:
                with socket.create_connection(place, timeout=5) as stranger:
                    stranger.sendall(data)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.02)  # the listener has not started yet
    check_process_ids(address, 2, 1, 30.0)
    thread.join(30)
    assert done == [None]


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        message = f"process 0 cannot listen at port {port}"
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        with pytest.raises(ConfigError, match=message):
            check_process_ids(f"127.0.0.1:{port}", 2, 0, 30.0)


def test_a_single_process_has_nobody_to_wait_for():
    check_process_ids("no such host:1", 1, 0, 0.0)
