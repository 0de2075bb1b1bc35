"""Bodies at random, half right: no answer may be a 5xx, and none may be late.

    python -m tests.serve_fuzz --count 5000 --streams 100

sends as many bodies to a server with a tiny model, and leaves as many streams half-way; then every
row must serve again.
"""

import argparse
import json
import pathlib
import random
import sys
from typing import Any

from jaxgpt.serve.schema import CHAT, COMPLETION, EMBEDDING, LOOK

FOLDERS = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "serve")]
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/embeddings": EMBEDDING,
    "/look": LOOK,
}
TEXTS = [
    "",
    "a",
    "hello world",
    "héllo 🎉 世界",
    "<|im_end|>",
    "\x00",
    "\ud800",
    "[a-c]+",
    "x" * 300,
]
NUMBERS = [0, 1, 2, -1, 0.5, 1e-9, 1e300, -0.0, 3, 5, 20, 21, 10**30, 128, 129, 2**63, True]
MESSAGES = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ],
    [{"role": "user"}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "x", "foo": 1}],
    [],
    [7],
]
SCHEMAS = [
    {"type": "object"}, {"type": "integer", "minimum": 0, "maximum": 9}, {"enum": []}, True,
    {"enum": ["a"]}, {"type": "nothing"}, {"$ref": "#/nothing"}, {"anyOf": 3},
    {"type": "array", "items": False},
]  # fmt: skip
# Values that are right more often than not, by the name of the field.
GOOD: dict[str, list[Any]] = {
    "messages": MESSAGES[:2],
    "prompt": ["a", "", ["a", "b"], [5, 6, 7], [[5], [6, 7]], [0, 269], [270], [[]]],
    "input": ["a", ["a", "bc"], [5, 6], [[5], [6]], [10**20]],
    "model": ["tiny", "a", "b", "nobody"],
    "max_tokens": [1, 3, 0, 10**9],
    "max_completion_tokens": [1, 3],
    "response_format": [
        {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": "xml"},
        *({"type": "json_schema", "json_schema": {"name": "s", "schema": x}} for x in SCHEMAS),
    ],
    "regex": ["[ab]{3}", "(", "a*b"],
    "grammar": ['start: "ab"', "start: nothing", "%"],
    "logit_bias": [{"5": 1}, {"269": -100}, {"270": 1}, {"x": 1}, {"5": 101}, {}],
    "stop": ["a", ["b", "🎉"], [""], ["a"] * 5, []],
    "stream_options": [{"include_usage": True}, {}, {"x": 1}],
    "stream": [True, False],
    "n": [1, 2, 3],
    "seed": [1, -1, 2**64],
    "temperature": [0, 1, 2, 1e-9],
    "top_p": [0, 1, 0.5],
    "repetition_penalty": [1, 0.01, 100],
    "encoding_format": ["float", "base64"],
    "dimensions": [16, 8],
}  # fmt: skip
BUDGET = {"max_tokens": 3}  # of texts, unless the body has its own


def make_value(dice: random.Random, depth: int = 2) -> Any:
    """Return any JSON."""
    kinds = [lambda: dice.choice(TEXTS), lambda: dice.choice(NUMBERS), lambda: None]
    if depth:
        kinds += [
            lambda: [make_value(dice, depth - 1) for _ in range(dice.randrange(4))],
            lambda: {dice.choice(TEXTS): make_value(dice, depth - 1) for _ in range(2)},
        ]
    return dice.choice(kinds)()


def make_body(dice: random.Random, path: str) -> Any:
    """Return a body for a route."""
    if dice.random() < 0.03:
        return make_value(dice)
    fields = ROUTES[path]
    needed = [name for name, field in fields.items() if field.is_required]
    names = needed + dice.sample(sorted(fields), dice.randrange(5))
    body: dict[str, Any] = dict(BUDGET) if "max_tokens" in fields else {}
    for name in names:
        is_good = name in GOOD and dice.random() < 0.8
        body[name] = dice.choice(GOOD[name]) if is_good else make_value(dice)
    if dice.random() < 0.05:
        body[dice.choice(["temprature", "functions", "\ud800", ""])] = make_value(dice)
    return body


def run(address: Any, count: int, seed: int = 0) -> dict[int, int]:
    """Send so many bodies, and return how many answers had each status.

    Raises:
        AssertionError: an answer is not what a client expects; the message has the body.
    """
    dice, counts = random.Random(seed), {}
    for _ in range(count):
        path = dice.choice(sorted(ROUTES))
        body = make_body(dice, path)
        status, headers, found = address.ask(path, json.dumps(body).encode())
        assert status < 500, (path, body, found)
        if status >= 400:
            assert set(found["error"]) == {"message", "type", "param", "code"}, (path, body)
            assert found["error"]["message"], (path, body)
        elif "event-stream" in headers["content-type"]:
            check_stream(found, (path, body))
        counts[status] = counts.get(status, 0) + 1
    return counts


def check_stream(data: bytes, case: Any):
    """Check the events of a stream: it is done, or its last event is an error of the client's."""
    lines = [x for x in data.decode().split("\n\n") if x]
    if lines[-1] != "data: [DONE]":
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["type"] == "invalid_request_error", case


def leave_streams(address: Any, count: int, seed: int = 0) -> None:
    """Leave so many streams after a few events each, and check that every row serves again.

    Raises:
        AssertionError: a row does not, or something is left.
    """
    from serving import wait_until

    dice, service = random.Random(seed), address.service
    open_streams: list[Any] = []
    for _ in range(count):
        body = {"prompt": dice.choice(["a", "b" * 40]), "max_tokens": 80, "n": dice.choice([1, 2])}
        open_streams.append(address.open_stream("/v1/completions", body | {"seed": 1}))
        for _ in range(dice.randrange(3)):
            open_streams[-1].read()
        if len(open_streams) > 3:
            open_streams.pop(dice.randrange(4)).close()
    for stream in open_streams:
        stream.close()
    wait_until(lambda: (service._texts, service.active, service.engine.running) == (0, 0, 0))
    body = {"prompt": "a", "max_tokens": 3, "n": 2 * service.rows, "temperature": 0}
    status, _, found = address.ask("/v1/completions", body)
    assert status == 200
    assert len({choice["text"] for choice in found["choices"]}) == 1
    assert service.engine._handles == {}


def main():
    """Run the doses that the arguments describe."""
    sys.path[:0] = FOLDERS
    from serving import open_tiny

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with open_tiny() as address:
        print(run(address, options.count, options.seed))
        leave_streams(address, options.streams, options.seed)


if __name__ == "__main__":
    main()
