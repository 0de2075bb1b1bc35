"""Llama, 33B: 32,528,943,616 parameters. All settings but the shape are those of llama_7b.py."""

from configs.llama_7b import config as base
from jaxgpt.config import override

shape = "model.width=6656 model.layers=60 model.heads=52 model.ffn=17920"
config = override(
    base, ["name=llama_33b", "optimizer.lr=1.5e-4", "train.steps=350_000", *shape.split()]
)
