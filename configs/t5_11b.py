"""T5, 11B: 11,307,321,344 parameters. All settings but the shape are those of t5_base.py."""

from configs.t5_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=128 model.head_width=128 model.ffn=65536"
large = "model.remat=dots mesh.data=1 mesh.fsdp=-1"
scale = f"model.head_scale={1024**-0.5}"
config = override(base, ["name=t5_11b", scale, *shape.split(), *large.split()])
