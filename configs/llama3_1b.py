"""Llama 3.2, 1B: 1,235,814,400 parameters. Grouped-query attention, large vocabulary, tied head.

Source: the model card of Llama 3.2 1B; Dubey et al. 2024, arXiv:2407.21783, for the family.
"""

from jaxgpt.architecture import RopeConfig
from jaxgpt.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="llama3_1b",
    model=ModelConfig(
        vocab=128_256,
        context=8192,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        ffn=8192,
        rope=RopeConfig(theta=500_000.0),
        dtype="bfloat16",
        remat="dots",
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=OptimizerConfig(lr=3e-4, warmup=2000),
    train=TrainConfig(steps=500_000, batch=256, eval_every=1000, eval_batches=8, save_every=1000),
)
