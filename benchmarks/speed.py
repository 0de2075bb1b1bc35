"""jaxgpt beside PyTorch, in one run: how long each part of the work takes, and how long it must.

    python -m benchmarks.speed                             all that fits this machine
    python -m benchmarks.speed --shapes gpt_mini --rows step forward --repeats 9
    python -m benchmarks.speed model.remat=dots --shapes gpt2_1558m      settings of jaxgpt's side

The peer is a model of transformers of the same shape, dtype and batch, eager and compiled; it has
no document masks, so that ours attends to whole rows (`model.documents=joined`). On a CPU
contestants take turns (A B B A A B ...), with a pause between them in which threads go to sleep, so
that noise hits all alike; on an accelerator each has the memory to itself, and what matters most is
measured first, since all of it has to end in `--seconds`.

The floor is the FLOPs that can not be left out at the median rate of the fastest matrix product of
this run (of any shape and side), and bytes at that of the fastest copy; "reached" is floor over
median. MFU counts attention as if it were not causal, as the literature does. Peers that are not
installed, what fails and what takes too long are left out, and the table says why.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO

from benchmarks.worker import DATA_TOKENS, Case, FailedError, Worker, describe_processor

JAX, TORCH = "benchmarks.jax_side", "benchmarks.torch_peer"
MIN_TURN_SECONDS = 0.1  # seconds: what is shorter runs several times in a turn
SHORT_TURN_SECONDS = 0.3  # seconds: where all take a turn in less, there are three times as many
PAUSE_SECONDS = 0.05  # seconds before a turn: threads of the one before spin for some milliseconds
ROW_SECONDS = {"cpu": 120}  # seconds that all turns of a row may take; what is long has fewer
DEFAULT_ROW_SECONDS = 10
TEXT_BYTES = 4e6  # bytes that tokenizers encode

# --- what is compared ---


@dataclass(frozen=True)
class Shape:
    """A model: a file in configs/, what differs from it, and the rows that are worth their time."""

    config: str
    settings: str = ""
    rows: tuple[str, ...] = ()  # none = all


SETTINGS = "step, other settings"
READY = "start-up, to the step"  # told with "start-up"
STEP_AND_PARTS = ("step", "dense of a block", "attention gradient", "loss gradient", "optimizer",
                  SETTINGS)  # fmt: skip
GPT2 = "model.position=learned model.norm=layer model.feedforward=plain model.bias=true"
SHAPES = {
    "gpt_mini": Shape("gpt_mini"),
    # nanoGPT's recipe for CPUs; transformers' GPT-2 always has biases, so ours has them too
    "nanogpt_cpu": Shape("shakespeare", f"{GPT2} model.activation=gelu_tanh model.ffn=512"),
    "gpt2_124m": Shape("gpt2_124m", "train.batch=32"),
    "llama3_1b": Shape("llama3_1b", "train.batch=8 model.context=2048 model.remat=none "
                       "train.loss_chunk=8192",
                       STEP_AND_PARTS),
    "gpt2_1558m": Shape("gpt2_1558m", "train.batch=8", STEP_AND_PARTS),
}  # fmt: skip
BY_PLATFORM = {"cpu": ["gpt_mini", "nanogpt_cpu"]}
ELSEWHERE = ["gpt2_124m", "llama3_1b", "gpt2_1558m"]


def make_case(name: str, settings: Iterable[str], scratch: str) -> Case:
    """Raises ConfigError if the settings do not fit."""
    from jaxgpt import config as configs

    shape = SHAPES[name]
    # Rows are one document each, as the peer takes all rows to be.
    given = ["train.accumulate=0", "model.documents=joined", *shape.settings.split(), *settings]
    cfg = configs.load(shape.config, given)
    m = cfg.model
    s = m.sizes
    return Case(
        name, B=cfg.train.batch, T=m.context, L=m.layers, D=s["D"], H=s["H"], G=s["G"], K=s["K"],
        F=s["F"], V=s["V"], dtype=m.dtype, is_llama=m.norm == "rms",
        config=json.loads(configs.to_json(cfg)), scratch=scratch,
    )  # fmt: skip


# --- floors ---


@dataclass(frozen=True)
class Rates:
    """Of this machine, as measured."""

    flops: float  # a second
    bytes: float  # a second, read and written


@dataclass(frozen=True)
class Work:
    """What can not be left out, in phases that wait for each other; (FLOPs, bytes) each."""

    phases: tuple[tuple[float, float], ...] = ()
    count: float = 0  # what is made
    unit: str = "tokens"
    model_flops: float = 0  # as the literature counts

    def compute_floor(self, rates: Rates) -> float:
        """Seconds: arithmetic and copying go on at once inside a phase."""
        return sum(max(f and f / rates.flops, b and b / rates.bytes) for f, b in self.phases)


def count_weights(case: Case) -> int:
    """Count the weights that every token is multiplied by."""
    return case.L * sum(n * m for n, m in case.products) + case.V * case.D


def count_attention_flops(case: Case) -> float:
    """Count the FLOPs of one attention product in one layer, over the unmasked pairs."""
    return 2 * case.B * case.H * case.K * case.T * (case.T + 1) / 2


def count_step_work(case: Case) -> Work:
    model = case.N * (6 * count_weights(case) + 12 * case.L * case.H * case.K * case.T)
    flops = 6 * case.N * count_weights(case) + 6 * case.L * count_attention_flops(case)
    # The norm of all gradients is known before the first parameter moves.
    return Work(((flops, 0), *count_optimizer_work(case).phases), case.N, model_flops=model)


def count_forward_work(case: Case) -> Work:
    flops = 2 * case.N * count_weights(case) + 2 * case.L * count_attention_flops(case)
    return Work(((flops, 0),), case.N)


def count_optimizer_work(case: Case) -> Work:
    """Read parameter, gradient and two moments, write all but the gradient, in float32."""
    return Work(((0, 28 * count_weights(case)),))


def count_decode_work(case: Case, rows: int) -> Work:
    """Read every weight once per token."""
    size = 4 if case.dtype == "float32" else 2
    prompt = 2 * rows * case.prompt * count_weights(case)
    each = (2 * rows * count_weights(case), size * count_weights(case))
    return Work(((prompt, 0), *[each] * case.new), rows * case.new)


def count_dense_work(case: Case) -> Work:
    return Work(((6 * case.N * sum(n * m for n, m in case.products), 0),), case.N)


def count_attention_work(case: Case, products: int) -> Work:
    return Work(((products * count_attention_flops(case), 0),), case.N)


Rule = Callable[[Case, dict[str, str]], Work]  # the side's facts tell sizes that are its choice


@dataclass(frozen=True)
class Row:
    """One comparison: its work, and how long one contestant may take to be made and run once."""

    work: Rule
    limit: float = 60


ROWS = {
    "matmul, square": Row(lambda c, a: Work(((2 * float(a["square"]) ** 3, 0),))),
    "matmul, [N D] x [D F]": Row(lambda c, a: Work(((2 * c.N * c.D * c.F, 0),))),
    "copy": Row(lambda c, a: Work(((0, float(a["copied"])),))),
    "step": Row(lambda c, a: count_step_work(c), 150),
    SETTINGS: Row(lambda c, a: count_step_work(c), 150),
    "forward": Row(lambda c, a: count_forward_work(c), 120),
    "dense of a block": Row(lambda c, a: count_dense_work(c)),
    "attention forward": Row(lambda c, a: count_attention_work(c, 2)),
    "attention gradient": Row(lambda c, a: count_attention_work(c, 6)),
    "loss gradient": Row(lambda c, a: Work(((6 * c.N * c.D * c.V, 0),), c.N)),
    "optimizer": Row(lambda c, a: count_optimizer_work(c)),
    "decode 1 row": Row(lambda c, a: count_decode_work(c, 1), 150),
    "decode 8 rows": Row(lambda c, a: count_decode_work(c, 8), 150),
    "tokenizer": Row(lambda c, a: Work((), TEXT_BYTES, "bytes"), 120),
    "data": Row(lambda c, a: Work((), DATA_TOKENS), 120),
    READY: Row(lambda c, a: Work()),
    "start-up": Row(lambda c, a: Work(), 150),
    "compile": Row(lambda c, a: Work(), 120),
}
RATES = tuple(ROWS)[:3]  # what floors are made of: always measured
ACCELERATED = (SETTINGS,)  # rows that a CPU does not run unless asked, and without turns
PER_LAYER = ("dense of a block", "attention gradient")
ONCE = ("loss gradient", "optimizer")

# --- measuring ---


@dataclass(frozen=True)
class Figure:
    """What a contestant took, in every turn; or why it has no figure."""

    shape: str
    row: str
    name: str
    seconds: tuple[float, ...] = ()
    first: float = 0  # seconds until it had run once, compiling included
    parameters: int = 0
    peak: int = 0  # bytes
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan


Entry = tuple[str, Worker]  # the name of a contestant, and who runs it


class _EntrantFailedError(FailedError):
    def __init__(self, name: str, why: str):
        super().__init__(why)
        self.name = name


@dataclass(frozen=True)
class Limits:
    """How long measuring may take."""

    repeats: int
    turns: float  # seconds for all turns of a row
    until: float  # on the clock of time.perf_counter
    pause: float = 0.0  # seconds before a turn


def run_in_turns(case: Case, row: str, entries: list[Entry], limits: Limits) -> list[Figure]:
    """Run contestants in turn. One that fails is left out and the others start again."""
    failed: list[Figure] = []
    while entries:
        try:
            return [*_turns(case, row, entries, limits), *failed]
        except _EntrantFailedError as error:
            failed.append(Figure(case.name, row, error.name, error=str(error)))
            entries = [entry for entry in entries if entry[0] != error.name]
        finally:
            for worker in {worker for _, worker in entries}:
                worker.drop()
    return failed


def _turns(case: Case, row: str, entries: list[Entry], limits: Limits) -> list[Figure]:
    def limit(name: str) -> float:
        left = limits.until - time.perf_counter()
        if left < 1:
            raise _EntrantFailedError(name, "no time was left")
        # Should this one fail, the others begin again.
        return min(left / len(entries), ROWS[row].limit)

    def ask(name: str, what: Callable, *more) -> dict:
        try:
            return what(limit(name), row, name, *more)
        except FailedError as error:
            raise _EntrantFailedError(name, str(error)) from None

    first, counts, made, total = {}, {}, {}, 0.0
    for name, worker in entries:
        start = time.perf_counter()
        made[name] = ask(name, worker.make, case)
        ask(name, worker.run)
        first[name] = time.perf_counter() - start
        # The second run is warm; it tells how many fill a turn.
        second = ask(name, worker.run)["seconds"]
        counts[name] = max(1, min(100, round(MIN_TURN_SECONDS / max(second, 1e-9))))
        total += second * counts[name]
    seconds: dict[str, list[float]] = {name: [] for name, _ in entries}
    peaks = dict.fromkeys(seconds, 0)
    wanted = limits.repeats * (3 if total < SHORT_TURN_SECONDS else 1)
    for number in range(max(1, min(wanted, int(limits.turns / max(total, 1e-9))))):
        for name, worker in entries[:: -1 if number % 2 else 1]:  # nobody is always the first
            time.sleep(limits.pause)
            answer = ask(name, worker.run, counts[name])
            seconds[name].append(answer["seconds"])
            peaks[name] = max(peaks[name], answer["peak"])
    return [
        Figure(case.name, row, name, tuple(seconds[name]), first[name],
               made[name]["parameters"], peaks[name])
        for name in seconds
    ]  # fmt: skip


def time_startup(case: Case, modules: Sequence[str], repeats: int, until: float, log: IO[str]):
    """Time from process start to the end of the first step; "warm" has a compilation cache.

    For jaxgpt also the time until that step can start: compiled, with all arrays in place.
    """
    plan = [("jaxgpt cold", JAX, "jaxgpt"), ("jaxgpt warm", JAX, "jaxgpt"),
            ("torch eager", TORCH, "torch eager"), ("torch compile cold", TORCH, "torch compile"),
            ("torch compile warm", TORCH, "torch compile")]  # fmt: skip
    plan = [one for one in plan if one[1] in modules]
    seconds = defaultdict[tuple[str, str], list[float]](list)  # by row and name
    why: dict[str, str] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            environment = {
                "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "jax"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "torch"),
            }
            for name, module, contestant in plan:
                if name in why:
                    continue
                limit = min(ROWS["start-up"].limit, until - time.perf_counter())
                worker, start = Worker(module, log, environment), time.perf_counter()
                try:
                    if limit < 1:
                        raise FailedError("no time was left")
                    worker.make(limit, "step", contestant, case)
                    if module == JAX:
                        seconds[READY, name].append(time.perf_counter() - start)
                    worker.run(limit, "step", contestant)
                    seconds["start-up", name].append(time.perf_counter() - start)
                except FailedError as error:
                    why[name] = str(error)
                finally:
                    worker.close()
    return [
        *(Figure(case.name, row, name, tuple(s)) for (row, name), s in seconds.items()),
        *(Figure(case.name, "start-up", name, error=error) for name, error in why.items()
          if ("start-up", name) not in seconds),
    ]  # fmt: skip


def reject_other_sizes(new: Sequence[Figure], known: Sequence[Figure]) -> list[Figure]:
    """Drop the figures of peers with another number of parameters: they are other models."""
    ours = {f.shape: f.parameters for f in [*known, *new] if is_ours(f) and f.parameters}

    def checked(f: Figure) -> Figure:
        wanted = ours.get(f.shape, f.parameters)
        if f.parameters in (0, wanted):
            return f
        why = f"it has {f.parameters:,} parameters, and jaxgpt {wanted:,}"
        return replace(f, seconds=(), error=why)

    return [checked(f) for f in new]


# --- the table ---


def compute_ratios(figure: Figure, figures: Iterable[Figure]) -> dict[str, float]:
    """Return how many times faster it is than each peer of its row: the median over turns."""
    peers = [f for f in figures if (f.shape, f.row) == (figure.shape, figure.row) and f.seconds]
    if not figure.seconds or not is_ours(figure):
        return {}
    return {
        peer.name: statistics.median(
            theirs / ours for theirs, ours in zip(peer.seconds, figure.seconds, strict=False)
        )
        for peer in peers
        if not is_ours(peer)
    }


def is_ours(figure: Figure) -> bool:
    return figure.name.startswith("jax")


def measure_rates(figures: Sequence[Figure], cases: dict[str, Case], about: dict[str, str]):
    """Return the median rates of the fastest contestants per shape; nan where none was measured."""

    def fastest(shape: str, kind: int) -> float:  # of the FLOPs (0) or bytes (1) of a row's work
        rates = (
            ROWS[f.row].work(cases[shape], about).phases[0][kind] / f.median
            for f in figures
            if f.shape == shape and f.row in RATES and f.seconds
        )
        return max(rates, default=0) or math.nan

    return {shape: Rates(fastest(shape, 0), fastest(shape, 1)) for shape in cases}


def derive_figures(
    f: Figure, case: Case, rates: Rates, figures: list[Figure], about: dict[str, str]
) -> dict[str, object]:
    """Return a figure with all that is derived from it, for JSON and the table."""
    work, is_there = ROWS[f.row].work(case, about), bool(f.seconds)
    floor = work.compute_floor(rates)
    floor = floor if math.isfinite(floor) else 0
    return asdict(f) | {
        "median": f.median if is_there else None,
        "floor": floor or None,
        "reached": floor / f.median if is_there and floor else None,
        "mfu": work.model_flops / f.median / rates.flops if is_there and work.model_flops else None,
        "per_second": work.count / f.median if is_there and work.count else None,
        "unit": work.unit,
        "faster": compute_ratios(f, figures),
    }


def split_step(figures: list[Figure], case: Case, is_jax: bool) -> dict[str, float]:
    """Return the seconds of a step by part, of a side's first contestants; {} if unknown."""
    first: dict[str, float] = {}
    for f in figures:
        if f.shape == case.name and f.seconds and is_ours(f) == is_jax:
            first.setdefault(f.row, f.median)
    if not {"step", *PER_LAYER, *ONCE} <= first.keys():
        return {}
    known = {f"{row}, x {case.L}": case.L * first[row] for row in PER_LAYER}
    known |= {row: first[row] for row in ONCE}
    return known | {"rest": first["step"] - sum(known.values())}


HEAD = ("row", "contestant", "median ms", "least to most", "a second", "floor ms", "reached", "MFU",
        "peak MB", "times faster than")  # fmt: skip


def format_row(one: dict) -> tuple[str, ...]:
    """Return a line of the table."""
    if one["error"]:
        return (one["row"], one["name"], one["error"], *[""] * (len(HEAD) - 3))
    ms = [1e3 * s for s in one["seconds"]]
    rate, unit = one["per_second"], {"tokens": "tokens", "bytes": "B"}[one["unit"]]
    faster = ", ".join(f"{ratio:.2f} {name}" for name, ratio in one["faster"].items())
    return (
        one["row"], one["name"], format_number(1e3 * one["median"]),
        f"{format_number(min(ms))} to {format_number(max(ms))}",
        f"{rate:,.0f} {unit}" if rate else "",
        format_number(1e3 * one["floor"]) if one["floor"] else "",
        f"{one['reached']:.0%}" if one["reached"] else "",
        f"{one['mfu']:.0%}" if one["mfu"] else "",
        f"{one['peak'] / 1e6:,.0f}" if one["peak"] else "", faster,
    )  # fmt: skip


def format_number(x: float) -> str:
    """Format with at least three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def format_table(rows: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    """Format a Markdown table whose columns are aligned."""
    lines = [head, *rows]
    wide = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def text(line):
        sides = zip(line, "<<" + ">" * len(head), wide, strict=False)
        return f"| {' | '.join(f'{x:{side}{w}}' for x, side, w in sides)} |"

    rule = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(wide)]
    return "\n".join([text(head), text(rule), *map(text, rows)])


def format_page(
    facts: dict, cases: dict[str, Case], figures: list[Figure], about: dict[str, str]
) -> str:
    """Return the text of speed.md."""
    out = ["# jaxgpt beside PyTorch", "", *(f"- {k}: {v}" for k, v in facts.items())]
    for name, rates in measure_rates(figures, cases, about).items():
        case, own = cases[name], [f for f in figures if f.shape == name]
        if not own:
            continue
        out += ["", f"## {name}: {case.B} x {case.T} tokens, {case.dtype}", ""]
        count = {f.name: f.parameters for f in own if f.row == "step" and f.parameters}
        for who, n in count.items():
            out += [f"- parameters of {who}: {n:,}"]
        out += [f"- floors: {rates.flops / 1e9:,.0f} GFLOP/s, {rates.bytes / 1e9:,.1f} GB/s", ""]
        out += [format_table([format_row(derive_figures(f, case, rates, own, about)) for f in own])]
        both = {
            who: split_step(own, case, is_jax) for who, is_jax in (("jax", True), ("torch", False))
        }
        for who, found in both.items():
            if found:
                shares = ", ".join(f"{k} {1e3 * s:,.1f}" for k, s in found.items())
                out += ["", f"A step of {who} in ms, by parts measured alone: {shares}."]
    return "\n".join(out) + "\n"


def write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --- the command ---


@dataclass(frozen=True)
class Stage:
    """Rows of some shapes, and the share of the time that is left which they may take."""

    shapes: tuple[str, ...]
    rows: tuple[str, ...]
    share: float


def deadline_after(share: float, until: float) -> float:
    """Return the time at which this share of the time left has passed."""
    now = time.perf_counter()
    return now + share * (until - now)


def plan_stages(shapes: Sequence[str], asked: Sequence[str], is_cpu: bool) -> list[Stage]:
    """Return the stages in order: shape by shape on a CPU, else what matters most first."""
    if is_cpu:
        wanted = asked or [row for row in ROWS if row not in ACCELERATED]
        rows = (*RATES, *(row for row in wanted if row not in RATES))
        share = [*[0.5] * (len(shapes) - 1), 1.0]  # the first has all rows
        return [Stage((name,), rows, x) for name, x in zip(shapes, share, strict=True)]
    whole, last = (*RATES, "step"), ("start-up", "compile")
    parts = tuple(row for row in ROWS if row not in {*whole, *last, *ACCELERATED})
    first, others, every = tuple(shapes[:1]), tuple(shapes[1:]), tuple(shapes)
    order = [(first, whole, 0.45), (others, whole, 0.8), (every, parts, 0.6),
             (every, ACCELERATED, 0.8), (every, last, 1.0)]  # fmt: skip
    wanted = {*RATES, *(asked or ROWS)}
    stages = [Stage(which, tuple(row for row in rows if row in wanted), share)
              for which, rows, share in order if which]  # fmt: skip
    return [stage for stage in stages if stage.rows]


class Bench:
    """The sides, what was measured so far, and where it is written."""

    def __init__(self, arguments: argparse.Namespace, log: IO[str], scratch: str):
        self.a, self.log = arguments, log
        self.figures: list[Figure] = []
        self.notes: list[str] = []
        self.start = time.perf_counter()
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if "device_count" not in flag]  # no virtual devices
        environment = {"XLA_FLAGS": " ".join(flags), "TOKENIZERS_PARALLELISM": "true"}
        # A side has the accelerator for itself.
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
        self.workers = {JAX: Worker(JAX, log, environment)}
        missing = [x for x in ("torch", "transformers") if importlib.util.find_spec(x) is None]
        if missing:
            self.notes.append(f"PyTorch (no module {' and no '.join(missing)})")
        elif not arguments.no_peers:
            self.workers[TORCH] = Worker(TORCH, log, environment)
        self.about: dict[str, str] = {}
        self.makers: dict[str, dict[str, list[str]]] = {}
        for module, worker in list(self.workers.items()):
            try:
                answer = worker.ask(120, do="about")
            except FailedError as error:
                if module == JAX:
                    raise
                self.notes.append(f"PyTorch ({error}; see the log)")
                del self.workers[module]
                continue
            self.about |= answer["about"]
            self.makers[module] = answer["makers"]
        self.is_cpu = self.about["platform"] == "cpu"
        names = arguments.shapes or BY_PLATFORM.get(self.about["platform"], ELSEWHERE)
        self.cases = {name: make_case(name, arguments.settings, scratch) for name in names}
        budget = arguments.seconds or (3600 if self.is_cpu else 450)
        self.until = self.start + budget

    def run(self) -> None:
        print("\n".join(f"{k:12} {v}" for k, v in self.facts().items()) + "\n", flush=True)
        stages = plan_stages(tuple(self.cases), self.a.rows or (), self.is_cpu)
        for number, stage in enumerate(stages):
            share = 1.0 if number == len(stages) - 1 else stage.share
            self.stage(stage, deadline_after(share, self.until))

    def stage(self, stage: Stage, until: float) -> None:
        groups = [list(self.workers)] if self.is_cpu else [[module] for module in self.workers]
        for number, modules in enumerate(groups):
            # Ours have somewhat more: what they leave is for the others.
            end = until if number == len(groups) - 1 else deadline_after(0.6, until)
            for which, name in enumerate(stage.shapes):
                share = 1 / (len(stage.shapes) - which)
                self.shape(self.cases[name], stage.rows, modules, deadline_after(share, end))
            if not self.is_cpu:  # the next side needs the memory
                for module in modules:
                    self.workers[module].close()
        if "start-up" in stage.rows:
            for worker in self.workers.values():
                worker.close()
            repeats = min(self.a.repeats, 3 if self.is_cpu else 1)
            for name in stage.shapes:
                if self.has(name, "start-up"):
                    case, modules = self.cases[name], list(self.workers)
                    self.add(time_startup(case, modules, repeats, until, self.log))

    def has(self, shape: str, row: str) -> bool:
        return row in (self.a.rows or SHAPES[shape].rows or ROWS) or row in RATES

    def shape(self, case: Case, rows: Sequence[str], modules: list[str], until: float) -> None:
        turns = ROW_SECONDS.get(self.about["platform"], DEFAULT_ROW_SECONDS)
        if "start-up" in rows:  # comes last, and has its share
            until = deadline_after(0.5, until)
        limits = Limits(self.a.repeats, turns, until, PAUSE_SECONDS)
        for row in filter(lambda row: self.has(case.name, row), rows):
            entries = [
                (name, self.workers[module])
                for module in modules
                for name in self.makers[module].get(row, ())
            ]
            # On an accelerator, where nobody disturbs, one at a time: memory is scarce.
            is_contest = self.is_cpu and row not in ACCELERATED
            rounds = [entries] if is_contest else [[entry] for entry in entries]
            for some in rounds:
                self.add(run_in_turns(case, row, some, limits))

    def add(self, new: list[Figure]) -> None:
        new = reject_other_sizes(new, self.figures)
        for f in new:
            shown = f.error or f"{format_number(1e3 * f.median)} ms"
            faster = ", ".join(f"{r:.2f} x {name}" for name, r in compute_ratios(f, new).items())
            print(f"{f.shape:12} {f.row:24} {f.name:22} {shown:>12}  {faster}", flush=True)
        self.figures += new
        order = {row: number for number, row in enumerate(ROWS)}
        self.figures.sort(key=lambda f: (list(self.cases).index(f.shape), order[f.row]))
        self.write()

    def facts(self) -> dict[str, str]:
        known = {k: v for k, v in self.about.items() if k not in ("square", "copied")}
        note = {"left out": ", ".join(self.notes)} if self.notes else {}
        own = {"command": self.a.command, "python": platform.python_version()}
        taken = f"{time.perf_counter() - self.start:.0f} s"
        own["processor" if self.is_cpu else "host"] = describe_processor()
        return own | known | {"taken": taken} | note

    def write(self) -> None:
        rates = measure_rates(self.figures, self.cases, self.about)
        rows = [
            derive_figures(f, self.cases[f.shape], rates[f.shape],
                 [g for g in self.figures if g.shape == f.shape], self.about)
            for f in self.figures
        ]  # fmt: skip
        found = {name: asdict(r) for name, r in rates.items()}
        finite = {n: r for n, r in found.items() if all(map(math.isfinite, r.values()))}
        whole = {"facts": self.facts(), "rates": finite, "rows": rows}
        write_atomically(self.a.out / "speed.json", json.dumps(whole, indent=1) + "\n")
        write_atomically(
            self.a.out / "speed.md", format_page(self.facts(), self.cases, self.figures, self.about)
        )


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="path=value", help="of jaxgpt's side")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}; default: by device",
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {'; '.join(ROWS)}; default: all"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns; the median counts")
    parser.add_argument("--seconds", type=float, help="for all; default: 450, on a CPU 3600")
    parser.add_argument("--no-peers", action="store_true", help="without PyTorch")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/speed"))
    a = parser.parse_intermixed_args(given)
    a.command = shlex.join(["python", "-m", "benchmarks.speed", *given])
    return a


def main() -> int:
    a = parse_arguments(sys.argv[1:])
    a.out.mkdir(parents=True, exist_ok=True)
    with open(a.out / "speed.log", "w") as log, tempfile.TemporaryDirectory() as scratch:
        bench = Bench(a, log, scratch)
        try:
            bench.run()
        finally:
            for worker in bench.workers.values():
                worker.close()
    print(f"\n{a.out / 'speed.md'}")
    return 0


if __name__ == "__main__":
    from jaxgpt.script import run

    run(main)
