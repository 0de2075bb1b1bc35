"""The models that a run reads and does not train: a teacher, or the model that it began with.

The log-probabilities of a preference's reference are computed once, before the first step, and kept
in the run folder and in the cache of `data.cache`, by the fingerprints of the parameters, the data
and the template.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import hosts
from jaxgpt.checksums import hash_json, sum_arrays
from jaxgpt.config import Config
from jaxgpt.data import Batch
from jaxgpt.data.chat import CompletionRows, PreferenceTask
from jaxgpt.data.work import atomic_write
from jaxgpt.loading import load
from jaxgpt.model import build
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer
from jaxgpt.tuning_losses import sum_completions

FILE = "reference.npz"  # in the run folder


class FrozenModel(NamedTuple):
    """A model that the loss reads: the module, and its parameters; None if it reads none."""

    model: Any = None
    params: Any = None

    def complete(self, step: Callable) -> Callable:
        """Return a step (state or parameters, batch) that is given these parameters."""
        if self.params is None:
            return step
        return lambda state, batch: step(state, batch, self.params)


def needs_start(cfg: Config) -> bool:
    """Return whether a run needs the parameters that it began with, also when it resumes."""
    has_reference = os.path.isfile(os.path.join(cfg.run_folder, FILE))
    is_online = cfg.train.objective == "online" and cfg.online.kl > 0
    return is_online or (cfg.train.objective == "preference" and not has_reference)


def load_frozen(
    cfg: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, make_first: Callable[[], Any]
) -> FrozenModel:
    """Return the model that the loss of a run reads.

    Args:
        tokenizer: of the run.
        mesh: to shard the model over.
        make_first: returns a copy of the parameters that the run began with.

    Raises:
        ConfigError: the teacher has other tokens, or is no decoder.
    """
    if cfg.distill.teacher:
        return _load_teacher(cfg, tokenizer, mesh)
    if cfg.train.objective == "online" and cfg.online.kl > 0:
        return FrozenModel(build(cfg.model), make_first())
    return FrozenModel()


def _load_teacher(cfg: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> FrozenModel:
    name = f"distill.teacher={cfg.distill.teacher!r}"
    try:
        teacher = load(cfg.distill.teacher, mesh=mesh)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    other = teacher.config.model
    if other.family != "decoder":
        raise ConfigError(f"{name} is an {other.family}: a teacher predicts the next token.")
    if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
        there, here = (x.fingerprint[:12] for x in (teacher.tokenizer, tokenizer))
        raise ConfigError(
            f"{name} has another tokenizer: its fingerprint is {there}, and that of the run {here}"
            ". Train with the teacher's: data.tokenizer=PATH of its tokenizer.json."
        )
    if other.vocab != cfg.model.vocab:
        raise ConfigError(
            f"{name} scores {other.vocab} ids: set model.vocab={other.vocab} (it is "
            f"{cfg.model.vocab})."
        )
    teacher.check_finite()
    return FrozenModel(build(other), teacher.params)


# --- the reference of preferences ---


def add_reference(
    cfg: Config,
    task: PreferenceTask,
    fingerprint: str,
    make_first: Callable[[], Any],
    place_batch: Callable[[Batch], Batch],
    log: Callable[[str], None],
):
    """Give a task the log-probabilities of all its completions under the first parameters.

    Args:
        fingerprint: of the data, the tokenizer and the template.
        make_first: as for `load_frozen`.
        place_batch: puts a batch on the devices.
        log: receives a line.
    """
    own = os.path.join(cfg.run_folder, FILE)
    found = _read(own, fingerprint, "")
    if not _is_everywhere(found):
        params = make_first()
        key = hash_json([sum_arrays(params=params), cfg.model.dtype])
        folder = os.path.expanduser(cfg.data.cache)
        cached = os.path.join(folder, f"reference-{hash_json([key, fingerprint])}.npz")
        found = _read(cached, fingerprint, key)
        if not _is_everywhere(found):
            log(f"computing the log-probabilities of the reference model, kept in {cached}")
            found = _compute(cfg, task, params, place_batch)
            hosts.run_on_first(_write)(cached, found, fingerprint, key)
        hosts.run_on_first(_write)(own, found, fingerprint, key)
    assert found is not None
    for rows, values in zip(task.all_rows, found, strict=True):
        rows.reference = values


def _is_everywhere(found: Any) -> bool:
    return all(hosts.all_gather_text("reference", "" if found is None else "x"))


def _read(path: str, fingerprint: str, key: str) -> list[np.ndarray] | None:
    """Read log-probabilities, float32 [rows 2] of each stream; None if they are of something else.

    Args:
        key: of the parameters; "" for any.
    """
    try:
        with np.load(path) as file:
            if str(file["fingerprint"]) != fingerprint or (key and str(file["key"]) != key):
                return None
            return [file[f"rows_{n}"] for n in range(int(file["count"]))]
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _write(path: str, found: list[np.ndarray], fingerprint: str, key: str):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    rows = {f"rows_{n}": values for n, values in enumerate(found)}
    with atomic_write(path) as file:
        np.savez(file, fingerprint=fingerprint, key=key, count=len(found), **rows)  # type: ignore


def _compute(
    cfg: Config, task: PreferenceTask, params: Any, place_batch: Callable[[Batch], Batch]
) -> list[np.ndarray]:
    """Compute the log-probabilities of all rows of a task, float32 [rows 2] of each stream."""
    model, B = build(cfg.model), cfg.train.batch

    @jax.jit
    def score(params, batch: Batch) -> jax.Array:
        batch = jax.tree.map(jnp.asarray, batch)
        return sum_completions(model, params, batch, {}, cfg.train.loss_chunk)[0]

    def score_rows(rows: CompletionRows) -> np.ndarray:
        batches = (rows.gather(first + np.arange(B)) for first in range(0, rows.size, B))
        found = [hosts.fetch(score(params, place_batch(batch))) for batch in batches]
        return np.concatenate([np.zeros((0, 2), np.float32), *found])[: rows.size]

    return [score_rows(rows) for rows in task.all_rows]
