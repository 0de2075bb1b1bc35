"""GPT-2, 124M: 124,439,808 parameters.

The training settings are those of nanoGPT's reproduction: 0.5M tokens per step, accumulated in
parts that fit one 80 GB GPU. For GPT-2's own vocabulary, set data.tokenizer to a folder with its
encoder.json and vocab.bpe.

Source: Radford et al. 2019.
"""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="gpt2_124m",
    model=ModelConfig(
        vocab=50257,
        context=1024,
        width=768,
        layers=12,
        heads=12,
        ffn=3072,
        position="learned",
        norm="layer",
        feedforward="plain",
        activation="gelu_tanh",
        bias=True,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(lr=6e-4, warmup=2000),
    train=TrainConfig(
        steps=600_000, batch=480, accumulate=40, eval_every=1000, eval_batches=8, save_every=1000
    ),
)
