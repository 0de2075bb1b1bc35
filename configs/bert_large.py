"""BERT, large: 335,174,458 parameters; 335,141,888 when counted like the published model.

All settings but the shape, and the way of counting, are those of bert_base.py.
"""

from configs.bert_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=16 model.ffn=4096 model.remat=dots"
config = override(base, ["name=bert_large", *shape.split()])
