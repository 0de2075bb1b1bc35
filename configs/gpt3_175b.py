"""GPT-3, 175B: 174,604,259,328 parameters.

Layers with full and with banded (sliding-window) attention alternate, as in the paper, which does
not state the bandwidth.

Source: Brown et al. 2020, arXiv:2005.14165, table 2.1 and appendix B.
"""

from configs.gpt2_124m import config as base
from jaxgpt.config import override

shape = "model.width=12288 model.layers=96 model.heads=96 model.ffn=49152 model.context=2048"
config = override(
    base,
    [
        "name=gpt3_175b",
        *shape.split(),
        "model.pattern=full,window",
        "model.sparse.window=256",
        "model.remat=full",
        "mesh.data=1",
        "mesh.fsdp=-1",
        "optimizer.lr=0.6e-4",
        "optimizer.warmup=200",
        "train.steps=94_000",
        "train.batch=1600",
        "train.accumulate=1",
    ],
)
