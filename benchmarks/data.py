"""How many tokens a second one host makes into batches, from token files on disk.

    python -m benchmarks.data --millions 50 --json data.json

Batches of some 65,536 tokens are made by every objective and packing, in turn and ahead of time by
threads. Beside them stand a floor, which only copies the bytes of a finished batch, and a peer: a
plain pipeline of Grain with one element per row, shuffled and batched, which gives tokens and
targets but neither segments, positions nor weights. The text is noise; its documents are as long as
those of the web are, by a log-normal distribution (median 300 tokens, mean some 560).
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

from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxgpt.data import Corpus, Tokens, read_ahead
from jaxgpt.data.packing import best_fit
from jaxgpt.data.shards import Joined

BATCH = 1 << 16  # tokens
AHEAD = 4  # batches
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


FILES = 4  # that the tokens are in


def write(folder: str, size: int) -> Tokens:
    """Files of so many tokens in all, mapped into memory."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(3, rng.lognormal(5.7, 1.1, size // 200).astype(np.int64))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[: np.searchsorted(starts, size, side="right")]
    ids = rng.integers(4, 260, starts[-1], np.uint16)
    ids[starts[:-1]], ids[starts[1:] - 1] = 1, 2
    paths = [os.path.join(folder, f"{number}.bin") for number in range(FILES)]
    for path, part in zip(paths, np.array_split(ids, FILES), strict=True):
        part.tofile(path)
    return Tokens(Joined([np.memmap(path, np.uint16, "r") for path in paths]), starts)


def task_of(name: str, tokens: Tokens, T: int):
    """What makes the batches of a case."""
    objective, packing, weights, model = CASES[name]
    cfg = Config(
        model=ModelConfig(vocab=VOCAB, context=T, width=64, layers=1, heads=1, ffn=64, **model),
        data=DataConfig(packing=packing, tokenizer="bytes"),
        train=TrainConfig(objective=objective, batch=BATCH // T),
    )
    words = tokenizers.from_bytes()
    parts = tuple((weight, tokens) for weight in weights)
    held = Tokens(tokens.ids[: tokens.starts[9]], tokens.starts[:10])
    return cfg.objective.task(cfg, Corpus(words, tokens, held, "", "", "", 0, 0, mixture=parts))


def in_turn(task) -> Iterator:
    return map(task.batch, itertools.count())


def peer(tokens: Tokens, T: int):
    """One element per row."""

    class Windows:
        def __len__(self):
            return (tokens.ids.size - 1) // T

        def __getitem__(self, number):
            window = tokens.cut(np.array([number * T]), T + 1)[0]
            return {"tokens": window[:-1], "targets": window[1:]}

    rows = grain.MapDataset.source(Windows()).shuffle(seed=0).repeat()
    options = grain.ReadOptions(num_threads=cores(), prefetch_buffer_size=AHEAD)
    return iter(rows.batch(BATCH // T).to_iter_dataset(options))


def copied(task) -> Iterator:
    """The floor."""
    batch = [x for x in task.batch(0) if isinstance(x, np.ndarray)]
    while True:
        yield [x.copy() for x in batch]


def cores() -> int:
    has = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1


def rates(batches: Iterator, tokens: int, seconds: float, repeats: int) -> dict[str, float]:
    """Million tokens a second: median, least and most."""
    for _ in range(3):
        next(batches)
    figures = []
    for _ in range(repeats):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        figures.append(count * tokens / (time.perf_counter() - start) / 1e6)
    named = {"median": statistics.median(figures), "least": min(figures), "most": max(figures)}
    return {name: round(figure, 2) for name, figure in named.items()}


def packing_rate(T: int) -> dict[str, float]:
    """How long a million documents take to be put together, and what stays empty."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5.7, 1.1, 1_000_000).astype(np.int64), 3, T)
    start = time.perf_counter()
    rows = int(best_fit(sizes, T).max()) + 1
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "padding": round(1 - sizes.sum() / (rows * T), 6)}


def measure(arguments) -> list[dict]:
    """A line for each length of row and each case."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        tokens = write(folder, int(arguments.millions * 1e6))
        limits = (arguments.seconds, arguments.repeats)
        for T in arguments.context:
            shown = BATCH // T * T

            def line(name, way, batches, shown=shown, T=T):
                lines.append({"T": T, "case": name, "way": way, **rates(batches, shown, *limits)})
                show(lines[-1])

            line("copy of a batch", "floor", copied(task_of("stream", tokens, T)))
            with closing(peer(tokens, T)) as batches:
                line("grain, element = row", "peer", batches)
            for name in arguments.cases:
                task = task_of(name, tokens, T)
                shown = BATCH // T * task.T
                line(name, "in turn", in_turn(task), shown)
                with closing(read_ahead(task, size=AHEAD)) as batches:
                    line(name, "ahead", batches, shown)
    return lines


def show(line: dict):
    print(f"{line['T']:>5}  {line['case']:22} {line['way']:8} {line['median']:9.2f} "
          f"({line['least']:.2f} to {line['most']:.2f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=50, help="tokens of text, 10^6")
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096], help="T")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=0.5, help="of a measurement")
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
        "cores": cores(),
        "batch": BATCH,
    }
    for name, value in facts.items():
        print(f"{name:10} {value}")
    print("\n    T  case                   way      million tokens/s: median (least to most)")
    lines = measure(arguments)
    packed = {str(T): packing_rate(T) for T in arguments.context}
    for T, figures in packed.items():
        print(f"{T:>5}  a million documents put together in {figures['seconds']} s, padding "
              f"{figures['padding']:.4%}")  # fmt: skip
    if arguments.json:
        told = {**facts, "rates": lines, "packing": packed}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
