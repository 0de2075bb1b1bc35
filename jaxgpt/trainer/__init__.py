"""Training: the state, the pure step, and the loop around it with all the side effects.

Read `loop` first: `train` opens a run (`run`, and `start` for parameters from another run) and runs
its steps (`step`, `state`). What comes out of a run is written and shown by `hooks` and `logging`,
in the words of `report`.
"""

from jaxgpt.loading import read_config
from jaxgpt.trainer.checkpoint import Progress, RunError
from jaxgpt.trainer.evaluate import evaluate
from jaxgpt.trainer.hooks import Hook, RunView
from jaxgpt.trainer.loop import DivergedError, train
from jaxgpt.trainer.start import load_config
from jaxgpt.trainer.state import TrainState

__all__ = [
    "DivergedError",
    "Hook",
    "Progress",
    "RunError",
    "RunView",
    "TrainState",
    "evaluate",
    "load_config",
    "read_config",
    "train",
]
