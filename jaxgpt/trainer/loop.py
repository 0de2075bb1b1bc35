"""The training loop: the one place with side effects (time, files, output, signals).

`open_run` builds everything from the config, or restores it; `train` runs the steps; the small
functions between them do what is due every so many steps.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config
from jaxgpt.data import Batch, Corpus, prefetch_batches, prepare
from jaxgpt.data.tasks import Task
from jaxgpt.data.work import print_line
from jaxgpt.model import abstract_params, build, count_params
from jaxgpt.objectives import Sums
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.optional import describe_missing
from jaxgpt.predict import check_prompts, predict
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import check_fits, list_unsharded_dims, make_mesh
from jaxgpt.trainer.checkpoint import (
    Checkpoints,
    Progress,
    ShapeMismatchError,
    latest_step,
    read_config,
)
from jaxgpt.trainer.logging import (
    Console,
    MetricsFile,
    format_duration,
    plot_confusion,
    plot_curves,
    write_text_atomically,
)
from jaxgpt.trainer.speed import Clock, flops_per_token, peak_flops
from jaxgpt.trainer.state import TrainState, abstract_state, make_state
from jaxgpt.trainer.step import Metrics, make_eval_step, make_train_step
from jaxgpt.trainer.stop import StopSignal, make_stop_signal


class DivergedError(RuntimeError):
    """The loss or the parameters are infinite or NaN."""


@dataclass
class Run:
    """A run in progress: what was built from its config, its state and its progress."""

    cfg: Config
    mesh: jax.sharding.Mesh
    corpus: Corpus
    task: Task
    state: TrainState
    progress: Progress
    train_step: Callable
    eval_step: Callable
    saver: Checkpoints
    metrics: MetricsFile
    console: Console
    peak_flops: float  # FLOP/s of all devices
    clock: Clock = field(default_factory=Clock)

    def place_batch(self, batch: Batch) -> Batch:
        """Put a batch [B T], or this process's rows of it, on the devices."""
        return hosts.place_batch(batch, self.mesh, self.cfg.train.batch)


def train(cfg: Config, *, is_quiet: bool = False) -> Progress:
    """Train the model of `cfg`, or resume its training, and return the progress.

    All output is in `cfg.run_folder`. Called again with the same config after any kind of stop,
    it continues bit for bit as if it had not stopped.

    Raises:
        ConfigError: the config, the data and the devices are incompatible, or the folder holds
            a run with other settings or data.
        DivergedError: the loss became infinite or NaN.
    """
    run = open_run(cfg, is_quiet or hosts.process_index() > 0)
    progress = run.progress
    with closing(run.console), closing(run.metrics), closing(run.saver):
        if progress.is_done or progress.step >= cfg.train.steps:
            run.console.log(f"This run is complete.{_format_sample_hint(cfg)}")
            return progress
        with (
            hosts.abort_on_error(DivergedError),
            jax.set_mesh(run.mesh),
            make_stop_signal(progress.step) as stop,
        ):
            run_steps(run, stop)
            run.saver.wait()
        run.console.log(_format_summary(cfg, progress, stop.name))
    return progress


def run_steps(run: Run, stop: StopSignal):
    """Run training steps until the end, an early stop or a signal."""
    cfg, progress, train_cfg = run.cfg, run.progress, run.cfg.train
    local_rows = hosts.find_local_rows(run.mesh, train_cfg.batch)
    batches = prefetch_batches(run.task, progress.step, local_rows, cfg.data.prefetch)
    pending = None  # metrics of an earlier step, fetched once the next step has been dispatched
    first = progress.step + 1
    run.clock.start(progress.step)
    with closing(batches):
        while progress.step < train_cfg.steps and not progress.is_done and not stop.name:
            run.state, metrics = run.train_step(run.state, run.place_batch(next(batches)))
            progress.step += 1
            progress.tokens += run.task.tokens_per_batch
            step, is_last = progress.step, progress.step == train_cfg.steps
            if step == first:
                jax.block_until_ready(metrics)
                run.console.log(
                    f"compiled, and made one step, in {format_duration(run.clock.start(step))}"
                )
            if pending:
                log_metrics(run, *pending)
                pending = None
            if step % train_cfg.log_every == 0 or is_last:
                pending = (step, metrics)

            is_eval = is_last or step % train_cfg.eval_every == 0
            is_sample = is_last or (train_cfg.sample_every and step % train_cfg.sample_every == 0)
            is_save = is_last or stop.is_last_step(step) or step % train_cfg.save_every == 0
            if not (is_eval or is_sample or is_save):
                continue
            if pending:
                log_metrics(run, *pending)
                pending = None
            _check_finite(run, step, "loss", float(metrics.loss))
            progress.seconds += run.clock.pause()
            if is_eval:
                run_eval(run)
            if is_sample:
                log_sample(run)
            if is_save or progress.is_done:
                save(run)
            run.clock.start(step)
    if pending:
        log_metrics(run, *pending)
    save(run)  # in case a signal arrived outside of the training step


# --- every so many steps ---------------------------------------------------------------------


def log_metrics(run: Run, step: int, metrics: Metrics):
    """Write and print the metrics of a training step."""
    values = {name: float(value) for name, value in metrics._asdict().items()}
    _check_finite(run, step, "loss", values["loss"])
    cfg, seconds = run.cfg, run.clock.seconds_per_step(step)
    if seconds:  # not known for the first step, which compiles
        rate = run.task.tokens_per_batch / seconds
        values |= {
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(cfg.model) / run.peak_flops,
            "eta_seconds": (cfg.train.steps - step) * seconds,
        }
    run.metrics.write("train", step, values)
    run.console.log_step(step, values)


def run_eval(run: Run):
    """Evaluate on the held-out text, save the best model, and end the run early if it is due."""
    cfg, progress = run.cfg, run.progress
    lengths = run.corpus.tokenizer.lengths if cfg.objective.is_text else None
    values = evaluate(
        run.eval_step, run.state.params, run.task.make_eval_batches(), lengths, run.place_batch
    )
    confusion = values.pop("confusion", None)
    _check_finite(run, progress.step, "held-out loss", values["loss"])
    run.metrics.write("eval", progress.step, values)
    is_best = values["loss"] < progress.best_loss
    if is_best:
        progress.best_loss, progress.best_step, progress.stale = values["loss"], progress.step, 0
        run.saver.save_best(run.state, progress)
    else:
        progress.stale += 1
        progress.is_done = bool(cfg.train.patience) and progress.stale >= cfg.train.patience
    best = "(best)" if is_best else f"(best {progress.best_loss:.4f})"
    figures = _format_eval(values, cfg.objective.loss_unit)
    run.console.log(f"step {progress.step}  {figures}  {best}")
    plot_curves(cfg.run_folder, cfg.name, cfg.objective.loss_unit)
    if confusion is not None:
        run.console.log(_format_confusion(confusion, run.task.labels))
        record = {"step": progress.step, "labels": run.task.labels, "rows": confusion}
        write_text_atomically(_join_run_path(cfg, "confusion.json"), json.dumps(record) + "\n")
        plot_confusion(cfg.run_folder, run.task.labels, confusion)


def _format_eval(values: dict[str, float], unit: str) -> str:
    """Format the metrics of an evaluation for the console."""
    text = f"held-out loss {values['loss']:.4f} nats/{unit}  "
    if unit == "text":
        return text + f"accuracy {values['accuracy']:.2%} of {values['tokens']:,} texts"
    text += f"perplexity {values['perplexity']:.2f}  "
    if "bits_per_byte" in values:
        return text + f"{values['bits_per_byte']:.3f} bits/byte"
    return text + f"accuracy {values['accuracy']:.1%}"


def _format_confusion(confusion: list[list[int]], labels: Sequence[str]) -> str:
    """Format a confusion matrix: true classes in rows, predicted classes in columns."""
    names = [name[:12] for name in labels]
    wide = max(8, *(len(name) for name in names)) + 2
    head = " " * wide + "".join(f"{'-> ' + name:>{wide + 3}}" for name in names)
    rows = [
        f"{name:>{wide}}" + "".join(f"{count:>{wide + 3},}" for count in row)
        for name, row in zip(names, confusion, strict=True)
    ]
    return "\n".join([head, *rows])


def evaluate(
    eval_step: Callable[[Any, Batch], Sums],
    params,
    batches: Iterable[Batch],
    lengths: np.ndarray | None = None,
    place_batch: Callable[[Batch], Batch] = jax.device_put,
) -> dict[str, Any]:
    """Compute the metrics of a model over held-out batches [B T].

    Args:
        lengths: int32 [V], bytes of each token, for bits per byte; None if targets are not text.
        place_batch: puts a batch on the devices.

    Returns:
        loss (nats per token or text), perplexity, bits_per_byte (with lengths), accuracy, tokens
        (or texts), and confusion (for classification: one row per true class).
    """
    batch_sums, total_bytes = [], 0
    for batch in batches:
        batch_sums.append(eval_step(params, place_batch(batch)))
        if lengths is not None:
            total_bytes += int(lengths[batch.targets][batch.weights > 0].sum())
    # In float64: float32 cannot count beyond 2**24 tokens.
    sums = jax.tree.map(
        lambda *x: np.sum(np.array(x, np.float64), axis=0), *hosts.fetch(batch_sums)
    )
    weight = max(float(sums.weight), 1.0)
    nats = float(sums.nats) / weight
    values = {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "accuracy": float(sums.correct) / weight,
        "tokens": int(weight),
    }
    if lengths is not None:
        values["bits_per_byte"] = float(sums.nats) / math.log(2) / max(total_bytes, 1)
    if sums.confusion is not None:
        values["confusion"] = sums.confusion.astype(int).tolist()
    return values


def log_sample(run: Run):
    """Generate a sample from the current model, print it, and save it in samples/."""
    cfg, prompt = run.cfg, run.cfg.sample.prompt
    if not _can_sample(cfg):
        return
    is_continued = cfg.model.family == "decoder"
    answer = predict(cfg, run.state.params, run.corpus.tokenizer, [prompt], run.task.labels)
    text = prompt + ("" if is_continued else "\n") + "".join(piece for (piece,) in answer)
    folder = os.path.join(cfg.run_folder, "samples")
    write_text_atomically(os.path.join(folder, f"step_{run.progress.step:06d}.txt"), text)
    title = f"--- sample at step {run.progress.step} "
    run.console.log(f"{title:-<72}\n{text}\n{'':-<72}")


def _can_sample(cfg: Config) -> bool:
    """Return whether the run can sample: only a decoder can with an empty prompt."""
    return bool(cfg.sample.prompt) or cfg.model.family == "decoder"


_compute_norm = jax.jit(optax.tree.norm)


def save(run: Run):
    """Start saving a checkpoint, after a check that the parameters are finite."""
    norm = float(_compute_norm(run.state.params))  # the loss is that of the parameters before
    _check_finite(run, run.progress.step, "norm of the parameters", norm)
    run.saver.save(run.state, run.progress)


def _check_finite(run: Run, step: int, quantity: str, value: float):
    if math.isfinite(value):
        return
    last, cfg = run.saver.latest_step(), run.cfg.optimizer
    checkpoint = f"the last checkpoint is of step {last}" if last else "there is no checkpoint yet"
    clip = f"clip harder than optimizer.clip={cfg.clip}" if cfg.clip else "set optimizer.clip=1"
    raise DivergedError(
        f"the {quantity} is {value} at step {step} ({checkpoint}): lower optimizer.lr={cfg.lr}, "
        f"lengthen optimizer.warmup={cfg.warmup}, or {clip}."
    )


# --- start and end of a run ------------------------------------------------------------------


class RunInputs(NamedTuple):
    """The inputs of a run, checked to be compatible with each other."""

    mesh: jax.sharding.Mesh
    corpus: Corpus
    task: Task
    resume_step: int | None  # of the checkpoint to restore


# What is disabled if an optional package is missing.
OPTIONAL_USES = {
    "matplotlib": "plots/*.png",
    "tensorboardX": "tensorboard/",
    "grain": "prefetching",
}


def open_run(cfg: Config, is_quiet: bool = False) -> Run:
    """Build everything that `cfg` describes, or restore it from the run folder."""
    hosts.check_equal({key: configs.get(cfg, key) for key in configs.list_fields(Config)})
    mesh, corpus, task, resume_step = hosts.run_on_all(lambda: _prepare_inputs(cfg, is_quiet))
    hosts.check_equal(
        {"text": corpus.fingerprint, f"latest checkpoint in {cfg.run_folder}": resume_step}
    )

    saver = Checkpoints(cfg.run_folder, cfg.train.keep)
    _, letters = abstract_params(cfg.model)
    optimizer, schedule = build_optimizer(cfg.optimizer, cfg.train.steps, letters)
    abstract = abstract_state(cfg.model, optimizer, cfg.seed, mesh)
    if resume_step is None:
        state = make_state(cfg.model, optimizer, cfg.seed, abstract)
        progress = Progress(data=corpus.fingerprint)
        saver.delete_best()  # of a run that was killed before its first checkpoint
    else:
        state, progress = hosts.run_on_all(lambda: _restore(cfg, corpus, saver, abstract))
    _write_run_files(cfg, corpus, task, is_new=resume_step is None)

    model = build(cfg.model)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    train_step = make_train_step(cfg, model, optimizer, schedule)
    peak, peak_source = peak_flops(mesh.local_devices)
    run = Run(
        cfg=cfg,
        mesh=mesh,
        corpus=corpus,
        task=task,
        state=state,
        progress=progress,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(make_eval_step(cfg, model)),
        saver=saver,
        metrics=MetricsFile(cfg.run_folder, progress.step),
        console=Console(cfg.train.steps, progress.step, is_quiet),
        peak_flops=peak * hosts.process_count(),
    )
    run.console.log(_format_header(run, peak_source))
    if missing := describe_missing(OPTIONAL_USES):
        run.console.log(missing)
    return run


def _prepare_inputs(cfg: Config, is_quiet: bool) -> RunInputs:
    """Load and check all inputs of a run, before the first array is created."""
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    resume_step = latest_step(os.path.join(cfg.run_folder, "checkpoints"))
    if resume_step is not None:
        _check_same_config(cfg)
    if not is_quiet:  # the first pass over a large text takes a while
        print_line(f"reading {cfg.data.source}, and tokenizing what is not in {cfg.data.cache}")
    tokenizer = (
        None if resume_step is None else tokenizers.load(_join_run_path(cfg, "tokenizer.json"))
    )
    corpus = prepare(
        cfg.data,
        cfg.model.vocab - cfg.objective.task.count_mask_tokens(cfg),
        tokenizer=tokenizer,
        is_paired=cfg.objective.task.IS_PAIRED,
        log=(lambda line: None) if is_quiet else print_line,
    )
    task = cfg.objective.task(cfg, corpus)
    if _can_sample(cfg):
        check_prompts(cfg, corpus.tokenizer, [cfg.sample.prompt])
    return RunInputs(mesh, corpus, task, resume_step)


def _restore(
    cfg: Config, corpus: Corpus, saver: Checkpoints, abstract: TrainState
) -> tuple[TrainState, Progress]:
    try:
        state, progress = saver.restore(abstract)
    except ShapeMismatchError as error:
        changed = "\n  ".join(configs.list_differences(read_config(cfg.run_folder), cfg))
        raise ConfigError(
            f"{error}\nSettings that differ from the run's:\n  {changed}\nresume=force works only "
            "if the parameters and the optimizer state keep their shapes: give the new run its "
            "own name=..."
        ) from None
    if progress.data != corpus.fingerprint and cfg.resume != "force":
        raise ConfigError(
            f"data.source={cfg.data.source!r} has changed since {cfg.run_folder} was started, so "
            "its position in the data is no longer valid. Give the new run its own name=..., or "
            "continue with the new data by resume=force."
        )
    return state, progress


@hosts.run_on_first
def _write_run_files(cfg: Config, corpus: Corpus, task: Task, is_new: bool):
    """Write the config of the run, and for a new run its tokenizer and labels."""
    if is_new:
        corpus.tokenizer.save(_join_run_path(cfg, "tokenizer.json"))
        if task.labels:
            labels = json.dumps(task.labels) + "\n"
            write_text_atomically(_join_run_path(cfg, "labels.json"), labels)
    write_text_atomically(_join_run_path(cfg, "config.json"), configs.to_json(cfg))


def _join_run_path(cfg: Config, name: str) -> str:
    return os.path.join(cfg.run_folder, name)


def _check_same_config(cfg: Config):
    changed = configs.list_differences(read_config(cfg.run_folder), cfg)
    if changed and cfg.resume != "force":
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{cfg.run_folder} holds a run with other settings:\n  {lines}\nGive the new run its "
            f"own name=..., continue with the new settings by resume=force, or delete the folder."
        )


def _format_header(run: Run, peak_source: str) -> str:
    cfg, corpus, progress = run.cfg, run.corpus, run.progress
    parts = count_params(cfg.model)
    total = parts.pop("total")
    shown = ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    grid = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
    shapes, letters = abstract_params(cfg.model)
    unsharded = ", ".join(list_unsharded_dims(shapes, letters, run.mesh))
    state = f"resuming from step {progress.step}" if progress.step else "new"
    return "\n".join([
        f"jaxgpt {jaxgpt.__version__} on jax {jax.__version__}, {run.mesh.size} "
        f"{run.mesh.devices.flat[0].platform} device(s){f' ({grid})' if grid else ''}",
        f"run    {cfg.run_folder} ({state})",
        f"data   {corpus.source}: {corpus.train_bytes / 1e6:,.1f} MB in {corpus.train.documents:,} "
        f"documents, {corpus.train.ids.size:,} tokens; held out by {corpus.rule}: "
        f"{corpus.held_out_bytes / 1e6:,.2f} MB, {corpus.held_out.ids.size:,} tokens; "
        f"{corpus.bytes_per_token:.2f} bytes per token" + (run.task.note and f"; {run.task.note}"),
        f"model  {total:,} parameters: {shown}" + (unsharded and f"; not sharded: {unsharded}"),
        f"plan   {cfg.train.steps:,} steps of {cfg.train.batch} x {run.task.T} tokens, "
        f"{cfg.optimizer.name} at {cfg.optimizer.lr:g}",
        f"speed  peak {run.peak_flops / 1e12:.3g} TFLOP/s ({peak_source}); "
        f"{flops_per_token(cfg.model) / 1e6:,.1f} MFLOP per token",
    ])  # fmt: skip


def _format_sample_hint(cfg: Config) -> str:
    return f" Sample from it:\n  jaxgpt sample {cfg.run_folder}"


def _format_plot_hint(cfg: Config) -> str:
    path = os.path.join(cfg.run_folder, "plots", "loss.png")
    return f"; curve in {path}" if os.path.isfile(path) else ""


def _format_summary(cfg: Config, progress: Progress, signal_name: str) -> str:
    time_spent = f"{progress.step:,} steps, {format_duration(progress.seconds)} of training"
    if signal_name:
        return (
            f"Stopped by {signal_name} after {time_spent}; saved. "
            "The same command resumes from here."
        )
    why = f", stopped early: no better for {progress.stale} evaluations" if progress.is_done else ""
    return (
        f"Done: {time_spent}{why}. Best held-out loss {progress.best_loss:.4f} nats/"
        f"{cfg.objective.loss_unit} at step "
        f"{progress.best_step}{_format_plot_hint(cfg)}." + _format_sample_hint(cfg)
    )


__all__ = ["DivergedError", "Run", "evaluate", "open_run", "train"]
