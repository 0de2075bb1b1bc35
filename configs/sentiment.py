"""A sentiment classifier: a small encoder that reads a sentence and tells which class it is of.

    python train.py --config sentiment data.source=classes:rt_polarity

The folder has one sentence a line, in files whose endings are the classes: x.pos and x.neg, such
as the 10,662 review sentences of Pang and Lee 2005.
"""

from jaxgpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)

config = Config(
    name="sentiment",
    model=ModelConfig(
        family="encoder",
        classes=2,
        vocab=4096,
        context=64,
        width=128,
        layers=2,
        heads=4,
        ffn=256,
        dropout=0.3,
    ),
    data=DataConfig(source="classes:rt_polarity"),
    optimizer=OptimizerConfig(lr=1e-3, warmup=50, weight_decay=0.1),
    train=TrainConfig(
        objective="classify",
        steps=600,
        batch=64,
        eval_every=100,
        save_every=200,
        log_every=20,
        patience=3,
        label_smoothing=0.1,
    ),
    sample=SampleConfig(prompt="a film of rare warmth and wit ."),
)
