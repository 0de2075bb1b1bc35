"""Damage to files: single bits, cut and zeroed and missing files. Nothing wrong may be used.

A file of arrays also holds bytes that nothing reads, such as those of superseded indices. Where the
damage must be found, `flip_value` and `change_number` hit what is read.
"""

import collections
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from contextlib import closing, redirect_stderr
from io import StringIO

import jax
import numpy as np
import tensorstore as ts
from tiny_runs import config, make_training, to_numpy

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import override
from jaxgpt.loading import load, read_config
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.verification import is_usable, verify

from . import Outcome

STEPS = (2, 3)


class SavedRun:
    """A run folder with two checkpoints and a best one, of different numbers, to be damaged."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.good = folder / "run", folder / "good"
        self.cfg = override(config(), [f"folder={folder}", "name=run"])
        self.training = make_training(self.cfg)
        self.tokenizer = tokenizers.make_byte_tokenizer()
        first = self.training.make_state()
        self.states = {step: _make_state(first, step) for step in STEPS}
        progress = {"tokenizer": self.tokenizer.fingerprint}
        with closing(Checkpoints(str(self.good), keep=2)) as saver:
            saver.save_best(self.states[2], Progress(step=2, **progress))
            for step in STEPS:
                saver.save(self.states[step], Progress(step=step, **progress))
        (self.good / "config.json").write_text(configs.to_json(self.cfg))
        self.tokenizer.save(str(self.good / "tokenizer.json"))
        self.bits = {step: to_numpy(state) for step, state in self.states.items()}
        self.reset()

    def reset(self):
        """Make the folder whole again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)

    def list_files(self) -> list[pathlib.Path]:
        """Return the files that a run or a reader needs, in a fixed order."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def use(self, what: str) -> str:
        """Return what happens when the folder is used: "right", "refused", "fell back" or "wrong".

        Args:
            what: "resume", "sample latest", "sample best" or "verify".
        """
        try:
            with redirect_stderr(StringIO()) as err:
                if what == "verify":
                    return "right" if is_usable(verify(str(self.folder))) else "refused"
                if what == "resume":
                    return self._resume()
                model = load(str(self.folder), checkpoint=what.split()[1])
        except ConfigError:
            return "refused"
        wanted = 3 if what == "sample latest" else 2
        if model.config != self.cfg or model.tokenizer.fingerprint != self.tokenizer.fingerprint:
            return "wrong"
        if not _is_same(to_numpy(model.params), self.bits[model.step].params):
            return "wrong"
        is_first = model.step == wanted and ("best" in model.origin) == (what == "sample best")
        if is_first:
            return "right"
        return "fell back" if "is damaged" in err.getvalue() or "cannot be read" in err.getvalue() \
            else "wrong"  # fmt: skip

    def _resume(self) -> str:
        if configs.list_differences(read_config(str(self.folder)), self.cfg):
            return "refused"
        with closing(Checkpoints(str(self.folder), 2)) as saver:
            state, progress = saver.restore(self.training.abstract)
            note = saver.note
        if not _is_same(to_numpy(state), self.bits[progress.step]):
            return "wrong"
        wanted = Progress(step=progress.step, tokenizer=self.tokenizer.fingerprint)
        if progress != wanted:
            return "wrong"
        return "right" if progress.step == 3 else "fell back" if note else "wrong"


def _make_state(state, step: int):
    """Return a state with other numbers in every array of floats."""

    def grow(x):
        return x + step if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) else x

    rest = jax.tree.map(grow, (state.params, state.opt_state))
    return state.replace(params=rest[0], opt_state=rest[1], step=jax.numpy.int32(step))


def _is_same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def flip(path: pathlib.Path, dice: random.Random):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


def cut(path: pathlib.Path, dice: random.Random):
    """Cut a file short."""
    os.truncate(path, dice.randrange(path.stat().st_size) if path.stat().st_size else 0)


def zero(path: pathlib.Path, dice: random.Random):
    """Fill a file, or the rest of it, with zeros, as after a power failure."""
    size = path.stat().st_size
    start = dice.choice([0, dice.randrange(size) if size else 0])
    path.write_bytes(path.read_bytes()[:start] + bytes(size - start))


def remove(path: pathlib.Path, dice: random.Random):
    """Delete a file."""
    path.unlink()


def flip_value(part: pathlib.Path) -> str:
    """Flip a bit in the largest stored value of a part of a checkpoint; return its array's name.

    Args:
        part: folder of the part, such as checkpoints/3/params.
    """
    base = {"driver": "file", "path": f"{part}/"}
    database = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [key for key in database.list().result() if not key.endswith(b".zarray")]
    values = {key.decode(): database.read(key).result().value for key in keys}
    key = max(values, key=lambda key: (len(values[key]), key))  # short ones are in an index
    value, is_found = values[key], False
    for path in part.rglob("d/*"):
        data = bytearray(path.read_bytes())
        start = data.find(value)
        while start >= 0:  # it may have been copied
            data[start + len(value) // 2] ^= 16
            is_found, start = True, data.find(value, start + len(value))
        path.write_bytes(data)
    assert is_found, f"{key} is in no file of {part}"
    return key.rpartition("/")[0]


def change_number(part: pathlib.Path, name: str):
    """Write another number into an array of a checkpoint, so that no file is broken."""
    base = {"driver": "file", "path": f"{part}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    first = (0,) * array.rank
    array[first].write(array[first].read().result() + 1).result()


USES = ("resume", "sample latest", "sample best", "verify")


def damage(
    run: SavedRun, how: Callable[[pathlib.Path, random.Random], None], times: int, seed: int = 0
) -> Outcome:
    """Damage one file of a run, by its size or any, and use the run in every way; many times."""
    dice, counts, failures = random.Random(seed), collections.Counter(), []
    for number in range(times):
        run.reset()
        files = run.list_files()
        weights = [path.stat().st_size for path in files] if number % 2 else None
        path = dice.choices(files, weights)[0]
        before = path.read_bytes()
        how(path, dice)
        is_changed = not path.exists() or path.read_bytes() != before
        for what in USES if is_changed else ():
            found = run.use(what)
            counts[f"{what}: {found}"] += 1
            if found == "wrong":
                failures.append(f"{how.__name__} {path.relative_to(run.folder)}: {what} was wrong")
    names = {"flip": "one flipped bit", "cut": "a file cut short", "zero": "a file zeroed",
             "remove": "a file missing"}  # fmt: skip
    return Outcome(names[how.__name__], times, failures, dict(sorted(counts.items())))
