"""The server under load, beside its engine without HTTP, on the same weights in the same run.

    python -m benchmarks.serve
    python -m benchmarks.serve --models smollm2 --clients 8 --repeats 3 --json out.json

So many clients send requests at once: a prompt of about 30 words that begins like no other, and a
streamed answer of a fixed number of greedy tokens. The server runs in a
process of its own, and so does the engine, as threads that submit what the clients send; both take
turns, and a figure is the median of the repeats.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.decode import MODELS, find_smollm2
from benchmarks.worker import describe_processor
from jaxgpt.config import SampleConfig
from jaxgpt.language_model import LanguageModel
from tests.serve.soak import make_request, start_server

ROWS, SLOTS, CHUNK = 8, 256, 64
MIN_REQUESTS = 4
WAIT = 0.05  # seconds until a request that was refused (429) is sent again
PATH = "/v1/completions"


@dataclasses.dataclass
class Times:
    """When one request was sent, when its first token came and its last one, in seconds."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def to_first(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent

    @property
    def per_token(self) -> float:
        """Seconds of each token after it."""
        return (self.last - self.first) / max(1, self.tokens - 1)


@dataclasses.dataclass
class Figures:
    """What a number of clients got from the server, or from the engine."""

    model: str
    clients: int
    by: str
    rate: float  # tokens per second, all clients together
    first_p50: float  # seconds
    first_p95: float
    token_p50: float
    token_p95: float
    refused: int  # requests that were answered with 429, and sent again


def summarize(model: str, clients: int, by: str, times: Sequence[Times], refused: int) -> Figures:
    """Return the figures of some requests."""
    seconds = max(each.last for each in times) - min(each.sent for each in times)
    firsts, tokens = ([getattr(x, name) for x in times] for name in ("to_first", "per_token"))
    return Figures(
        model, clients, by, sum(each.tokens for each in times) / seconds,
        take_share(firsts, 0.5), take_share(firsts, 0.95),
        take_share(tokens, 0.5), take_share(tokens, 0.95), refused,
    )  # fmt: skip


def take_share(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed.

    >>> take_share([3.0, 1.0, 2.0, 4.0], 0.5)
    2.0
    """
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def take_median(runs: Sequence[Figures]) -> Figures:
    """Return the median of every figure over repeats."""
    numbers = {
        field.name: statistics.median(getattr(run, field.name) for run in runs)
        for field in dataclasses.fields(Figures)
        if field.type is float
    }
    return dataclasses.replace(runs[0], **numbers, refused=sum(run.refused for run in runs))


def make_prompt(number: int) -> str:
    """Return a prompt that begins like no other: 26 words, 100 bytes."""
    words = ("river", "stone", "cloud", "paper", "light", "green", "seven", "house")
    return " ".join(words[(number >> (3 * place)) % 8] for place in range(12)) + "\n" + "a " * 14


def split_work(clients: int, numbers: Iterator[int]) -> list[list[str]]:
    """Return the prompts of every client: one each, and at least MIN_REQUESTS in all."""
    each = math.ceil(MIN_REQUESTS / clients)
    return [[make_prompt(next(numbers)) for _ in range(each)] for _ in range(clients)]


# --- the server ---


async def ask(port: int, prompt: str, tokens: int) -> Times | None:
    """Send a request, and return its times; None if it was refused because the queue is full.

    Raises:
        RuntimeError: it failed.
    """
    body = {"prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    sent = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first = last = 0.0
    try:
        writer.write(make_request(PATH, json.dumps(body).encode()))
        status = int((await reader.readline()).split(None, 2)[1])
        if status == 429:
            return None
        if status != 200:
            raise RuntimeError(f"{status}: {(await reader.read())[-300:].decode()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if b'"choices":[]' in line:
                    usage = json.loads(line[6:])["usage"]
                    return Times(sent, first, last, usage["completion_tokens"])
                if b'"finish_reason":null' in line:
                    first, last = first or now, now
    finally:
        writer.close()
    raise RuntimeError("the answer is not whole")


async def run_clients(port: int, work: list[list[str]], tokens: int) -> tuple[list[Times], int]:
    """Return the times of all requests of all clients, and how many were refused."""
    times: list[Times] = []
    refused = 0

    async def run_client(prompts: list[str]):
        nonlocal refused
        for prompt in prompts:
            while (found := await ask(port, prompt, tokens)) is None:
                refused += 1
                await asyncio.sleep(WAIT)
            times.append(found)

    await asyncio.gather(*map(run_client, work))
    return times, refused


# --- the engine ---


def run_threads(engine: Any, work: list[list[str]], tokens: int) -> list[Times]:
    """Return the times of all requests, of a thread for each client."""
    sample = SampleConfig(temperature=0, tokens=tokens, min_tokens=tokens)
    times: list[Times] = []

    def run_client(prompts: list[str]):
        for prompt in prompts:
            sent, first, count = time.perf_counter(), 0.0, 0
            for piece in engine.submit(prompt, sample):
                count += len(piece.tokens)
                now = time.perf_counter()
                first = first or now
            times.append(Times(sent, first, now, count))

    threads = [threading.Thread(target=run_client, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def serve_engine(name: str):
    """Answer lines of standard input with lines about an engine: the other side of `Peer`."""
    model = MODELS[name]()
    with model.start_engine(rows=ROWS, slots=SLOTS, chunk=CHUNK) as engine:
        print("ready", flush=True)
        for line in sys.stdin:
            work, tokens = json.loads(line)
            times = run_threads(engine, work, tokens)
            print(json.dumps([dataclasses.astuple(each) for each in times]), flush=True)


class Peer:
    """An engine in a process of its own."""

    def __init__(self, name: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve", "--engine", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._write, self._read = self._process.stdin, self._process.stdout
        while self._read.readline().strip() != "ready":
            if self._process.poll() is not None:
                raise RuntimeError("the engine did not start")

    def run(self, work: list[list[str]], tokens: int) -> list[Times]:
        """Return the times of all requests."""
        self._write.write(json.dumps([work, tokens]) + "\n")
        self._write.flush()
        return [Times(*row) for row in json.loads(self._read.readline())]

    def close(self):
        """End the process."""
        self._write.close()
        self._process.wait(60)


# --- the run ---


@contextlib.contextmanager
def start_both(name: str, queue: int) -> Iterator[tuple[int, Peer]]:
    """Start a server, whose port is given, and an engine of the same model."""
    import jaxgpt

    with tempfile.TemporaryDirectory() as folder:
        if name == "smollm2":
            path = find_smollm2()
        else:
            path = str(pathlib.Path(folder) / "model")
            model: LanguageModel = MODELS[name]()
            jaxgpt.save(model, path)
            del model
        options = ("--rows", ROWS, "--slots", SLOTS, "--chunk", CHUNK, "--queue", queue)
        process, port = start_server(path, *map(str, options))
        peer = None
        try:
            peer = Peer(name)
            yield port, peer
        finally:
            if peer is not None:
                peer.close()
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def measure(name: str, options: argparse.Namespace) -> Iterator[tuple[Figures, Figures]]:
    """Yield the figures of the server and of the engine for every number of clients."""
    numbers = itertools.count()
    with start_both(name, options.queue) as (port, peer):

        def run_once(clients: int) -> tuple[Figures, Figures]:
            work, again = split_work(clients, numbers), split_work(clients, numbers)
            times, refused = asyncio.run(run_clients(port, work, options.tokens))
            alone = peer.run(again, options.tokens)
            return (
                summarize(name, clients, "server", times, refused),
                summarize(name, clients, "engine", alone, 0),
            )

        run_once(1)
        for clients in options.clients:
            runs = [run_once(clients) for _ in range(options.repeats)]
            served, alone = zip(*runs, strict=True)
            yield take_median(served), take_median(alone)


def format_table(figures: Sequence[Figures]) -> str:
    """Return figures as a table in Markdown."""
    lines = [
        "| model | clients | by | tokens/s in all | first token p50, p95 | token p50, p95 | 429s |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in figures:
        first = f"{1e3 * f.first_p50:,.1f} ms, {1e3 * f.first_p95:,.1f} ms"
        each = f"{1e3 * f.token_p50:,.2f} ms, {1e3 * f.token_p95:,.2f} ms"
        refused = f"{f.refused}" if f.by == "server" else "-"
        lines.append(
            f"| {f.model} | {f.clients} | {f.by} | {f.rate:,.0f} | {first} | {each} | {refused} |"
        )
    return "\n".join(lines)


def main():
    """Measure what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt_mini", "smollm2"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32, help="of every answer (32)")
    parser.add_argument("--repeats", type=int, default=3, help="of every figure (3)")
    parser.add_argument("--queue", type=int, default=256, help="of the server (256)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        serve_engine(options.engine)
        return
    print(f"{describe_processor()}; jax {version('jax')}; {ROWS} rows", flush=True)
    figures: list[Figures] = []
    for name in options.models:
        for served, alone in measure(name, options):
            figures += [served, alone]
            share, later = served.rate / alone.rate, served.first_p50 - alone.first_p50
            print(
                f"{name}, {served.clients} clients: {share:.1%} of the engine's tokens/s, "
                f"first token {1e3 * later:+.1f} ms", flush=True,
            )  # fmt: skip
    print(format_table(figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump([dataclasses.asdict(each) for each in figures], file, indent=1)
            file.write(os.linesep)


if __name__ == "__main__":
    main()
