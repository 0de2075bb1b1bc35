"""What the loop does about a failed save, `train.on_save_error`, and about a loss spike.

For a spike there are `train.on_spike`, its limit, and the autopsy. The loop raises `Spike` when it
reads metrics that are no good. `recover` writes the autopsy and then ends the run, skips the step,
or rolls the run back; the loop goes on from there. All of it follows from the metrics alone, so
that all processes do the same, and a run that is killed and resumed comes to the same state.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from jaxgpt import hosts
from jaxgpt.trainer.autopsy import save_record
from jaxgpt.trainer.checkpoint import RunError, SaveError, describe_last_step
from jaxgpt.trainer.report import SPIKE_BATCHES
from jaxgpt.trainer.run import Run
from jaxgpt.trainer.spikes import describe_spike, read_guard, skip_step
from jaxgpt.trainer.state import TrainState
from jaxgpt.trainer.stop import StopSignal

MAX_REPLAYED_STEPS = 2_000  # to find the state before a spike that was not held


class DivergedError(RunError):
    """The loss or the parameters are infinite or NaN, or rise again and again."""


class Spike(Exception):  # noqa: N818
    """A step whose loss or state is no good.

    Args:
        step: number of the step.
        reason: what is wrong, in words.
        is_held: whether the state is still the one before the step.
    """

    def __init__(self, step: int, reason: str, is_held: bool = False):
        super().__init__(reason)
        self.step, self.reason, self.is_held = step, reason, is_held


def find_spike(run: Run) -> Spike:
    """Return the spike at which the state is held."""
    reason = describe_spike(run.cfg.train, run.state.guard)
    return Spike(int(run.state.step) + 1, reason, is_held=True)


def recover(run: Run, spike: Spike, stop: StopSignal) -> bool:
    """Make a run go on after a spike.

    Returns:
        Whether the step of the spike is done, without its update: what is due after it is next.

    Raises:
        DivergedError: the run ends here.
        SaveError: the checkpoint before could not be saved, and `train.on_save_error` is stop.
    """
    progress = run.progress
    progress.seconds += run.clock.pause()
    with go_on_without_save(run):
        run.saver.wait()  # the last one may still be being saved
    batch = spike.step - 1 + progress.passed
    recent = [number for number in progress.spikes if number > batch - SPIKE_BATCHES] + [batch]
    action = choose_action(run, spike, recent)
    event: dict[str, Any] = {
        "step": spike.step, "batch": batch, "action": action, "reason": spike.reason
    }  # fmt: skip
    event["autopsy"] = write_autopsy_of(run, spike, event, stop)
    event["recent"] = len(recent)
    if action == "stop":
        run.notify("on_spike", event)
        raise DivergedError(format_end(run, spike, len(recent), event["autopsy"])) from None
    if action == "skip":
        progress.tokens -= (progress.step - spike.step + 1) * run.task.tokens_per_batch
        run.state, progress.step, progress.spikes = skip_step(run.state), spike.step, recent
    else:
        run.drop_state()
        run.state, run.progress = run.restore()
        run.progress.spikes = recent
        run.progress.passed = batch + 1 - run.progress.step
    run.clock.start(run.progress.step)
    run.notify("on_spike", event)
    return action == "skip"


def choose_action(run: Run, spike: Spike, recent: list[int]) -> str:
    """Return what to do about a spike, the last one of `recent`: a key of `SPIKE_ACTIONS`."""
    action = run.cfg.train.on_spike
    if len(recent) > run.cfg.train.max_spikes or (action == "skip" and not spike.is_held):
        return "stop"
    return action


def format_end(run: Run, spike: Spike, recent: int, autopsy: int) -> str:
    """Return why the run ends at a spike, and what might help."""
    train, cfg = run.cfg.train, run.cfg.optimizer
    checkpoint = describe_last_step(run.cfg.run_folder)
    clip = f"clip harder than optimizer.clip={cfg.clip}" if cfg.clip else "set optimizer.clip=1"
    text = (
        f"{spike.reason} at step {spike.step} ({checkpoint}): lower optimizer.lr={cfg.lr}, "
        f"lengthen optimizer.warmup={cfg.count_warmup(train.steps)}, or {clip}."
    )
    if train.on_spike == "stop":
        text += " train.on_spike=skip or rollback would go on without such batches."
    elif recent > train.max_spikes:
        text += (
            f" It is spike number {recent} within {SPIKE_BATCHES:,} batches, and "
            f"train.max_spikes={train.max_spikes}: the model, rather than a batch, is at fault."
        )
    if autopsy:
        text += f" See `jaxgpt autopsy {shlex.quote(run.cfg.run_folder)} {autopsy}`."
    return text


@contextmanager
def go_on_without_save(run: Run, is_last: bool = False) -> Iterator[None]:
    """Log that a checkpoint could not be saved, unless `train.on_save_error` is stop.

    If that was the best one, the progress returns to the one on disk, so that a later evaluation is
    compared with what can be sampled from.

    Args:
        is_last: of a run, which tries it again, and ends with the error if that fails.
    """
    try:
        yield
    except SaveError as error:
        if run.cfg.train.on_save_error == "stop":
            raise
        if error.is_best or not is_last:
            run.console.log(
                f"warning: {error}. Training goes on to the next save "
                "(train.on_save_error=continue)."
            )
        if error.is_best:
            best, progress = run.saver.read_best_progress(), run.progress
            progress.best_loss, progress.best_accuracy = best.best_loss, best.best_accuracy
            progress.best_step = best.best_step


# --- the autopsy ---


def write_autopsy_of(run: Run, spike: Spike, event: dict[str, Any], stop: StopSignal) -> int:
    """Write the autopsy of a spike; return its step, or 0 if that fails, which ends no run."""
    try:
        before = run.state if spike.is_held else _find_state_before(run, spike, stop)
        if before is None:
            return 0
        run.state, step = before, int(before.step) + 1
        number = step - 1 + run.progress.passed
        batch = run.task.make_batch(number)
        findings = hosts.fetch(run.diagnose(before, run.feed(before, batch)))
        record = event | {"step": step, "batch": number} | read_guard(before.guard)
        save_record(run.cfg, run.corpus.tokenizer, run.task.labels, batch, findings, record)
    except Exception as error:  # above all, too little memory
        run.console.log(f"no autopsy: {type(error).__name__}: {error}".splitlines()[0][:200])
        return 0
    return step


def _local_rows(run: Run) -> np.ndarray:
    return hosts.find_local_rows(run.mesh, run.cfg.train.batch)


def _find_state_before(run: Run, spike: Spike, stop: StopSignal) -> TrainState | None:
    """Return the state before the first bad step up to `spike.step`, by making the steps again.

    The devices hold none: a step takes the memory of the state that it is given.
    """
    run.drop_state()
    state = run.restore_state()
    first = int(state.step)
    count = spike.step - first
    if count > MAX_REPLAYED_STEPS:
        run.console.log(
            f"no autopsy: the last checkpoint is {count:,} steps before the spike; "
            "train.on_spike=skip or rollback, or train.spike_threshold=10, hold the state instead"
        )
        return None
    run.console.log(f"making steps {first + 1} to {spike.step} again, for the autopsy")
    for step in range(first, spike.step):
        if stop.name:
            return None
        before = jax.tree.map(lambda x: x.copy(), state)
        batch = run.task.make_batch(step + run.progress.passed, _local_rows(run))
        state, metrics = run.train_step(state, run.feed(state, batch))
        if not np.isfinite([float(metrics[name]) for name in ("loss", "grad_norm")]).all():
            break
    return before
