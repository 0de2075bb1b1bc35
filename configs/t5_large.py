"""T5, large: 737,668,096 parameters. All settings but the shape are those of t5_base.py."""

from configs.t5_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=16 model.head_width=64 model.ffn=4096"
config = override(base, ["name=t5_large", f"model.head_scale={1024**-0.5}", *shape.split()])
