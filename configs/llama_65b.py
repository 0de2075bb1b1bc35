"""Llama, 65B: 65,285,660,672 parameters. All settings but the shape are those of llama_7b.py."""

from configs.llama_7b import config as base
from jaxgpt.config import override

shape = "model.width=8192 model.layers=80 model.heads=64 model.ffn=22016"
config = override(
    base, ["name=llama_65b", "optimizer.lr=1.5e-4", "train.steps=350_000", *shape.split()]
)
