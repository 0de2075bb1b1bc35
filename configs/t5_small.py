"""T5, small: 60,506,624 parameters. All settings but the shape are those of t5_base.py."""

from configs.t5_base import config as base
from jaxgpt.config import override

shape = "model.width=512 model.layers=6 model.heads=8 model.head_width=64 model.ffn=2048"
config = override(base, ["name=t5_small", f"model.head_scale={512**-0.5}", *shape.split()])
