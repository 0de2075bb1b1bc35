"""Checkpoints: everything a run needs to resume as if it had never stopped.

    run/config.json  tokenizer.json  labels.json  written once, when the run starts
    run/checkpoints/<step>/{params,rest,progress}  the latest ones
    run/best/<step>/{params,progress}              the one with the lowest held-out loss

Saving is asynchronous and atomic: a folder gets its final name only when it is complete, so a run
killed while saving resumes from the previous checkpoint: it loses at most `train.save_every` steps,
and those made while a write was under way. An older checkpoint is deleted when the new one has been
read back, and loses its name first, so that a reader never meets half of one. Parameters are stored
separately from optimizer and random state, so that sampling reads no more than it needs. All of it
has checksums (see `jaxgpt.checksums`), and what is damaged is passed over.
"""

import dataclasses
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgpt import hosts
from jaxgpt.checksums import read_arrays, seal, sum_arrays
from jaxgpt.saved_arrays import (
    DELETED,
    DamagedError,
    check_shapes,
    describe_error,
    describe_read_errors,
    get_shapes,
    list_steps,
    make_manager,
    read_manifest,
    read_progress,
)
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.barrier import Barrier, BrokenBarrierError
from jaxgpt.trainer.state import TrainState

Result = TypeVar("Result")


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
    base: str = ""  # fingerprint of the model that adapters are trained on, "" without
    labels: str = ""  # hash of the names of the classes, "" in older runs and without classes
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


class SaveError(RunError):
    """A checkpoint could not be saved; older ones are as they were.

    Attributes:
        is_best: whether it is the best one.
    """

    is_best = False


class _Folder:
    """Checkpoints in one folder. Older ones are deleted when a newer one has been read back."""

    def __init__(self, folder: str, keep: int, is_read_only: bool):
        self.path, self._keep, self._is_read_only = os.path.abspath(folder), keep, is_read_only
        self._barrier = Barrier(os.path.basename(folder))
        several = hosts.process_count() > 1
        self.manager = make_manager(folder, is_read_only, self._barrier.wait if several else None)
        self._has_failed = False
        self.damaged: set[int] = set()  # steps that cannot be restored, under their names so far
        self._saving: tuple[int, dict[str, dict[str, list[int]]]] | None = None
        if not is_read_only and hosts.process_index() == 0:  # what a killed process has left
            shutil.rmtree(os.path.join(self.path, DELETED), ignore_errors=True)

    def list_steps(self) -> list[int]:
        """Return the steps with a checkpoint, also one that is being saved, the latest first."""
        return sorted(set(self.manager.all_steps()) - self.damaged, reverse=True)

    def save(self, step: int, progress: Progress, **trees):
        """Start saving; return as soon as the arrays may be overwritten."""
        self.wait()
        if self._has_failed:
            self._remove_unfinished()
        with self._describe_errors(step):
            if not os.path.isdir(self.path):  # not into the folder that a disk was mounted on
                raise FileNotFoundError(
                    2, "No such file or directory, is its disk gone?", self.path
                )
        with self._describe_errors(step):
            if self.damaged:
                self._rename(sorted(self.damaged), "")
            self._barrier.begin()
            records = sum_arrays(**trees)
            arrays = {part: ocp.args.StandardSave(tree) for part, tree in trees.items()}
            saved_progress = ocp.args.JsonSave(seal(dataclasses.asdict(progress), records))
            args = ocp.args.Composite(progress=saved_progress, **arrays)
            if not self.manager.save(step, args=args):
                raise ValueError("a checkpoint of this step, or a later one, is in its place")
        self._saving = step, {part: get_shapes(tree) for part, tree in trees.items()}

    def wait(self):
        """Wait until everything is on disk, and can be read back; only then delete older ones."""
        if self._saving is None:
            return
        (step, shapes), self._saving = self._saving, None
        with self._describe_errors(step):
            self.manager.wait_until_finished()
            saved = read_manifest(os.path.join(self.path, str(step)))
            if {part: get_shapes(saved.get(part)) for part in shapes} != shapes:
                raise ValueError("it has other arrays than were saved")
        if old := self.list_steps()[self._keep :]:
            self._rename(old, DELETED)

    @contextmanager
    def _describe_errors(self, step: int) -> Iterator[None]:
        """Turn any error of saving, in any process, into a SaveError in all of them."""
        cause: Exception | None = None
        try:
            yield
        except Exception as found:  # Orbax raises all kinds of errors
            cause = found
            self._barrier.break_it()
        reason = describe_error(cause) if cause else ""
        reasons = list(filter(None, hosts.all_gather_text("save", reason)))
        if not reasons:
            return
        reason = next((x for x in reasons if BrokenBarrierError.__name__ not in x), reasons[0])
        self._remove_unfinished()
        if step in list_steps(self.path):  # complete, but it could not be read back
            self.damaged.add(step)
        with suppress(Exception):  # the disk may be gone
            self.manager.reload()
        name, last = f"{self.path}/{step}", describe_last_step(os.path.dirname(self.path), step)
        error = SaveError(f"the checkpoint {name} could not be saved ({reason}); {last}")
        error.is_best = os.path.basename(self.path) == "best"
        raise error from cause

    def _remove_unfinished(self):
        """Free the space of checkpoints that could not be saved.

        Called again later: writes of a save that has failed may still go on, and make folders.
        """
        self._has_failed = True
        if hosts.process_index() == 0:
            for path in glob.glob(f"{glob.escape(self.path)}/*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _rename(self, steps: Sequence[int], target: str):
        """Take the names of checkpoints away, at once for readers, in all processes.

        Args:
            target: DELETED to delete them then; "" to keep them beside, as 500.damaged.
        """
        deleted = os.path.join(self.path, DELETED)
        if hosts.process_index() == 0:
            with suppress(OSError):  # another time
                for step in steps:
                    os.makedirs(deleted, exist_ok=True)
                    number = time.time_ns()
                    beside = os.path.join(self.path, f"{step}.damaged")
                    beside += f"-{number}" if os.path.exists(beside) else ""
                    new = beside if not target else os.path.join(deleted, f"{step}-{number}")
                    os.rename(os.path.join(self.path, str(step)), new)
            shutil.rmtree(deleted, ignore_errors=True)
        hosts.all_gather_text("renamed", "")
        self.manager.reload()
        self.damaged.intersection_update(self.manager.all_steps())

    def delete(self, from_step: int):
        """Delete the checkpoints of step `from_step` and later."""
        self.wait()
        if steps := [step for step in self.manager.all_steps() if step >= from_step]:
            self._rename(steps, DELETED)

    def close(self):
        try:
            self.wait()
        finally:
            # After a failed save Orbax raises its later errors too: the first one was reported.
            with suppress(Exception) if self._has_failed else nullcontext():
                self.manager.close()
            if self._has_failed:
                self._remove_unfinished()


def describe_last_step(run_folder: str, other_than: int = -1) -> str:
    """Return which step a run can continue from, for messages."""
    steps = list_steps(os.path.join(run_folder, "checkpoints"))
    last = max((step for step in steps if step != other_than), default=0)
    return f"the last good checkpoint is of step {last}" if last else "there is no checkpoint yet"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_folder: str, keep: int, is_read_only: bool = False):
        self._latest = _Folder(os.path.join(run_folder, "checkpoints"), keep, is_read_only)
        self._best = _Folder(os.path.join(run_folder, "best"), 1, is_read_only)
        self.note = ""  # what a damaged checkpoint has cost, for the user

    def latest_step(self) -> int | None:
        """Return the step of the latest checkpoint, or None."""
        return next(iter(self._latest.list_steps()), None)

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
        """Restore the latest good state, with the shardings of `abstract`, and its progress.

        Every array is checked. A damaged checkpoint is passed over; `note` says what is lost by it,
        and it is renamed when the run saves again.

        Raises:
            ShapeMismatchError: it is the state of another model or optimizer.
            DamagedError: there is none that can be read; of the latest one.
        """
        self.wait()
        first = None
        for step in self._latest.list_steps():
            folder = os.path.join(self._latest.path, str(step))
            try:
                restored = read_on_all(partial(_read_state, folder, abstract))
            except DamagedError as error:
                first = first or error
                self._latest.damaged.add(step)
                continue
            if first:
                self.note = _describe_loss(first, step, self._latest.damaged)
            return restored
        self._latest.damaged.clear()  # nothing is done with the only copies
        raise first or ConfigError(f"{self._latest.path} has no checkpoint.")

    def read_best_progress(self) -> Progress:
        """Return the progress of the best checkpoint on disk; a new one if there is none."""
        for step in self._best.list_steps():
            with suppress(Exception):
                return Progress(**read_progress(os.path.join(self._best.path, str(step)))[0])
        return Progress()

    def wait(self):
        """Wait until everything is on disk, and can be read back."""
        self._latest.wait()
        self._best.wait()

    def close(self):
        """Finish saving and release the folders."""
        with ExitStack() as stack:
            stack.callback(self._best.close)
            stack.callback(self._latest.close)


def _read_state(folder: str, abstract: TrainState) -> tuple[TrainState, Progress]:
    """Read and check one checkpoint."""
    rng = jax.eval_shape(jax.random.key_data, abstract.rng)
    rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=abstract.step.sharding)
    expected = {"params": abstract.params, "rest": {"opt_state": abstract.opt_state, "rng": rng}}
    with describe_read_errors(folder):
        saved = read_manifest(folder)
        check_shapes(folder, saved, **expected)
        found, records = read_progress(folder)
        progress = Progress(**found)
        arrays = {part: read_arrays(folder, part, x, records) for part, x in expected.items()}
    sharding, rest = abstract.step.sharding, arrays["rest"]
    count = jax.make_array_from_callback((), sharding, lambda _: np.int32(progress.step))
    key = jax.random.wrap_key_data(rest["rng"])
    return TrainState(count, arrays["params"], rest["opt_state"], key), progress


def read_on_all(read: Callable[[], Result]) -> Result:
    """Call `read` in every process; all must call it.

    Raises:
        DamagedError: `read` has raised it, in any process.
        ConfigError: another error, of any process.
    """
    result: Result | None = None
    kind = ""
    error: ConfigError | None = None
    try:
        result = read()
    except ConfigError as found:
        error, kind = found, "damaged" if isinstance(found, DamagedError) else "other"
    text = getattr(error, "what", str(error))
    outcomes = [json.loads(x) for x in hosts.all_gather_text("read", json.dumps([kind, text]))]
    for wanted, error_type in (("other", ConfigError), ("damaged", DamagedError)):
        for index, (other_kind, other_text) in enumerate(outcomes):
            if other_kind != wanted:
                continue
            raised = error if kind == wanted else error_type(f"process {index}: {other_text}")
            raise raised or error_type(other_text)
    return cast(Result, result)


def _describe_loss(error: DamagedError, step: int, damaged: Collection[int]) -> str:
    """Return the warning of a run that continues from an older checkpoint."""
    lost = max(damaged) - step
    names = " and ".join(f"{number}.damaged" for number in sorted(damaged))
    return (
        f"warning: {error.what}. The run continues from step {step}, the checkpoint before: "
        f"{lost} step{'s' * (lost != 1)} after it are made again. What is damaged is kept as "
        f"{names} until you delete it."
    )
