"""A server under load beside its own engine: tokens per second, and seconds to the first token.

    python -m benchmarks.serve runs/mine
    python -m benchmarks.serve model.gguf --clients 1,8,32 --rows 8 --tokens 64

Each of so many clients asks for one text after the other. First they are threads that ask the
engine; then they are those of another process, which read streams over HTTP. Prompts are random, so
that none is found in the cache; every text has all of its tokens.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

# A text: yields how many tokens each piece of it has.
Ask = Callable[[list[int]], Iterator[int]]


class Load(NamedTuple):
    """What clients have seen together.

    Attributes:
        rate: tokens per second, of all.
        first: seconds to the first token, of every text, sorted.
        later: mean seconds from a token to the next.
    """

    rate: float
    first: list[float]
    later: float


def make_prompt(number: int, tokens: int) -> list[int]:
    """Return a prompt that no other number has: plain tokens, of any vocabulary."""
    dice = random.Random(number)
    return [dice.randrange(5, 200) for _ in range(tokens)]


def run_clients(ask: Ask, clients: int, texts: int, prompt: int, seed: int) -> Load:
    """Let clients ask for texts, at once."""
    first: list[float] = []
    later: list[float] = []
    counts: list[int] = []
    start = threading.Barrier(clients + 1)

    def run(client: int):
        start.wait()
        for number in range(texts):
            begin = time.perf_counter()
            times, count = [], 0
            for tokens in ask(make_prompt(seed + client * texts + number, prompt)):
                count += tokens
                if tokens:
                    times.append(time.perf_counter())
            counts.append(count)
            first.append(times[0] - begin)
            later.append((times[-1] - times[0]) / max(1, count - 1))

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    return Load(sum(counts) / seconds, sorted(first), statistics.mean(later))


def ask_engine(engine, tokens: int) -> Ask:
    """Return the function that asks an engine."""
    from jaxgpt.config import SampleConfig

    sample = SampleConfig(temperature=0, top_p=1.0, tokens=tokens, min_tokens=tokens)

    def ask(prompt: list[int]) -> Iterator[int]:
        for piece in engine.submit(prompt, sample):
            yield len(piece.tokens)

    return ask


def ask_server(port: int, tokens: int) -> Ask:
    """Return the function that asks a server; `logprobs` tell how many tokens a chunk has."""

    def ask(prompt: list[int]) -> Iterator[int]:
        body = {"prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response, seen = connection.getresponse(), 0
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if usage := event.get("usage"):
                yield usage["completion_tokens"] - seen
            elif event["choices"][0]["text"]:
                seen += 1
                yield 1
        connection.close()

    return ask


def run_server(service) -> tuple[int, Callable[[], None]]:
    """Start a server in a thread. Return its port, and the function that ends it."""
    from jaxgpt.serve.server import Server

    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(service, sock)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server._server.started:
        time.sleep(0.01)

    def stop():
        server.stop()
        thread.join()

    return sock.getsockname()[1], stop


def format_row(clients: int, alone: Load, served: Load) -> str:
    """Return a row of the table."""

    def show(times: list[float]) -> str:
        late = times[min(len(times) - 1, int(0.95 * len(times)))]
        return f"{1000 * statistics.median(times):.0f} / {1000 * late:.0f}"

    return (
        f"| {clients} | {alone.rate:.1f} | {served.rate:.1f} | {served.rate / alone.rate:.0%} "
        f"| {show(alone.first)} | {show(served.first)} | {1000 * served.later:.1f} |"
    )


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder, or any model")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients (1,8,32)")
    parser.add_argument("--rows", type=int, default=8, help="texts that decode at once (8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text (64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--texts", type=int, default=3, help="texts of each client (3)")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)  # of the clients' process
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.port:
        ask = ask_server(args.port, args.tokens)
        found = run_clients(ask, int(args.clients), args.texts, args.prompt, args.seed)
        print(json.dumps(found))
        return
    import jax

    import jaxgpt
    from jaxgpt.serve.served import serve_model
    from jaxgpt.serve.service import Service

    slots = args.tokens + args.prompt + 1
    served = serve_model(jaxgpt.load(args.model), "model", rows=args.rows, slots=slots)
    service = Service(args.rows)
    service.open(served)
    port, stop = run_server(service)
    device = jax.devices()[0].device_kind
    print(
        f"jax {jax.__version__}, {device}, {args.rows} rows, prompts of {args.prompt} tokens, "
        f"{args.texts} texts of {args.tokens} for each client\n\n"
        "| clients | engine, tokens/s | server, tokens/s | share | engine, ms to the first token: "
        "median / 95% | server | server, ms a token |\n|---|---|---|---|---|---|---|"
    )
    ask = ask_engine(served.engine, args.tokens)
    list(ask(make_prompt(9999, args.prompt)))
    for number, clients in enumerate(map(int, args.clients.split(","))):
        alone = run_clients(ask, clients, args.texts, args.prompt, 10_000 * (2 * number + 1))
        command = [
            sys.executable, "-m", "benchmarks.serve", args.model, "--port", str(port),
            "--clients", str(clients), "--texts", str(args.texts), "--tokens", str(args.tokens),
            "--prompt", str(args.prompt), "--seed", str(10_000 * (2 * number + 2)),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(format_row(clients, alone, Load(*json.loads(done.stdout))), flush=True)
    stop()


if __name__ == "__main__":
    main()
