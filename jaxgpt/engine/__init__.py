"""The decoding engine: requests join and leave the rows of one compiled program.

    engine = Engine(cfg, params, Size(rows=8, slots=1024), ends, allowed)
    engine.submit(request)
    while not engine.is_idle:
        for request, piece in engine.step(): ...

`generate` makes requests of prompts; `worker.EngineWorker` serves them from many threads.
"""

from jaxgpt.engine.engine import Engine
from jaxgpt.engine.processors import check_scores
from jaxgpt.engine.programs import CHUNK_TOKENS, prepare_decode_params
from jaxgpt.engine.request import Request
from jaxgpt.engine.size import Size
from jaxgpt.engine.speculation import DraftModel
from jaxgpt.engine.text import Generation, Row, join_pieces

__all__ = [
    "CHUNK_TOKENS",
    "DraftModel",
    "Engine",
    "Generation",
    "Request",
    "Row",
    "Size",
    "check_scores",
    "join_pieces",
    "prepare_decode_params",
]
