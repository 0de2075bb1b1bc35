"""T5 v1.1, XXL: 11,135,332,352 parameters. Settings but the shape: t5_v1_1_base.py."""

from configs.t5_v1_1_base import config as base
from jaxgpt.config import override

shape = "model.width=4096 model.layers=24 model.heads=64 model.ffn=10240"
large = "model.remat=dots mesh.data=1 mesh.fsdp=-1"
config = override(base, ["name=t5_v1_1_xxl", *shape.split(), *large.split()])
