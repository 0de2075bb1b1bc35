"""Training: the state, the pure step, and the loop around it with all the side effects."""

from jaxgpt.trainer.checkpoint import Progress, read_config
from jaxgpt.trainer.loop import DivergedError, evaluate, train
from jaxgpt.trainer.state import TrainState

__all__ = [
    "DivergedError",
    "Progress",
    "TrainState",
    "evaluate",
    "read_config",
    "train",
]
