"""Checkpoints: everything a run needs to resume as if it had never stopped.

    run/config.json  tokenizer.json  labels.json  written once, when the run starts
    run/checkpoints/<step>/{params,rest,progress}  the latest ones
    run/best/<step>/{params,progress}              the one with the lowest held-out loss

Saving is asynchronous and atomic: a folder gets its final name only when it is complete, so a run
killed while saving resumes from the previous checkpoint. Parameters are stored separately from
optimizer and random state, so that sampling reads no more than it needs.
"""

import dataclasses
import os
from dataclasses import dataclass

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt.loading import (
    describe_read_errors,
    latest_step,
    make_manager,
    read_config,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.state import TrainState

__all__ = [
    "Checkpoints",
    "Progress",
    "ShapeMismatchError",
    "latest_step",
    "read_config",
]


@dataclass
class Progress:
    """The progress of a run, saved beside its arrays. `step` also determines the data position."""

    step: int = 0
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent so far
    best_loss: float = float("inf")  # held-out, nats per token
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    data: str = ""  # fingerprint of the tokens trained on
    tokenizer: str = ""  # fingerprint of the tokenizer, "" in older runs
    evaluation: str = ""  # what `best_loss` was measured on (see `run.describe_evaluation`)
    is_done: bool = False  # it has stopped early
    stop_reason: str = ""


class ShapeMismatchError(ConfigError):
    """A checkpoint's arrays have other names or shapes than expected."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: str, keep: int):
        self._latest = make_manager(os.path.join(run_folder, "checkpoints"), keep)
        self._best = make_manager(os.path.join(run_folder, "best"), 1)

    def latest_step(self) -> int | None:
        """Return the step of the latest checkpoint, or None."""
        return self._latest.latest_step()

    def save(self, state: TrainState, progress: Progress):
        """Start saving; return as soon as the arrays may be overwritten."""
        if progress.step == self._latest.latest_step():
            return
        self._best.wait_until_finished()  # the best one that `progress` refers to must be on disk
        rest = {"opt_state": state.opt_state, "rng": jax.random.key_data(state.rng)}
        parts = _make_save_args(state, progress, rest=ocp.args.StandardSave(rest))
        self._latest.save(progress.step, args=parts)

    def save_best(self, state: TrainState, progress: Progress):
        """Start saving the parameters, replacing the previous best ones."""
        self._latest.wait_until_finished()  # with many processes, Orbax cannot save two at a time
        self.delete_best(progress.step)  # of later steps, from before a kill
        self._best.save(progress.step, args=_make_save_args(state, progress))

    def delete_best(self, from_step: int = 0):
        """Delete the best parameters if they are of step `from_step` or later."""
        for step in self._best.all_steps():
            if step >= from_step:
                self._best.delete(step)

    def restore(self, abstract: TrainState) -> tuple[TrainState, Progress]:
        """Restore the latest state, with the shardings of `abstract`, and its progress.

        Raises:
            ShapeMismatchError: it is the state of another model or optimizer.
            ConfigError: it cannot be read.
        """
        self.wait()
        rng = jax.eval_shape(jax.random.key_data, abstract.rng)
        rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=abstract.step.sharding)
        rest = {"opt_state": abstract.opt_state, "rng": rng}
        step = self._latest.latest_step()
        folder = os.path.join(self._latest.directory, str(step))
        with describe_read_errors(folder):
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
        sharding = abstract.step.sharding
        count = jax.make_array_from_callback((), sharding, lambda _: np.int32(progress.step))
        key = jax.random.wrap_key_data(parts.rest["rng"])
        return TrainState(count, parts.params, parts.rest["opt_state"], key), progress

    def wait(self):
        """Wait until everything is on disk."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self):
        """Finish saving and release the folders."""
        self._latest.close()
        self._best.close()


def _check_shapes(folder: str, saved, **expected):
    """Raise ShapeMismatchError unless the saved arrays have the expected names and shapes."""
    saved_shapes = {part: _get_shapes(saved[part].tree) for part in expected}
    expected_shapes = {part: _get_shapes(tree) for part, tree in expected.items()}
    lines = [
        f"  {name}: {saved_shapes[part].get(name, 'nothing')} is saved, "
        f"{expected_shapes[part].get(name, 'nothing')} is expected"
        for part in expected
        for name in saved_shapes[part] | expected_shapes[part]
        if saved_shapes[part].get(name) != expected_shapes[part].get(name)
    ]
    if lines:
        more = [f"  and {len(lines) - 4} more"] if len(lines) > 4 else []
        text = "\n".join(lines[:4] + more)
        raise ShapeMismatchError(f"{folder} is of another model or optimizer:\n{text}")


def _get_shapes(tree) -> dict[str, list[int]]:
    """Map the name of every array of a tree to its shape. Saved trees have lists for tuples."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _make_save_args(state: TrainState, progress: Progress, **more) -> ocp.args.Composite:
    return ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        **more,
    )
