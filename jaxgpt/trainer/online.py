"""Answers that the model writes to the prompts of a batch, and their rewards: GRPO's samples.

Every prompt has a group of answers; the advantage of one is how far its reward is above the mean of
its group, in standard deviations. A batch is a function of the parameters and the step, so that a
resumed run draws the same answers.

Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxgpt import hosts
from jaxgpt.config import MAX_SEED, Config, SampleConfig
from jaxgpt.data import Batch
from jaxgpt.data.chat import OnlineTask
from jaxgpt.data.conversations import find_end
from jaxgpt.generate import Generation
from jaxgpt.language_model import LanguageModel
from jaxgpt.rewards import compute_reward, find_reward
from jaxgpt.settings import ConfigError
from jaxgpt.tokenizer import Tokenizer

STEP_STRIDE = 1_000_003  # between the seeds of two steps


class Rollouts:
    """Makes the batches of `train.objective=online`.

    Args:
        cfg, task, tokenizer: of the run.

    Raises:
        ConfigError: there is no such reward, or there are several processes.
    """

    def __init__(self, cfg: Config, task: OnlineTask, tokenizer: Tokenizer):
        if hosts.process_count() > 1:
            raise ConfigError("train.objective=online runs in one process.")
        self.cfg, self.task = cfg, task
        self.reward = find_reward(cfg.online.reward)
        self.end = find_end(tokenizer)
        self.tokenizer = tokenizer.with_ends([self.end])  # the only one, so that it is known

    def __call__(self, params: Any, batch: Batch, step: int) -> Batch:
        """Return the answers to a batch of prompts, [B * group T]."""
        online = self.cfg.online
        seed = (self.cfg.seed + (step + 1) * STEP_STRIDE) % MAX_SEED
        sample = SampleConfig(
            tokens=online.answer_tokens, temperature=online.temperature, top_p=1.0, seed=seed
        )
        return self.answer(params, batch, sample, online.group)

    def evaluate(self, params: Any, batch: Batch) -> Batch:
        """Return the likeliest answer to each prompt, [B T]."""
        sample = SampleConfig(tokens=self.cfg.online.answer_tokens, temperature=0.0, top_p=1.0)
        return self.answer(params, batch, sample, 1)

    def answer(self, params: Any, batch: Batch, sample: SampleConfig, group: int) -> Batch:
        """Return a batch of answers; `reference` [B 2] has their advantages and rewards."""
        found = self.task.read_prompts(batch)
        prompts = [ids for ids, _ in found for _ in range(group)]
        config = dataclasses.replace(self.cfg, sample=sample)
        answers = LanguageModel(config, params, self.tokenizer).generate(prompts)
        records = [record for _, record in found for _ in range(group)]
        rewards = np.array([
            compute_reward(self.reward, record, answer.text)
            for record, answer in zip(records, answers, strict=True)
        ])  # fmt: skip
        advantages = normalize_groups(rewards, group)
        rows = len(batch.tokens) * group
        return self.make_batch(rows, prompts, answers, np.stack([advantages, rewards], axis=1))

    def make_batch(
        self, B: int, prompts: list[np.ndarray], answers: list[Generation], values: np.ndarray
    ) -> Batch:
        """Return prompts with their answers as rows [B T]; those that are missing are empty."""
        T = self.task.T
        tokens, targets = (np.full((B, T), self.tokenizer.pad, np.int32) for _ in range(2))
        segment_ids, weights = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
        reference = np.zeros((B, 2), np.float32)
        reference[: len(values)] = values
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ends = [self.end] if answer.ending == "eos" else []
            ids = np.array([*prompt, *answer.tokens, *ends], np.int32)[: T + 1]
            n = ids.size - 1
            tokens[row, :n], targets[row, :n] = ids[:-1], ids[1:]
            segment_ids[row, :n] = 1
            weights[row, len(prompt) - 1 : n] = 1
        positions = (np.arange(T) * (segment_ids > 0)).astype(np.int32)
        return Batch(tokens, targets, positions, segment_ids, weights, reference=reference)


def normalize_groups(rewards: np.ndarray, group: int) -> np.ndarray:
    """Return the advantages of answers, float64 [N], of which each `group` belong to one prompt.

    >>> normalize_groups(np.array([1.0, 0.0, 2.0, 2.0]), 2).round(3).tolist()
    [1.0, -1.0, 0.0, 0.0]
    """
    grouped = rewards.reshape(-1, group)
    centered = grouped - grouped.mean(axis=1, keepdims=True)
    return (centered / (grouped.std(axis=1, keepdims=True) + 1e-6)).reshape(-1)
