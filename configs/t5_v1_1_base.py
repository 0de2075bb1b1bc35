"""T5 v1.1, base: 247,577,856 parameters. GeGLU, an untied head, no dropout.

Source: Shazeer 2020, arXiv:2002.05202, and "T5.1.1" in the code of T5 for the shapes.
"""

from configs.t5_base import config as base
from jaxgpt.config import override

gated = "model.feedforward=gated model.activation=gelu_tanh model.ffn=2048 model.dropout=0"
head = "model.tie=false model.head_scale=none"
config = override(base, ["name=t5_v1_1_base", *gated.split(), *head.split()])
