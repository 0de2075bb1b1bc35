"""Training: the state, the pure step, and the loop around it with all the side effects."""

from jaxgpt.trainer.checkpoint import Progress, load_run, read_config
from jaxgpt.trainer.loop import DivergedError, evaluate, train
from jaxgpt.trainer.state import TrainState

__all__ = [
    "DivergedError",
    "Progress",
    "TrainState",
    "evaluate",
    "load_run",
    "read_config",
    "train",
]
