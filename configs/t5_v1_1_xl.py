"""T5 v1.1, XL: 2,849,757,184 parameters. Settings but the shape: t5_v1_1_base.py."""

from configs.t5_v1_1_base import config as base
from jaxgpt.config import override

shape = "model.width=2048 model.layers=24 model.heads=32 model.ffn=5120"
large = "model.remat=dots mesh.data=1 mesh.fsdp=-1"
config = override(base, ["name=t5_v1_1_xl", *shape.split(), *large.split()])
