"""Readers beside a writer: they never meet a half of a checkpoint."""

import pathlib
import threading
from contextlib import closing, redirect_stderr
from io import StringIO

import jax
import numpy as np
from tiny_runs import config, make_training

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.loading import load
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.verification import is_usable, verify

from . import Outcome


def read_beside_writer(folder: pathlib.Path, times: int, keep: int = 1) -> Outcome:
    """Read best and latest many times while a writer saves without a pause, keeping one of each."""
    training = make_training(config())
    state = training.make_state()
    number = jax.jit(lambda s, n: s.replace(params=jax.tree.map(lambda x: x * 0 + n, s.params)))
    tokenizer = tokenizers.make_byte_tokenizer()
    folder.mkdir()
    (folder / "config.json").write_text(configs.to_json(config()))
    tokenizer.save(str(folder / "tokenizer.json"))
    is_done, is_ready, failures = threading.Event(), threading.Event(), []
    written = 0

    def write():
        nonlocal written
        with closing(Checkpoints(str(folder), keep)) as saver:
            while not is_done.is_set():
                written += 1
                numbered = number(state, written)
                saver.save_best(numbered, Progress(step=written))
                saver.save(numbered, Progress(step=written))
                if written > 1:
                    is_ready.set()

    writer = threading.Thread(target=write)
    writer.start()
    is_ready.wait(60)
    seen, warnings = set(), StringIO()
    try:
        with redirect_stderr(warnings):
            for read in range(times):
                try:
                    if read % 10 == 9:
                        if not is_usable(found := verify(str(folder))):
                            failures.append(f"verify: {found}")
                        continue
                    model = load(str(folder), checkpoint=("best", "latest")[read % 2])
                except Exception as error:
                    failures.append(f"{type(error).__name__}: {error}"[:300])
                    continue
                seen.add(model.step)
                values = np.unique(np.concatenate(
                    [np.ravel(x) for x in jax.tree.leaves(model.params)]))  # fmt: skip
                if values.tolist() != [model.step]:
                    failures.append(f"step {model.step} has the parameters of {values[:3]}")
    finally:
        is_done.set()
        writer.join()
    if warnings.getvalue():
        failures.append(warnings.getvalue()[:300])
    return Outcome(
        "reads beside a writer", times, failures,
        {"checkpoints written": 2 * written, "different ones read": len(seen)},
    )  # fmt: skip
