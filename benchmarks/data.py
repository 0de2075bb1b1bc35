"""Measure how many tokens per second one host turns into batches, from token files on disk.

    python -m benchmarks.data --millions 50 --json data.json

Batches of about 65,536 tokens are made by every objective and packing, one after the other and
prefetched by threads. They are compared with a floor, which only copies the bytes of a finished
batch, and with a peer: a plain Grain pipeline with one element per row, shuffled and batched, which
returns tokens and targets but no segment ids, positions or weights. The text is noise; lengths of
documents follow those of the web, by a log-normal distribution (median 300 tokens, mean about 560).
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing

import grain
import numpy as np

from benchmarks.worker import count_cores
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.data import Corpus, Tokens, prefetch_batches
from jaxgpt.data.packing import pack_best_fit
from jaxgpt.data.shards import ConcatenatedArray

BATCH_TOKENS = 1 << 16  # tokens in a batch
PREFETCH_BATCHES = 4  # prefetched batches
VOCAB = 32_768
CASES = {  # name: train.objective, data.packing, weights of the sources, model.*
    "stream": ("causal", "stream", (1,), {}),
    "documents": ("causal", "documents", (1,), {}),
    "mixture of 3": ("causal", "stream", (0.6, 0.3, 0.1), {}),
    "prefix": ("prefix", "stream", (1,), {"pattern": ("prefix",)}),
    "masked": ("masked", "stream", (1,), {"family": "encoder"}),
    "span": ("span", "stream", (1,), {"family": "encoder_decoder"}),
    "span, documents": ("span", "documents", (1,), {"family": "encoder_decoder"}),
}


TOKEN_FILES = 4


def write_token_files(folder: str, size: int) -> Tokens:
    """Write files with this many tokens in total, and map them into memory."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(3, rng.lognormal(5.7, 1.1, size // 200).astype(np.int64))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[: np.searchsorted(starts, size, side="right")]
    ids = rng.integers(4, 260, starts[-1], np.uint16)
    ids[starts[:-1]], ids[starts[1:] - 1] = 1, 2
    paths = [os.path.join(folder, f"{number}.bin") for number in range(TOKEN_FILES)]
    for path, part in zip(paths, np.array_split(ids, TOKEN_FILES), strict=True):
        part.tofile(path)
    return Tokens(ConcatenatedArray([np.memmap(path, np.uint16, "r") for path in paths]), starts)


def make_task(name: str, tokens: Tokens, T: int):
    """Return the task that makes the batches of a case."""
    objective, packing, weights, model = CASES[name]
    cfg = Config(
        model=ModelConfig(vocab=VOCAB, context=T, width=64, layers=1, heads=1, ffn=64, **model),
        data=DataConfig(packing=packing, tokenizer="bytes"),
        train=TrainConfig(objective=objective, batch=BATCH_TOKENS // T),
    )
    tokenizer = tokenizers.make_byte_tokenizer()
    mixture = tuple((weight, tokens) for weight in weights)
    held_out = Tokens(tokens.ids[: tokens.starts[9]], tokens.starts[:10])
    return cfg.objective.task(
        cfg, Corpus(tokenizer, tokens, held_out, "", "", "", 0, 0, mixture=mixture)
    )


def iterate_batches(task) -> Iterator:
    return map(task.make_batch, itertools.count())


def iterate_grain_batches(tokens: Tokens, T: int):
    """Return an iterator over the batches of a Grain pipeline with one element per row."""

    class Windows:
        def __len__(self):
            return (tokens.ids.size - 1) // T

        def __getitem__(self, number):
            window = tokens.gather_windows(np.array([number * T]), T + 1)[0]
            return {"tokens": window[:-1], "targets": window[1:]}

    rows = grain.MapDataset.source(Windows()).shuffle(seed=0).repeat()
    options = grain.ReadOptions(num_threads=count_cores(), prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(rows.batch(BATCH_TOKENS // T).to_iter_dataset(options))


def copy_batches(task) -> Iterator:
    """Copy the arrays of one batch again and again: the floor."""
    batch = [x for x in task.make_batch(0) if isinstance(x, np.ndarray)]
    while True:
        yield [x.copy() for x in batch]


def measure_rates(batches: Iterator, tokens: int, seconds: float, repeats: int) -> dict[str, float]:
    """Measure millions of tokens per second: median, least and most."""
    for _ in range(3):
        next(batches)
    figures = []
    for _ in range(repeats):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        figures.append(count * tokens / (time.perf_counter() - start) / 1e6)
    summary = {"median": statistics.median(figures), "least": min(figures), "most": max(figures)}
    return {name: round(figure, 2) for name, figure in summary.items()}


def measure_packing(T: int) -> dict[str, float]:
    """Measure how long packing a million documents takes, and the fraction of padding."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5.7, 1.1, 1_000_000).astype(np.int64), 3, T)
    start = time.perf_counter()
    rows = int(pack_best_fit(sizes, T).max()) + 1
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "padding": round(1 - sizes.sum() / (rows * T), 6)}


def measure(arguments) -> list[dict]:
    """Measure every case at every row length; return the lines of the table."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_token_files(folder, int(arguments.millions * 1e6))
        limits = (arguments.seconds, arguments.repeats)
        for T in arguments.context:
            batch_tokens = BATCH_TOKENS // T * T

            def add_line(name, way, batches, batch_tokens=batch_tokens, T=T):
                rates = measure_rates(batches, batch_tokens, *limits)
                lines.append({"T": T, "case": name, "way": way, **rates})
                print_line(lines[-1])

            add_line("copy of a batch", "floor", copy_batches(make_task("stream", tokens, T)))
            with closing(iterate_grain_batches(tokens, T)) as batches:
                add_line("grain, element = row", "peer", batches)
            for name in arguments.cases:
                task = make_task(name, tokens, T)
                batch_tokens = BATCH_TOKENS // T * task.T
                add_line(name, "serial", iterate_batches(task), batch_tokens)
                with closing(prefetch_batches(task, size=PREFETCH_BATCHES)) as batches:
                    add_line(name, "prefetch", batches, batch_tokens)
    return lines


def print_line(line: dict):
    print(f"{line['T']:>5}  {line['case']:22} {line['way']:8} {line['median']:9.2f} "
          f"({line['least']:.2f} to {line['most']:.2f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=50, help="millions of tokens of text")
    parser.add_argument(
        "--context", type=int, nargs="+", default=[256, 1024, 4096], help="T, tokens per row"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements; the median counts")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    arguments = parser.parse_args()
    facts = {
        "command": f"python -m benchmarks.data --millions {arguments.millions:g} --context "
        f"{' '.join(map(str, arguments.context))} --seconds {arguments.seconds:g} --repeats "
        f"{arguments.repeats}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "grain": grain.__version__,
        "cores": count_cores(),
        "batch": BATCH_TOKENS,
    }
    for name, value in facts.items():
        print(f"{name:10} {value}")
    print("\n    T  case                   way      million tokens/s: median (least to most)")
    lines = measure(arguments)
    packing = {str(T): measure_packing(T) for T in arguments.context}
    for T, figures in packing.items():
        print(f"{T:>5}  a million documents packed in {figures['seconds']} s, padding "
              f"{figures['padding']:.4%}")  # fmt: skip
    if arguments.json:
        results = {**facts, "rates": lines, "packing": packing}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
