"""A server's life: it listens while the model loads, answers, and finishes what it has begun."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.optional import require
from jaxgpt.script import print_text
from jaxgpt.serve.app import make_app
from jaxgpt.serve.http import LOOPBACK_HOSTS, USER
from jaxgpt.serve.served import Served
from jaxgpt.serve.service import Service
from jaxgpt.settings import ConfigError

DRAIN_SECONDS = 30
CLOSE_SECONDS = 5  # for connections, after their requests


def check_network(host: str, keys: Sequence[str]):
    """Check that a server that others can reach asks for a key.

    Raises:
        ConfigError: it does not.
    """
    if f"[{host}]" not in LOOPBACK_HOSTS and host not in LOOPBACK_HOSTS and not keys:
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --api-key KEY (or the "
            "variable JAXGPT_API_KEY), or leave --host out to serve this machine only."
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        port: 0 for any free one.

    Raises:
        ConfigError: the port is taken, or there is no such host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--host {host} --port {port}: {reason}. Choose another port.") from error


def format_address(sock: socket.socket) -> str:
    """Return the address that a socket listens on, as http://127.0.0.1:8000."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """A service on a socket.

    Args:
        service: what is served; it may still load.
        sock: listens.
        keys, origins: see `make_app`.
        hosts: names of this server, besides those of the loopback interface.
        log: takes a line about every request.

    Attributes:
        error: what loading the model has raised.
    """

    def __init__(
        self,
        service: Service,
        sock: socket.socket,
        *,
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        log: Callable[[str], object] = lambda line: None,
    ):
        uvicorn = require("uvicorn", USER)
        names = (*LOOPBACK_HOSTS, sock.getsockname()[0], *hosts)
        app = make_app(service, keys=keys, hosts=names, origins=origins, log=log)
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_level="warning", access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=CLOSE_SECONDS,
        )  # fmt: skip
        self.service, self.sock, self.log = service, sock, log
        self.error: BaseException | None = None
        self._server = uvicorn.Server(config)
        self._server.handle_exit = self._handle_signal
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loader: threading.Thread | None = None
        self._drain: asyncio.Task | None = None

    def run(self, load: Callable[[], Served] | None = None):
        """Answer requests until `stop` is called, or a signal comes.

        Args:
            load: returns what is served; it is called in a thread, while the server answers 503.

        Raises:
            BaseException: what `load` has raised.
        """
        asyncio.run(self._serve(load))
        if self.error is not None:
            raise self.error

    @property
    def is_loading(self) -> bool:
        """Whether the thread that loads the model still runs."""
        return self._loader is not None and self._loader.is_alive()

    def stop(self):
        """Take no more requests, finish those that run, and return from `run`.

        It may be called from any thread. A second call does not wait for requests.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop)

    def _handle_signal(self, number: int, frame: Any):
        self.stop()

    async def _serve(self, load: Callable[[], Served] | None):
        self._loop = asyncio.get_running_loop()
        if load is not None:
            self._loader = threading.Thread(target=self._load, args=(load,), daemon=True)
            self._loader.start()
        await self._server.serve(sockets=[self.sock])
        await asyncio.to_thread(self.service.close)

    def _load(self, load: Callable[[], Served]):
        """Load the model, in a thread of its own."""
        try:
            self.service.open(load())
        except BaseException as error:
            self.error = error
            self.stop()

    def _stop(self):
        if self._drain is not None:
            self._server.should_exit = self._server.force_exit = True
            return
        self.service.drain()
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self):
        """Wait for the requests that run, within limits; then let the server end."""
        if self.service.active:
            self.log(f"finishing {self.service.active} requests, for {DRAIN_SECONDS} s at most")
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.service.active:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self.log(f"ending {self.service.active} requests that are not finished")
            await asyncio.to_thread(self.service.close)
        self._server.should_exit = True


def run_cli(
    host: str,
    port: int,
    rows: int,
    queue: int,
    load: Callable[[], Served],
    *,
    keys: Sequence[str],
    hosts: Sequence[str],
    origins: Sequence[str],
) -> int:
    """Serve a model until a signal comes, with lines on standard error about what happens.

    Returns:
        The exit status.

    Raises:
        ConfigError: the network is not as it should be, or the model cannot be served.
    """
    check_network(host, keys)
    sock = listen(host, port)

    def log(line: str):
        print_text(line, sys.stderr)

    service = Service(rows, queue)
    server = Server(service, sock, keys=keys, hosts=hosts, origins=origins, log=log)
    address = format_address(sock)

    def load_and_tell() -> Served:
        served = load()
        service.open(served)
        names = ", ".join(served.choices)
        print_text(f"serving {names} on {address} ({rows} rows of {served.window} tokens)")
        return served

    log(f"listening on {address}, loading")
    for number in (signal.SIGINT, signal.SIGTERM):  # before the server has its own
        signal.signal(number, lambda *_: os._exit(130))
    server.run(load_and_tell)
    if server.is_loading:  # it cannot be stopped, and the end of the process would wait for it
        sys.stdout.flush()
        os._exit(0)
    return 0
