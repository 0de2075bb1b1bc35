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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt.saved_arrays import (
    check_shapes,
    describe_read_errors,
    get_shapes,
    make_manager,
    read_manifest,
)
from jaxgpt.trainer.state import TrainState


@dataclass
class Progress:
    """The progress of a run, saved beside its arrays. `step` also determines the data position."""

    step: int = 0
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent so far
    best_loss: float = float("inf")  # held-out, nats per token, at the best step
    best_accuracy: float = -1.0  # held-out, at the best step; -1 if there is none
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    data: str = ""  # fingerprint of the tokens trained on
    tokenizer: str = ""  # fingerprint of the tokenizer, "" in older runs
    evaluation: str = ""  # what `best_loss` was measured on (see `run.describe_evaluation`)
    is_done: bool = False  # it has stopped early
    stop_reason: str = ""
    passed: int = 0  # batches that rollbacks have passed over: the next one is step + passed
    spikes: list[int] = field(default_factory=list)  # numbers of the batches of the latest spikes
    guard: dict[str, float] = field(default_factory=dict)  # see `spikes.read_guard`

    @property
    def next_batch(self) -> int:
        """The number of the batch of the next step."""
        return self.step + self.passed


class RunError(RuntimeError):
    """A run cannot go on: the message gives the file, the reason and the last good step."""


class _Folder:
    """Checkpoints in one folder. Older ones are deleted when a newer one has been read back."""

    def __init__(self, folder: str, keep: int, is_read_only: bool):
        self.path, self._keep, self._is_read_only = os.path.abspath(folder), keep, is_read_only
        self.manager = make_manager(folder, is_read_only)
        self._saving: tuple[int, dict[str, dict[str, list[int]]]] | None = None

    def save(self, step: int, progress: Progress, **trees):
        """Start saving; return as soon as the arrays may be overwritten."""
        self.wait()
        arrays = {part: ocp.args.StandardSave(tree) for part, tree in trees.items()}
        saved_progress = ocp.args.JsonSave(dataclasses.asdict(progress))
        with self._describe_errors(step):
            args = ocp.args.Composite(progress=saved_progress, **arrays)
            self.manager.save(step, args=args)
        self._saving = step, {part: get_shapes(tree) for part, tree in trees.items()}

    def wait(self):
        """Wait until everything is on disk, and can be read back."""
        if self._saving is None:
            return
        (step, shapes), self._saving = self._saving, None
        with self._describe_errors(step):
            self.manager.wait_until_finished()
            saved = read_manifest(os.path.join(self.path, str(step)))
            if {part: get_shapes(saved.get(part)) for part in shapes} != shapes:
                raise ValueError("it has other arrays than were saved")
            for old in sorted(self.manager.all_steps())[: -self._keep]:
                self.manager.delete(old)

    @contextmanager
    def _describe_errors(self, step: int) -> Iterator[None]:
        """Turn any error of saving into a RunError. Orbax raises all kinds of errors."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            text = f"the checkpoint {self.path}/{step} could not be saved ({reason}); "
            raise RunError(text + describe_last_step(os.path.dirname(self.path), step)) from error

    def delete(self, from_step: int):
        """Delete the checkpoints of step `from_step` and later."""
        self.wait()
        for step in self.manager.all_steps():
            if step >= from_step:
                self.manager.delete(step)

    def close(self):
        try:
            self.wait()
        finally:
            self.manager.close()


def describe_last_step(run_folder: str, other_than: int = -1) -> str:
    """Return which step a run can continue from, for messages."""
    steps = ocp.utils.checkpoint_steps(os.path.join(run_folder, "checkpoints"))
    last = max((step for step in steps if step != other_than), default=0)
    return f"the last good checkpoint is of step {last}" if last else "there is no checkpoint yet"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: str, keep: int, is_read_only: bool = False):
        self._latest = _Folder(os.path.join(run_folder, "checkpoints"), keep, is_read_only)
        self._best = _Folder(os.path.join(run_folder, "best"), 1, is_read_only)

    def latest_step(self) -> int | None:
        """Return the step of the latest checkpoint, or None."""
        return self._latest.manager.latest_step()

    def save(self, state: TrainState, progress: Progress):
        """Start saving; return as soon as the arrays may be overwritten."""
        if progress.step == self.latest_step():
            return
        self._best.wait()  # the best one that `progress` refers to must be on disk
        rest = {"opt_state": state.opt_state, "rng": jax.random.key_data(state.rng)}
        self._latest.save(progress.step, progress, params=state.params, rest=rest)

    def save_best(self, state: TrainState, progress: Progress):
        """Start saving the parameters, replacing the previous best ones."""
        self._latest.wait()  # with many processes, Orbax cannot save two at a time
        self.delete_best(progress.step)  # of later steps, from before a kill
        self._best.save(progress.step, progress, params=state.params)

    def delete_best(self, from_step: int = 0):
        """Delete the best parameters if they are of step `from_step` or later."""
        self._best.delete(from_step)

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
        step = self.latest_step()
        folder = os.path.join(self._latest.path, str(step))
        with describe_read_errors(folder):
            check_shapes(folder, read_manifest(folder), params=abstract.params, rest=rest)
            parts = self._latest.manager.restore(
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
        """Wait until everything is on disk, and can be read back."""
        self._latest.wait()
        self._best.wait()

    def close(self):
        """Finish saving and release the folders."""
        with ExitStack() as stack:
            stack.callback(self._best.close)
            stack.callback(self._latest.close)
