"""T5, base: 222,903,552 parameters. The base of the other sizes and of v1.1.

Source: Raffel et al. 2020, arXiv:1910.10683, sections 2.1 and 3.1.
"""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="t5_base",
    model=ModelConfig(
        family="encoder_decoder",
        vocab=32128,
        context=512,
        width=768,
        layers=12,
        heads=12,
        head_width=64,
        ffn=3072,
        position="t5",
        norm_eps=1e-6,
        query_scale=1.0,
        embed_std=1.0,
        feedforward="plain",
        activation="relu",
        head_scale=768**-0.5,
        dropout=0.1,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(
        name="adafactor",
        lr=1e-2,  # relative: 1% of a parameter's RMS per step
        relative_lr=True,
        schedule="inverse_sqrt",
        warmup=10_000,
        weight_decay=0.0,
        logit_lr=1.0,
    ),
    train=TrainConfig(
        objective="span",
        steps=524_288,
        batch=128,
        eval_every=1000,
        eval_batches=8,
        save_every=1000,
        sample_every=0,
    ),
)
