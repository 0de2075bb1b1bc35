"""Benchmarks: what a model makes of questions and texts, with standard errors.

    from jaxgpt import evaluate

    model = jaxgpt.load("runs/stdlib")
    found = evaluate.evaluate_task(model, "blimp", limit=10)
    print(found.metrics["accuracy"].format(), found.categories["island_effects"]["accuracy"].value)

tasks.py has the registry of tasks, benchmarks.py and bbh.py the tasks; likelihood.py computes, with
prefixes.py; run.py asks and metrics.py counts; texts.py measures perplexity, contamination.py looks
for questions in the training text, emergence.py compares sizes, and harness.py is the adapter to
lm-evaluation-harness.
"""

from typing import Any

from jaxgpt.settings import resolve_table

# Imported when they are used: a command that checks its arguments does not wait for jax.
_NAMES = {
    "Estimate": "metrics",
    "TASKS": "tasks",
    "Question": "tasks",
    "Task": "tasks",
    "TaskResult": "run",
    "compute_likelihoods": "likelihood",
    "evaluate_task": "run",
    "evaluate_tasks": "run",
    "find_contamination": "contamination",
    "measure_emergence": "emergence",
    "measure_perplexity": "texts",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return resolve_table(f"jaxgpt.evaluate.{_NAMES[name]}:{name}")
