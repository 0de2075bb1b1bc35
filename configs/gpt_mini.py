"""The mini-GPT: 13,767,552 parameters. RMSNorm, RoPE, SwiGLU, no biases, tied head.

python train.py --config configs/gpt_mini.py data.source=my_texts/
"""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="gpt_mini",
    model=ModelConfig(vocab=8192, context=256, width=384, layers=6, heads=6, ffn=1024),
    optimizer=OptimizerConfig(lr=1e-3, warmup=100),
    train=TrainConfig(steps=2000, batch=16, save_every=50, eval_tasks=("auto",)),
)
