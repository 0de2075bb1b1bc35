"""Llama, 13B: 13,015,864,320 parameters. All settings but the shape are those of llama_7b.py."""

from configs.llama_7b import config as base
from jaxgpt.config import override

shape = "model.width=5120 model.layers=40 model.heads=40 model.ffn=13824"
config = override(base, ["name=llama_13b", *shape.split()])
