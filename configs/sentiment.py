"""A sentiment classifier: a small encoder that predicts the class of a sentence.

    python train.py --config sentiment data.source=classes:rt_polarity

The folder has one sentence per line, in files whose extensions are the classes: x.pos and x.neg,
such as the 10,662 review sentences of Pang and Lee 2005. Held-out accuracy on a tenth of these is
74.9% after 300 steps, 20 to 40 seconds on two CPU cores; the convolutional network of Kim 2014 with
random word vectors reaches 76.1% (arXiv:1408.5882, table 2, CNN-rand).
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
        layers=1,
        heads=4,
        ffn=256,
        dropout=0.5,
    ),
    data=DataConfig(source="classes:rt_polarity"),
    optimizer=OptimizerConfig(lr=1e-3, warmup=50, weight_decay=2.0),
    train=TrainConfig(
        objective="classify",
        steps=300,
        batch=64,
        eval_every=50,
        save_every=100,
        sample_every=100,
        label_smoothing=0.1,
    ),
    sample=SampleConfig(prompt="a film of rare warmth and wit ."),
)
