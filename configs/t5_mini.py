"""A small T5, trained by span corruption on Python's own text, on a laptop's CPU.

    python train.py --config t5_mini
    python sample.py runs/t5_mini --prompt "import <mask>"

1,185,408 parameters. The architecture is that of T5 v1.1, with tied embeddings.
"""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig

config = Config(
    name="t5_mini",
    model=ModelConfig(
        family="encoder_decoder",
        vocab=2048,
        context=128,
        width=128,
        layers=2,
        heads=2,
        ffn=344,
        position="t5",
        norm="rms",
        norm_eps=1e-6,
        activation="gelu_tanh",
        query_scale=1.0,
    ),
    optimizer=OptimizerConfig(name="muon", lr=5e-3, matrix_lr=1e-2, warmup=100, logit_lr=1.0),
    train=TrainConfig(
        objective="span",
        steps=1000,
        batch=16,
        eval_every=250,
        eval_batches=20,
        sample_every=500,
    ),
    sample=SampleConfig(prompt="    def __init__(<mask>, name):", tokens=20, temperature=0.5),
)
