"""The training loop: the one place with side effects (time, files, output, signals).

`train` opens a run and trains it; `run_steps` is the loop; the small functions below it do what is
due every so many steps. What follows from that (files, plots, output) is done by hooks.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import jax
import optax

from jaxgpt import hosts
from jaxgpt.config import Config
from jaxgpt.console import format_sample
from jaxgpt.data import prefetch_batches
from jaxgpt.evaluate.run import ask
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import abstract_params
from jaxgpt.model.capture import find_groups
from jaxgpt.selection import select
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import Progress, RunError, SaveError, describe_last_step
from jaxgpt.trainer.evaluate import evaluate
from jaxgpt.trainer.hooks import Hook
from jaxgpt.trainer.logging import warn_on_file_errors, write_text_atomically
from jaxgpt.trainer.memory import describe_step_memory_errors
from jaxgpt.trainer.norms import list_layers
from jaxgpt.trainer.recovery import (
    DivergedError,
    Spike,
    find_spike,
    go_on_without_save,
    recover,
)
from jaxgpt.trainer.report import format_complete, format_duration, format_samples, format_summary
from jaxgpt.trainer.run import Run, can_sample, join_run_path, open_run
from jaxgpt.trainer.speed import count_step_flops
from jaxgpt.trainer.spikes import read_guard
from jaxgpt.trainer.step import Metrics, select_trained
from jaxgpt.trainer.stop import StopSignal, make_stop_signal


def train(cfg: Config, *, hooks: Sequence[Hook] = (), is_quiet: bool = False) -> Progress:
    """Train the model of `cfg`, or resume its training, and return the progress.

    All output is in `cfg.run_folder`. Called again with the same config after any kind of stop,
    it continues bit for bit as if it had not stopped.

    Args:
        hooks: called at every step, evaluation and checkpoint and at the end, after the built-in
            ones, in this order.

    Raises:
        ConfigError: the config, the data and the devices are incompatible, or the folder holds
            a run with other settings or data.
        DivergedError: the loss became infinite or NaN.
    """
    for hook in hooks if isinstance(hooks, Sequence) else [hooks]:
        if not isinstance(hook, Hook):
            raise ConfigError(f"hooks has {hook!r}, which is not an instance of a Hook's class.")
    with describe_file_errors(cfg.run_folder):
        run = open_run(cfg, hooks, is_quiet or hosts.process_index() > 0)
    with closing(run):
        if run.is_complete:
            run.console.log(format_complete(cfg, run.progress))
            return run.progress
        with (
            hosts.abort_on_error(DivergedError, SaveError, LostLockError),
            jax.set_mesh(run.mesh),
            make_stop_signal(run.progress.step, run.console.log) as stop,
        ):
            run.notify("on_start")
            with (
                describe_file_errors(cfg.run_folder),
                describe_step_memory_errors(cfg, run.mesh),
            ):
                run_steps(run, stop)
                finish_saving(run)
                run.notify("on_end")
        if not stop.name and cfg.train.sample_every:
            run.console.log(format_samples(join_run_path(cfg, "samples")))
        run.console.log(format_summary(cfg, run.progress, stop.name))
    return run.progress


@contextmanager
def describe_file_errors(run_folder: str) -> Iterator[None]:
    """Turn an error of a file into one that gives its path and the last good step.

    Raises:
        RunError: in place of the original error.
    """
    try:
        yield
    except OSError as error:
        path = error.filename if error.filename is not None else run_folder
        raise RunError(
            f"{path}: {error.strerror or error}; {describe_last_step(run_folder)}. The same "
            "command continues from there."
        ) from error


def run_steps(run: Run, stop: StopSignal):
    """Run training steps until the end, an early stop or a signal; recover from spikes."""
    timer: StepTimer | None = StepTimer(run)
    if run.progress.step == 0:
        show_untrained(run)
    is_due = False
    while True:
        try:
            if is_due:  # after the step that was skipped
                do_what_is_due(run, find_due(run.cfg, run.progress.step, run.is_complete))
            run_until_spike(run, stop, timer)
            return
        except Spike as spike:
            timer = None
            is_due = recover(run, spike, stop)


def run_until_spike(run: Run, stop: StopSignal, timer: "StepTimer | None"):
    """Run training steps until the end, an early stop or a signal.

    Raises:
        Spike: a step, its evaluation or the state is no good.
    """
    cfg, progress = run.cfg, run.progress
    local_rows = hosts.find_local_rows(run.mesh, cfg.train.batch)
    batches = prefetch_batches(run.task, progress.next_batch, local_rows, cfg.data.prefetch)
    pending = None  # metrics of an earlier step, fetched once the next step has been dispatched
    run.clock.start(progress.step)
    with closing(batches):
        while not run.is_complete and not stop.name:
            with jax.profiler.StepTraceAnnotation("train", step_num=progress.step + 1):
                run.state, metrics = run.train_step(run.state, run.feed(run.state, next(batches)))
            progress.step += 1
            progress.tokens += run.task.tokens_per_batch
            step = progress.step
            run.notify("on_step")
            if pending:
                log_metrics(run, *pending)
            if timer:  # last: it waits for this step, which would count as a part of the one before
                timer.count(metrics)
            due = find_due(cfg, step, run.is_complete or stop.is_last_step(step))
            pending = (step, metrics) if due.log or due.norms else None
            if not (due.eval or due.tasks or due.save or due.sample):
                continue
            if pending:
                log_metrics(run, *pending)
                pending = None
            check_step(run, step, metrics)
            do_what_is_due(run, due)
    if pending:
        log_metrics(run, *pending)
    save(run)  # in case a signal arrived outside of the training step


# --- every so many steps ---------------------------------------------------------------------


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    norms: bool
    eval: bool
    tasks: bool
    save: bool
    sample: bool


# Steps after which a sample shows how the model learns, besides those of train.sample_every.
EARLY_SAMPLES = (50, 200)


def find_due(cfg: Config, step: int, is_stopping: bool) -> Due:
    """Return what is to be done after a step; everything after the last one."""
    train, is_last = cfg.train, step == cfg.train.steps
    return Due(
        log=is_last or step % train.log_every == 0,
        norms=train.log_norms > 0 and (is_last or step % train.log_norms == 0),
        eval=is_last or step % train.eval_every == 0,
        tasks=bool(train.eval_tasks) and (is_last or step % train.task_interval == 0),
        save=is_stopping or step % train.save_every == 0,
        sample=is_last
        or (train.sample_every > 0 and (step % train.sample_every == 0 or step in EARLY_SAMPLES)),
    )


def do_what_is_due(run: Run, due: Due):
    """Evaluate, save and sample after a step, as far as they are due."""
    run.progress.seconds += run.clock.pause()
    if due.eval:
        run_eval(run)
    if due.tasks:
        run_tasks(run)
    if due.save or run.progress.is_done:
        save(run)
    if due.sample:  # last, because it is only shown
        log_sample(run)
    run.clock.start(run.progress.step)


def show_untrained(run: Run):
    """Evaluate the model before its first step, and log a sample of it."""
    run.notify("on_untrained", measure(run))
    run_tasks(run)
    if run.cfg.train.sample_every:
        log_sample(run)


class StepTimer:
    """Logs the time of the first step, and of the run, once a few more steps have shown it."""

    STEPS = 5  # that are timed, after the one that compiles

    def __init__(self, run: Run):
        self._run, self._first, self._start = run, run.progress.step + 1, 0.0
        timed = range(self._first, self._first + self.STEPS)
        self._is_undisturbed = not any(any(find_due(run.cfg, s, False)[2:]) for s in timed)

    def count(self, metrics: Metrics):
        """Count a step that has been dispatched."""
        done = self._run.progress.step - self._first
        if done == 0:
            jax.block_until_ready(metrics)
            duration = format_duration(self._run.clock.start(self._run.progress.step))
            self._run.console.log(f"compiled, and made one step, in {duration}")
        if done not in (0, self.STEPS) or not self._is_undisturbed:
            return
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        if done == 0:
            self._start = now
            return
        left = self._run.cfg.train.steps - self._run.progress.step
        seconds = (now - self._start) / self.STEPS
        self._run.console.log(
            f"{seconds:.2g} s a step: about {format_duration(left * seconds)} of training for the "
            f"remaining {left:,} steps, besides evaluations and samples"
        )


def log_metrics(run: Run, step: int, metrics: Metrics):
    """Fetch the metrics of a training step, and pass them to the hooks."""
    check_step(run, step, metrics)
    cfg, due = run.cfg, find_due(run.cfg, step, False)
    if due.norms:
        run.notify("on_norms", step, fetch_norms(run, metrics["norms"]))
    if not due.log:
        return
    names = (name for name in metrics if name not in ("norms", "is_spike"))
    values = {name: float(metrics[name]) for name in dict.fromkeys(("loss", "nats", *names))}
    seconds = run.clock.seconds_per_step(step)
    if seconds:  # not known for the first step, which compiles
        rate = run.task.tokens_per_batch / seconds
        values |= {
            "tokens_per_second": rate,
            "mfu": rate * count_step_flops(cfg) / run.peak_flops,
            "eta_seconds": (cfg.train.steps - step) * seconds,
        }
    run.notify("on_metrics", step, values)


def fetch_norms(run: Run, norms: Any) -> dict[str, float]:
    """Fetch the norms of a step by layer, as "grad_norm/layers.0"."""
    trees = {"grad": select(run.state.params, select_trained(run.cfg)), "param": run.state.params}
    groups = find_groups(abstract_params(run.cfg.model)[0])
    return {
        f"{kind}_norm/{name}": float(value)
        for kind, values in hosts.fetch(norms).items()
        for name, value in zip(list_layers(trees[kind], groups), values, strict=True)
    }


def run_eval(run: Run):
    """Evaluate on the held-out text, save the best model, and pass the metrics to the hooks."""
    cfg, progress = run.cfg, run.progress
    values = measure(run)
    check_finite(run, progress.step, "held-out loss", values["loss"])
    if is_better(cfg, values, progress):
        check_lock(run)
        with go_on_without_save(run):
            run.saver.wait()
        progress.best_loss, progress.best_accuracy = values["loss"], values["accuracy"]
        progress.best_step, progress.stale = progress.step, 0
        with go_on_without_save(run):
            run.saver.save_best(run.state, progress)
    else:
        progress.stale += 1
    run.notify("on_eval", values)


def measure(run: Run) -> dict[str, Any]:
    """Return the metrics of the current model on the held-out text."""
    lengths = run.corpus.tokenizer.lengths if run.cfg.objective.is_text else None
    params, batches = run.state.model_params, run.make_eval_batches()
    return evaluate(run.eval_step, params, batches, lengths, run.place_batch)


def run_tasks(run: Run):
    """Ask the current model the questions of `train.eval_tasks`, and pass the results to hooks."""
    if not run.benchmarks:
        return
    model = make_model(run)
    for name, (shown, shots) in run.benchmarks.items():
        run.notify("on_task", ask(model, name, shown, shots))


def make_model(run: Run) -> LanguageModel:
    """Return the current model: valid until the next step, which takes its memory."""
    params, labels = run.state.model_params, tuple(run.task.labels)
    return LanguageModel(run.cfg, params, run.corpus.tokenizer, labels)


def is_better(cfg: Config, values: Mapping[str, float], best: Progress) -> bool:
    """Return whether an evaluation is better than the best one so far, by `train.best_by`."""
    if cfg.best_by == "loss":
        return values["loss"] < best.best_loss
    found = values["accuracy"], -values["loss"]  # of the same accuracy, the lower loss
    return found > (best.best_accuracy, -best.best_loss)


def log_sample(run: Run):
    """Generate a sample from the current model, print it, and save it in samples/."""
    cfg = run.cfg
    if not can_sample(cfg):
        return
    text = format_sample(make_model(run), cfg.sample.prompt)
    path = os.path.join(join_run_path(cfg, "samples"), f"step_{run.progress.step:06d}.txt")
    with warn_on_file_errors(run.console.log, path):
        write_text_atomically(path, text)
    title = f"--- sample at step {run.progress.step} "
    run.console.log(f"{title:-<72}\n{text}\n{'':-<72}")


_compute_norm = jax.jit(optax.tree.norm)


def save(run: Run):
    """Start saving a checkpoint, after a check that the parameters are finite."""
    if run.progress.step == run.saver.latest_step():
        return
    norm = float(_compute_norm(run.state.params))  # the loss is that of the parameters before
    check_finite(run, run.progress.step, "norm of the parameters", norm)
    run.progress.guard = read_guard(run.state.guard)
    run.notify("on_save")
    check_lock(run)
    with go_on_without_save(run):
        run.saver.wait()  # its error is that of the checkpoint before
    with go_on_without_save(run, is_last=run.is_complete):
        run.saver.save(run.state, run.progress)


def finish_saving(run: Run):
    """Wait until the last state is on disk.

    Raises:
        SaveError: it could not be saved, at two tries.
    """
    with go_on_without_save(run, is_last=True):
        run.saver.wait()
    if run.saver.latest_step() != run.progress.step:
        run.saver.save(run.state, run.progress)
        run.saver.wait()


class LostLockError(RunError):
    """Another run has taken the folder of this one."""


def check_lock(run: Run):
    """Raise LostLockError if another run has taken the folder: its files must be left alone."""
    is_lost = run.lock is not None and not run.lock.is_held()
    if any(hosts.all_gather_text("lock", "lost" if is_lost else "")):
        raise LostLockError(
            f"another run has taken {run.cfg.run_folder}, whose lock was deleted: this one ends at "
            f"step {run.progress.step} without saving."
        )


def check_step(run: Run, step: int, metrics: Metrics):
    """Raise Spike if a step is one, or comes after one at which the state is held."""
    if "is_spike" in metrics and bool(metrics["is_spike"]):
        raise find_spike(run)
    check_finite(run, step, "loss", float(metrics["loss"]))


def check_finite(run: Run, step: int, quantity: str, value: float):
    """Raise Spike unless `value` is finite."""
    if not math.isfinite(value):
        raise Spike(step, f"the {quantity} is {value}")


__all__ = ["DivergedError", "Run", "evaluate", "open_run", "train"]
