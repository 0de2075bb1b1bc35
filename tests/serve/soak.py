"""A soak of the server: random arrivals, clients that leave and bad requests, as long as is asked.

    python -m tests.serve.soak --minutes 60

Every greedy answer must be the one that its request got before, every bad request must be refused
with the status that it deserves, and at the end nothing may be left: no row, no request, no thread,
no open file, and no more memory than after the first fifth. It prints a table.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

CLIENTS = 12
DEADLINE = 120  # seconds of one request
MAX_GROWTH_MB = 100
MESSAGES = [[{"role": "user", "content": text}] for text in ("hello", "né 🙂", "x" * 30, "a b a b")]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RULES = [
    {"temperature": 0, "max_tokens": 12},
    {"temperature": 0, "max_tokens": 5, "n": 3},
    {"temperature": 1.2, "seed": 7, "max_tokens": 20, "top_p": 0.9},
    {"temperature": 0, "max_tokens": 9, "stop": ["e", "zz"]},
    {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 3},
]
# Requests that are refused: (path, body, content type, statuses).
JSON = "application/json"
BAD: list[tuple[str, bytes, str, set[int]]] = [
    (CHAT, b"{", JSON, {400}),
    (CHAT, b"\xff\xfe", JSON, {400}),
    (CHAT, b"[]", JSON, {400}),
    (CHAT, b"{}", JSON, {400}),
    (CHAT, b'{"messages": [], "max_tokens": 3}', JSON, {400}),
    (CHAT, b'{"messages": [{"role": "user"}]}', JSON, {400}),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temprature": 1}', JSON, {400}),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "top_p": 7}', JSON, {400}),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}]}', "text/plain", {415}),
    (COMPLETIONS, json.dumps({"prompt": "x" * 9000}).encode(), JSON, {400}),
    (COMPLETIONS, b'{"prompt": "a", "max_tokens": -1}', JSON, {400}),
    (COMPLETIONS, b'{"prompt": "a", "model": "other"}', JSON, {400, 404}),
    (COMPLETIONS, b'{"prompt": "' + b"a" * 5_000_000 + b'"}', JSON, {413}),
    ("/v1/nothing", b"{}", JSON, {404, 405}),
]


@dataclasses.dataclass
class State:
    """What a process holds."""

    memory_mb: float
    threads: int
    files: int


def read_state(pid: int) -> State:
    """Return what a process holds."""
    process = pathlib.Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    page_mb = os.sysconf("SC_PAGE_SIZE") / 2**20
    threads, files = (len(os.listdir(process / name)) for name in ("task", "fd"))
    return State(pages * page_mb, threads, files)


# --- clients ---


def make_request(path: str, body: bytes, kind: str = JSON, method: str = "POST") -> bytes:
    """Return a request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def call(port: int, request: bytes, leave_after: int | None = None) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the answer.

    Args:
        leave_after: bytes of the answer after which the connection is closed; then the status is 0.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        if leave_after is not None:
            await asyncio.wait_for(reader.read(leave_after), DEADLINE)
            return 0, b""
        answer = await asyncio.wait_for(reader.read(-1), DEADLINE)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        body = join_chunks(body)
    return int(head.split(None, 2)[1]), body


def join_chunks(body: bytes) -> bytes:
    """Return a body that came in chunks."""
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size, 16)
        parts.append(rest[:count])
        body = rest[count + 2 :] if count else b""
    return b"".join(parts)


def read_stream(body: bytes) -> list[tuple[str, str]]:
    """Return the text and the reason of its end of every choice of a stream.

    Raises:
        AssertionError: it is not whole, or a choice does not end once.
    """
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    texts: Counter[int] = Counter()
    joined: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for line in lines[:-1]:
        if line.startswith(":"):
            continue
        for choice in json.loads(line)["choices"]:
            index = choice["index"]
            joined[index] = joined.get(index, "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"] is not None:
                texts[index] += 1
                reasons[index] = choice["finish_reason"]
    assert set(texts.values()) == {1}, texts
    return [(joined[index], reasons[index]) for index in sorted(joined)]


def read_whole(body: bytes) -> list[tuple[str, str]]:
    """Return as `read_stream` what an answer without a stream has."""
    choices = json.loads(body)["choices"]
    return [(each["message"]["content"], each["finish_reason"]) for each in choices]


class Client:
    """Sends random requests, one after the other, and checks what comes back.

    Args:
        port: of the server.
        rng: draws what to send.
        expected: of every request with one answer, that answer; shared by all clients.
        counts: (what was sent, status) -> how often; shared by all clients.
    """

    def __init__(self, port: int, rng: random.Random, expected: dict, counts: Counter):
        self.port, self.rng, self.expected, self.counts = port, rng, expected, counts

    async def send_one(self):
        """Send one request of a random kind."""
        await asyncio.sleep(self.rng.expovariate(20))
        kinds = (self.send_chat, self.send_bad, self.leave, self.leave_early, self.ask_other)
        await self.rng.choices(kinds, (6, 2, 2, 1, 1))[0]()

    async def send_chat(self):
        """Ask for an answer, whole or as a stream: both are the same."""
        message, rule = self.rng.randrange(len(MESSAGES)), self.rng.randrange(len(RULES))
        is_stream = self.rng.random() < 0.5
        body = {"messages": MESSAGES[message], **RULES[rule], "stream": is_stream}
        status, answer = await call(self.port, make_request(CHAT, json.dumps(body).encode()))
        self.count("stream" if is_stream else "answer", status)
        if status in (429, 503):
            return
        assert status == 200, (status, answer[:300])
        found = read_stream(answer) if is_stream else read_whole(answer)
        assert found == self.expected.setdefault((message, rule), found), (message, rule, found)

    async def send_bad(self):
        """Send a request that is not valid."""
        path, body, kind, statuses = self.rng.choice(BAD)
        status, answer = await call(self.port, make_request(path, body, kind))
        self.count("bad request", status)
        assert status in statuses | {503}, (status, path, body[:80], answer[:300])
        assert json.loads(answer)["error"]["message"], answer[:300]

    async def leave(self):
        """Close the connection while an answer is streamed, or before it begins."""
        body = {"messages": self.rng.choice(MESSAGES), "max_tokens": 40, "stream": True}
        request = make_request(CHAT, json.dumps(body).encode())
        await call(self.port, request, leave_after=self.rng.choice((0, 1, 400, 2000)))
        self.count("client left", 0)

    async def leave_early(self):
        """Close the connection in the middle of a request."""
        request = make_request(CHAT, json.dumps({"messages": MESSAGES[0]}).encode())
        cut = request[: self.rng.randrange(1, len(request))]
        await call(self.port, cut, leave_after=0)
        self.count("half a request", 0)

    async def ask_other(self):
        """Ask for what is no text."""
        embedding = make_request("/v1/embeddings", b'{"input": ["one", "two"]}')
        paths = ("/", "/health", "/v1/models", "/metrics")
        gets = [make_request(path, b"", method="GET") for path in paths]
        request = self.rng.choice([embedding, *gets])
        status, _ = await call(self.port, request)
        self.count("other", status)
        assert status in (200, 429), status

    def count(self, kind: str, status: int):
        """Count a request."""
        self.counts[kind, status] += 1


# --- the run ---


async def read_metrics(port: int) -> dict[str, float]:
    """Return the metrics of the server without labels."""
    _, body = await call(port, make_request("/metrics", b"", method="GET"))
    rows = [line.split() for line in body.decode().splitlines() if not line.startswith("#")]
    return {row[0]: float(row[1]) for row in rows if "{" not in row[0]}


async def wait_until_idle(port: int) -> dict[str, float]:
    """Wait until no text is left in the server, and return its metrics.

    Raises:
        AssertionError: some is left after a minute.
    """
    names = ("jaxgpt_requests_running", "jaxgpt_requests_waiting", "jaxgpt_slots_used")
    until = time.monotonic() + 60
    while True:
        metrics = await read_metrics(port)
        if not any(metrics[name] for name in names):
            return metrics
        assert time.monotonic() < until, {name: metrics[name] for name in names}
        await asyncio.sleep(0.1)


async def run(
    port: int,
    pid: int,
    seconds: float = 0,
    count: int = 0,
    seed: int = 0,
    log: Callable[[str], object] = lambda line: None,
) -> tuple[Counter, list[tuple[str, State]]]:
    """Run a soak for so many seconds, or of so many requests.

    Args:
        pid: of the server.

    Returns:
        (counts of what was sent by status, what the server held at several times).

    Raises:
        AssertionError: something was wrong or is left.
    """
    counts: Counter = Counter()
    expected: dict = {}
    begin = time.monotonic()
    states = [("start", read_state(pid))]

    def is_over() -> bool:
        if seconds:
            return time.monotonic() - begin > seconds
        return counts.total() >= count

    async def run_client(number: int):
        client = Client(port, random.Random(f"{seed} {number}"), expected, counts)
        while not is_over():
            await client.send_one()

    async def watch():
        for fifth in range(1, 5):
            await asyncio.sleep(seconds / 5)
            states.append((f"{fifth * seconds / 300:.1f} min", read_state(pid)))
            log(f"{states[-1][0]}: {counts.total()} requests, {states[-1][1]}")

    watching = asyncio.create_task(watch()) if seconds else None
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(run_client(number))
    finally:
        if watching:
            watching.cancel()
    metrics = await wait_until_idle(port)
    status, _ = await call(port, make_request("/health", b"", method="GET"))
    assert status == 200, status
    await asyncio.sleep(0.5)  # connections that were closed
    states.append(("end, idle", read_state(pid)))
    if seconds:
        check_states(states)
        log(f"{metrics['jaxgpt_compiles_total']:.0f} programs compiled")
    return counts, states


def check_states(states: list[tuple[str, State]]):
    """Raise AssertionError if the end holds more than the first fifth did.

    Threads and files are those of an idle server: the start has no more threads than it needs, the
    pool of threads grows to its limit with the first requests.
    """
    early, end = states[1][1], states[-1][1]
    assert end.memory_mb < early.memory_mb + MAX_GROWTH_MB, states
    assert end.threads <= early.threads, states
    assert end.files <= states[0][1].files + 2, states


def format_tables(counts: Counter, states: list[tuple[str, State]]) -> str:
    """Return the counts and the states as tables in Markdown."""
    lines = ["| sent | status | times |", "|---|---|---|"]
    for (kind, status), times in sorted(counts.items()):
        lines.append(f"| {kind} | {status or '-'} | {times:,} |")
    lines += ["", "| | memory | threads | open files |", "|---|---|---|---|"]
    for name, state in states:
        lines.append(f"| {name} | {state.memory_mb:.0f} MB | {state.threads} | {state.files} |")
    return "\n".join(lines)


# --- a server of its own ---


def save_tiny_model(folder: pathlib.Path):
    """Save a model with random weights that has a chat template."""
    sys.path[:0] = [str(pathlib.Path(__file__).parent.parent)]
    from helpers import random_params, tiny

    import jaxgpt
    from jaxgpt.config import Config
    from jaxgpt.language_model import LanguageModel
    from jaxgpt.tokenizer import make_byte_tokenizer

    cfg = tiny(vocab=270, context=256)
    tokenizer = make_byte_tokenizer().with_chat_template("plain")
    jaxgpt.save(LanguageModel(Config(model=cfg), random_params(cfg), tokenizer), folder)


def start_server(model: pathlib.Path | str, *options: str) -> tuple[subprocess.Popen, int]:
    """Start `jaxgpt serve`, and return its process and port when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", "serve", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving "):
            address = line.rpartition(" on ")[2].split()[0]
            return process, int(address.rpartition(":")[2])
    raise RuntimeError(f"the server has ended with status {process.wait()}")


def main():
    """Run the soak that the arguments describe, with a server of a tiny model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(pathlib.Path(folder) / "model")
        process, port = start_server(
            pathlib.Path(folder) / "model", "--rows", "4", "--queue", "8", "--chunk", "32"
        )
        try:
            seconds = 60 * options.minutes
            found = asyncio.run(run(port, process.pid, seconds, seed=options.seed, log=print))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    print(format_tables(*found))
    assert status == 0, status


if __name__ == "__main__":
    main()
