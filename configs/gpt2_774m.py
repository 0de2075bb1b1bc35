"""GPT-2, 774M: 774,030,080 parameters. All settings but the shape are those of gpt2_124m.py."""

from configs.gpt2_124m import config as base
from jaxgpt.config import override

shape = "model.width=1280 model.layers=36 model.heads=20 model.ffn=5120"
config = override(
    base, ["name=gpt2_774m", "optimizer.lr=2.5e-4", "train.accumulate=120", *shape.split()]
)
