"""Llama 2, 7B: 6,738,415,616 parameters, for a pod: parameters sharded over all devices.

Source: Touvron et al. 2023, arXiv:2307.09288, table 1 and appendix A.2.
"""

from jaxgpt.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="llama2_7b",
    model=ModelConfig(
        vocab=32000,
        context=4096,
        width=4096,
        layers=32,
        heads=32,
        ffn=11008,
        tie=False,
        dtype="bfloat16",
        remat="dots",
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    optimizer=OptimizerConfig(lr=3e-4, warmup=2000),
    train=TrainConfig(steps=500_000, batch=1024, eval_every=1000, eval_batches=8, save_every=1000),
)
