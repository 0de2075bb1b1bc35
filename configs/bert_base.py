"""BERT, base: 109,514,298 parameters; with the pooler of the published model instead of the head
for masked language modeling, 109,482,240.

The settings are those of the paper, whose first 90% of steps used sequences of 128 tokens.

Source: Devlin et al. 2019, arXiv:1810.04805, section 3 and appendix A.2.
"""

from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig

config = Config(
    name="bert_base",
    model=ModelConfig(
        family="encoder",
        vocab=30522,
        context=512,
        width=768,
        layers=12,
        heads=12,
        ffn=3072,
        position="learned",
        types=2,
        embed_norm=True,
        norm="layer",
        norm_eps=1e-12,
        wiring="post",
        feedforward="plain",
        activation="gelu",
        bias=True,
        head="mlm",
        dropout=0.1,
        dtype="bfloat16",
    ),
    optimizer=OptimizerConfig(
        lr=1e-4, b2=0.999, weight_decay=0.01, schedule="warmup_linear", warmup=10_000, floor=0.0
    ),
    train=TrainConfig(
        objective="masked",
        steps=1_000_000,
        batch=256,
        eval_every=1000,
        eval_batches=8,
        save_every=1000,
        sample_every=0,
    ),
)
