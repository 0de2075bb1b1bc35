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
from jaxgpt.config import Config
from jaxgpt.interop import convert, loaders
from jaxgpt.interop.formats import find_format
from jaxgpt.loading import (
    CHECKPOINT_FOLDERS,
    check_config_file,
    is_checkpoint,
    read_config,
    read_facts,
    read_params,
    split_checkpoint_path,
)
from jaxgpt.model import abstract_params
from jaxgpt.saved_arrays import DamagedError, list_steps
from jaxgpt.script import print_text
from jaxgpt.selection import merge, select
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.trainer.checkpoint import read_on_all
from jaxgpt.trainer.state import TrainState

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin with.

    Args:
        folder: of the checkpoint, such as runs/a/best/500.
        config, tokenizer: of its run.
        plan: where its parameters are, if it is a model of another library.
        taken: the parameters that fit the new run, as a selection (see `jaxgpt.selection`).
        differences: a line for each parameter that does not fit, and for each setting of the model
            that differs.
        others: checkpoints in place of one that is damaged, the best choice first.
    """

    folder: str
    config: Config
    tokenizer: Tokenizer
    plan: convert.Plan | None = None
    taken: Any = None
    differences: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """The line of a run's header."""
        count = len(jax.tree.leaves(self.taken))
        return "\n         ".join([f"{count} arrays of {self.folder}", *self.differences])


def find_start(path: str) -> Start:
    """Find the checkpoint that `train.start` names.

    Args:
        path: a run folder or saved model (its best checkpoint, or the latest if there is no best;
            with "@latest" the latest), a run's `best` or `checkpoints`, or one checkpoint in it; or
            a model of another library, as `jaxgpt.load` takes it. In place of a damaged checkpoint,
            unless the path is that of one, the latest good one is taken, with a warning.

    Raises:
        ConfigError: there is none.
    """
    try:
        if find_format(os.path.expanduser(path)):
            return _find_foreign(os.path.expanduser(path))
        run_folder, folders = _list_checkpoints(path)
        check_config_file(run_folder)
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
        other = find_start(values["train.start"]).config
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
    changed = [
        line for line in configs.list_differences(start.config, cfg) if line.startswith("model.")
    ]
    notes = [f"not taken: {line}" for line in unfit] + [f"settings: {line}" for line in changed]
    selection = unflatten_dict(taken, sep=".")
    return dataclasses.replace(start, taken=selection, differences=tuple(notes))


def take_params(start: Start, state: TrainState, abstract: TrainState) -> TrainState:
    """Return a new state with the parameters that are taken from `start`. All processes call it.

    Args:
        state: as initialized.
        abstract: shapes and shardings of it.
    """
    if start.plan:
        wanted = flatten_dict(select(abstract.params, start.taken), sep=".")
        shardings = {path: x.sharding for path, x in wanted.items() if x is not None}
        params = convert.read_params(start.plan, shardings, "float32")
        return state.replace(params=merge(params, state.params))
    there, _ = abstract_params(start.config.model)
    replicated = abstract.step.sharding
    there = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), there
    )
    there = merge(select(abstract.params, start.taken), there)

    def read(folder: str) -> Any:
        return read_on_all(partial(read_params, os.path.abspath(folder), there))

    params = _read_first_good([start.folder, *start.others], read, _warn)
    return state.replace(params=merge(select(params, start.taken), state.params))


@hosts.run_on_first
def _warn(line: str):
    print_text(line, sys.stderr)
