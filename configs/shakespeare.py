"""Tiny Shakespeare through TensorFlow Datasets, byte by byte: a model for a laptop's CPU.

The first run downloads 1 MB. A file of your own needs no download: data.source=input.txt
"""

from jaxgpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)

config = Config(
    name="shakespeare",
    model=ModelConfig(vocab=260, context=64, width=128, layers=4, heads=4, ffn=336),
    data=DataConfig(source="tfds:tiny_shakespeare", tokenizer="bytes"),
    optimizer=OptimizerConfig(lr=1e-3, b2=0.99, warmup=100),
    train=TrainConfig(steps=2000, batch=12, eval_every=500, log_every=50, sample_every=500),
    sample=SampleConfig(prompt="\n", tokens=300, slide=True),
)
