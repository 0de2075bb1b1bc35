"""GPT-2, 1.5B: 1,557,611,200 parameters. All settings but the shape are those of gpt2_124m.py."""

from configs.gpt2_124m import config as base
from jaxgpt.config import override

shape = "model.width=1600 model.layers=48 model.heads=25 model.ffn=6400"
config = override(
    base, ["name=gpt2_1558m", "optimizer.lr=2e-4", "train.accumulate=240", *shape.split()]
)
