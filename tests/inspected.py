"""A tiny language model to look into."""

import dataclasses

from helpers import random_params, tiny

from jaxgpt.config import Config, TrainConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.tokenizer import make_byte_tokenizer

TEXT = "a cat sat"


def make_model(objective="causal", seed=0, **settings):
    cfg = tiny(**{"vocab": 270, "context": 64, **settings})
    config = dataclasses.replace(
        Config(), model=cfg, train=dataclasses.replace(TrainConfig(), objective=objective)
    )
    return LanguageModel(config, random_params(cfg, seed), make_byte_tokenizer())
