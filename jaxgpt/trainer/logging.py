"""Logging: metrics.jsonl, TensorBoard, plots, and console output, each a hook of the loop."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jaxgpt import hosts
from jaxgpt.evaluate.run import TaskResult, format_headline, list_scalars
from jaxgpt.optional import import_board_writer, is_installed
from jaxgpt.script import print_text
from jaxgpt.trainer.hooks import Hook, RunView
from jaxgpt.trainer.report import format_confusion, format_duration, format_eval, format_spike

LogFn = Callable[[str], object]
STEP_DIGITS = 6  # significant ones of a number in metrics.jsonl
RESULT_DIGITS = 9  # of evaluations: all of float32, so that a report rounds as the console does


class MetricsFile(Hook):
    """Metrics in metrics.jsonl, one JSON object per line, and in TensorBoard.

    A run that resumes at step s drops the records of later steps, so that every step is in the
    file once. Only process 0 writes.
    """

    MAX_PENDING_BYTES = 1 << 24  # of lines that could not be written yet

    @hosts.run_on_first
    def __init__(self, run_folder: str, step: int, log: LogFn = print_text):
        self._folder, self._log, self._pending = run_folder, log, b""
        self.path = os.path.join(run_folder, "metrics.jsonl")
        self._open(step or -1)  # a run without a checkpoint begins with its untrained model again

    def _open(self, step: int, kept_kinds: Sequence[str] = ()):
        """Open the files without the records after a step, but those of `kept_kinds`."""
        records = ((line, _parse_record(line)) for line in _read_lines(self.path))
        kept = [x for x, r in records if r and (r["step"] <= step or r["kind"] in kept_kinds)]
        if not os.path.exists(self.path) or kept != list(_read_lines(self.path, is_whole=False)):
            write_text_atomically(self.path, "".join(kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._board = None
        if is_installed("tensorboardX"):
            board = os.path.join(self._folder, "tensorboard")
            is_purged = os.path.isdir(board)
            with warn_on_file_errors(self._log, board):
                self._board = import_board_writer()(
                    board, purge_step=step + 1 if is_purged else None
                )
                _guard_board(self._board, self._log, board)

    @hosts.run_on_first
    def write(self, kind: str, step: int, values: Mapping[str, Any]):
        """Write the metrics of a step. kind: "train", "eval", "task", ...; units are in the names.

        What cannot be written, as on a full disk, is kept in memory and written later.
        """
        digits = RESULT_DIGITS if kind == "eval" else STEP_DIGITS
        rounded = {key: _round_value(value, digits) for key, value in values.items()}
        record = {"kind": kind, "step": step} | rounded
        if len(self._pending) < self.MAX_PENDING_BYTES:
            self._pending += (json.dumps(record) + "\n").encode()
        with warn_on_file_errors(self._log, self.path):
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        if self._board is None:
            return
        for name, value in values.items():
            if is_number(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def on_norms(self, view: RunView, step: int, values: Mapping[str, float]):
        self.write("norms", step, values)

    @hosts.run_on_first
    def on_spike(self, view: RunView, spike: Mapping[str, Any]):
        if view.step < spike["step"]:  # a rollback: what came after its step is not part of the run
            self.close()
            self._open(view.step, kept_kinds=("spike",))
        self.write("spike", spike["step"], {k: v for k, v in spike.items() if k != "step"})

    def on_metrics(self, view: RunView, step: int, values: Mapping[str, float]):
        self.write("train", step, values)

    def on_untrained(self, view: RunView, values: Mapping[str, Any]):
        self.on_eval(view, values)

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        self.write("eval", view.step, {k: v for k, v in values.items() if k != "confusion"})

    def on_task(self, view: RunView, found: TaskResult):
        self.write("task", view.step, {"task": found.task} | list_scalars(found))

    @hosts.run_on_first
    def close(self):
        """Close the files of the run."""
        with warn_on_file_errors(self._log, self.path):
            self._file.close()
        if self._board:
            self._board.close()


def _guard_board(board: Any, log: LogFn, path: str):
    """Make the thread that writes TensorBoard files survive a full disk.

    It would end, and its queue, which nothing empties then, would block the run when it is full.
    """
    events = board.file_writer.event_writer._ev_writer
    for owner, name in ((events, "write_event"), (events, "flush"),
                        (events._py_recordio_writer, "close")):  # fmt: skip
        setattr(owner, name, warn_on_file_errors(log, path)(getattr(owner, name)))


_warned: set[tuple[str, int]] = set()  # errors of files that a warning was logged for


@contextlib.contextmanager
def warn_on_file_errors(log: LogFn, path: str) -> Iterator[None]:
    """Log an error of a file that a run can do without, once for each path and kind of error."""
    try:
        yield
    except OSError as error:
        path, number = error.filename or path, error.errno or 0
        if (os.path.dirname(path), number) not in _warned:
            _warned.add((os.path.dirname(path), number))
            reason = error.strerror or str(error)
            log(f"warning: {path} cannot be written ({reason}); training goes on.")


def _read_lines(path: str, is_whole: bool = True) -> Iterator[str]:
    """Yield the lines of a file; `is_whole` leaves out one that a kill has truncated."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        yield from (line for line in file if line.endswith("\n") or not is_whole)


def _parse_record(line: str) -> dict[str, Any] | None:
    """Return the record of a line; None if it is none, whatever has damaged the file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if isinstance(record.get("step"), int) else None


def _round_value(value: Any, digits: int) -> Any:
    """Round a float; JSON has no NaN and no infinity, which become text."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)


def read_metrics(run_folder: str) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, in order."""
    return list(_iterate_metrics(run_folder))


def _iterate_metrics(run_folder: str) -> Iterator[dict[str, Any]]:
    """Yield the records of metrics.jsonl, which may be many, one at a time."""
    lines = _read_lines(os.path.join(run_folder, "metrics.jsonl"))
    return (record for record in map(_parse_record, lines) if record is not None)


def is_number(value: Any) -> bool:
    """Return whether a value of a record is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@hosts.run_on_first
def write_text_atomically(path: str, text: str):
    """Write a file atomically, and create its folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


class Plots(Hook):
    """The curves, and for a classifier the confusion matrix, drawn after every evaluation."""

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        folder = view.cfg.run_folder
        with warn_on_file_errors(view.log, os.path.join(folder, "plots")):
            plot_curves(folder, view.cfg.name, view.cfg.objective.loss_unit)
            plot_norms(folder, view.cfg.name)
            if "confusion" in values:
                record = {"step": view.step, "labels": view.labels, "rows": values["confusion"]}
                path = os.path.join(folder, "confusion.json")
                write_text_atomically(path, json.dumps(record) + "\n")
                plot_confusion(folder, view.labels, values["confusion"])

    def on_task(self, view: RunView, found: TaskResult):
        folder = view.cfg.run_folder
        with warn_on_file_errors(view.log, os.path.join(folder, "plots")):
            plot_task(folder, view.cfg.name, found.task)


@hosts.run_on_first
def plot_curves(run_folder: str, title: str, unit: str = "token"):
    """Plot training and held-out metrics over the steps, from metrics.jsonl.

    Writes plots/loss.png, and for text classification plots/accuracy.png; nothing without
    matplotlib.
    """
    if not is_installed("matplotlib"):
        return
    plots = {"loss": ({"train": "nats", "eval": "loss"}, f"loss (nats per {unit})")}
    if unit == "text":
        plots["accuracy"] = ({"train": "accuracy", "eval": "accuracy"}, "accuracy")
    curves: dict[str, dict[str, list]] = {name: {"train": [], "eval": []} for name in plots}
    for record in _iterate_metrics(run_folder):
        for name, (keys, _) in plots.items():
            value = record.get(keys.get(record["kind"], ""))
            if is_number(value):
                curves[name][record["kind"]].append((record["step"], value))
    for name, (_, label) in plots.items():
        _plot_metric(curves[name], run_folder, title, name, label)


def _plot_metric(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    run_folder: str,
    title: str,
    name: str,
    label: str,
):
    """Plot one metric: a curve for training and one for held-out data."""
    from matplotlib.figure import Figure

    train, held = curves["train"], curves["eval"]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db4d0", lw=1, label="training")
    if held:
        last = f"held out: {held[-1][1]:.3f} at the end"
        axes.plot(*zip(*held, strict=True), color="#c0392b", marker="o", ms=3, label=last)
    axes.set(xlabel="step", ylabel=label, title=f"{title}: {name} of training and held-out text")
    axes.grid(alpha=0.3)
    if train or held:
        axes.legend(frameon=False)
    _save_figure(figure, run_folder, name)


@hosts.run_on_first
def plot_norms(run_folder: str, title: str):
    """Plot the norms of gradient and parameters by layer, in plots/norms.png, if there are any."""
    records = [r for r in _iterate_metrics(run_folder) if r["kind"] == "norms"]
    if not records or not is_installed("matplotlib"):
        return
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), dpi=120, layout="constrained")
    labels = {"grad_norm": "norm of the gradient", "param_norm": "norm of the parameters"}
    panels = zip(figure.subplots(2, sharex=True), labels, strict=True)
    for axes, kind in panels:
        names = [name for name in records[-1] if name.startswith(f"{kind}/")]
        colors = matplotlib.colormaps["viridis"].resampled(max(len(names), 2))
        for number, name in enumerate(names):
            points = [(r["step"], r[name]) for r in records if is_number(r.get(name))]
            if points:
                label = name.partition("/")[2] if len(names) <= MAX_LABELS else None
                axes.plot(*zip(*points, strict=True), color=colors(number), lw=1, label=label)
        axes.set(yscale="log", ylabel=labels[kind])
        axes.grid(alpha=0.3)
        if 0 < len(names) <= MAX_LABELS:
            axes.legend(frameon=False, fontsize=7)
    axes.set(xlabel="step")
    figure.suptitle(f"{title}: norms by layer, the first dark, the last light")
    _save_figure(figure, run_folder, "norms")


@hosts.run_on_first
def plot_task(run_folder: str, title: str, task: str):
    """Plot a benchmark over the steps, from metrics.jsonl, in plots/TASK.png.

    The first metric is drawn with its standard error and its chance level, and thinner what it is
    in each category of the benchmark.
    """
    found = _iterate_metrics(run_folder)
    records = [r for r in found if r["kind"] == "task" and r["task"] == task]
    if not records or not is_installed("matplotlib"):
        return
    import matplotlib
    from matplotlib.figure import Figure

    name = next(key for key in records[-1] if key.startswith(f"{task}/"))
    parts = [key for key in records[-1] if key.startswith(f"{name}/")]
    parts = [key for key in parts if key not in (f"{name}/error", f"{name}/chance")]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20"].resampled(20)
    for number, key in enumerate(parts if len(parts) <= 20 else []):
        points = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
        label = key.rpartition("/")[2].replace("_", " ")
        axes.plot(*zip(*points, strict=True), color=colors(number), lw=1, label=label)
    steps, values = zip(*((r["step"], r[name]) for r in records if is_number(r[name])), strict=True)
    errors = [r[f"{name}/error"] for r in records if is_number(r[name])]
    errors = [x if is_number(x) else 0.0 for x in errors]
    axes.errorbar(steps, values, errors, color="black", lw=2, capsize=2, label="all")
    if (chance := records[-1].get(f"{name}/chance")) is not None and is_number(chance):
        axes.axhline(chance, color="gray", ls=":", label="chance")
    metric = name.partition("/")[2].replace("_", " ")
    axes.set(xlabel="step", ylabel=metric, title=f"{title}: {task}")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=7, loc="outside right center")
    _save_figure(figure, run_folder, task)


MAX_LABELS = 14  # of layers in the legend of a plot


@hosts.run_on_first
def plot_confusion(run_folder: str, labels: Sequence[str], rows: Sequence[Sequence[int]]):
    """Plot the confusion matrix, true classes in rows, in plots/confusion.png."""
    if not is_installed("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 * len(labels) + 2.5, 1.2 * len(labels) + 2), dpi=120,
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    axes.imshow([[n / max(sum(row), 1) for n in row] for row in rows], cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(labels))
    total = sum(map(sum, rows))
    right = sum(row[i] for i, row in enumerate(rows)) / max(total, 1)
    axes.set(xticks=ticks, yticks=ticks, xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{total:,} held-out texts,\n{right:.1%} classified correctly", fontsize=10)
    axes.set_xticklabels(labels, rotation=45 if len(labels) > 4 else 0)
    axes.set_yticklabels(labels)
    for i, row in enumerate(rows):
        for j, n in enumerate(row):
            color = "white" if n > 0.5 * sum(row) else "black"
            text = f"{n:,}\n{n / max(sum(row), 1):.1%}"  # of the true class
            axes.text(j, i, text, ha="center", va="center", color=color)
    _save_figure(figure, run_folder, "confusion")


def _save_figure(figure, run_folder: str, name: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = os.path.join(run_folder, "plots", f"{name}.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        FigureCanvasAgg(figure).print_png(f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise


def format_mfu(mfu: float) -> str:
    """Format the model FLOPs utilization; a peak that was measured on a busy machine is too low."""
    note = " (of a peak measured while the machine was busy)" if mfu > 1 else ""
    return f"MFU {mfu:.0%}{note}"


class Console(Hook):
    """Console output: a progress bar on a terminal, plain lines elsewhere.

    Output that fails (a closed pipe, a full disk) ends the output, not the run.
    """

    def __init__(self, steps: int, step: int, is_quiet: bool = False):
        self._steps, self._is_quiet = steps, is_quiet
        self._bar = None
        if sys.stderr and sys.stderr.isatty() and not is_quiet:
            layout = "{percentage:3.0f}%|{bar:10}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=steps, initial=step, bar_format=layout, dynamic_ncols=True)

    def log(self, text: str = ""):
        """Print a line, above the progress bar if there is one."""
        with (
            self._end_output_on_error(),
            self._bar.external_write_mode() if self._bar else contextlib.nullcontext(),
        ):
            if not self._is_quiet and sys.stdout:
                print_text(text)

    @contextlib.contextmanager
    def _end_output_on_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the file is closed
            self._is_quiet, self._bar = True, None

    def log_step(self, step: int, values: Mapping[str, float]):
        """Show a step's loss and lr; tokens_per_second, mfu and eta_seconds where known."""
        nats = values.get("nats", values["loss"])  # as of held-out text, and in the plot
        text = f"loss {nats:.3f}  lr {values['lr']:.2e}"
        if f"{nats:.3f}" != f"{values['loss']:.3f}":
            text = f"loss {nats:.3f} ({values['loss']:.3f} with penalties)  lr {values['lr']:.2e}"
        if "mfu" in values:
            text += (
                f"  {values['tokens_per_second']:,.0f} tokens/s  {format_mfu(values['mfu'])}  "
                f"ETA {format_duration(values['eta_seconds'])}"
            )
        if self._bar is None:
            self.log(f"step {step:>{len(str(self._steps))}}/{self._steps}  {text}")
        else:
            with self._end_output_on_error():
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update(step - self._bar.n)

    def on_metrics(self, view: RunView, step: int, values: Mapping[str, float]):
        self.log_step(step, values)

    def on_untrained(self, view: RunView, values: Mapping[str, Any]):
        self.log(f"step 0  {format_eval(values, view.cfg.objective.loss_unit)}  (untrained)")

    def on_spike(self, view: RunView, spike: Mapping[str, Any]):
        if spike["action"] != "stop":  # an error says so
            self.log(format_spike(spike, view.step, view.cfg))

    def on_eval(self, view: RunView, values: Mapping[str, Any]):
        loss, step = view.best
        figure = f"{view.best_accuracy:.2%}" if view.cfg.best_by == "accuracy" else f"{loss:.4f}"
        best = "(best)" if step == view.step else f"(best {figure})"
        figures = format_eval(values, view.cfg.objective.loss_unit)
        self.log(f"step {view.step}  {figures}  {best}")
        if "confusion" in values:
            self.log(format_confusion(values["confusion"], view.labels))

    def on_task(self, view: RunView, found: TaskResult):
        self.log(f"step {view.step}  {format_headline(found)}  {found.subset}")

    def close(self):
        """Leave the progress bar as it is and end it."""
        if self._bar is not None:
            with self._end_output_on_error():
                self._bar.close()
