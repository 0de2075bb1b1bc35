"""What a run reports to its user: header, summary, evaluations. Functions from values to text."""

import glob
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import jaxgpt
from jaxgpt.backend import choose_dtype
from jaxgpt.config import Config
from jaxgpt.lora import describe_trained
from jaxgpt.model import abstract_params, count_params
from jaxgpt.selection import select, select_letters
from jaxgpt.sharding import list_unsharded_dims
from jaxgpt.trainer.checkpoint import Progress
from jaxgpt.trainer.estimate import TYPICAL_MFU, estimate_memory
from jaxgpt.trainer.memory import read_memory_bytes
from jaxgpt.trainer.speed import count_step_flops

SPIKE_BATCHES = 1_000  # within which `train.max_spikes` counts
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
        f"{cfg.optimizer.name} at {cfg.optimizer.lr:g}; {format_plan(run)}",
        f"speed  peak {run.peak_flops / 1e12:.3g} TFLOP/s ({peak_source}); "
        f"{count_step_flops(cfg) / 1e6:,.1f} MFLOP per token",
        *list_warnings(run),
    ])  # fmt: skip


def format_lost_steps(cfg: Config, step: int, records: Sequence[Mapping[str, Any]]) -> str:
    """Format which steps of a run that resumes at `step` were not saved; "" if all were.

    Args:
        records: of metrics.jsonl, from before the run resumed.
    """
    last = max((r["step"] for r in records if r["kind"] == "train"), default=0)
    if not step or last <= step:
        return ""
    return (
        f"lost   {last - step} steps or more, made after step {step} was saved: they are made "
        f"again. A kill costs at most train.save_every={cfg.train.save_every} steps, and those "
        "made while a checkpoint was being written."
    )


MAX_EPOCHS = 50  # a model of useful size has learned its text by heart before
MAX_DAYS = 2  # a longer run may be meant for faster devices


def count_epochs(run: Any) -> float:
    """Return how often a `Run` goes through its text. Padding counts as text."""
    return run.cfg.train.steps * run.task.tokens_per_batch / max(run.corpus.train.ids.size, 1)


def estimate_seconds(run: Any) -> float:
    """Return the least time that all steps of a `Run` can take: at the peak of its devices."""
    tokens = run.cfg.train.steps * run.task.tokens_per_batch
    return tokens * count_step_flops(run.cfg) / run.peak_flops


def format_plan(run: Any) -> str:
    """Format the epochs of a `Run`, and its least time."""
    epochs, seconds = count_epochs(run), estimate_seconds(run)
    text = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"
    return f"{text} epochs, at least {format_duration(seconds)} at the peak speed"


def list_warnings(run: Any) -> list[str]:
    """Return warnings about the plan of a `Run`: too many epochs, or too long."""
    steps, lines = run.cfg.train.steps, []
    if (epochs := count_epochs(run)) > MAX_EPOCHS:
        fewer = max(int(steps * MAX_EPOCHS / epochs), 1)
        lines.append(
            f"warning: {epochs:,.0f} epochs: the model will learn the text by heart. Use more "
            f"text, or train.steps={fewer} ({MAX_EPOCHS} epochs)."
        )
    platform = run.mesh.devices.flat[0].platform
    left = 1 - run.progress.step / steps
    seconds = left * estimate_seconds(run) / TYPICAL_MFU.get(platform, 0.4)
    if seconds > MAX_DAYS * 86400:
        lines.append(
            f"warning: about {format_duration(seconds)} on this {_name_devices(run)}; --plan shows "
            "what would fit. A smaller model or fewer train.steps end sooner."
        )
    needed, memory = estimate_memory_of(run)
    if memory and needed > memory:
        lines.append(
            f"warning: a step needs about {needed / 1e9:,.1f} GB, and this {_name_devices(run)} "
            f"has {memory / 1e9:,.1f} GB: it may not fit; --plan shows what would."
        )
    device = run.mesh.devices.flat[0]
    is_emulated = device.platform == "gpu" and choose_dtype(device) != "bfloat16"
    if is_emulated and run.cfg.model.dtype == "bfloat16":
        lines.append(
            f"warning: {device.device_kind} only emulates bfloat16: model.dtype=float32 is faster."
        )
    return lines


def estimate_memory_of(run: Any) -> tuple[int, int]:
    """Return the estimated bytes of a step of a `Run` on one device, and the device's memory."""
    device = run.mesh.local_devices[0]
    copies = len(run.mesh.local_devices) if device.platform == "cpu" else 1  # they share it
    with jax.set_mesh(run.mesh):
        needed = estimate_memory(run.cfg, run.state, run.mesh).total
    return needed * copies, read_memory_bytes(device)


def _name_devices(run: Any) -> str:
    device = run.mesh.devices.flat[0]
    if device.platform == "cpu":
        return "CPU"
    return device.device_kind if run.mesh.size == 1 else f"mesh of {run.mesh.size} devices"


def format_samples(folder: str) -> str:
    """Format the first line of a run's samples at a few steps, one below the other."""
    names = sorted(glob.glob("step_*.txt", root_dir=folder))
    if not names:
        return ""
    chosen = [name for name in names if int(name[5:-4]) in SHOWN_STEPS] + names[-1:]
    lines = []
    for name in dict.fromkeys(chosen):
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            text = " ".join(file.read(400).split())
        lines.append(f"  step {int(name[5:-4]):>6,}  {text[:80]}")
    return "\n".join(["how its samples began:", *lines])


SHOWN_STEPS = (0, 50, 200)


def _format_params(cfg: Config, mesh: jax.sharding.Mesh) -> str:
    """Format the number of parameters: of each component, trained, and not sharded."""
    parts = count_params(cfg.model)
    total = parts.pop("total")
    text = f"{total:,} parameters: "
    text += ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    shapes, letters = abstract_params(cfg.model)
    if cfg.lora.rank:
        adapters = describe_trained(cfg)[0]
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))
        text += f"; frozen in {cfg.lora.base}, with {count:,} trained beside them"
    elif cfg.optimizer.train:
        trained = select(shapes, select_letters(letters, cfg.optimizer.train))
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
        text += f"; {count:,} of them are trained"
    unsharded = ", ".join(list_unsharded_dims(shapes, letters, mesh))
    return text + (unsharded and f"; not sharded: {unsharded}")


def format_eval(values: Mapping[str, Any], unit: str) -> str:
    """Format the metrics of an evaluation for the console. unit: what the loss is a mean over."""
    text = f"held-out loss {format_loss(values['loss'], unit)}  "
    if unit == "text":
        text += f"accuracy {values['accuracy']:.2%} of {values['tokens']:,} texts"
    elif "bits_per_byte" in values:
        text += f"perplexity {values['perplexity']:.2f}  {values['bits_per_byte']:.3f} bits/byte"
    elif unit in ("pair", "answer"):
        text += f"accuracy {values['accuracy']:.1%}"
    else:
        text += f"perplexity {values['perplexity']:.2f}  accuracy {values['accuracy']:.1%}"
    own = [f"  {name} {x:.4g}" for name, x in values.items() if name not in EVAL_METRICS]
    return text + "".join(own)


def format_loss(loss: float, unit: str) -> str:
    """Format a mean loss per unit; that of an answer is minus its reward, which is not in nats."""
    return f"{loss:.4f}" if unit == "answer" else f"{loss:.4f} nats/{unit}"


def format_spike(spike: Mapping[str, Any], step: int, cfg: Config) -> str:
    """Format what a run does about a loss spike, and goes on from `step`."""
    if spike["action"] == "skip":
        answer = "its update is skipped"
    else:
        answer = f"back to step {step}, and on with batch {spike['batch'] + 1}"
    recent = f"{spike['recent']} of at most {cfg.train.max_spikes} in {SPIKE_BATCHES:,} batches"
    text = f"spike at step {spike['step']}: {spike['reason']}; {answer} ({recent})"
    if spike["autopsy"]:
        text += f": jaxgpt autopsy {shlex.quote(cfg.run_folder)} {spike['autopsy']}"
    return text


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


MANY_DAYS = 10


def format_duration(seconds: float) -> str:
    """Format a duration as 12s, 3m05s, 2h07m, 12 days or 3 years."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < MANY_DAYS * 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    days = total / 86400
    return f"{days:,.0f} days" if days < 2 * 365 else f"{days / 365:,.0f} years"


def format_complete(cfg: Config, progress: Progress) -> str:
    """Format the message for a run in which nothing is left to do."""
    hint = _format_sample_hint(cfg)
    if progress.is_done and progress.step < cfg.train.steps:
        has_patience = 0 < cfg.train.patience <= progress.stale  # it would stop again
        remedy = " and a larger train.patience, or 0" if has_patience else ""
        return (
            f"This run is complete: it stopped early at step {progress.step}"
            f"{_format_reason(progress)}. Continue it by resume=force{remedy}.{hint}"
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
    return f"Done: {time_spent}{why}. {best}{curve}.\n{format_next_commands(cfg)}"


def format_next_commands(cfg: Config) -> str:
    """Format commands to go on with after training."""
    folder = shlex.quote(cfg.run_folder) + _format_plugins(cfg)
    if cfg.objective.is_chat:
        return f"Next, talk with this model:\n  jaxgpt chat {folder}"
    text = shlex.quote(cfg.sample.prompt or "Once")
    more = f"--prompt {text}" + (" temperature=0.5 top_p=0.95" if cfg.objective.is_text else "")
    return "\n".join([
        "Next, train on a text of your own, or see what this model has learned:",
        "  jaxgpt train --config gpt_mini data.source=my_texts/",
        f"  jaxgpt sample {folder} {more}",
        f"  jaxgpt sample {folder}",
    ])  # fmt: skip


def _format_best(cfg: Config, progress: Progress) -> str:
    if cfg.best_by == "accuracy":
        return f"accuracy {progress.best_accuracy:.2%}"
    return f"loss {format_loss(progress.best_loss, cfg.objective.loss_unit)}"


def _format_reason(progress: Progress) -> str:
    return f": {progress.stop_reason or f'no better for {progress.stale} evaluations'}"


def _format_sample_hint(cfg: Config) -> str:
    return f" Sample from it:\n  jaxgpt sample {shlex.quote(cfg.run_folder)}{_format_plugins(cfg)}"


def _format_plugins(cfg: Config) -> str:
    """Return the argument that imports the plugins of a run again."""
    return f" plugins={shlex.quote(','.join(cfg.plugins))}" if cfg.plugins else ""
