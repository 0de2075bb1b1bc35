"""How decoding is timed, and the peers: transformers and llama.cpp with the weights of a model."""

import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np

from benchmarks.worker import count_cores
from jaxgpt.language_model import LanguageModel

NEW_TOKENS, PROMPT_TOKENS, REPEATS = 64, 37, 3


def draw_prompts(model: LanguageModel, rows: int, tokens: int) -> np.ndarray:
    vocab = min(model.config.model.vocab, model.tokenizer.vocab_size)
    return np.random.default_rng(0).integers(5, vocab, (rows, tokens))


def measure(run_once: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median seconds of a call, after one that compiles."""
    run_once()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run_once()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_outputs(run_with: Callable[[int], object]) -> tuple[float, float]:
    """Return seconds of one token, prefill included, and of each token after it."""
    first = measure(lambda: run_with(1))
    return first, (measure(lambda: run_with(1 + NEW_TOKENS)) - first) / NEW_TOKENS


class Peers:
    """The same weights in transformers and llama.cpp."""

    def __init__(self, model: LanguageModel, folder: str, has_compiled: bool = True):
        from jaxgpt.interop.exporting import export

        self.model, self.folder, self.has_compiled = model, pathlib.Path(folder), has_compiled
        self.errors: list[str] = []
        quiet = dict(log=lambda line: None)
        for name, format in (("hf", "hf"), ("model.gguf", "gguf")):
            try:
                export(model, str(self.folder / name), format, dtype="float32", **quiet)
            except Exception as error:
                self.errors.append(f"{format}: {error}")

    def time_transformers(self, rows: int, is_static: bool = False) -> tuple[float, float]:
        import torch
        import transformers

        torch.set_num_threads(count_cores())
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(self.folder / "hf", dtype=torch.float32).eval()
        tokens = torch.tensor(draw_prompts(self.model, rows, PROMPT_TOKENS))
        more: dict[str, object] = {}
        if is_static:
            compiling = transformers.CompileConfig(mode="default")
            compiling._compile_all_devices = True  # else it leaves out CPUs
            more = dict(cache_implementation="static", compile_config=compiling)

        def run_with(count: int):
            with torch.inference_mode():
                model.generate(
                    tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                    max_new_tokens=count, min_new_tokens=count, pad_token_id=0, **more,
                )  # fmt: skip

        return time_outputs(run_with)

    def time_llama_cpp(self) -> tuple[float, float]:
        from tests.interop.llama_cpp import LlamaCpp

        ids = draw_prompts(self.model, 1, PROMPT_TOKENS)[0].tolist()
        with LlamaCpp(self.folder / "model.gguf", threads=count_cores()) as peer:

            def run_with(count: int):
                peer.clear()
                logits = peer.step(ids)
                for _ in range(count - 1):
                    logits = peer.step([int(logits.argmax())])

            return time_outputs(run_with)
