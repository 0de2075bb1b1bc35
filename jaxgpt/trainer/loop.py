"""The training loop: the one place with side effects (time, files, prints, signals).

`open_run` builds everything from the config, or restores it; `train` turns the crank; the small
functions between them are what happens every so many steps.
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
from jaxgpt.data import Batch, Corpus, prepare, read_ahead
from jaxgpt.data.tasks import Task
from jaxgpt.data.work import aloud
from jaxgpt.model import abstract_params, build, count_params
from jaxgpt.objectives import Sums
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.optional import describe_missing
from jaxgpt.predict import ask
from jaxgpt.predict import check as check_prompt
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import check_fits, make_mesh, undivided
from jaxgpt.trainer.checkpoint import (
    Checkpoints,
    OtherShapesError,
    Progress,
    latest_step,
    read_config,
)
from jaxgpt.trainer.logging import (
    Console,
    MetricsFile,
    duration,
    plot_confusion,
    plot_curves,
    write_whole,
)
from jaxgpt.trainer.memory import keep_freed
from jaxgpt.trainer.speed import Clock, flops_per_token, peak_flops
from jaxgpt.trainer.state import TrainState, abstract_state, make_state
from jaxgpt.trainer.step import Metrics, make_eval_step, make_train_step
from jaxgpt.trainer.stop import Stop, listen


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


@dataclass
class Run:
    """A run in progress: what was built from its config, and where it stands."""

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
    peak: float  # FLOP/s of all devices
    clock: Clock = field(default_factory=Clock)

    def place(self, batch: Batch) -> Batch:
        """Puts a batch [B T], or this process's rows of it, on the devices."""
        return hosts.place(batch, self.mesh, self.cfg.train.batch)


def train(cfg: Config, *, is_quiet: bool = False) -> Progress:
    """Trains the model of `cfg`, or goes on training it, and returns where it got to.

    Everything it makes lies in `cfg.run_folder`. Called again with the same config after any kind
    of stop, it continues bit for bit as if it had not stopped.

    Raises:
        ConfigError: the config, the data and the devices do not fit together, or the folder
            holds a run that learned something else.
        DivergedError: the loss became infinite or NaN.
    """
    keep_freed()
    run = open_run(cfg, is_quiet or hosts.index() > 0)
    progress = run.progress
    with closing(run.console), closing(run.metrics), closing(run.saver):
        if progress.is_done or progress.step >= cfg.train.steps:
            run.console.say(f"This run is complete.{_invitation(cfg)}")
            return progress
        with (
            hosts.guarded(DivergedError),
            jax.set_mesh(run.mesh),
            listen(progress.step) as stop,
        ):
            loop(run, stop)
            run.saver.wait()
        run.console.say(_farewell(cfg, progress, stop.name))
    return progress


def loop(run: Run, stop: Stop):
    """Steps until the end, an early stop or a signal."""
    cfg, progress, every = run.cfg, run.progress, run.cfg.train
    mine = hosts.rows(run.mesh, every.batch)
    batches = read_ahead(run.task, progress.step, mine, cfg.data.prefetch)
    due = None  # figures of an earlier step: fetched once the next step is under way
    first = progress.step + 1
    run.clock.start(progress.step)
    with closing(batches):
        while progress.step < every.steps and not progress.is_done and not stop.name:
            run.state, metrics = run.train_step(run.state, run.place(next(batches)))
            progress.step += 1
            progress.tokens += run.task.tokens
            step, is_last = progress.step, progress.step == every.steps
            if step == first:
                jax.block_until_ready(metrics)
                run.console.say(
                    f"compiled, and made one step, in {duration(run.clock.start(step))}"
                )
            if due:
                log(run, *due)
                due = None
            if step % every.log_every == 0 or is_last:
                due = (step, metrics)

            is_eval = is_last or step % every.eval_every == 0
            is_sample = is_last or (every.sample_every and step % every.sample_every == 0)
            is_save = is_last or stop.reached(step) or step % every.save_every == 0
            if not (is_eval or is_sample or is_save):
                continue
            if due:
                log(run, *due)
                due = None
            _check_finite(run, step, "loss", float(metrics.loss))
            progress.seconds += run.clock.pause()
            if is_eval:
                look(run)
            if is_sample:
                speak(run)
            if is_save or progress.is_done:
                save(run)
            run.clock.start(step)
    if due:
        log(run, *due)
    save(run)  # if a signal came while the loop was busy elsewhere


# --- what happens every so many steps --------------------------------------------------------


def log(run: Run, step: int, metrics: Metrics):
    """Writes and shows the figures of a training step."""
    values = {name: float(value) for name, value in metrics._asdict().items()}
    _check_finite(run, step, "loss", values["loss"])
    cfg, seconds = run.cfg, run.clock.seconds_per_step(step)
    if seconds:  # not of the first step, which compiles
        rate = run.task.tokens / seconds
        values |= {
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(cfg.model) / run.peak,
            "eta_seconds": (cfg.train.steps - step) * seconds,
        }
    run.metrics.write("train", step, values)
    run.console.step(step, values)


def look(run: Run):
    """Evaluates on the held-out text, keeps the best model, and may end the run early."""
    cfg, progress = run.cfg, run.progress
    lengths = run.corpus.tokenizer.lengths if cfg.objective.is_text else None
    values = evaluate(run.eval_step, run.state.params, run.task.held(), lengths, run.place)
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
    rank = "(best)" if is_best else f"(best {progress.best_loss:.4f})"
    run.console.say(f"step {progress.step}  {_figures(values, cfg.objective.unit)}  {rank}")
    plot_curves(cfg.run_folder, cfg.name, cfg.objective.unit)
    if confusion is not None:
        run.console.say(_table(confusion, run.task.labels))
        kept = {"step": progress.step, "labels": run.task.labels, "rows": confusion}
        write_whole(_in(cfg, "confusion.json"), json.dumps(kept) + "\n")
        plot_confusion(cfg.run_folder, run.task.labels, confusion)


def _figures(values: dict[str, float], unit: str) -> str:
    """Those of an evaluation, for people."""
    text = f"held-out loss {values['loss']:.4f} nats/{unit}  "
    if unit == "text":
        return text + f"accuracy {values['accuracy']:.2%} of {values['tokens']:,} texts"
    text += f"perplexity {values['perplexity']:.2f}  "
    if "bits_per_byte" in values:
        return text + f"{values['bits_per_byte']:.3f} bits/byte"
    return text + f"accuracy {values['accuracy']:.1%}"


def _table(confusion: list[list[int]], labels: Sequence[str]) -> str:
    """Which class (rows) was taken for which (columns)."""
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
    place: Callable[[Batch], Batch] = jax.device_put,
) -> dict[str, Any]:
    """Figures over held-out batches [B T].

    Args:
        lengths: int32 [V], bytes of each token, to count bits per byte; None where targets are not
            a text.
        place: puts a batch on the devices.

    Returns:
        loss (nats per token or text), perplexity, bits_per_byte (with lengths), accuracy, tokens
        (or texts), and confusion (of classes: a row for each true one).
    """
    told, size = [], 0
    for batch in batches:
        told.append(eval_step(params, place(batch)))
        if lengths is not None:
            size += int(lengths[batch.targets][batch.weights > 0].sum())
    # In float64, since a float32 stops counting at 2**24 tokens.
    sums = jax.tree.map(lambda *x: np.sum(np.array(x, np.float64), axis=0), *hosts.fetch(told))
    weight = max(float(sums.weight), 1.0)
    nats = float(sums.nats) / weight
    values = {
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "accuracy": float(sums.correct) / weight,
        "tokens": int(weight),
    }
    if lengths is not None:
        values["bits_per_byte"] = float(sums.nats) / math.log(2) / max(size, 1)
    if sums.confusion is not None:
        values["confusion"] = sums.confusion.astype(int).tolist()
    return values


def speak(run: Run):
    """Shows what the model would say now, and keeps it in samples/."""
    cfg, prompt = run.cfg, run.cfg.sample.prompt
    if not _is_asked(cfg):
        return
    is_continued = cfg.model.family == "decoder"
    answer = ask(cfg, run.state.params, run.corpus.tokenizer, [prompt], run.task.labels)
    text = prompt + ("" if is_continued else "\n") + "".join(piece for (piece,) in answer)
    folder = os.path.join(cfg.run_folder, "samples")
    write_whole(os.path.join(folder, f"step_{run.progress.step:06d}.txt"), text)
    title = f"--- sample at step {run.progress.step} "
    run.console.say(f"{title:-<72}\n{text}\n{'':-<72}")


def _is_asked(cfg: Config) -> bool:
    """Only a decoder has something to say to an empty prompt."""
    return bool(cfg.sample.prompt) or cfg.model.family == "decoder"


_norm = jax.jit(optax.tree.norm)


def save(run: Run):
    """Begins to save all that the run needs to go on."""
    norm = float(_norm(run.state.params))  # the loss is of the parameters before
    _check_finite(run, run.progress.step, "norm of the parameters", norm)
    run.saver.save(run.state, run.progress)


def _check_finite(run: Run, step: int, what: str, value: float):
    if math.isfinite(value):
        return
    last, how = run.saver.latest_step(), run.cfg.optimizer
    rest = f"the last checkpoint is of step {last}" if last else "there is no checkpoint yet"
    clip = f"clip harder than optimizer.clip={how.clip}" if how.clip else "set optimizer.clip=1"
    raise DivergedError(
        f"the {what} is {value} at step {step} ({rest}): lower optimizer.lr={how.lr}, "
        f"lengthen optimizer.warmup={how.warmup}, or {clip}."
    )


# --- beginning and ending --------------------------------------------------------------------


class Material(NamedTuple):
    """What a run is made of, once it is known that its parts fit together."""

    mesh: jax.sharding.Mesh
    corpus: Corpus
    task: Task
    resumes: int | None  # from the checkpoint of this step


# What a run goes without where an optional package is missing.
OPTIONAL_USES = {
    "matplotlib": "plots/*.png",
    "tensorboardX": "tensorboard/",
    "grain": "batches made ahead of time",
}


def open_run(cfg: Config, is_quiet: bool = False) -> Run:
    """Builds everything that `cfg` describes, or restores it from the run's folder."""
    hosts.agree({key: configs.get(cfg, key) for key in configs.flat_fields(Config)})
    mesh, corpus, task, resumes = hosts.together(lambda: _gather(cfg, is_quiet))
    hosts.agree({"text": corpus.fingerprint, f"latest checkpoint in {cfg.run_folder}": resumes})

    saver = Checkpoints(cfg.run_folder, cfg.train.keep)
    _, letters = abstract_params(cfg.model)
    optimizer, schedule = build_optimizer(cfg.optimizer, cfg.train.steps, letters)
    abstract = abstract_state(cfg.model, optimizer, cfg.seed, mesh)
    if resumes is None:
        state = make_state(cfg.model, optimizer, cfg.seed, abstract)
        progress = Progress(data=corpus.fingerprint)
        saver.forget_best()  # of a run that was killed before its first checkpoint
    else:
        state, progress = hosts.together(lambda: _restore(cfg, corpus, saver, abstract))
    _write_facts(cfg, corpus, task, is_new=resumes is None)

    model = build(cfg.model)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    train_step = make_train_step(cfg, model, optimizer, schedule)
    peak, peak_source = peak_flops(mesh.local_devices)
    run = Run(
        cfg=cfg,
        mesh=mesh,
        corpus=corpus,
        task=task,
        state=state,
        progress=progress,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(where, None)),
        eval_step=jax.jit(make_eval_step(cfg, model)),
        saver=saver,
        metrics=MetricsFile(cfg.run_folder, progress.step),
        console=Console(cfg.train.steps, progress.step, is_quiet),
        peak=peak * hosts.count(),
    )
    run.console.say(_introduction(run, peak_source))
    if missing := describe_missing(OPTIONAL_USES):
        run.console.say(missing)
    return run


def _gather(cfg: Config, is_quiet: bool) -> Material:
    """All that can be refused before the first array is made."""
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    resumes = latest_step(os.path.join(cfg.run_folder, "checkpoints"))
    if resumes is not None:
        _check_same_config(cfg)
    if not is_quiet:  # the first reading of a large text takes a while
        aloud(f"reading {cfg.data.source}, and tokenizing what is not in {cfg.data.cache}")
    known = None if resumes is None else tokenizers.load(_in(cfg, "tokenizer.json"))
    corpus = prepare(
        cfg.data,
        cfg.model.vocab - cfg.objective.task.reserved(cfg),
        tokenizer=known,
        is_paired=cfg.objective.task.IS_PAIRED,
        say=(lambda line: None) if is_quiet else aloud,
    )
    task = cfg.objective.task(cfg, corpus)
    if _is_asked(cfg):
        check_prompt(cfg, corpus.tokenizer, [cfg.sample.prompt])
    return Material(mesh, corpus, task, resumes)


def _restore(
    cfg: Config, corpus: Corpus, saver: Checkpoints, abstract: TrainState
) -> tuple[TrainState, Progress]:
    try:
        state, progress = saver.restore(abstract)
    except OtherShapesError as error:
        changed = "\n  ".join(configs.differences(read_config(cfg.run_folder), cfg))
        raise ConfigError(
            f"{error}\nSettings that differ from the run's:\n  {changed}\nresume=force goes on "
            "only where the parameters and the optimizer keep their shapes: give the new run its "
            "own name=..."
        ) from None
    if progress.data != corpus.fingerprint and cfg.resume != "force":
        raise ConfigError(
            f"data.source={cfg.data.source!r} has changed since {cfg.run_folder} was started, so "
            "its place in the data means nothing any more. Give the new run its own name=..., or "
            "go on with the new data by resume=force."
        )
    return state, progress


@hosts.once
def _write_facts(cfg: Config, corpus: Corpus, task: Task, is_new: bool):
    """What stands in the run's folder from its beginning."""
    if is_new:
        corpus.tokenizer.save(_in(cfg, "tokenizer.json"))
        if task.labels:
            write_whole(_in(cfg, "labels.json"), json.dumps(task.labels) + "\n")
    write_whole(_in(cfg, "config.json"), configs.to_json(cfg))


def _in(cfg: Config, name: str) -> str:
    return os.path.join(cfg.run_folder, name)


def _check_same_config(cfg: Config):
    changed = configs.differences(read_config(cfg.run_folder), cfg)
    if changed and cfg.resume != "force":
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{cfg.run_folder} holds a run with other settings:\n  {lines}\nGive the new run its "
            f"own name=..., go on with the new settings by resume=force, or delete the folder."
        )


def _introduction(run: Run, peak_source: str) -> str:
    cfg, corpus, progress = run.cfg, run.corpus, run.progress
    parts = count_params(cfg.model)
    total = parts.pop("total")
    shown = ", ".join(f"{name} {size:,}" for name, size in parts.items() if size)
    grid = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
    shapes, letters = abstract_params(cfg.model)
    whole = ", ".join(undivided(shapes, letters, run.mesh))
    state = f"going on from step {progress.step}" if progress.step else "new"
    return "\n".join([
        f"jaxgpt {jaxgpt.__version__} on jax {jax.__version__}, {run.mesh.size} "
        f"{run.mesh.devices.flat[0].platform} device(s){f' ({grid})' if grid else ''}",
        f"run    {cfg.run_folder} ({state})",
        f"data   {corpus.source}: {corpus.train_bytes / 1e6:,.1f} MB in {corpus.train.documents:,} "
        f"documents, {corpus.train.ids.size:,} tokens; held out by {corpus.rule}: "
        f"{corpus.held_bytes / 1e6:,.2f} MB, {corpus.held.ids.size:,} tokens; "
        f"{corpus.bytes_per_token:.2f} bytes per token" + (run.task.note and f"; {run.task.note}"),
        f"model  {total:,} parameters: {shown}" + (whole and f"; not divided: {whole}"),
        f"plan   {cfg.train.steps:,} steps of {cfg.train.batch} x {run.task.T} tokens, "
        f"{cfg.optimizer.name} at {cfg.optimizer.lr:g}",
        f"speed  peak {run.peak / 1e12:.3g} TFLOP/s ({peak_source}); "
        f"{flops_per_token(cfg.model) / 1e6:,.1f} MFLOP per token",
    ])  # fmt: skip


def _invitation(cfg: Config) -> str:
    return f" Sample from it:\n  jaxgpt sample {cfg.run_folder}"


def _curve(cfg: Config) -> str:
    path = os.path.join(cfg.run_folder, "plots", "loss.png")
    return f"; curve in {path}" if os.path.isfile(path) else ""


def _farewell(cfg: Config, progress: Progress, signal_name: str) -> str:
    time_spent = f"{progress.step:,} steps, {duration(progress.seconds)} of training"
    if signal_name:
        return (
            f"Stopped by {signal_name} after {time_spent}; saved. "
            "The same command goes on from here."
        )
    why = f", stopped early: no better for {progress.stale} evaluations" if progress.is_done else ""
    return (
        f"Done: {time_spent}{why}. Best held-out loss {progress.best_loss:.4f} nats/"
        f"{cfg.objective.unit} at step "
        f"{progress.best_step}{_curve(cfg)}." + _invitation(cfg)
    )


__all__ = ["DivergedError", "Run", "evaluate", "open_run", "train"]
