"""T5 v1.1, small: 76,961,152 parameters. Settings but the shape: t5_v1_1_base.py."""

from configs.t5_v1_1_base import config as base
from jaxgpt.config import override

shape = "model.width=512 model.layers=8 model.heads=6 model.ffn=1024"
config = override(base, ["name=t5_v1_1_small", *shape.split()])
