"""Mamba, 130M: 129,135,360 parameters. No attention, no position encoding, no feed-forward.

Source: Gu and Dao 2023, arXiv:2312.00752; the shape is that of the released mamba-130m.
"""

from jaxgpt.architecture import MixerConfig
from jaxgpt.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="mamba_130m",
    model=ModelConfig(
        vocab=50280,
        context=2048,
        width=768,
        layers=24,
        mixers=("mamba",),
        mixer=MixerConfig(state=16, expand=2, conv=4, chunk=64),
        position="none",
        feedforward="none",
        dtype="bfloat16",
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=OptimizerConfig(lr=3e-3, warmup=480),
    train=TrainConfig(steps=4800, batch=256, accumulate=8, eval_batches=8),
)
