"""Compare position encodings, norms, activations, mixers, ... on the same text and budget.

    python -m benchmarks.ablate                                change the base one choice at a time
    python -m benchmarks.ablate --axes position,mixer          only these
    python -m benchmarks.ablate --product position,norm        every combination of these
    python -m benchmarks.ablate --steps 2000 model.width=256   a longer run around another base

The choices are the rows of the registries, so a new row is included automatically; a choice that
the config rejects is listed with the reason. For each seed, every choice trains on the same batches
(steps x batch x context). The trained model's held-out loss is also computed in windows of 2 and 4
times the training length: the same text is cut into longer pieces, so the three losses are means
over the same tokens and differ only in how much context a token has.

There are two phases. The losses do not depend on what else the machine does, and take most of the
time; the speed and memory of a step are measured afterwards, in a few minutes of a quiet machine:

    nice python -m benchmarks.ablate --phase losses
    python -m benchmarks.ablate --phase speed

Without --phase, both. Each configuration adds a line of JSON to losses.jsonl and one to speed.jsonl
under --out; what is already there is not measured again, so that a command that ended early is
continued by giving it again. The page shows a dash for what has not been measured yet.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.ablation_page import (
    CONTEXT_FACTORS,
    Entry,
    Rejection,
    Result,
    describe_base,
    draw_plots,
    format_line,
    format_page,
)
from benchmarks.worker import count_cores
from jaxgpt.architecture import MixerConfig
from jaxgpt.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    override,
)
from jaxgpt.data import tasks
from jaxgpt.data.loader import make_eval_batches
from jaxgpt.data.shards import prepare
from jaxgpt.model import abstract_params, build, count_params
from jaxgpt.model.block import WIRINGS
from jaxgpt.model.feedforward import ACTIVATIONS, FEEDFORWARDS
from jaxgpt.model.masks import PATTERNS
from jaxgpt.model.mixers import MIXERS
from jaxgpt.model.norms import NORMS
from jaxgpt.model.positions import POSITION_ENCODINGS
from jaxgpt.objectives import OBJECTIVES
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.script import run
from jaxgpt.trainer.logging import format_duration, write_text_atomically
from jaxgpt.trainer.state import init_state
from jaxgpt.trainer.step import make_eval_step, make_train_step

# Mixers, and patterns below, get sizes well below the 64 tokens of context, or they would attend to
# all.
BASE = Config(
    name="ablate",
    model=ModelConfig(
        vocab=260,
        context=64,
        width=64,
        layers=2,
        heads=4,
        ffn=128,
        mixer=MixerConfig(chunk=16, summary=4, memory=32, bucket_window=16),
    ),
    data=DataConfig(tokenizer="bytes"),
    optimizer=OptimizerConfig(lr=2e-3, warmup=40),
    train=TrainConfig(steps=400, batch=16, eval_batches=64),
)
WARMUP_STEPS, BLOCK_STEPS, BLOCKS = 3, 20, 3  # training steps of a measurement of speed


# --- choices ---------------------------------------------------------------------------------


class Choice(NamedTuple):
    """One row of a table: its name, and the settings that it changes in the base."""

    name: str
    settings: tuple[str, ...]  # path=value


def list_choices(key: str, table) -> Callable[[Config], list[Choice]]:
    return lambda base: [Choice(name, (f"{key}={name}",)) for name in table]


# A gated layer has three matrices, a plain one two: F in this proportion makes their sizes equal.
FEEDFORWARD_MATRICES = {"gated": 3, "moe_gated": 3, "plain": 2, "moe_plain": 2}


def set_feedforward(base: Config, name: str) -> tuple[str, str]:
    """Return the settings for a kind of feed-forward with as many parameters as the base's."""
    old, new = (FEEDFORWARD_MATRICES.get(kind) for kind in (base.model.feedforward, name))
    ffn = base.model.ffn * old // new if old and new else base.model.ffn
    return f"model.feedforward={name}", f"model.ffn={ffn}"


def list_activations(base: Config) -> list[Choice]:
    return [
        Choice(f"{kind} {name}", (*set_feedforward(base, kind), f"model.activation={name}"))
        for kind in ("gated", "plain")
        for name in ACTIVATIONS
    ]


PATTERN_SIZES = {
    "window": ("model.sparse.window=16",),
    "chunked": ("model.sparse.chunk=16",),
    "strided": ("model.sparse.stride=8",),
    "blocks": ("model.sparse.block=8", "model.sparse.random=1"),
}

AXES: dict[str, Callable[[Config], list[Choice]]] = {
    "position": list_choices("model.position", POSITION_ENCODINGS),
    "norm": list_choices("model.norm", NORMS),
    "activation": list_activations,
    "mixer": list_choices("model.mixers", MIXERS),
    "wiring": list_choices("model.wiring", WIRINGS),
    "feedforward": lambda base: [
        Choice(name, set_feedforward(base, name)) for name in FEEDFORWARDS
    ],
    "pattern": lambda base: [
        Choice(name, (f"model.pattern={name}", *PATTERN_SIZES.get(name, ()))) for name in PATTERNS
    ],
}


def combine_axes(base: Config, axes: Sequence[str]) -> list[Choice]:
    """Return every combination of the choices of these axes.

    Raises:
        ConfigError: two of the axes change the same setting.
    """
    choices = [AXES[axis](base) for axis in axes]
    keys = [
        key
        for axis_choices in choices
        for key in sorted({s.partition("=")[0] for c in axis_choices for s in c.settings})
    ]
    shared = next((key for key in keys if keys.count(key) > 1), None)
    if shared:
        raise ConfigError(f"--product {','.join(axes)}: two of these set {shared}; leave one out.")
    return [
        Choice(" / ".join(c.name for c in combined), tuple(s for c in combined for s in c.settings))
        for combined in itertools.product(*choices)
    ]


def plan(base: Config, axes: Sequence[str], is_product: bool) -> list[Entry | Rejection]:
    """Return all choices, in the order of the registries."""
    if is_product:
        name = " x ".join(axes)
        return [resolve_choice(base, name, choice) for choice in combine_axes(base, axes)]
    return [resolve_choice(base, axis, choice) for axis in axes for choice in AXES[axis](base)]


def resolve_choice(base: Config, axis: str, choice: Choice) -> Entry | Rejection:
    """Apply a choice to the base, with another position encoding if the mixer needs one."""
    is_chosen = any(s.startswith("model.position=") for s in choice.settings)
    positions = [None] if is_chosen else [None, "rope", "none"]
    errors = []
    for position in positions:
        replaced = [f"model.position={position}"] if position else []
        try:
            cfg = override(base, [*choice.settings, *replaced])
        except ConfigError as error:
            errors.append(str(error))
        else:
            name = f"{choice.name} (position {position})" if position else choice.name
            return Entry(axis, name, cfg)
    reason = errors[0].partition(": use ")[0].partition(". ")[0].removesuffix(".") + "."
    return Rejection(axis, choice.name, reason, find_objectives(base, choice))


def find_objectives(base: Config, choice: Choice) -> tuple[str, ...]:
    """Return the objectives with which the config accepts a rejected choice."""
    accepting = []
    for name, objective in OBJECTIVES.items():
        changed = [f"train.objective={name}", f"model.family={objective.family}"]
        vocab = f"model.vocab={base.model.vocab + base.model.context}"  # with room for mask tokens
        try:
            override(base, [*choice.settings, *changed, vocab])
        except ConfigError:
            continue
        accepting.append(name)
    return tuple(accepting)


# --- measurement -----------------------------------------------------------------------------


class Batches:
    """The batches that all choices share: for training per seed, held out per window length."""

    def __init__(self, base: Config):
        self.base, self.corpus = base, prepare(base.data, base.model.vocab)
        self._train_batches: dict[int, list] = {}  # by seed

    def get_train_batches(self, seed: int) -> list:
        """Return the batches of a run, in order."""
        if seed not in self._train_batches:
            task = tasks.CausalTask(dataclasses.replace(self.base, seed=seed), self.corpus)
            batches = [task.make_batch(step) for step in range(self.base.train.steps)]
            self._train_batches[seed] = batches
        return self._train_batches[seed]

    def iterate_held_out(self, factor: int):
        """Iterate over held-out batches in windows of `factor` times the training length.

        A batch has as many tokens for every factor.
        """
        train, corpus = self.base.train, self.corpus
        return make_eval_batches(
            corpus.held_out,
            train.batch // factor,
            self.base.model.context * factor,
            train.eval_batches,
            pad=corpus.tokenizer.pad,
            mask_documents=self.base.model.documents == "separate",
        )


def extend_context(cfg: Config, factor: int) -> tuple[Config, str]:
    """Return the config with a longer context, and the parameters that do not fit it."""
    longer = override(cfg, [f"model.context={cfg.model.context * factor}"])
    before, after = (jax.tree.leaves_with_path(abstract_params(c.model)[0]) for c in (cfg, longer))
    fixed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), (_, y) in zip(before, after, strict=True)
        if x.shape != y.shape
    ]
    return longer, " and ".join(f"`{name}`" for name in fixed)


def compile_train_step(cfg: Config, batches: Batches, seed: int):
    """Return the compiled initialization and training step."""
    optimizer, schedule = build_optimizer(
        cfg.optimizer, cfg.train.steps, abstract_params(cfg.model)[1]
    )
    init = jax.jit(lambda seed: init_state(cfg.model, optimizer, seed))
    state, batch = init(seed), batches.get_train_batches(seed)[0]
    step = make_train_step(cfg, build(cfg.model), optimizer, schedule)
    return init, jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def measure_losses(cfg: Config, batches: Batches, seeds: Sequence[int]) -> dict[str, Any]:
    """Train from scratch with every seed, and return the held-out losses by window length."""
    init, step = compile_train_step(cfg, batches, seeds[0])
    params = init(seeds[0]).params
    evaluate, reason = {}, ""
    for factor in CONTEXT_FACTORS:
        longer, why = extend_context(cfg, factor)
        reason = reason or why
        if not why:
            lowered = jax.jit(make_eval_step(longer, build(longer.model)))
            batch = next(batches.iterate_held_out(factor))
            evaluate[factor] = lowered.lower(params, batch).compile()
    losses: dict[int, list[float]] = {factor: [] for factor in evaluate}
    for seed in seeds:
        state = train(step, init(seed), batches.get_train_batches(seed))[0]
        for factor, run_eval in evaluate.items():
            held_out = batches.iterate_held_out(factor)
            losses[factor].append(compute_held_out_loss(run_eval, state.params, held_out))
    return {
        "parameters": count_params(cfg.model)["total"],
        "losses": losses,
        "reason": reason,
    }


def measure_speed(cfg: Config, batches: Batches, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the time of a training step, in several blocks of steps, and its memory."""
    init, step = compile_train_step(cfg, batches, seeds[0])
    state, train_batches = init(seeds[0]), batches.get_train_batches(seeds[0])[:BLOCK_STEPS]
    state, _ = train(step, state, train_batches[:WARMUP_STEPS])
    seconds: list[float] = []  # per step, the median of each block
    for _ in range(BLOCKS):
        state, step_seconds = train(step, state, train_batches)
        seconds.append(statistics.median(step_seconds))
    memory = step.memory_analysis()
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": cfg.train.batch * cfg.model.context / statistics.median(seconds),
        "megabytes": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6
        if memory
        else None,
    }


def train(step, state, batches: list):
    """Train on all batches; return the final state and the seconds of each step."""
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return state, seconds


def compute_held_out_loss(run_eval, params, batches) -> float:
    """Return the loss in nats per token."""
    sums = [run_eval(params, batch) for batch in batches]
    return float(np.sum([s["nats"] for s in sums]) / np.sum([s["weight"] for s in sums]))


# --- losses.jsonl and speed.jsonl --------------------------------------------------------------


def describe_environment() -> dict[str, str]:
    """Return what a measurement depends on besides its config and its seeds."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {count_cores()} cores",
    }


def list_changes(cfg: Any, default: Any, prefix: str = "") -> list[str]:
    """Return the settings that are not at their defaults, as path=value.

    Defaults are left out, so that measurements stay valid when settings are added.
    """
    changes: list[str] = []
    for field in dataclasses.fields(cfg):
        value, other = getattr(cfg, field.name), getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changes += list_changes(value, other, f"{prefix}{field.name}.")
        elif value != other:
            changes.append(f"{prefix}{field.name}={value!r}")
    return sorted(changes)


IGNORED_SETTINGS = ("data.cache=", "data.source=", "name=", "folder=")  # the text has a fingerprint


def hash_inputs(cfg: Config, batches: Batches, seeds: Sequence[int], phase: str) -> str:
    """Return the key of a measurement; losses depend on the machine by rounding alone."""
    changes = [c for c in list_changes(cfg, Config()) if not c.startswith(IGNORED_SETTINGS)]
    environment = describe_environment() if phase == "speed" else None
    parts = [changes, batches.corpus.fingerprint, list(seeds), environment]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read_rows(path: pathlib.Path) -> dict[str, dict]:
    """Return the finished rows by key; skip a line truncated when its process was killed."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "losses" in row:
            row["losses"] = {int(factor): losses for factor, losses in row["losses"].items()}
        rows[row["key"]] = row
    return rows


def append_row(path: pathlib.Path, row: dict):
    """Append a line, after the end of a line that was truncated."""
    is_cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * bool(is_cut) + json.dumps(row) + "\n")


PHASES = {"losses": measure_losses, "speed": measure_speed}


def measure_all(entries: Sequence[Entry], batches: Batches, seeds, out: pathlib.Path, phase: str):
    """Measure what the file of a phase ("losses" or "speed") lacks."""
    path = out / f"{phase}.jsonl"
    rows = read_rows(path)
    for entry in entries:
        key = hash_inputs(entry.cfg, batches, seeds, phase)
        if key not in rows:
            measured = PHASES[phase](entry.cfg, batches, seeds)
            labels = {"name": f"{entry.axis}: {entry.name}", "environment": describe_environment()}
            rows[key] = {"key": key} | labels | measured
            append_row(path, rows[key])
        print(format_line(entry, rows[key]), flush=True)


def read_results(entries: Sequence[Entry], batches: Batches, seeds, out: pathlib.Path):
    """Return what has been measured of each choice, in both phases; {} where nothing has.

    Returns:
        A row for each entry, and the environments of the measurements, by phase.
    """
    results: list[dict] = [{} for _ in entries]
    environments: dict[str, str] = {}
    for phase in PHASES:
        rows = read_rows(out / f"{phase}.jsonl")
        for entry, result in zip(entries, results, strict=True):
            row = dict(rows.get(hash_inputs(entry.cfg, batches, seeds, phase), {}))
            for name, value in row.pop("environment", {}).items():
                environments.setdefault(f"{name} ({phase})", value)
            result.update(row)
    return results, environments


# --- the command -----------------------------------------------------------------------------


def parse_axes(text: str) -> list[str]:
    """Parse axes from the command line."""
    axes = text.split(",")
    for name in axes:
        if name not in AXES:
            raise argparse.ArgumentTypeError(f"no axis {name!r}; there are: {', '.join(AXES)}")
    return axes


def parse_integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="path=value", help="changes to the base")
    choices = parser.add_mutually_exclusive_group()
    choices.add_argument(
        "--axes", type=parse_axes, default=[*AXES], help=f"some of {','.join(AXES)}"
    )
    choices.add_argument("--product", type=parse_axes, help="every combination of these axes")
    parser.add_argument("--seeds", type=parse_integers, default=[0, 1], help="such as 0,1,2")
    parser.add_argument("--steps", type=int, default=BASE.train.steps, help="training steps")
    parser.add_argument("--source", default=BASE.data.source, help="text; see data.source")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default="benchmarks/results/ablation",
        help="folder for losses.jsonl and speed.jsonl (default: %(default)s)",
    )
    parser.add_argument("--phase", choices=PHASES, help="measure only this (default: both)")
    parser.add_argument(
        "--docs", type=pathlib.Path, help="folder for ablation.md and images/ (default: --out)"
    )
    return parser


def make_base(a: argparse.Namespace) -> Config:
    """Return the base config that the command requests.

    Raises:
        ConfigError: the config is invalid, or its windows cannot be joined to longer ones.
    """
    warmup = min(BASE.optimizer.warmup, a.steps // 10)
    budget = (f"train.steps={a.steps}", f"data.source={a.source}", f"optimizer.warmup={warmup}")
    base = override(BASE, [*budget, *a.settings])
    if base.train.batch % CONTEXT_FACTORS[-1]:
        raise ConfigError(
            f"train.batch={base.train.batch} must be a multiple of {CONTEXT_FACTORS[-1]}, so that "
            "batches of longer windows have as many tokens."
        )
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    a = make_parser().parse_args(arguments)
    base = make_base(a)
    planned = plan(base, a.product or a.axes, is_product=bool(a.product))
    entries = [x for x in planned if isinstance(x, Entry)]
    rejections = [x for x in planned if isinstance(x, Rejection)]
    batches = Batches(base)
    held_out_tokens = int(sum(batch.weights.sum() for batch in batches.iterate_held_out(1)))
    facts = {"seeds": ", ".join(map(str, a.seeds))}
    given = list_page_arguments(arguments)
    command = shlex.join(["python", "-m", "benchmarks.ablate", *given])
    print(f"{command}\n{describe_base(base, facts)}", flush=True)
    a.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for phase in [a.phase] if a.phase else PHASES:
        print(f"\n{phase}\n{format_line(None, None)}", flush=True)
        measure_all(entries, batches, a.seeds, a.out, phase)
    for rejection in rejections:
        print(f"{rejection.axis:12} {rejection.name:36} left out: {rejection.reason}")
    rows, environments = read_results(entries, batches, a.seeds, a.out)
    facts |= environments
    result = Result(base, entries, rows, rejections, facts, command, held_out_tokens)
    docs = a.docs or a.out
    draw_plots(result, docs / "images")
    write_text_atomically(str(docs / "ablation.md"), format_page(result))
    print(f"{format_duration(time.perf_counter() - start)}; {docs / 'ablation.md'}")
    return 0


def list_page_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command that measures all of the page: those without --phase."""
    phase = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    phase.add_argument("--phase")
    return phase.parse_known_args(list(arguments))[1]


if __name__ == "__main__":
    run(main)
