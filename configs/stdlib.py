"""The default: a small GPT on Python's own documentation and library source, which every
CPython carries, so that it needs no download."""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

config = Config(
    name="stdlib",
    model=ModelConfig(vocab=4096, context=128, width=256, layers=4, heads=4, ffn=704),
    optimizer=OptimizerConfig(lr=2e-3, warmup=50),
    train=TrainConfig(
        steps=600, batch=16, eval_every=100, eval_batches=20, sample_every=100, save_every=100
    ),
    sample=SampleConfig(prompt="def ", tokens=100),
)
