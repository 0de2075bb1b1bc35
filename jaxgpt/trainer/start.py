"""`train.start`: begin a new run with the parameters of another one.

Only parameters are taken, and only those of the same path and shape (and, where they belong to the
vocabulary, of the same tokenizer). Optimizer, schedule, data and best are the new run's own. Once
it has a checkpoint of its own, the run that it started from is not read again.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgpt import config as configs
from jaxgpt import hosts
from jaxgpt import tokenizer as tokenizers
from jaxgpt.adapters import (
    Adapter,
    Base,
    check_base,
    choose_path,
    compute_fingerprint,
    read_base,
)
from jaxgpt.config import Config
from jaxgpt.interop import convert, loaders
from jaxgpt.interop.formats import find_format
from jaxgpt.language_model import LanguageModel
from jaxgpt.loading import (
    CHECKPOINT_FOLDERS,
    check_config_file,
    is_checkpoint,
    load,
    read_config,
    read_facts,
    read_params,
    split_checkpoint_path,
)
from jaxgpt.lora import describe_frozen, describe_trained, select_full, store_base
from jaxgpt.model import abstract_params
from jaxgpt.saved_arrays import DamagedError, list_steps
from jaxgpt.script import print_text
from jaxgpt.selection import merge, select
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_shardings
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.trainer.checkpoint import Progress, read_on_all
from jaxgpt.trainer.state import FrozenBase, TrainState, make_adapter_state, make_first_base

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin with.

    Args:
        folder: of the checkpoint, such as runs/a/best/500.
        config, tokenizer: of its run.
        plan: where its parameters are, if it is a model of another library.
        model: the model itself, if it was one with adapters: they are merged.
        adapter: the adapters that a run with adapters goes on with, on this as their base.
        taken: the parameters that fit the new run, as a selection (see `jaxgpt.selection`).
        differences: a line for each parameter that does not fit, and for each setting of the model
            that differs.
        others: checkpoints in place of one that is damaged, the best choice first.
    """

    folder: str
    config: Config
    tokenizer: Tokenizer
    plan: convert.Plan | None = None
    model: LanguageModel | None = None
    adapter: Adapter | None = None
    taken: Any = None
    differences: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """The line of a run's header."""
        count = len(jax.tree.leaves(self.taken))
        of = f", with the adapters of {self.adapter.origin}" if self.adapter else ""
        return "\n         ".join([f"{count} arrays of {self.folder}{of}", *self.differences])


def find_start(path: str, is_adapted: bool = False) -> Start:
    """Find the checkpoint that `train.start` names.

    Args:
        path: a run folder or saved model (its best checkpoint, or the latest if there is no best;
            with "@latest" the latest), a run's `best` or `checkpoints`, or one checkpoint in it; or
            a model of another library, as `jaxgpt.load` takes it. In place of a damaged checkpoint,
            unless the path is that of one, the latest good one is taken, with a warning.
        is_adapted: whether adapters are trained: those of the checkpoint go on then, on their base,
            and are not merged into it.

    Raises:
        ConfigError: there is none.
    """
    try:
        if name := find_format(os.path.expanduser(path)):
            path = os.path.expanduser(path)
            return _find_adapted(path, is_adapted) if name == "peft" else _find_foreign(path)
        run_folder, folders = _list_checkpoints(path)
        check_config_file(run_folder)
        if read_config(run_folder).lora.rank:
            return _find_adapted(folders[0], is_adapted)
        tokenizer = tokenizers.load(os.path.join(run_folder, "tokenizer.json"))
        facts = _read_first_good(folders, read_facts)
        tokenizer.check_fingerprint(facts.get("tokenizer", ""), run_folder)
        return Start(folders[0], read_config(run_folder), tokenizer, others=tuple(folders[1:]))
    except ConfigError as error:
        raise ConfigError(f"train.start={path!r}: {error}") from error


def _find_foreign(path: str) -> Start:
    """Return the start at a model of another library."""
    archive = loaders.open_archive(path)
    plan = convert.plan_import(archive)
    tokenizer = convert.make_tokenizer(plan.config.model, archive)
    return Start(path, plan.config, tokenizer, plan)


def _find_adapted(path: str, is_adapted: bool) -> Start:
    """Return the start at a model with adapters: merged, or at its base."""
    model = load(path)
    if not is_adapted:
        merged = model.merge()
        return Start(path, merged.config, merged.tokenizer, model=merged)
    adapter = model.adapters[model.adapter]
    return dataclasses.replace(find_start(choose_path(adapter.base, path)), adapter=adapter)


def find_base(cfg: Config, is_resumed: bool) -> Start | None:
    """Find the base of the adapters of a run: `train.start`, or where it was when the run began.

    Raises:
        ConfigError: it is at neither.
    """
    if not is_resumed:
        return find_start(cfg.train.start, True) if cfg.train.start else None
    base = read_base(cfg.run_folder, [cfg.train.start] if cfg.train.start else [])
    return find_start(choose_path(base, cfg.run_folder), True) if base.paths else None


def load_config(settings: Sequence[str]) -> Config:
    """Return the config of a run that names a start and no config: its model is that of the start.

    A run that exists has its own config, so that it resumes without its start.

    Args:
        settings: `path=value` assignments, of which one is train.start.

    Raises:
        ConfigError: there is no such start, or a setting is invalid.
    """
    default, values = configs.load("stdlib"), configs.parse_assignments(settings)
    places = {k: values[k] for k in ("name", "folder") if k in values}
    run_folder = dataclasses.replace(default, **places).run_folder
    if os.path.isfile(os.path.join(run_folder, "config.json")):
        other = read_config(run_folder)
    else:
        other = find_start(values["train.start"], bool(values.get("lora.rank"))).config
    train = dataclasses.replace(default.train, objective=other.train.objective)
    return configs.override(dataclasses.replace(default, model=other.model, train=train), settings)


def _list_checkpoints(path: str) -> tuple[str, list[str]]:
    """Return the folder of the run that a path names, and its checkpoints, the best choice first.

    If the path is that of one checkpoint, there is no other choice.
    """
    which = path.rpartition("@")[2] if path.endswith(("@best", "@latest")) else ""
    path = os.path.normpath(os.path.expanduser(path.removesuffix(f"@{which}")))
    run_folder, named = split_checkpoint_path(path)
    if is_checkpoint(named):
        return run_folder, [named]
    names = (os.path.basename(named),) if named else CHECKPOINT_FOLDERS[which or "best"]
    read_config(run_folder)  # the error of a folder that is no run is clearer than the one below
    folders = [os.path.join(run_folder, name) for name in names]
    found = [os.path.join(folder, str(step)) for folder in folders for step in list_steps(folder)]
    if not found:
        raise ConfigError(f"{run_folder} has no checkpoint in {' or '.join(names)}.")
    return run_folder, found


def _read_first_good(
    folders: Sequence[str],
    read: Callable[[str], Result],
    warn: Callable[[str], object] = lambda line: None,
) -> Result:
    """Read the first of some checkpoints that is not damaged.

    Args:
        folders: of the checkpoints.
        read: reads one, and raises DamagedError.
        warn: receives a line if a damaged one was passed over.

    Raises:
        DamagedError: all of them are damaged; of the first.
    """
    damaged: list[DamagedError] = []
    for folder in folders:
        try:
            result = read(folder)
        except DamagedError as error:
            damaged.append(error)
            continue
        if damaged:
            names = "; ".join(error.what for error in damaged)
            warn(f"warning: {names}. {folder} is used in its place.")
        return result
    raise damaged[0]


def match_start(start: Start, cfg: Config, tokenizer: Tokenizer) -> Start:
    """Return `start` with `taken` and `differences` for a new run.

    Args:
        cfg, tokenizer: of the new run.

    Raises:
        ConfigError: parameters do not fit, and `train.start_missing` is not init; or none fits.
    """
    old = flatten_dict(abstract_params(start.config.model)[0], sep=".")
    new_shapes, letters = (flatten_dict(x, sep=".") for x in abstract_params(cfg.model))
    has_same_tokens = start.tokenizer.fingerprint == tokenizer.fingerprint
    taken, unfit = {}, []
    for path in new_shapes | old:
        shapes = [list(x[path].shape) if path in x else "nothing" for x in (old, new_shapes)]
        if shapes[0] != shapes[1]:
            unfit.append(f"{path}: {shapes[0]} there, {shapes[1]} here")
        elif "V" in letters[path] and not has_same_tokens:
            unfit.append(f"{path}: {shapes[0]} of another tokenizer there")
        else:
            taken[path] = letters[path]
    if not taken or (unfit and cfg.train.start_missing != "init"):
        lines = "\n  ".join(unfit)
        remedy = "Set the model's sizes to those there"
        if taken:
            remedy += ", or initialize what is missing here by train.start_missing=init"
        raise ConfigError(
            f"train.start={cfg.train.start!r}: parameters of {start.folder} do not fit:\n  {lines}"
            f"\n{remedy}."
        )
    if cfg.lora.rank:
        _check_frozen(cfg, start, taken)
    changed = [
        line for line in configs.list_differences(start.config, cfg) if line.startswith("model.")
    ]
    notes = [f"not taken: {line}" for line in unfit] + [f"settings: {line}" for line in changed]
    selection = unflatten_dict(taken, sep=".")
    return dataclasses.replace(start, taken=selection, differences=tuple(notes))


def _check_frozen(cfg: Config, start: Start, taken: dict[str, str]):
    """Check that all that is frozen is taken, and that the adapters of the start have our shapes.

    Raises:
        ConfigError: a parameter would be random for ever, or the adapters are others.
    """
    frozen = flatten_dict(describe_frozen(cfg)[1], sep=".")
    if missing := sorted(frozen.keys() - taken.keys()):
        raise ConfigError(
            f"train.start={cfg.train.start!r} has no {missing[0]}, which would stay as it was "
            f"initialized, since lora.rank={cfg.lora.rank} freezes it: train it in full by "
            f"optimizer.train={missing[0].rpartition('.')[0]}."
        )
    if start.adapter is None:
        return
    found, wanted = (
        {path: list(x.shape) for path, x in flatten_dict(tree, sep=".").items()}
        for tree in (start.adapter.trained, describe_trained(cfg)[0])
    )
    if found != wanted:
        path = min(k for k in found | wanted if found.get(k) != wanted.get(k))
        theirs = start.adapter.config
        raise ConfigError(
            f"train.start={cfg.train.start!r} has adapters to go on with, and they are others: "
            f"{path} is {found.get(path, 'nothing')} there, {wanted.get(path, 'nothing')} here. Set"
            f" lora.rank={theirs.rank} lora.targets={','.join(theirs.targets) or chr(39) * 2}; or "
            "merge them first, with `jaxgpt merge`, and begin new adapters on the result."
        )


def take_params(start: Start, state: TrainState, abstract: TrainState) -> TrainState:
    """Return a new state with the parameters that are taken from `start`. All processes call it.

    Args:
        state: as initialized.
        abstract: shapes and shardings of it.
    """
    wanted = select(abstract.params, start.taken)
    params = read_start(start, wanted, abstract.step.sharding)
    return state.replace(params=merge(params, state.params))


def read_start(start: Start, wanted: Any, replicated: jax.sharding.Sharding) -> Any:
    """Read parameters of a start.

    Args:
        wanted: which, as shapes and shardings; they are read in float32.
        replicated: a sharding for what is read and not wanted.
    """
    if start.model is not None:
        found = flatten_dict(start.model.params, sep=".")
        flat = {
            path: jax.device_put(found[path].astype(x.dtype), x.sharding)
            for path, x in flatten_dict(wanted, sep=".").items()
        }
        return unflatten_dict(flat, sep=".")
    if start.plan:
        flat = flatten_dict(wanted, sep=".")
        shardings = {path: x.sharding for path, x in flat.items() if x is not None}
        return convert.read_params(start.plan, shardings, "float32")
    there, _ = abstract_params(start.config.model)
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), there
    )
    there = merge(wanted, there)

    def read(folder: str) -> Any:
        return read_on_all(partial(read_params, os.path.abspath(folder), there))

    params = _read_first_good([start.folder, *start.others], read, _warn)
    return select(params, wanted)


@hosts.run_on_first
def _warn(line: str):
    print_text(line, sys.stderr)


def make_adapter_start(
    cfg: Config, optimizer, abstract: TrainState, start: Start | None
) -> tuple[TrainState, str]:
    """Make the first state of a run with adapters, and return it with its base's fingerprint."""
    state = make_adapter_state(cfg, optimizer, abstract)
    if start:
        if full := select_full(cfg, start.taken):
            params = read_start(start, select(abstract.params, full), abstract.step.sharding)
            state = state.replace(params=merge(params, state.params))
        if start.adapter:
            params = jax.tree.map(
                lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding),
                start.adapter.trained, abstract.params,
            )  # fmt: skip
            state = state.replace(params=params)
    base, fingerprint = read_frozen(cfg, abstract, start)
    return state.replace(base=base), fingerprint


def read_frozen(cfg: Config, abstract: TrainState, start: Start | None) -> tuple[FrozenBase, str]:
    """Read the frozen base of adapters, and return it with its fingerprint.

    Args:
        start: what it is a part of; None for the initial parameters of the seed.
    """
    assert abstract.base is not None
    shapes, letters = describe_frozen(cfg)
    mesh: Any = abstract.step.sharding
    shardings = make_shardings(shapes, letters, mesh.mesh)
    wanted = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), shapes, shardings
    )
    if start is None:
        params = make_first_base(cfg, wanted)
    else:
        params = read_start(start, wanted, abstract.step.sharding)
    fingerprint = compute_fingerprint(params)
    if start and start.adapter and start.adapter.base.fingerprint:
        check_base(start.adapter.base, params, start.folder, start.adapter.origin)
    stored = jax.device_put(
        store_base(cfg, params), jax.tree.map(lambda x: x.sharding, abstract.base.params)
    )
    return abstract.base.replace(params=stored), fingerprint


def add_base(
    cfg: Config, state: TrainState, progress: Progress, abstract: TrainState, start: Start | None
) -> TrainState:
    """Return a restored state with the base of its adapters, if it has any.

    Raises:
        ConfigError: the base is another one than that of the checkpoint.
    """
    if not cfg.lora.rank:
        return state
    base, fingerprint = read_frozen(cfg, abstract, start)
    if fingerprint != progress.base:
        raise ConfigError(
            f"{start.folder if start else 'the initial model'} is not the base of the adapters in "
            f"{cfg.run_folder}: its fingerprint is {fingerprint}, and they were trained on "
            f"{progress.base}. Put the base back, or give the new run its own name=..."
        )
    return state.replace(base=base)


def describe_base(cfg: Config, start: Start | None, progress: Progress) -> Base | None:
    """Return the base of the adapters of a run; None if it trains none."""
    if not cfg.lora.rank:
        return None
    return Base((start.folder,) if start else (), progress.base)
