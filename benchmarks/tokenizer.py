"""Measure how fast a tokenizer is trained and how fast it encodes, on real text.

    python -m benchmarks.tokenizer --megabytes 100 --json tokenizer.json

The text is Python source: the standard library, the documentation in pydoc_data, and the files of
site-packages, each once; if that is not enough, blocks of these lines follow in shuffled order.
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator

import tokenizers

from benchmarks.worker import count_cores
from jaxgpt import tokenizer

BLOCK_LINES = 200  # lines per block of repeated text


def read_source_files() -> Iterator[bytes]:
    """Read the distinct Python files of this installation."""
    seen = set()
    for folder in ("stdlib", "purelib"):
        for path in sorted(pathlib.Path(sysconfig.get_path(folder)).rglob("*.py")):
            if folder == "stdlib" and "site-packages" in path.parts:
                continue
            try:
                text = path.read_bytes()
            except OSError:
                continue
            if text and text not in seen:
                seen.add(text)
                yield text


def make_corpus(megabytes: float) -> tuple[list[bytes], int]:
    """Return documents of this many megabytes (10^6 bytes), and the count of distinct bytes."""
    target, documents, size = int(megabytes * 1e6), [], 0
    for text in read_source_files():
        documents.append(text[: target - size])
        size += len(documents[-1])
        if size >= target:
            return documents, size
    distinct, shuffle = size, random.Random(0)
    lines = [line for text in documents for line in text.splitlines(keepends=True)]
    starts = list(range(0, len(lines), BLOCK_LINES))
    while size < target:
        shuffle.shuffle(starts)
        for start in starts:
            documents.append(b"".join(lines[start : start + BLOCK_LINES])[: target - size])
            size += len(documents[-1])
            if size >= target:
                break
    return documents, distinct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100, help="text to train on, 10^6 bytes")
    parser.add_argument("--vocab", type=int, default=8192, help="V, tokens in the vocabulary")
    parser.add_argument("--repeats", type=int, default=3, help="encoding runs; the median counts")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    arguments = parser.parse_args()

    documents, distinct = make_corpus(arguments.megabytes)
    megabytes = sum(map(len, documents)) / 1e6
    start = time.perf_counter()
    trained = tokenizer.train(iter(documents), arguments.vocab)
    seconds = time.perf_counter() - start

    # Encoding is measured on a tenth: its speed does not depend on the amount of text.
    sample = random.Random(0).sample(documents, max(1, len(documents) // 10))
    sampled = sum(map(len, sample)) / 1e6
    rates = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        tokens = sum(ids.size for ids in trained.encode_batch(sample))
        rates.append(sampled / (time.perf_counter() - start))

    result = {
        "command": f"python -m benchmarks.tokenizer --megabytes {arguments.megabytes:g} "
        f"--vocab {arguments.vocab} --repeats {arguments.repeats}",
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "cores": count_cores(),
        "documents": len(documents),
        "megabytes": round(megabytes, 3),
        "megabytes_distinct": round(distinct / 1e6, 3),
        "vocab": trained.vocab_size,
        "train_seconds": round(seconds, 2),
        "train_megabytes_per_second": round(megabytes / seconds, 2),
        "bytes_per_token": round(sampled * 1e6 / tokens, 3),
        "encode_megabytes": round(sampled, 3),
        "encode_megabytes_per_second": round(statistics.median(rates), 2),
        "encode_megabytes_per_second_range": [round(min(rates), 2), round(max(rates), 2)],
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):36} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
