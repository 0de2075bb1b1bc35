"""Open a run: build everything that a config describes, or resume it from its last checkpoint."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt import tokenizer as tokenizers
from jaxgpt.adapters import BASE_FILE, Base, format_base
from jaxgpt.config import Config
from jaxgpt.data import Batch, Corpus, prepare
from jaxgpt.data.chat import OnlineTask, PreferenceTask
from jaxgpt.data.tasks import Task
from jaxgpt.data.work import print_line
from jaxgpt.evaluate.run import check_benchmarks, read_benchmarks
from jaxgpt.evaluate.tasks import Shown
from jaxgpt.loading import LABELS, check_config_file, hash_labels, is_saved_model, read_config
from jaxgpt.lora import check_lora
from jaxgpt.model import abstract_params, build
from jaxgpt.optional import describe_missing
from jaxgpt.predict import check_prompts
from jaxgpt.rewards import find_reward
from jaxgpt.saved_arrays import ShapeMismatchError, latest_step
from jaxgpt.selection import select_letters
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import check_fits, make_mesh
from jaxgpt.trainer.autopsy import make_diagnosis
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.trainer.folder import check_run_folder, check_writable, is_writable
from jaxgpt.trainer.frozen import add_reference, load_frozen, needs_start
from jaxgpt.trainer.hooks import EarlyStop, Hook, OverfitWarning, Profiler, RunView
from jaxgpt.trainer.lock import RunLock
from jaxgpt.trainer.logging import (
    Console,
    MetricsFile,
    Plots,
    read_metrics,
    write_text_atomically,
)
from jaxgpt.trainer.memory import describe_memory_errors
from jaxgpt.trainer.online import Rollouts
from jaxgpt.trainer.report import format_header, format_lost_steps
from jaxgpt.trainer.speed import Clock, peak_flops
from jaxgpt.trainer.spikes import add_guard
from jaxgpt.trainer.start import (
    Start,
    add_base,
    describe_base,
    find_base,
    find_start,
    make_adapter_start,
    match_start,
    take_params,
)
from jaxgpt.trainer.state import TrainState, make_abstract_state, make_state
from jaxgpt.trainer.step import make_eval_step, make_train_step


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
    lock: RunLock | None  # None: the folder is only read
    console: Console
    hooks: Sequence[Hook]
    peak_flops: float  # FLOP/s of all devices
    restore: Callable[[], tuple[TrainState, Progress]]  # of the last checkpoint, or the first state
    restore_state: Callable[
        [], TrainState
    ]  # the same state alone; the run's files stay as they are
    diagnose: Callable  # see `autopsy.make_diagnosis`
    benchmarks: Mapping[str, tuple[Shown, int]]  # of train.eval_tasks: questions, worked examples
    roll_out: Rollouts | None = None  # makes the batches that the model writes itself
    start_note: str = ""  # which parameters it began with, if not with random ones
    clock: Clock = field(default_factory=Clock)

    def place_batch(self, batch: Batch) -> Batch:
        """Put a batch [B T], or this process's rows of it, on the devices."""
        return hosts.place_batch(batch, self.mesh, self.cfg.train.batch)

    def feed(self, state: TrainState, batch: Batch) -> Batch:
        """Put what a step trains on on the devices: a batch, or what the model makes of it."""
        if self.roll_out is None:
            return self.place_batch(batch)
        answers = self.roll_out(state.model_params, batch, int(state.step))
        return hosts.place_batch(answers, self.mesh, len(answers.tokens))

    def make_eval_batches(self) -> Iterator[Batch]:
        """Yield the held-out batches, or what the model makes of them."""
        batches = self.task.make_eval_batches()
        if self.roll_out is None:
            return batches
        return (self.roll_out.evaluate(self.state.model_params, batch) for batch in batches)

    def drop_state(self):
        """Free the memory of the state, before another one is restored."""
        self.state = None  # type: ignore[assignment]

    def notify(self, event: str, *args):
        """Call the method `event` of every hook."""
        view = RunView(self)
        for hook in self.hooks:
            getattr(hook, event)(view, *args)

    @property
    def is_complete(self) -> bool:
        """Whether no step is left to do."""
        return self.progress.is_done or self.progress.step >= self.cfg.train.steps

    def close(self):
        """Close everything, also after an error."""
        with ExitStack() as stack:
            for part in (*filter(None, [self.lock]), *self.hooks, self.saver):
                stack.callback(part.close)


class RunInputs(NamedTuple):
    """The inputs of a run, checked to be compatible with each other."""

    mesh: jax.sharding.Mesh
    corpus: Corpus
    task: Task
    resume_step: int | None  # of the checkpoint to restore
    start: Start | None  # of a new run
    benchmarks: Mapping[str, tuple[Shown, int]]  # see `Run`


# What is disabled if an optional package is missing.
OPTIONAL_USES = {
    "matplotlib": "plots/*.png",
    "tensorboardX": "tensorboard/",
    "grain": "prefetching",
}


def open_run(cfg: Config, hooks: Sequence[Hook] = (), is_quiet: bool = False) -> Run:
    """Build everything that `cfg` describes, or resume the run from its last checkpoint."""
    hosts.check_equal({key: configs.get(cfg, key) for key in configs.list_fields(Config)})
    lock = hosts.run_on_all(lambda: _lock_folder(cfg))
    try:
        return _open_locked(cfg, lock, hooks, is_quiet)
    except BaseException:
        if lock:
            lock.close()
        raise


def _lock_folder(cfg: Config) -> RunLock | None:
    """Lock the folder of a run, if it can be written at all."""
    check_run_folder(cfg)
    return RunLock(cfg.run_folder, print_line) if is_writable(cfg.run_folder) else None


def _open_locked(cfg: Config, lock: RunLock | None, hooks: Sequence[Hook], is_quiet: bool) -> Run:
    """Do the work of `open_run`, which holds the lock."""
    inputs = hosts.run_on_all(lambda: _prepare_inputs(cfg, is_quiet))
    mesh, corpus, task, resume_step, start, benchmarks = inputs
    hosts.check_equal(
        {
            "text": corpus.fingerprint,
            f"latest checkpoint in {cfg.run_folder}": resume_step,
            "benchmarks": ",".join(benchmarks),
        }
    )

    saver = Checkpoints(cfg.run_folder, cfg.train.keep, not is_writable(cfg.run_folder))
    optimizer, schedule, abstract = make_abstract_state(cfg, mesh)

    def restore_state() -> TrainState:
        if saver.latest_step() is None:
            (state, _), progress = _make_state(cfg, optimizer, abstract, start), Progress()
        else:
            state, progress = hosts.run_on_all(lambda: saver.restore(abstract))
            state = add_base(cfg, state, progress, abstract, start)
        return _add_guard(cfg, state, progress, abstract)

    def restore() -> tuple[TrainState, Progress]:
        if saver.latest_step() is None:
            state, progress = _begin(cfg, corpus, saver, optimizer, abstract, start)
            progress.labels = hash_labels(task.labels)
        else:
            state, progress = hosts.run_on_all(lambda: _restore(cfg, corpus, task, saver, abstract))
            state = add_base(cfg, state, progress, abstract, start)
        return _add_guard(cfg, state, progress, abstract), progress

    def make_first() -> Any:
        return _make_state(cfg, optimizer, abstract, start)[0].model_params

    log = (lambda line: None) if is_quiet else print_line
    frozen = load_frozen(cfg, corpus.tokenizer, mesh, make_first)
    if isinstance(task, PreferenceTask):
        place = partial(hosts.place_batch, mesh=mesh, B=cfg.train.batch)
        add_reference(cfg, task, corpus.fingerprint, make_first, place, log)
    state, progress = restore()
    model = build(cfg.model)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if state.guard is not None:
        shardings = shardings.replace(guard=jax.tree.map(lambda x: x.sharding, state.guard))
    train_step = make_train_step(cfg, model, optimizer, schedule, frozen.model)
    train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
    peak, peak_source = peak_flops(mesh.local_devices)
    console = Console(cfg.train.steps, progress.step, is_quiet)
    run = Run(
        cfg=cfg,
        mesh=mesh,
        corpus=corpus,
        task=task,
        state=state,
        progress=progress,
        train_step=frozen.complete(train_step),
        eval_step=frozen.complete(jax.jit(make_eval_step(cfg, model, frozen.model))),
        saver=saver,
        lock=lock,
        console=console,
        hooks=(),
        restore=restore,
        restore_state=restore_state,
        diagnose=jax.jit(make_diagnosis(cfg, model, optimizer, schedule)),
        peak_flops=peak * hosts.process_count(),
        benchmarks=benchmarks,
        start_note=start.note if start and not progress.step else "",
    )
    if isinstance(task, OnlineTask):
        run.roll_out = Rollouts(cfg, task, corpus.tokenizer)
    note = saver.note or format_lost_steps(cfg, progress.step, read_metrics(cfg.run_folder))
    if not run.is_complete:  # a complete run is left as it is
        check_writable(cfg)
        _write_run_files(cfg, corpus, task, describe_base(cfg, start, progress))
        run.hooks = (
            MetricsFile(cfg.run_folder, progress.step, console.log),
            console,
            Plots(),
            EarlyStop(cfg.train.patience),
            OverfitWarning(),
            Profiler(cfg.run_folder, *cfg.train.parse_profile()),
            *hooks,
        )
    console.log(format_header(run, peak_source))
    if task.example:
        console.log(task.example)
    if note:
        console.log(note)
    if missing := describe_missing(OPTIONAL_USES):
        console.log(missing)
    return run


def _prepare_inputs(cfg: Config, is_quiet: bool) -> RunInputs:
    """Load and check all inputs of a run, before the first array is created."""
    mesh = make_mesh(cfg.mesh)
    check_fits(cfg, mesh)
    select_letters(abstract_params(cfg.model)[1], cfg.optimizer.train)
    benchmarks = read_benchmarks(cfg)
    check_lora(cfg)
    resume_step = latest_step(os.path.join(cfg.run_folder, "checkpoints"))
    if resume_step is not None:
        _check_same_config(cfg)
    elif is_saved_model(cfg.run_folder):
        raise ConfigError(
            f"{cfg.run_folder} holds a saved model, not a run: give the new run its own name=..., "
            f"and train.start={cfg.run_folder} to begin with the model's parameters."
        )
    if resume_step is None:
        check_writable(cfg)
    start = None
    if cfg.lora.rank:
        start = find_base(cfg, resume_step is not None)
    elif cfg.train.start and (resume_step is None or needs_start(cfg)):
        start = find_start(cfg.train.start)
    if cfg.train.objective == "online":
        find_reward(cfg.online.reward)
    if not is_quiet:  # the first pass over a large text takes a while
        print_line(f"reading {cfg.data.source}, and tokenizing what is not in {cfg.data.cache}")
    corpus = prepare(
        cfg.data,
        cfg.tokenizer_vocab,
        tokenizer=_load_tokenizer(cfg, resume_step, start),
        is_paired=cfg.objective.task.IS_PAIRED,
        encoder=cfg.objective.task.make_encoder(cfg),
        log=(lambda line: None) if is_quiet else print_line,
    )
    task = cfg.objective.task(cfg, corpus)
    _check_held_out(cfg, task)
    if can_sample(cfg):
        check_prompts(cfg, corpus.tokenizer, [cfg.sample.prompt])
    if start:
        start = match_start(start, cfg, corpus.tokenizer)
    benchmarks = check_benchmarks(cfg, corpus.tokenizer, benchmarks)
    return RunInputs(mesh, corpus, task, resume_step, start, benchmarks)


def _load_tokenizer(
    cfg: Config, resume_step: int | None, start: Start | None
) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of the run or of its start; None for the one that the config names."""
    if resume_step is not None:
        return tokenizers.load(join_run_path(cfg, "tokenizer.json"))
    return start.tokenizer if start and cfg.data.tokenizer == "train" else None


def _check_held_out(cfg: Config, task: Task):
    """Check that something in the held-out text is predicted: the mean loss of nothing is 0."""
    if not any(batch.weights.any() for batch in task.make_eval_batches()):
        tokens = task.corpus.held_out.ids.size
        raise ConfigError(
            f"nothing in the {tokens} held-out tokens is to be predicted, so there would be no "
            f"held-out loss: train on more text, or raise data.holdout={cfg.data.holdout:g} or, "
            f"with train.objective=masked or span, train.mask_rate={cfg.train.mask_rate:g}."
        )


def can_sample(cfg: Config) -> bool:
    """Return whether the run can sample: only a decoder can with an empty prompt."""
    return bool(cfg.sample.prompt) or cfg.model.family == "decoder"


# --- the state: new, or restored -------------------------------------------------------------

# The settings besides the text itself that give the held-out loss its meaning.
EVALUATION_SETTINGS = (
    *("train.objective", "train.mask_rate", "train.span", "train.eval_batches"),
    *("model.context", "model.documents", "data.packing", "data.text_key", "data.target_key"),
)


def describe_evaluation(cfg: Config, fingerprint: str) -> str:
    """Return a text that differs if held-out losses are not comparable. fingerprint: of the text"""
    settings = {key: configs.get(cfg, key) for key in EVALUATION_SETTINGS}
    if cfg.train.eval_batches:
        settings["train.batch"] = cfg.train.batch
    if cfg.best_by != "loss":  # older runs have gone by the loss
        settings["train.best_by"] = cfg.best_by
    return json.dumps({"text": fingerprint} | settings)


def _begin(
    cfg: Config, corpus: Corpus, saver: Checkpoints, optimizer, abstract, start: Start | None
) -> tuple[TrainState, Progress]:
    """Make the state of a new run, and its progress."""
    state, base = _make_state(cfg, optimizer, abstract, start)
    saver.delete_best()  # of a run that was killed before its first checkpoint
    evaluation = describe_evaluation(cfg, corpus.fingerprint)
    tokenizer = corpus.tokenizer.fingerprint
    return state, Progress(
        data=corpus.fingerprint, tokenizer=tokenizer, evaluation=evaluation, base=base
    )


def _make_state(cfg: Config, optimizer, abstract, start: Start | None) -> tuple[TrainState, str]:
    """Make the first state, and return it with the fingerprint of the base of its adapters."""
    with describe_memory_errors(cfg, abstract):
        if cfg.lora.rank:
            return hosts.run_on_all(lambda: make_adapter_start(cfg, optimizer, abstract, start))
        state = make_state(cfg.model, optimizer, cfg.seed, abstract)
    if not start:
        return state, ""
    return hosts.run_on_all(lambda: take_params(start, state, abstract)), ""


def _add_guard(cfg: Config, state: TrainState, progress: Progress, abstract) -> TrainState:
    if not cfg.train.is_guarded:
        return state
    return add_guard(state, progress.guard, abstract.step.sharding)


def _restore(
    cfg: Config, corpus: Corpus, task: Task, saver: Checkpoints, abstract: TrainState
) -> tuple[TrainState, Progress]:
    """Restore the state of the latest checkpoint."""
    try:
        state, progress = saver.restore(abstract)
    except ShapeMismatchError as error:
        changed = "\n  ".join(configs.list_differences(read_config(cfg.run_folder), cfg))
        raise ConfigError(
            f"{error}\nSettings that differ from the run's:\n  {changed}\nresume=force works only "
            "if the parameters and the optimizer state keep their shapes: give the new run its "
            "own name=..."
        ) from None
    corpus.tokenizer.check_fingerprint(progress.tokenizer, cfg.run_folder)
    progress.tokenizer = corpus.tokenizer.fingerprint  # older runs do not record it
    if progress.data != corpus.fingerprint and cfg.resume != "force":
        before = read_config(cfg.run_folder).data.source
        change = (
            f"has changed since {cfg.run_folder} was started"
            if before == cfg.data.source
            else f"has other text than data.source={before!r}, of {cfg.run_folder}"
        )
        raise ConfigError(
            f"data.source={cfg.data.source!r} {change}, so "
            "its position in the data is no longer valid. Give the new run its own name=..., or "
            "continue with the new data by resume=force."
        )
    _renew_progress(cfg, corpus, task, saver, progress)
    return state, progress


def _renew_progress(
    cfg: Config, corpus: Corpus, task: Task, saver: Checkpoints, progress: Progress
):
    """Drop from the progress what the settings of this run make invalid.

    A best loss on another text, or of another objective, cannot be compared with those to come,
    and would keep the parameters of then for sampling.
    """
    # Older runs do not record it.
    old = progress.evaluation or describe_evaluation(read_config(cfg.run_folder), progress.data)
    new = describe_evaluation(cfg, corpus.fingerprint)
    if cfg.resume == "force":
        patience = cfg.train.patience if old == new else 0
        progress.is_done = bool(patience) and progress.stale >= patience
        progress.stop_reason = progress.stop_reason if progress.is_done else ""
    if progress.is_done or progress.step >= cfg.train.steps:
        return  # nothing is trained with the new settings
    progress.data, progress.evaluation = corpus.fingerprint, new
    progress.labels = hash_labels(task.labels)  # of the text, so that others have another best
    if old != new:
        new_run = Progress()
        progress.best_loss, progress.best_accuracy = new_run.best_loss, new_run.best_accuracy
        progress.best_step = progress.stale = 0
        saver.delete_best()


# --- files -----------------------------------------------------------------------------------


@hosts.run_on_first
def _write_run_files(cfg: Config, corpus: Corpus, task: Task, base: Base | None):
    """Write the config of the run, its tokenizer and the names of its classes."""
    path = join_run_path(cfg, "tokenizer.json")
    try:
        corpus.tokenizer.save(path)
    except OSError:  # a run resumes on a disk that is full
        if not _is_saved(corpus.tokenizer, path):
            raise
    files = {LABELS: json.dumps(task.labels) + "\n"} if task.labels else {}
    if base is not None:
        files[BASE_FILE] = format_base(base, cfg.run_folder)
    for name, text in (files | {"config.json": _to_saved_json(cfg)}).items():
        path = join_run_path(cfg, name)
        if not _has_text(path, text):
            write_text_atomically(path, text)


def _is_saved(tokenizer: tokenizers.Tokenizer, path: str) -> bool:
    try:
        return tokenizers.load(path).fingerprint == tokenizer.fingerprint
    except (ConfigError, OSError):
        return False


def _has_text(path: str, text: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read() == text
    except (OSError, ValueError):
        return False


def _to_saved_json(cfg: Config) -> str:
    """Serialize the config of a run. resume=force is for one start: it is not what the run is."""
    return configs.to_json(dataclasses.replace(cfg, resume=Config().resume))


def join_run_path(cfg: Config, name: str) -> str:
    """Return the path of a file in the run folder."""
    return os.path.join(cfg.run_folder, name)


def _check_same_config(cfg: Config):
    if cfg.resume != "force":
        check_config_file(cfg.run_folder)
    changed = configs.list_differences(read_config(cfg.run_folder), cfg)
    if changed and cfg.resume != "force":
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{cfg.run_folder} holds a run with other settings:\n  {lines}\nGive the new run its "
            f"own name=..., continue with the new settings by resume=force, or delete the folder."
        )
