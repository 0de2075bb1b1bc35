"""A server in a thread, over a tiny model or over an engine that tests play themselves."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_params, tiny

from jaxgpt.adapters import Adapter
from jaxgpt.config import Config, LoraConfig, SampleConfig, TrainConfig
from jaxgpt.engine import Generation
from jaxgpt.engine.worker import Handle
from jaxgpt.language_model import LanguageModel
from jaxgpt.lora import describe_adapters
from jaxgpt.serve.served import OPENAI_DEFAULTS, Served, prepare_tokenizer, serve_model
from jaxgpt.serve.server import Server
from jaxgpt.serve.service import Service
from jaxgpt.tokenizer.training import SPECIALS, build

TURNS = ("<|im_start|>", "<|im_end|>")
TOKENIZER = build([], specials=[*SPECIALS, *TURNS])  # one byte is one token
CONTEXT = 128
SECONDS = 60  # that a test waits for what takes much less
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def make_model(template: str = TEMPLATE, objective: str = "causal", **changes) -> LanguageModel:
    """Return a model of random weights, whose tokens are bytes."""
    cfg = tiny(vocab=270, context=CONTEXT, **changes)
    config = Config(model=cfg, train=TrainConfig(objective=objective))
    return prepare_tokenizer(
        LanguageModel(config, random_params(cfg, std=0.3), TOKENIZER), template
    )


class PlayedEngine:
    """Takes requests, and gives the pieces that a test puts into their handles."""

    def __init__(self):
        self.handles: list[Handle] = []
        self.cancelled: list[Handle] = []
        self.seconds_since_step, self.is_alive, self.is_closed = 0.0, True, False
        self.slots_used = 0

    @property
    def running(self) -> int:
        return len(self.handles)

    waiting = 0

    def submit(self, row, sample, index, bias, top, adapter) -> Handle:
        handle = Handle(SimpleNamespace(row=row, reused=0, sample=sample), self.cancel)
        self.handles.append(handle)
        return handle

    def cancel(self, handle: Handle):
        if handle not in self.cancelled:
            self.cancelled.append(handle)
            handle._put(Generation("", (), (), "cancelled"))

    def close(self):
        self.is_closed = True
        for handle in self.handles:
            self.cancel(handle)


def make_played(rows: int = 2, queue: int = 2, template: str = TEMPLATE, **changes) -> Service:
    """Return a service whose engine is played by the test."""
    model = make_model(template, **changes)
    service = Service(rows, queue)
    choices = {"tiny": "", "a": "a"}
    engine: Any = PlayedEngine()
    service.open(Served(model, choices, engine, OPENAI_DEFAULTS, rows, CONTEXT, 0))
    return service


def piece(text: str, ending: str = "") -> Generation:
    """Return a piece of text of one token for each byte."""
    tokens = tuple(TOKENIZER.encode(text).tolist())
    return Generation(text, tokens, (-1.0,) * len(tokens), ending)


class Address:
    """Where a server listens, and how to ask it."""

    def __init__(self, server: Server):
        self.server, self.service = server, server.service
        self.host, self.port = server.sock.getsockname()[:2]
        self.lines: list[str] = []

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str):
        """Return (status, headers, body) of a request; JSON if it is."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            return ask(connection, path, body, method, **headers)
        finally:
            connection.close()

    def open_stream(self, path: str, body: dict[str, Any]) -> "Stream":
        """Return a stream of events."""
        return Stream(self, path, body | {"stream": True})


def ask(connection, path: str, body: Any = None, method: str = "", **headers: str):
    """Return (status, headers, body) of a request on a connection."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        names = {"Content-Type": "application/json", **names}
    connection.request(method or ("GET" if data is None else "POST"), path, data, names)
    response = connection.getresponse()
    found = response.read()
    kind = response.getheader("content-type", "")
    return response.status, response.headers, json.loads(found) if "json" in kind else found


class Stream:
    """A stream of events, read one by one."""

    def __init__(self, address: Address, path: str, body: dict[str, Any]):
        self.connection = http.client.HTTPConnection(address.host, address.port, timeout=SECONDS)
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", path, json.dumps(body).encode(), headers)
        self.response = self.connection.getresponse()

    def read(self) -> Any:
        """Return the next event: JSON, or the text of one that is none; None at the end."""
        while line := self.response.readline():
            if text := line.decode().strip():
                name, _, data = text.partition(": ")
                return json.loads(data) if name == "data" and data[0] == "{" else text
        return None

    def list_events(self) -> list[Any]:
        """Return the events that are left."""
        return list(iter(self.read, None))

    def close(self):
        """Close the connection, whatever is still to come."""
        with contextlib.suppress(OSError):
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        self.response.close()
        self.connection.close()


@contextlib.contextmanager
def run_server(service: Service, load=None, **options) -> Iterator[Address]:
    """Run a server in a thread until the end of the block."""
    sock = socket.create_server(("127.0.0.1", 0))
    lines: list[str] = []
    server = Server(service, sock, log=lines.append, **options)
    thread = threading.Thread(target=server.run, args=(load,), daemon=True)
    thread.start()
    wait_until(lambda: server._server.started)
    address = Address(server)
    address.lines, address.thread = lines, thread
    try:
        yield address
    finally:
        for _ in range(2):
            if thread.is_alive():
                server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


def wait_until(is_true, seconds: float = SECONDS):
    """Wait for a condition; fail if it does not come."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
RULES = SampleConfig(temperature=0, top_p=1.0, tokens=12)


def fill_adapters(cfg, lora: LoraConfig, seed: int) -> Any:
    """Return adapters of random factors."""
    shapes, _ = describe_adapters(cfg, lora)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@contextlib.contextmanager
def open_tiny(rows: int = 4, queue: int = 60) -> Iterator[Address]:
    """Run a server with a tiny model and two adapters."""
    model = make_model("")
    kinds = {"a": ("q", "down"), "b": ("v", "up")}
    adapters = {
        name: Adapter(
            fill_adapters(model.config.model, LoraConfig(rank=3, targets=targets), seed=n),
            LoraConfig(rank=3, targets=targets),
        )
        for n, (name, targets) in enumerate(kinds.items())
    }
    served = serve_model(
        model, "tiny", template=TEMPLATE, adapters=adapters, rows=rows, queue=queue, chunk=16
    )
    service = Service(rows, queue)
    service.open(served)
    with run_server(service) as address:
        yield address


def open_chat(address, **more):
    """Return a stream of a conversation, whose handle the engine has, and that handle."""
    engine = address.service.engine
    before = len(engine.handles)
    stream = address.open_stream(CHAT, {"messages": USER, **more})
    wait_until(lambda: len(engine.handles) > before)
    return stream, engine.handles[-1]
