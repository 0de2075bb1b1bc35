"""Mixtral, 8x7B: 46,702,792,704 parameters, with two of eight experts active per token.

Source: Jiang et al. 2024, arXiv:2401.04088, table 1.
"""

from configs.mistral_7b import config as base
from jaxgpt.config import override

shape = "model.context=32768 model.rope.theta=1e6 model.remat=full"
full = "model.pattern=full model.sparse.window=128"  # the default: Mistral's window is not used
experts = "model.feedforward=moe_gated model.moe.experts=8 model.moe.active=2"
config = override(base, ["name=mixtral_8x7b", *f"{shape} {full} {experts}".split()])
