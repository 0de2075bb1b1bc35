"""Llama, 7B: 6,738,415,616 parameters. Like Llama 2 of this size, with half the context.

Source: Touvron et al. 2023, arXiv:2302.13971, table 2 and section 2.3.
"""

from configs.llama2_7b import config as base
from jaxgpt.config import override

shape = "model.context=2048 model.norm_eps=1e-6"
config = override(
    base, ["name=llama_7b", "train.steps=250_000", "train.batch=2048", *shape.split()]
)
