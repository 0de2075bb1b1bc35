"""Hooks: what is called at every step, at every evaluation and checkpoint, and at the end of a run.

    class Patience(Hook):
        def on_eval(self, view, values):
            if values["accuracy"] > 0.9:
                view.stop("accurate enough")

    train(config, hooks=[Patience()])

The files, plots and console output of a run are hooks too (see `jaxgpt.trainer.logging`). With
several processes every process calls its hooks, with the same values: what they decide must follow
from these values alone, so that all processes decide the same.
"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxgpt import hosts
from jaxgpt.config import Config
from jaxgpt.evaluate.run import TaskResult
from jaxgpt.tokenizer import Tokenizer


class RunView:
    """What hooks may see of a run, and the two things that they may do: log, and stop it."""

    def __init__(self, run: Any):  # a `jaxgpt.trainer.run.Run`, a module that imports this one
        self._run = run

    @property
    def cfg(self) -> Config:
        """The config of the run."""
        return self._run.cfg

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self._run.corpus.tokenizer

    @property
    def labels(self) -> list[str]:
        """Names of the classes, for a classifier."""
        return list(self._run.task.labels)

    @property
    def step(self) -> int:
        """Steps done so far."""
        return self._run.progress.step

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self._run.progress.tokens

    @property
    def best(self) -> tuple[float, int]:
        """The held-out loss of the best evaluation (see `train.best_by`), nats, and its step."""
        return self._run.progress.best_loss, self._run.progress.best_step

    @property
    def best_accuracy(self) -> float:
        """The held-out accuracy of the best evaluation."""
        return self._run.progress.best_accuracy

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return self._run.progress.stale

    @property
    def params(self) -> Any:
        """The model's parameters: valid until the next step, which takes their memory."""
        return self._run.state.model_params

    def log(self, text: str):
        """Print a text, above the progress bar."""
        self._run.console.log(text)

    def stop(self, reason: str):
        """End the run after this step; it stays ended when it is resumed, but for resume=force."""
        self._run.progress.is_done = True
        self._run.progress.stop_reason = reason


class Hook:
    """Does nothing. Override what is needed.

    None of its methods may change the run, and `on_step` must not wait for the devices: a step has
    been dispatched, not computed, when it is called.
    """

    def on_start(self, view: RunView):
        """Act before the first step, also of a resumed run."""

    def on_untrained(self, view: RunView, values: Mapping[str, Any]):
        """Act on the metrics of the held-out text before the first step of a new run."""

    def on_step(self, view: RunView):
        """Act after every step."""

    def on_metrics(self, view: RunView, step: int, values: Mapping[str, float]):
        """Act on the metrics of a training step, one step later: every `train.log_every` steps."""

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        """Act on the metrics of an evaluation (see `evaluate`), after the best one is updated."""

    def on_task(self, view: RunView, found: TaskResult):
        """Act on the result of a benchmark (`train.eval_tasks`), also before the first step."""

    def on_norms(self, view: RunView, step: int, values: Mapping[str, float]):
        """Act on the norms of a step by layer, "grad_norm/layers.0": every `train.log_norms`."""

    def on_spike(self, view: RunView, spike: Mapping[str, Any]):
        """Act on a loss spike, with the run where it goes on: after the spike, or rolled back.

        Steps from `view.step` to the spike, and some after it, have been counted before: `on_step`
        is called for them again. `spike` is as in metrics.jsonl: step, batch, action, reason.
        """

    def on_save(self, view: RunView):
        """Act when a checkpoint is about to be saved: of this step, with these parameters."""

    def on_end(self, view: RunView):
        """Act when the run is complete or stopped, with its last checkpoint on disk."""

    def close(self):
        """Release files and the like, also after an error."""


class EarlyStop(Hook):
    """Stop the run after some evaluations without a new best one. `patience`: 0 = never."""

    def __init__(self, patience: int):
        self._patience = patience

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        if self._patience and view.stale >= self._patience:
            view.stop(f"no better for {view.stale} evaluations")


class OverfitWarning(Hook):
    """Warn once if the held-out loss has risen for a while though the training loss falls."""

    EVALUATIONS = 3  # in a row, above the lowest one

    def __init__(self):
        self._losses: list[float] = []  # of training, since the last evaluation
        self._at_lowest, self._lowest, self._step = float("nan"), float("inf"), 0
        self._count = 0  # of evaluations since the lowest one

    def on_metrics(self, view: RunView, step: int, values: Mapping[str, float]):
        self._losses.append(values["nats"])

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        if not self._losses:
            return
        training = sum(self._losses) / len(self._losses)
        self._losses = []
        if values["loss"] < self._lowest:
            self._lowest, self._at_lowest, self._step = values["loss"], training, view.step
            self._count = 0
            return
        self._count += 1
        if self._count == self.EVALUATIONS and training < self._at_lowest:
            view.log(
                f"overfitting: since step {self._step} the held-out loss has risen from "
                f"{self._lowest:.3f} to {values['loss']:.3f}, while the training loss fell from "
                f"{self._at_lowest:.3f} to {training:.3f}. The best checkpoint is kept; "
                f"train.patience={self.EVALUATIONS} would end the run, more text would help."
            )


class Profiler(Hook):
    """Trace a window of steps, for the profile tab of TensorBoard, or XProf.

    Args:
        folder: of the run; traces are in its plugins/profile.
        first, last: the steps to trace; 0, 0 = none.
    """

    def __init__(self, folder: str, first: int, last: int):
        self._folder, self._first, self._last = folder, first, last
        self._is_tracing = False

    def on_start(self, view: RunView):
        self.on_step(view)

    def on_step(self, view: RunView):
        if hosts.process_index() > 0:
            return
        if self._is_tracing and view.step >= self._last:
            jax.block_until_ready(view.params)
            self.close()
            view.log(
                f"traced up to step {view.step}: "
                f"tensorboard --logdir {self._folder} (with xprof installed)"
            )
        elif not self._is_tracing and self._first - 1 <= view.step < self._last:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True

    def close(self):
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
