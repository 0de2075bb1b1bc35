"""Rewards: functions of a record and an answer, for `train.objective=online`.

    # rewards.py
    def score(record, answer):
        return float(answer.strip() == record["answer"])

    jaxgpt train train.objective=online online.reward=rewards.py:score ...

A record is the JSON object that has the prompt, with whatever other fields a reward needs.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxgpt.plugins import find_function
from jaxgpt.settings import ConfigError

Reward = Callable[[Mapping[str, Any], str], float]


def exact(record: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the answer is the record's `answer`, without the space around it."""
    return float(answer.strip() == str(record["answer"]).strip())


def number(record: Mapping[str, Any], answer: str) -> float:
    """Return 1 if the last number of the answer is the record's `answer`, and 0.1 for another one.

    >>> number({"answer": 12}, "7 and 5 are 12."), number({"answer": 12}, "13"),
    ... number({"answer": 12}, "none")
    (1.0, 0.1, 0.0)
    """
    found = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    if not found:
        return 0.0
    return 1.0 if float(found[-1]) == float(record["answer"]) else 0.1


REWARDS: dict[str, Reward] = {"exact": exact, "number": number}


def find_reward(name: str) -> Reward:
    """Return the function that `online.reward` names.

    Args:
        name: a row of REWARDS, module:function or file.py:function.

    Raises:
        ConfigError: there is no such function.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise ConfigError(
            f"online.reward={name!r} is not known: it is module:function, file.py:function, or one "
            f"of {', '.join(REWARDS)}."
        )
    return find_function(name, "online.reward")


def compute_reward(reward: Reward, record: Mapping[str, Any], answer: str) -> float:
    """Return the reward of an answer.

    Raises:
        ConfigError: the function fails, or returns what is not a finite number.
    """
    try:
        value = float(reward(record, answer))
    except Exception as error:
        raise ConfigError(
            f"online.reward fails for the answer {answer!r:.60}: {type(error).__name__}: {error}."
        ) from error
    if not math.isfinite(value):
        raise ConfigError(f"online.reward is {value} for the answer {answer!r:.60}.")
    return value
