"""BERT, large: 335,174,458 parameters; 335,141,888 as the published one is counted.

All but the shape, and how it is counted, is as in bert_base.py.
"""

from configs.bert_base import config as base
from jaxgpt.config import override

shape = "model.width=1024 model.layers=24 model.heads=16 model.ffn=4096 model.remat=dots"
config = override(base, ["name=bert_large", *shape.split()])
