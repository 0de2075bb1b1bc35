"""Checkpoints: what a run needs to go on as if it had never stopped.

    run/config.json  tokenizer.json  labels.json  written once, when the run begins
    run/checkpoints/<step>/{params,rest,progress}  the latest ones
    run/best/<step>/{params,progress}              the one with the least held-out loss

Saving is asynchronous and atomic: a folder has its final name only when it is whole, so a run
killed while saving goes on from the checkpoint before. Parameters stand apart from optimizer and
randomness, so that sampling reads no more than it needs.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt import config as configs
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config
from jaxgpt.config_files import find_run_config
from jaxgpt.model import abstract_params
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.state import TrainState


@dataclass
class Progress:
    """What a run remembers beside its arrays. `step` is also the exact place in the data."""

    step: int = 0
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent so far
    best_loss: float = float("inf")  # held-out, nats per token
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    data: str = ""  # fingerprint of the tokens trained on
    is_done: bool = False  # it has stopped early


class OtherShapesError(ConfigError):
    """A checkpoint holds arrays of other names or shapes than are wanted."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: str, keep: int):
        self._latest = _manager(os.path.join(run_folder, "checkpoints"), keep)
        self._best = _manager(os.path.join(run_folder, "best"), 1)

    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    def save(self, state: TrainState, progress: Progress):
        """Begins to save; returns as soon as the arrays may be overwritten."""
        if progress.step == self._latest.latest_step():
            return
        self._best.wait_until_finished()  # what `progress` says of the best one must be on disk
        rest = {"opt_state": state.opt_state, "rng": jax.random.key_data(state.rng)}
        parts = _parts(state, progress, rest=ocp.args.StandardSave(rest))
        self._latest.save(progress.step, args=parts)

    def save_best(self, state: TrainState, progress: Progress):
        """Begins to save the parameters alone, in place of the best ones before."""
        self._latest.wait_until_finished()  # among many processes, Orbax does one thing at a time
        self.forget_best(progress.step)  # from before a kill: the run is catching up with itself
        self._best.save(progress.step, args=_parts(state, progress))

    def forget_best(self, since: int = 0):
        """Deletes the best parameters if they are of step `since` or later."""
        for step in self._best.all_steps():
            if step >= since:
                self._best.delete(step)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress]:
        """The latest state, placed as `abstract` says, and the progress that belongs to it.

        Raises:
            OtherShapesError: it is the state of another model or optimizer.
            ConfigError: it can not be read.
        """
        self.wait()
        rng = jax.eval_shape(jax.random.key_data, abstract.rng)
        rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=abstract.step.sharding)
        rest = {"opt_state": abstract.opt_state, "rng": rng}
        step = self._latest.latest_step()
        folder = os.path.join(self._latest.directory, str(step))
        with _reading(folder):
            saved = self._latest.item_metadata(step)
            _check_shapes(folder, saved, params=abstract.params, rest=rest)
            parts = self._latest.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    rest=ocp.args.StandardRestore(rest),
                    progress=ocp.args.JsonRestore(),
                ),
            )
            progress = Progress(**parts.progress)
        where = abstract.step.sharding
        count = jax.make_array_from_callback((), where, lambda _: np.int32(progress.step))
        key = jax.random.wrap_key_data(parts.rest["rng"])
        return TrainState(count, parts.params, parts.rest["opt_state"], key), progress

    def wait(self):
        """Returns when everything is on disk."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self):
        self._latest.close()
        self._best.close()


def load_run(run_folder: str, which: str = "best") -> tuple[Config, Any, Any, int]:
    """Reads a run for use.

    Args:
        run_folder: such as runs/gpt_mini.
        which: "best" (latest, while there is no best) or "latest".

    Returns:
        (config, tokenizer, params, step).

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet, or it can not be read.
    """
    config = read_config(run_folder)
    tokenizer = tokenizers.load(os.path.join(run_folder, "tokenizer.json"))
    order = {"best": ("best", "checkpoints"), "latest": ("checkpoints",)}
    for name in configs.choose(order, which, "checkpoint"):
        folder = os.path.abspath(os.path.join(run_folder, name))
        step = latest_step(folder)
        if step is not None:
            path = os.path.join(folder, f"{step}")
            with ocp.StandardCheckpointer() as reader, _reading(path):
                params = reader.restore(os.path.join(path, "params"), _here(config))
            return config, tokenizer, params, step
    raise ConfigError(f"{run_folder} has no checkpoint yet: train it first, or for longer.")


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    """Names the checkpoint that can not be read, and what to do. Orbax raises all kinds of errors.

    Raises:
        ConfigError: in place of what came from reading.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        above, step = os.path.split(folder)
        before = [n for n in ocp.utils.checkpoint_steps(above) if n != int(step)]
        rest = f"step {max(before)}, the one before, is used then" if before else (
            "there is no other one (train.keep=2 keeps two)"
        )  # fmt: skip
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ConfigError(
            f"the checkpoint {folder} is damaged ({why}). Delete this folder: {rest}."
        ) from error


def _check_shapes(folder: str, saved, **wanted):
    """Raises OtherShapesError if the saved arrays have other names or shapes than are wanted."""
    there = {part: _shapes(saved[part].tree) for part in wanted}
    here = {part: _shapes(tree) for part, tree in wanted.items()}
    lines = [
        f"  {name}: {there[part].get(name, 'nothing')} is saved, {here[part].get(name, 'nothing')} "
        "is wanted"
        for part in wanted
        for name in there[part] | here[part]
        if there[part].get(name) != here[part].get(name)
    ]
    if lines:
        more = [f"  and {len(lines) - 4} more"] if len(lines) > 4 else []
        text = "\n".join(lines[:4] + more)
        raise OtherShapesError(f"{folder} is of another model or optimizer:\n{text}")


def _shapes(tree) -> dict[str, list[int]]:
    """Name -> shape of every array of a tree. Saved trees have lists where ours have tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _here(config: Config):
    """The shapes of the parameters, on this machine's first device, wherever they were trained."""
    shapes, _ = abstract_params(config.model)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def latest_step(folder: str) -> int | None:
    """The last step of which a whole checkpoint lies in `folder`."""
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def read_config(run_folder: str) -> Config:
    """The config that a run was started with."""
    path = find_run_config(run_folder)
    with open(path) as file:
        return configs.from_json(file.read(), path)


def read_labels(run_folder: str) -> list[str]:
    """The names of the classes that a run tells apart; none if it does not classify."""
    path = os.path.join(run_folder, "labels.json")
    if not os.path.isfile(path):
        return []
    with open(path) as file:
        return json.load(file)


def _manager(folder: str, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    arrays = {part: ocp.StandardCheckpointHandler() for part in ("params", "rest")}
    handlers = {**arrays, "progress": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(os.path.abspath(folder), options=options, item_handlers=handlers)


def _parts(state: TrainState, progress: Progress, **more) -> ocp.args.Composite:
    return ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        **more,
    )
