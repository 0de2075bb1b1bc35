"""GPT-2, 355M: 354,823,168 parameters. All settings but the shape are those of gpt2_124m.py."""

from configs.gpt2_124m import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=16 model.ffn=4096"
config = override(
    base, ["name=gpt2_355m", "optimizer.lr=3e-4", "train.accumulate=60", *shape.split()]
)
