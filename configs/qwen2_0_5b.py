"""Qwen 2 (and 2.5), 0.5B: 494,032,768 parameters. Biases of queries, keys and values alone.

Its training settings are not published: they are those of llama3_1b.py.

Source: Yang et al. 2024, arXiv:2407.10671, table 1; the released config.json.
"""

from configs.llama3_1b import config as base
from jaxgpt.config import override

shape = "model.width=896 model.layers=24 model.heads=14 model.kv_heads=2 model.ffn=4864"
rest = "model.vocab=151936 model.context=32768 model.rope.theta=1e6 model.norm_eps=1e-6"
config = override(base, ["name=qwen2_0_5b", "model.bias=qkv", *shape.split(), *rest.split()])
