"""What a run reports to its user: header, summary, evaluations. Functions from values to text."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import jaxgpt
from jaxgpt.config import Config
from jaxgpt.model import abstract_params, count_params
from jaxgpt.selection import select, select_letters
from jaxgpt.sharding import list_unsharded_dims
from jaxgpt.trainer.checkpoint import Progress
from jaxgpt.trainer.speed import flops_per_token

EVAL_METRICS = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "confusion")


def format_header(run: Any, peak_source: str) -> str:
    """Format what is known of a `Run` before its first step."""
    cfg, corpus, progress = run.cfg, run.corpus, run.progress
    grid = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
    state = f"resuming from step {progress.step}" if progress.step else "new"
    return "\n".join([
        f"jaxgpt {jaxgpt.__version__} on jax {jax.__version__}, {run.mesh.size} "
        f"{run.mesh.devices.flat[0].platform} device(s){f' ({grid})' if grid else ''}",
        f"run    {cfg.run_folder} ({state})",
        *([f"start  {run.start_note}"] if run.start_note else []),
        f"data   {corpus.source}: {corpus.train_bytes / 1e6:,.1f} MB in "
        f"{corpus.train_documents:,} {'pairs' if corpus.is_paired else 'documents'}, "
        f"{corpus.train.ids.size:,} tokens; held out by {corpus.rule}: "
        f"{corpus.held_out_bytes / 1e6:,.2f} MB, {corpus.held_out.ids.size:,} tokens; "
        f"{corpus.bytes_per_token:.2f} bytes per token" + (run.task.note and f"; {run.task.note}"),
        f"model  {_format_params(cfg, run.mesh)}",
        f"plan   {cfg.train.steps:,} steps of {cfg.train.batch} x {run.task.T} tokens, "
        f"{cfg.optimizer.name} at {cfg.optimizer.lr:g}",
        f"speed  peak {run.peak_flops / 1e12:.3g} TFLOP/s ({peak_source}); "
        f"{flops_per_token(cfg.model) / 1e6:,.1f} MFLOP per token",
    ])  # fmt: skip


def _format_params(cfg: Config, mesh: jax.sharding.Mesh) -> str:
    """Format the number of parameters: of each component, trained, and not sharded."""
    parts = count_params(cfg.model)
    total = parts.pop("total")
    text = f"{total:,} parameters: "
    text += ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    shapes, letters = abstract_params(cfg.model)
    if cfg.optimizer.train:
        trained = select(shapes, select_letters(letters, cfg.optimizer.train))
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
        text += f"; {count:,} of them are trained"
    unsharded = ", ".join(list_unsharded_dims(shapes, letters, mesh))
    return text + (unsharded and f"; not sharded: {unsharded}")


def format_eval(values: Mapping[str, Any], unit: str) -> str:
    """Format the metrics of an evaluation for the console. unit: what the loss is a mean over."""
    text = f"held-out loss {values['loss']:.4f} nats/{unit}  "
    if unit == "text":
        text += f"accuracy {values['accuracy']:.2%} of {values['tokens']:,} texts"
    elif "bits_per_byte" in values:
        text += f"perplexity {values['perplexity']:.2f}  {values['bits_per_byte']:.3f} bits/byte"
    else:
        text += f"perplexity {values['perplexity']:.2f}  accuracy {values['accuracy']:.1%}"
    own = [f"  {name} {x:.4g}" for name, x in values.items() if name not in EVAL_METRICS]
    return text + "".join(own)


def format_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Format a confusion matrix: true classes in rows, predicted classes in columns."""
    names = [name[:12] for name in labels]
    wide = max(8, *(len(name) for name in names)) + 2
    head = " " * wide + "".join(f"{'-> ' + name:>{wide + 3}}" for name in names)
    rows = [
        f"{name:>{wide}}" + "".join(f"{count:>{wide + 3},}" for count in row)
        for name, row in zip(names, confusion, strict=True)
    ]
    return "\n".join([head, *rows])


def format_duration(seconds: float) -> str:
    """Format a duration as 12s, 3m05s or 2h07m."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def format_complete(cfg: Config, progress: Progress) -> str:
    """Format the message for a run in which nothing is left to do."""
    hint = _format_sample_hint(cfg)
    if progress.is_done and progress.step < cfg.train.steps:
        return (
            f"This run is complete: it stopped early at step {progress.step}"
            f"{_format_reason(progress)}. Continue it by resume=force, with a larger "
            f"train.patience or 0 if that has stopped it.{hint}"
        )
    return f"This run is complete.{hint}"


def format_summary(cfg: Config, progress: Progress, signal_name: str) -> str:
    """Format the message at the end of training."""
    time_spent = f"{progress.step:,} steps, {format_duration(progress.seconds)} of training"
    if signal_name:
        return (
            f"Stopped by {signal_name} after {time_spent}; saved. "
            "The same command resumes from here."
        )
    why = f", stopped early{_format_reason(progress)}" if progress.is_done else ""
    best = "No evaluation yet" if not progress.best_step else (
        f"Best held-out {_format_best(cfg, progress)} at step {progress.best_step}"
    )  # fmt: skip
    plot = os.path.join(cfg.run_folder, "plots", "loss.png")
    curve = f"; curve in {plot}" if os.path.isfile(plot) else ""
    return f"Done: {time_spent}{why}. {best}{curve}.{_format_sample_hint(cfg)}"


def _format_best(cfg: Config, progress: Progress) -> str:
    if cfg.best_by == "accuracy":
        return f"accuracy {progress.best_accuracy:.2%}"
    return f"loss {progress.best_loss:.4f} nats/{cfg.objective.loss_unit}"


def _format_reason(progress: Progress) -> str:
    return f": {progress.stop_reason or f'no better for {progress.stale} evaluations'}"


def _format_sample_hint(cfg: Config) -> str:
    return f" Sample from it:\n  jaxgpt sample {cfg.run_folder}"
