"""JSON schemas at random, and how a model of random weights writes what they allow.

python -m tests.engine.schemas --count 200
"""

import argparse
import json
import random

import jsonschema

WORDS = ["name", "age", "tags", "ok", "x", "kind"]


def make_schema(rng: random.Random, depth: int = 2) -> dict:
    """Return a JSON schema of finite texts."""
    kinds = ["string", "integer", "boolean", "enum", "null"]
    kind = rng.choice(kinds + (["object", "array", "anyOf"] * 2 if depth else []))
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": -9, "maximum": rng.choice([0, 99])}
    if kind == "enum":
        return {"enum": rng.sample([1, "a b", None, True, "\u00e9", 2.5], rng.randint(1, 3))}
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: make_schema(rng, depth - 1) for name in names},
            "required": names[: rng.randint(0, len(names))],
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": make_schema(rng, depth - 1), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [make_schema(rng, depth - 1) for _ in range(2)]}
    return {"type": kind}


def check_text(schema: dict, text: str):
    """Raise an error unless a text is JSON that a schema allows."""
    jsonschema.validate(json.loads(text), schema)


def run(count: int, seed: int, tokens: int = 60) -> int:
    """Generate one text for each of `count` schemas, and check those that end. Return how many."""
    from engine_cases import CFG, PARAMS, TOKENIZER

    from jaxgpt.config import Config, SampleConfig
    from jaxgpt.generate import generate

    rng = random.Random(seed)
    schemas = [make_schema(rng) for _ in range(count)]
    samples = [
        SampleConfig(temperature=1.0, json_schema=json.dumps(schema), tokens=tokens - 2)
        for schema in schemas
    ]
    rows = generate(Config(model=CFG), PARAMS, TOKENIZER, [""] * count, samples)
    finished = 0
    for schema, row in zip(schemas, rows, strict=True):
        if row.ending == "eos":
            check_text(schema, row.text)
            finished += 1
    return finished


if __name__ == "__main__":
    import pathlib
    import sys

    sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    print(f"{found} of {options.count} texts ended, and each is what its schema allows")
