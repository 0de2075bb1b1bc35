"""SmolLM2-135M prefers one format of answers to another, by DPO.

python examples/toy.py write toy
jaxgpt train --config examples/toy_preference.py
"""

import dataclasses

from examples.toy_chat import config as base
from jaxgpt.config import DataConfig, OptimizerConfig, PreferenceConfig

config = dataclasses.replace(
    base,
    name="toy_preference",
    data=DataConfig(source="toy/preferences.jsonl"),
    optimizer=OptimizerConfig(lr=2e-5, weight_decay=0.0, warmup=2),
    preference=PreferenceConfig(loss="dpo", beta=0.1),
    train=dataclasses.replace(
        base.train, objective="preference", steps=8, eval_every=8, log_every=1, save_every=8,
        eval_batches=5, sample_every=0,
    ),
)  # fmt: skip
