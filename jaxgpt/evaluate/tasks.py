"""Benchmarks as data: a registry of tasks, each a few pure functions from files to numbers.

A task reads questions from files, and measures an answer. What a model makes of a question is
either the log-likelihoods of its requests, or a text that it generates. `run.py` asks a model, and
`benchmarks.py` and `bbh.py` have the tasks. A plugin adds a task by a row of TASKS.

Prompts are those of lm-evaluation-harness where it has the task, so that numbers can be compared.
"""

import os
import pathlib
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgpt.settings import ConfigError, choose, resolve_table

FOLDER_VARIABLE = "JAXGPT_BENCHMARKS"  # names the folder of the files, if no setting does
DEFAULT_FOLDER = "data/benchmarks"


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: its name in the benchmark, "anatomy/12".
        group: the part of the benchmark that it is sampled from: a subject, a paradigm.
        requests: (context, continuation) of the texts to score; their likelihoods are the answer.
        answer: what `Task.measure` compares with.
        category: of its group, if groups have categories.
        prompt: a text to continue, of a task that generates.
        stop: texts that end the continuation.
    """

    id: str
    group: str
    requests: tuple[tuple[str, str], ...] = ()
    answer: Any = None
    category: str = ""
    prompt: str = ""
    stop: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What of it may be found in other texts: its longest text, without worked examples."""
        texts = [self.prompt.rsplit("\n\n", 1)[-1]]
        texts += [context.rsplit("\n\n", 1)[-1] + after for context, after in self.requests]
        return max(texts, key=len)


class Shown(NamedTuple):
    """Which questions of a benchmark are asked."""

    questions: list[Question]
    sizes: Mapping[str, int]  # questions of each group in the whole benchmark
    name: str  # "first 2 of each of 57 groups (114 of 14,042)", or "all 14,042"


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        title: one line about it.
        read: (folder of its files, worked examples) -> all its questions, in a fixed order.
        measure: (question, likelihoods of its requests, or the generated text) -> metrics.
        guess: question -> the metrics of a guess, as far as they are known.
        files: patterns of the files that it needs, in its folder.
        origin: where the files are published.
        shots, most_shots: worked examples before a question: as published, and at most.
        generates: the answer is generated.
    """

    title: str
    read: Callable[[pathlib.Path, int], list[Question]]
    measure: Callable[[Question, Any], dict[str, float]]
    guess: Callable[[Question], dict[str, float]]
    files: tuple[str, ...]
    origin: str
    shots: int = 0
    most_shots: int = 0
    generates: bool = False


# A row is resolved when it is used: "module:NAME".
TASKS: dict[str, str | Task] = {
    "blimp": "jaxgpt.evaluate.benchmarks:BLIMP",
    "mmlu": "jaxgpt.evaluate.benchmarks:MMLU",
    "mmlu_cloze": "jaxgpt.evaluate.benchmarks:MMLU_CLOZE",
    "truthfulqa": "jaxgpt.evaluate.benchmarks:TRUTHFULQA",
    "bbh": "jaxgpt.evaluate.bbh:BBH",
    "wic": "jaxgpt.evaluate.benchmarks:WIC",
    "winobias": "jaxgpt.evaluate.benchmarks:WINOBIAS",
}

AUTO = "auto"  # of train.eval_tasks: the tasks of AUTO_TASKS whose files are there
AUTO_TASKS = ("blimp",)
TRAINING_TASKS: Mapping[str, Any] = ChainMap({AUTO: ""}, TASKS)


def find_task(name: str, key: str = "--tasks") -> Task:
    """Return the task of a name.

    Raises:
        ConfigError: there is none; `key` names where it was given.
    """
    row = choose(TASKS, name, key)
    task: Any = resolve_table(row) if isinstance(row, str) else row
    return task


def find_folder(name: str, folder: str = "", key: str = "--data") -> pathlib.Path:
    """Return the folder of the files of a task.

    Args:
        name: of the task.
        folder: of all benchmarks; "": that of the environment variable, or the default.
        key: names where the folder was given, for the message.

    Raises:
        ConfigError: a file is missing; the message has where it is published.
    """
    task, root = find_task(name), get_root(folder)
    place = root / name.removesuffix("_cloze")
    for pattern in task.files:
        if not any(place.glob(pattern)):
            how = f"{key} names the folder" if folder else f"{key} or ${FOLDER_VARIABLE} names it"
            raise ConfigError(
                f"{name} needs {place / pattern}, which is not there. Get the files of "
                f"{task.origin} and put them into {place}/; {how} of all benchmarks ({root})."
            )
    return place


def choose_training_tasks(names: Sequence[str], folder: str = "") -> list[str]:
    """Return the tasks of `train.eval_tasks`: those of AUTO in its place, as far as they are there.

    Args:
        names: of tasks, or AUTO.
        folder: of the files of all benchmarks; see `get_root`.
    """
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys(filter(lambda x: has_files(x, folder), AUTO_TASKS)
                               if name == AUTO else [name])  # fmt: skip
    return list(found)


def has_files(name: str, folder: str = "") -> bool:
    """Return whether the files of a task are there."""
    try:
        find_folder(name, folder)
    except ConfigError:
        return False
    return True


def get_root(folder: str = "") -> pathlib.Path:
    """Return the folder of all benchmarks: the one given, or of the environment, or the default."""
    return pathlib.Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()


def read_questions(
    name: str, folder: str = "", limit: int = 0, shots: int | None = None, key: str = "--data"
) -> Shown:
    """Return the questions of a task that are asked.

    Args:
        name, folder, key: as of `find_folder`.
        limit: the first questions of each group, 0 = all: a stratified sample, always the same one.
        shots: worked examples before a question; None: as published.

    Raises:
        ConfigError: a file is missing or damaged, or there are not so many worked examples.
    """
    task = find_task(name)
    shots = task.shots if shots is None else shots
    if not 0 <= shots <= task.most_shots:
        most = f"0 to {task.most_shots}" if task.most_shots else "none"
        raise ConfigError(f"--shots {shots}: {name} has {most} worked examples.")
    if limit < 0:
        raise ConfigError(f"--limit {limit}: give the number of questions of each group, 0 = all.")
    place = find_folder(name, folder, key)
    try:
        everything = task.read(place, shots)
    except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"the files of {name} in {place} are not as they are published by {task.origin}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return limit_questions(everything, limit)


def limit_questions(everything: Sequence[Question], limit: int) -> Shown:
    """Return the first questions of each group, or all if `limit` is 0, and a name for them."""
    sizes: dict[str, int] = {}
    chosen = []
    for question in everything:
        sizes[question.group] = sizes.get(question.group, 0) + 1
        if not limit or sizes[question.group] <= limit:
            chosen.append(question)
    total = f"{len(everything):,}"
    if len(chosen) == len(everything):
        return Shown(chosen, sizes, f"all {total}")
    each = f" of each of {len(sizes)} groups" if len(sizes) > 1 else ""
    return Shown(chosen, sizes, f"first {limit}{each} ({len(chosen):,} of {total})")
