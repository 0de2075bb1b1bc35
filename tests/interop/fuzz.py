"""Mutated files of foreign models: each is a clear error, or a model that computes.

    python -m tests.interop.fuzz --count 10000
    python -m tests.interop.fuzz --count 500 --kinds config.json tokenizer.json --seed 7

A mutation changes bytes, cuts or repeats a part, swaps numbers for hostile ones, or edits JSON. For
each file, the tool loads it and asserts: no error but ConfigError with the name of the file or
folder; no more memory than twice the file (beyond a fixed amount); no longer than MAX_SECONDS; and
no run folder after an import that failed. It prints the seed of what went wrong.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from interop import llama2c_files
from interop.make_files import edit_header, write_folder

import jaxgpt
from jaxgpt import cli
from jaxgpt.interop import gguf_files, huggingface
from jaxgpt.settings import ConfigError

MAX_SECONDS = 20  # of the processor
MAX_WAIT_SECONDS = 300  # of the clock: other processes may be busy
SLACK_BYTES = 16 << 20  # of Python objects and of tracing, whatever the size of the file
HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63,
    10**30, "", "x", "\0", "../x", "/etc/passwd", "F32", "BF16", "F8_E4M3", [], [0], [1, 2, 3], {},
    {"a": 1},
    "llama", "gpt2", "mamba", "t5", "relu", "yarn", [[]], "é" * 300,
)  # fmt: skip


# --- mutations -----------------------------------------------------------------------------------


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """Return data with a few bytes changed, a part cut, or a part repeated."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        if not found:
            break
        place, size = dice.randrange(len(found)), dice.choice((1, 2, 4, 8, 100))
        kind = dice.randrange(5)
        if kind == 0:
            found[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            found[place : place + size] = dice.randbytes(min(size, 8))
        elif kind == 2:
            del found[place : place + size]
        elif kind == 3:
            found[place:place] = found[place : place + size]
        else:
            found[place : place + 8] = dice.choice(
                (b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little"), b"\x7f" + b"\xff" * 7)
            )
    return bytes(found)


def mutate_value(value, dice: random.Random, depth: int = 0):
    """Return a JSON value with one place of it changed."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        kind = dice.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {dice.choice((f"{key}_", "new", "auto_map")): dice.choice(HOSTILE)}
        if kind == 2:
            return value | {key: value[dice.choice(list(value))]}
        return value | {key: mutate_value(value[key], dice, depth + 1)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        place = dice.randrange(len(value))
        if dice.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutate_value(value[place], dice, depth + 1), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and dice.random() < 0.5:
        return value + dice.choice((-1, 1, 7, 2**20))
    return dice.choice(HOSTILE)


def mutate_json(path: pathlib.Path, dice: random.Random):
    """Mutate a JSON file, usually so that it is still JSON."""
    if dice.random() < 0.2:
        path.write_bytes(mutate_bytes(path.read_bytes(), dice))
        return
    value = json.loads(path.read_text())
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        value = mutate_value(value, dice)
    path.write_text(json.dumps(value))


def mutate_safetensors(path: pathlib.Path, dice: random.Random):
    """Mutate the header or the bytes of a safetensors file."""
    if dice.random() < 0.6:
        edit_header(path, lambda header: mutate_value(header, dice) or {"": 1})
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), dice))


def mutate_binary(path: pathlib.Path, dice: random.Random):
    """Mutate a GGUF file or one of llama2.c, mostly in its header, where counts and sizes are."""
    data = path.read_bytes()
    cut = min(len(data), dice.choice((64, 1000, 4000, 40_000, len(data))))
    path.write_bytes(mutate_bytes(data[:cut], dice) + data[cut:])


# --- kinds of files ------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of file to mutate.

    Attributes:
        make: writes a good model at a path.
        file: the file to mutate in it, "" = the path itself.
        mutate: changes the file.
        ending: of the path.
    """

    make: Callable[[pathlib.Path], object]
    file: str
    mutate: Callable[[pathlib.Path, random.Random], None]
    ending: str = ""


def _write_shards(path: pathlib.Path):
    write_folder(path, shards=3)


def _write_gguf(path: pathlib.Path):
    """Write a tiny Llama with a tokenizer, matrices in 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(pathlib.Path(folder) / "model")
        archive = huggingface.open_folder(f"{folder}/model")
        gguf_files.write_file(archive, path, "Q8_0")


def _write_llama2c(path: pathlib.Path):
    weights = llama2c_files.make_weights(llama2c_files.SIZE)
    llama2c_files.write(path, llama2c_files.SIZE, weights, 0, is_tied=True)


KINDS: dict[str, Kind] = {
    "safetensors": Kind(write_folder, "model.safetensors", mutate_safetensors),
    "index": Kind(_write_shards, "model.safetensors.index.json", mutate_json),
    "config.json": Kind(write_folder, "config.json", mutate_json),
    "tokenizer.json": Kind(write_folder, "tokenizer.json", mutate_json),
    "tokenizer_config.json": Kind(write_folder, "tokenizer_config.json", mutate_json),
    "generation_config.json": Kind(write_folder, "generation_config.json", mutate_json),
    "gguf": Kind(_write_gguf, "", mutate_binary, ".gguf"),
    "llama2c": Kind(_write_llama2c, "", mutate_binary, ".bin"),
}


# --- one file ------------------------------------------------------------------------------------


class FuzzError(Exception):
    """Something that must not happen to a mutated file."""


def check_file(path: pathlib.Path, imports: bool = False) -> str:
    """Load a mutated model. Return "refused" or "loaded".

    Raises:
        FuzzError: it is neither, or takes too much memory or time.
    """
    size = _count_bytes(path)
    tracemalloc.start()
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _raise_hang)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.alarm(MAX_WAIT_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = _import(path) if imports else _load(path)
        peak = tracemalloc.get_traced_memory()[1]
    except FuzzError:
        raise
    except (Exception, SystemExit) as error:
        raise FuzzError("".join(traceback.format_exception(error)[-6:])) from error
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        tracemalloc.stop()
    if peak > 2 * size + SLACK_BYTES:
        raise FuzzError(f"{peak:,} bytes of memory, for files of {size:,}")
    return outcome


def _raise_hang(*_):
    raise FuzzError(f"a hang: more than {MAX_SECONDS} seconds")


def _load(path: pathlib.Path) -> str:
    try:
        model = jaxgpt.load(path)
    except ConfigError as error:
        _check_message(error, path)
        return "refused"
    cfg = model.config.model
    if any(math.prod(x.shape) > 1 << 24 for x in jax.tree.leaves(model.params)):
        raise FuzzError(f"a parameter larger than any file: {cfg}")
    return "loaded"


def _import(path: pathlib.Path) -> str:
    run = path.parent / "run"
    try:
        cli.find_module("import").main([str(path), str(run)], "jaxgpt import")
    except ConfigError as error:
        _check_message(error, path)
        if run.exists():
            raise FuzzError("a run folder of a model that was refused") from error
        return "refused"
    jaxgpt.load(run)
    return "loaded"


def _check_message(error: ConfigError, path: pathlib.Path):
    text = str(error)
    names = {path.name, "tokenizer", "model."}
    if not any(name in text for name in names) or "Traceback" in text or len(text) > 4000:
        raise FuzzError(f"an unclear error: {text[:500]!r}") from error


def _count_bytes(path: pathlib.Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def run(
    count: int,
    kinds: list[str],
    seed: int = 0,
    imports_every: int = 50,
    on_error: Callable[[FuzzError], None] | None = None,
) -> dict[str, int]:
    """Check `count` mutated files. Return how many were refused and loaded, by kind.

    Args:
        count: files.
        kinds: rows of KINDS, which take turns.
        seed: of the first file; the next ones follow.
        imports_every: every so many files are imported as a run folder, the others loaded.
        on_error: takes what was found, in place of raising it.

    Raises:
        FuzzError: with the kind and the seed that repeat it.
    """
    found: dict[str, int] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        originals = {}
        for kind in kinds:
            originals[kind] = folder / f"{kind.replace('.', '_')}{KINDS[kind].ending}"
            KINDS[kind].make(originals[kind])
        jaxgpt.load(originals[kinds[0]])  # traced and compiled once
        for number in range(seed, seed + count):
            kind = kinds[number % len(kinds)]
            target = folder / "work" / f"model{KINDS[kind].ending}"
            _copy(originals[kind], target)
            KINDS[kind].mutate(target / KINDS[kind].file if KINDS[kind].file else target,
                               random.Random(number))  # fmt: skip
            try:
                outcome = check_file(target, imports=number % imports_every == 0)
            except FuzzError as error:
                full = FuzzError(f"{kind}, --kinds {kind} --seed {number} --count 1: {error}")
                if on_error is None:
                    raise full from error
                on_error(full)
                outcome = "FOUND"
            found[f"{kind} {outcome}"] += 1
            shutil.rmtree(folder / "work", ignore_errors=True)
    return dict(found)


def _copy(source: pathlib.Path, target: pathlib.Path):
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    start = time.monotonic()
    found = run(args.count, args.kinds, args.seed, on_error=lambda error: print(error, flush=True))
    for name, count in sorted(found.items()):
        print(f"{name:40} {count}")
    print(f"{args.count} files in {time.monotonic() - start:.0f} s")
    sys.exit(any("FOUND" in name for name in found))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
