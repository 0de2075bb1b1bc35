"""Try a balancer of deploy/serve on this machine, with two servers of a tiny model.

    python deploy/try_balancer.py nginx
    python deploy/try_balancer.py haproxy

Whole answers come from both servers, a stream comes in parts, and every request is answered while a
server is full, is killed, starts again and drains. It needs the program, and the extra `serve`.
"""

import argparse
import asyncio
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.serve.soak import (  # noqa: E402
    CHAT,
    call,
    make_request,
    read_metrics,
    read_stream,
    read_whole,
    save_tiny_model,
    start_server,
)

NAME = "models.example.org"
OPTIONS = ("--rows", "2", "--queue", "6", "--chunk", "32", "--allow-host", NAME)
COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "nginx": lambda folder, path: ["nginx", "-p", folder, "-e", "stderr", "-c", path],
    "haproxy": lambda folder, path: ["haproxy", "-f", path],
}
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}


def find_port() -> int:
    """Return a free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_chat(tokens: int = 8, **more) -> bytes:
    """Return a request for an answer of exactly so many tokens."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens,
            "min_tokens": tokens, "temperature": 0, **more}  # fmt: skip
    request = make_request(CHAT, json.dumps(body).encode())
    return request.replace(b"Host: localhost", f"Host: {NAME}".encode())


async def ask(port: int, count: int = 1, tokens: int = 8) -> list[int]:
    """Return the statuses of several answers, of which four are asked for at once."""
    limit = asyncio.Semaphore(4)

    async def ask_one() -> int:
        async with limit:
            status, body = await call(port, make_chat(tokens))
            if status == 200:
                assert read_whole(body)[0][1] == "length"
            return status

    return list(await asyncio.gather(*(ask_one() for _ in range(count))))


async def count_parts(port: int) -> int:
    """Return in how many parts a stream arrives."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(make_chat(200, stream=True))
    parts = [part async for part in read_parts(reader)]
    writer.close()
    assert b" 200 " in parts[0]
    return len(parts)


async def read_parts(reader: asyncio.StreamReader):
    """Yield what is read until the end."""
    while part := await reader.read(1 << 16):
        yield part


async def wait_for(port: int):
    """Wait until the balancer passes requests on."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            if (await call(port, make_chat()))[0] == 200:
                return
        except (ConnectionError, IndexError):
            pass
        await asyncio.sleep(0.1)
    raise AssertionError("the balancer does not answer")


async def run_checks(kind: str, port: int, ports: list[int], servers: list, model: str):
    """Run all checks.

    Args:
        port, ports: of the balancer and of the servers.
        servers: processes; those that are started again take their place.
    """
    await wait_for(port)
    assert {*await ask(port, 40)} == {200}
    shares = [(await read_metrics(each))["jaxgpt_generated_tokens_total"] for each in ports]
    assert min(shares) > 0.2 * sum(shares), shares
    print(f"whole answers: 40, tokens of the servers {shares}")

    parts = await count_parts(port)
    assert parts > 20, parts
    status, body = await call(port, make_chat(40, stream=True))
    assert status == 200
    assert read_stream(body)[0][1] == "length"
    print(f"a stream of 200 tokens: {parts} parts")

    if kind == "nginx":  # HAProxy counts the requests that it passes on, and needs no 429
        full = [asyncio.create_task(call(ports[0], make_chat(220))) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert (await call(ports[0], make_chat()))[0] == 429
        assert {*await ask(port, 8)} == {200}
        await asyncio.gather(*full)
        print("a full server: 8 requests answered by the other one")

    servers[0].kill()
    servers[0].wait()
    assert {*await ask(port, 40)} == {200}
    print("a server that is killed: 40 requests answered by the other one")

    servers[0], _ = start_server(model, *OPTIONS, "--port", str(ports[0]))
    await asyncio.sleep(6)  # a pause of nginx, checks of HAProxy
    before = (await read_metrics(ports[0]))["jaxgpt_generated_tokens_total"]
    assert {*await ask(port, 40)} == {200}
    assert (await read_metrics(ports[0]))["jaxgpt_generated_tokens_total"] > before
    print("the same server again: it has its share")

    load = asyncio.create_task(ask(port, 200, tokens=20))
    await asyncio.sleep(0.3)
    servers[1].send_signal(signal.SIGTERM)
    assert {*await load} == {200}
    assert await asyncio.to_thread(servers[1].wait, 60) == 0
    print("a server that drains: 200 requests answered")


def configure(kind: str, folder: str, port: int, ports: list[int]) -> str:
    """Write the configuration with other ports, and return its path."""
    text = (ROOT / "deploy" / "serve" / FILES[kind]).read_text()
    for old, new in zip((8000, 8001, 8002), (port, *ports), strict=True):
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    path = pathlib.Path(folder) / FILES[kind]
    path.write_text(text.replace("/tmp/", f"{folder}/"))
    return str(path)


def start_servers(model: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start two servers."""
    for _ in range(2):
        yield start_server(model, *OPTIONS)


def main():
    """Try the balancer that the argument names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("balancer", choices=COMMANDS)
    kind = parser.parse_args().balancer
    with tempfile.TemporaryDirectory() as folder:
        model = str(pathlib.Path(folder) / "model")
        save_tiny_model(pathlib.Path(model))
        servers, ports = map(list, zip(*start_servers(model), strict=True))
        port = find_port()
        command = COMMANDS[kind](folder, configure(kind, folder, port, ports))
        balancer = subprocess.Popen(command)
        try:
            asyncio.run(run_checks(kind, port, ports, servers, model))
        finally:
            for process in (balancer, *servers):
                process.kill()
                process.wait()
    print(f"{kind}: all as it should be")


if __name__ == "__main__":
    main()
