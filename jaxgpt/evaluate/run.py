"""Ask a model the questions of benchmarks, and make numbers of its answers.

found = evaluate_task(jaxgpt.load("runs/stdlib"), "blimp", limit=10)
print(found.metrics["accuracy"].format())
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.config import Config, SampleConfig
from jaxgpt.evaluate.likelihood import compute_likelihoods
from jaxgpt.evaluate.metrics import Estimate, estimate_calibration, estimate_mean
from jaxgpt.evaluate.tasks import (
    AUTO,
    Question,
    Shown,
    Task,
    choose_training_tasks,
    find_task,
    read_questions,
)
from jaxgpt.language_model import ABILITIES, FAMILY_ABILITIES, LanguageModel
from jaxgpt.score import BATCH_TOKENS
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

GENERATED_ROWS = 16  # of a batch that generates
MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class TaskResult:
    """What a model scores on a task.

    Attributes:
        task: its name.
        subset: which of its questions were asked.
        shots: worked examples before each.
        metrics: over all questions, with standard errors and chance levels.
        groups, categories: the same, of each group of questions and each category of groups.
        answers: of each question its id, its metrics, and the log-likelihoods or the text.
        cut: questions whose prompt did not fit the context, and lost its beginning.
        seconds: how long it took.
    """

    task: str
    subset: str
    shots: int
    metrics: dict[str, Estimate]
    groups: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    categories: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    cut: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object; a number that is not finite is null."""
        values = dataclasses.asdict(self)
        values["metrics"] = _to_json(self.metrics)
        for part in ("groups", "categories"):
            values[part] = {name: _to_json(x) for name, x in getattr(self, part).items()}
        return values


def _to_json(metrics: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
    def clean(x: float | None) -> float | None:
        return None if x is None or not math.isfinite(x) else x

    return {
        name: {key: clean(x) for key, x in estimate._asdict().items()}
        for name, estimate in metrics.items()
    }


def evaluate_task(
    model: LanguageModel,
    name: str,
    *,
    folder: str = "",
    limit: int = 0,
    shots: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    key: str = "--data",
) -> TaskResult:
    """Ask a model the questions of a task.

    Args:
        model: a decoder or an encoder-decoder.
        name: a row of `tasks.TASKS`.
        folder: of the files of all benchmarks; see `tasks.find_folder`, also for `key`.
        limit: the first questions of each group, 0 = all.
        shots: worked examples before each question; None: as published.
        batch_tokens: tokens of a batch.

    Raises:
        ConfigError: the task or its files are missing, or the model cannot answer.
    """
    shown = read_questions(name, folder, limit, shots, key)
    shots = find_task(name).shots if shots is None else shots
    return ask(model, name, shown, shots, batch_tokens)


def ask(
    model: LanguageModel, name: str, shown: Shown, shots: int, batch_tokens: int = BATCH_TOKENS
) -> TaskResult:
    """Ask a model the questions of a task that were read; see `evaluate_task`."""
    task, start = find_task(name), time.perf_counter()
    if "score" not in model.abilities:
        raise ConfigError(
            f"a model of train.objective={model.config.train.objective!r} answers no questions: "
            "benchmarks are for models that generate text."
        )
    answer = generate_answers if task.generates else score_answers
    found, cut = answer(model, task, shown.questions, batch_tokens)
    measured = [
        task.measure(question, given["text"] if task.generates else given["found"])
        for question, given in zip(shown.questions, found, strict=True)
    ]
    metrics, groups, categories = summarize(task, shown, measured)
    answers = [
        {"id": question.id, "group": question.group, **values, **_describe(given)}
        for question, values, given in zip(shown.questions, measured, found, strict=True)
    ]
    seconds = time.perf_counter() - start
    return TaskResult(
        name, shown.name, shots, metrics, groups, categories, answers, cut, round(seconds, 3)
    )


def read_benchmarks(config: Config) -> dict[str, tuple[Shown, int]]:
    """Return the questions of `train.eval_tasks`, and how many worked examples they have.

    The tasks of "auto" are left out where their files are missing, or no question can be answered.

    Raises:
        ConfigError: the files of a task that is named are missing, or the model of the config
            answers no questions.
    """
    train, found = config.train, {}
    abilities = ABILITIES.get(train.objective, FAMILY_ABILITIES[config.model.family])
    if "score" not in abilities:
        if set(train.eval_tasks) <= {AUTO}:
            return {}
        raise ConfigError(
            f"train.eval_tasks={','.join(train.eval_tasks)}: a model of train.objective="
            f"{train.objective} answers no questions; one that generates text does, as with "
            "train.objective=causal."
        )
    folder, limit = config.data.benchmarks, train.eval_tasks_limit
    for name in choose_training_tasks(train.eval_tasks, folder):
        shown = read_questions(name, folder, limit, key="data.benchmarks")
        found[name] = shown, find_task(name).shots
    return found


def check_benchmarks(
    config: Config, tokenizer: Tokenizer, found: Mapping[str, tuple[Shown, int]]
) -> dict[str, tuple[Shown, int]]:
    """Return those of `read_benchmarks` whose texts fit the context: a run is not to end by one.

    Raises:
        ConfigError: a task that is named has a longer text; those of "auto" are left out.
    """
    kept, context = {}, config.model.context
    for name, (shown, shots) in found.items():
        texts = {text for question in shown.questions for _, text in question.requests}
        longest = max((len(tokenizer.encode(text)) for text in texts), default=0)
        if longest <= context:
            kept[name] = shown, shots
        elif name in config.train.eval_tasks:
            raise ConfigError(
                f"train.eval_tasks={name}: a text of it has {longest} tokens, and model.context="
                f"{context} must hold them: give the model a longer context or another tokenizer."
            )
    return kept


def _describe(given: dict[str, Any]) -> dict[str, Any]:
    if "text" in given:
        return given
    return {
        "logprobs": [x.total for x in given["found"]],
        "tokens": [x.tokens for x in given["found"]],
    }


def score_answers(
    model: LanguageModel, task: Task, questions: Sequence[Question], batch_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Return the likelihoods of the requests of each question, and how many contexts are cut."""
    requests = [request for question in questions for request in question.requests]
    model.check_finite()
    found = compute_likelihoods(
        model.config, model.params, model.tokenizer, requests, batch_tokens=batch_tokens
    )
    ends = iter(found)
    parts = [[next(ends) for _ in question.requests] for question in questions]
    return [{"found": part} for part in parts], sum(any(x.is_cut for x in p) for p in parts)


def count_answer_tokens(model: LanguageModel, questions: Sequence[Question]) -> int:
    """Return how many tokens are generated for an answer: the longest right one, twice, and 8."""
    longest = max((len(model.tokenizer.encode(x.answer)) for x in questions), default=0)
    return min(2 * longest + 8, MAX_ANSWER_TOKENS, max(model.config.model.context // 2, 1))


def generate_answers(
    model: LanguageModel, task: Task, questions: Sequence[Question], batch_tokens: int
) -> tuple[list[dict[str, Any]], int]:
    """Return the text that is generated after each prompt by the likeliest tokens.

    It ends at one of the stops, or when it is clearly longer than the longest right answer. A
    prompt that leaves no room for it in the context loses its beginning.
    """
    encode, cut = model.tokenizer.encode, 0
    tokens = count_answer_tokens(model, questions)
    room = model.config.model.context - tokens
    rows = []
    for question in questions:
        ids = [*model.tokenizer.prefix, *encode(question.prompt).tolist()] or [model.tokenizer.bos]
        cut += len(ids) > room
        rows.append(ids[-room:])
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    texts = [""] * len(rows)
    for first in range(0, len(order), GENERATED_ROWS):
        numbers = order[first : first + GENERATED_ROWS]
        samples = [
            SampleConfig(tokens=tokens, temperature=0.0, top_p=1.0, stop=questions[number].stop)
            for number in numbers
        ]
        found = model.generate([rows[number] for number in numbers], samples)
        for number, generated in zip(numbers, found, strict=True):
            texts[number] = generated.text
    return [{"text": text} for text in texts], cut


def summarize(
    task: Task, shown: Shown, measured: Sequence[dict[str, float]]
) -> tuple[dict[str, Estimate], dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """Return the metrics over all questions, of each group, and of each category."""

    def estimate(numbers: Sequence[int]) -> dict[str, Estimate]:
        groups = [shown.questions[number].group for number in numbers]
        guesses = [task.guess(shown.questions[number]) for number in numbers]
        found = {}
        for name in measured[numbers[0]]:
            values = [measured[number][name] for number in numbers]
            chance = None
            if name in guesses[0]:
                chance = estimate_mean([x[name] for x in guesses], groups, shown.sizes).value
            found[name] = estimate_mean(values, groups, shown.sizes, chance)
        if "confidence" in found:
            pairs = [(measured[n]["confidence"], measured[n]["accuracy"]) for n in numbers]
            found["calibration_error"] = estimate_calibration(*zip(*pairs, strict=True))
        return found

    parts: tuple[dict[str, list[int]], ...] = (defaultdict(list), defaultdict(list))
    for number, question in enumerate(shown.questions):
        parts[0][question.group].append(number)
        parts[1][question.category].append(number)
    groups, categories = (
        {name: estimate(numbers) for name, numbers in part.items()} if len(part) > 1 else {}
        for part in parts
    )
    return estimate(range(len(measured))), groups, categories


def evaluate_tasks(
    model: LanguageModel,
    names: Iterable[str],
    log: Callable[[str], object] = lambda line: None,
    **arguments,
) -> list[TaskResult]:
    """Ask a model the questions of several tasks, and log each result; see `evaluate_task`.

    `shots` is for the tasks that have worked examples.
    """
    found = []
    for name in names:
        found.append(evaluate_task(model, name, **arguments))
        log(format_result(found[-1]))
    return found


def format_result(found: TaskResult) -> str:
    """Format a result: a line for each metric, and the categories of its first one."""
    shots = f", {found.shots} shots" if found.shots else ""
    lines = [f"{found.task}: {found.subset}{shots}, {found.seconds:.1f} s"]
    if found.cut:
        lines.append(f"  {found.cut} prompts are longer than the context: their beginning is cut")
    for name, estimate in found.metrics.items():
        chance = "" if estimate.chance is None else f"   chance {estimate.chance:.4g}"
        lines.append(f"  {name:18} {estimate.format()}{chance}")
    first = next(iter(found.metrics))
    parts = found.categories or found.groups
    if 1 < len(parts) <= 40:
        lines += [f"    {name:42} {parts[name][first].format()}" for name in sorted(parts)]
    return "\n".join(lines)


def list_scalars(found: TaskResult) -> dict[str, float]:
    """Return a result as numbers by name: "blimp/accuracy", ".../error", ".../chance".

    The first metric of each category is "blimp/accuracy/island_effects".
    """
    values: dict[str, float] = {}
    for name, (value, error, chance) in found.metrics.items():
        values |= {f"{found.task}/{name}": value, f"{found.task}/{name}/error": error}
        if chance is not None:
            values[f"{found.task}/{name}/chance"] = chance
    first = next(iter(found.metrics))
    for part, metrics in found.categories.items():
        values[f"{found.task}/{first}/{part}"] = metrics[first].value
    return values


def format_headline(found: TaskResult) -> str:
    """Format the first metric of a result, for one line: "blimp accuracy 0.6123 ± 0.0150"."""
    name, estimate = next(iter(found.metrics.items()))
    chance = "" if estimate.chance is None else f" (chance {estimate.chance:.3g})"
    return f"{found.task} {name} {estimate.format()}{chance}"


def make_report(
    run: str, step: int, results: Sequence[TaskResult], contamination: Mapping[str, Any]
) -> dict[str, Any]:
    """Return results as a JSON object.

    Args:
        run, step: of the model.
        results: of its tasks.
        contamination: a `Contamination` by task, as far as it was looked for.
    """
    tasks = {found.task: found.to_json() for found in results}
    for name, found in contamination.items():
        tasks[name]["contamination"] = dataclasses.asdict(found)
    return {"run": run, "step": step, "tasks": tasks}
