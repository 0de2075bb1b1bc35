"""OLMo 2, 1B: 1,484,916,736 parameters. Norms after the sublayers, QK-norm over all heads.

Its data and recipe are published with its code; here they are those of llama3_1b.py, with the
paper's z-loss.

Source: OLMo team 2025, arXiv:2501.00656, section 3.2; the config.json of OLMo-2-0425-1B.
"""

from configs.llama3_1b import config as base
from jaxgpt.config import override

shape = "model.heads=16 model.kv_heads=16 model.vocab=100352 model.context=4096 model.tie=false"
norms = "model.wiring=reordered model.qk_norm=width model.norm_eps=1e-6 train.z_loss=1e-5"
config = override(base, ["name=olmo2_1b", *shape.split(), *norms.split()])
