"""A tiny model of bytes with random parameters."""

import functools

from helpers import random_params, tiny

from jaxgpt.config import Config, DataConfig, TrainConfig
from jaxgpt.language_model import LanguageModel
from jaxgpt.tokenizer import Tokenizer, make_byte_tokenizer


@functools.cache
def make_model(
    seed: int = 0, std: float = 0.1, objective: str = "causal", adds_bos: bool = True, **changes
) -> LanguageModel:
    """Return a model of bytes; `changes` are those of its model config.

    An exported tokenizer adds no bos in transformers, where `adds_bos=False` is compared with it.
    """
    cfg = tiny(**{"vocab": 260, "context": 128, **changes})
    data = DataConfig(tokenizer="bytes", target_key="b" if objective == "pairs" else "")
    config = Config(model=cfg, data=data, train=TrainConfig(objective=objective))
    tokenizer = make_byte_tokenizer()
    if not adds_bos:
        tokenizer = Tokenizer(tokenizer.content, settings={"add_bos_token": False})
    return LanguageModel(config, random_params(cfg, seed, std), tokenizer)
