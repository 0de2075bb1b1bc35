"""T5 v1.1, large: 783,150,080 parameters. Settings but the shape: t5_v1_1_base.py."""

from configs.t5_v1_1_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=16 model.ffn=2816"
config = override(base, ["name=t5_v1_1_large", *shape.split()])
