"""Gemma 3, 1B: 999,885,952 parameters. Five local layers to a global one, with a RoPE of their own.

26 layers are four cycles of six and a tail of two local ones. Its training settings are not
published in full: they are those of llama3_1b.py.

Source: Gemma Team 2025, arXiv:2503.19786, section 2; the released config.json.
"""

from dataclasses import replace

from configs.llama3_1b import config as base
from jaxgpt.architecture import ModelConfig, RopeConfig, SparseConfig

local = 5
config = replace(
    base,
    name="gemma3_1b",
    model=ModelConfig(
        vocab=262_144,
        context=32_768,
        width=1152,
        layers=26,
        heads=4,
        kv_heads=1,
        head_width=256,
        ffn=6912,
        pattern=("window",) * local + ("full",),
        sparse=SparseConfig(window=512),
        rope=RopeConfig(theta=(10_000.0,) * local + (1_000_000.0,)),
        qk_norm="head",
        norm_eps=1e-6,
        wiring="sandwich",
        activation="gelu_tanh",
        embed_scale=True,
        dtype="bfloat16",
        remat="dots",
    ),
)
