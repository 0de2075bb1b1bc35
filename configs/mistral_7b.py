"""Mistral, 7B: 7,241,732,096 parameters. Grouped-query attention and a sliding window.

Its training settings are not published: they are those of llama2_7b.py.

Source: Jiang et al. 2023, arXiv:2310.06825, table 1.
"""

from configs.llama2_7b import config as base
from jaxgpt.config import override

shape = "model.context=8192 model.kv_heads=8 model.ffn=14336"
window = "model.pattern=window model.sparse.window=4096"
config = override(base, ["name=mistral_7b", *shape.split(), *window.split()])
