"""T5, 3B: 2,851,598,336 parameters. All settings but the shape are those of t5_base.py."""

from configs.t5_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=32 model.head_width=128 model.ffn=16384"
large = "model.remat=dots mesh.data=1 mesh.fsdp=-1"
scale = f"model.head_scale={1024**-0.5}"
config = override(base, ["name=t5_3b", scale, *shape.split(), *large.split()])
