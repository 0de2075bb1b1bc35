"""What jaxgpt runs in benchmarks/speed.py: each contestant is the library's own code, compiled."""

import itertools
import json
import pathlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.worker import DATA_TOKENS, Case, Contestant, Side, serve_pipe
from jaxgpt import config as configs
from jaxgpt import objectives
from jaxgpt import tokenizer as tokenizers
from jaxgpt.config import Config, SampleConfig
from jaxgpt.data import Batch, prefetch_batches
from jaxgpt.engine import Engine, Request, Size
from jaxgpt.engine import Row as TextRow
from jaxgpt.engine.processors import make_rules
from jaxgpt.model import Coords, Head, build, init_params, unstack_layers
from jaxgpt.model.kernels import ACCELERATED, ScoreMod, attend
from jaxgpt.model.layers import DTYPES
from jaxgpt.model.masks import make_layer_mask
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.planning.step import lower_step
from jaxgpt.sharding import make_batch_sharding
from jaxgpt.trainer.memory import retain_freed_memory
from jaxgpt.trainer.state import make_adapter_state, make_first_base, make_state
from jaxgpt.trainer.step import make_eval_step


def make_config(case: Case) -> Config:
    """On one device."""
    one = [f"mesh.{axis}=1" for axis in ("data", "fsdp")]
    return configs.override(configs.from_json(json.dumps(case.config)), one)


def draw_normal(case: Case, *shape: int, number: int = 0):
    """Random numbers: products of equal ones take less power, and so less time, than real ones."""
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.random.normal(key, shape, DTYPES[case.dtype])


def make_batch(case: Case) -> Batch:
    """Rows of one document each."""
    tokens, targets = np.random.default_rng(0).integers(0, case.V, (2, case.B, case.T), np.int32)
    ones = np.ones((case.B, case.T), np.int32)
    return Batch(tokens, targets, ones.cumsum(1, np.int32) - 1, ones, ones.astype(np.float32))


# --- training ---


def count_peak_bytes(compiled) -> int:
    """Bytes that a compiled function needs, its arguments and results included."""
    m = compiled.memory_analysis()
    if m is None:
        return 0
    given = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return given + m.temp_size_in_bytes


def make_step(case: Case, settings: tuple[str, ...] = ()) -> Contestant:
    cfg = configs.override(make_config(case), settings)
    mesh, optimizer, abstract, lowered = lower_step(cfg, jax.devices()[:1])
    batch = jax.tree.map(lambda x: jax.device_put(x, make_batch_sharding(mesh, x.shape)),
                         make_batch(case))  # fmt: skip
    compiled = lowered.compile()
    state = make_state(cfg.model, optimizer, cfg.seed, abstract)

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return Contestant(run, optax.tree.size(state.params), count_peak_bytes(compiled))


def make_lora_step(case: Case, settings: tuple[str, ...] = ()) -> Contestant:
    """A step of adapters on a frozen base."""
    cfg = configs.override(make_config(case), settings)
    mesh, optimizer, abstract, lowered = lower_step(cfg, jax.devices()[:1])
    batch = jax.tree.map(lambda x: jax.device_put(x, make_batch_sharding(mesh, x.shape)),
                         make_batch(case))  # fmt: skip
    compiled = lowered.compile()
    params = make_first_base(cfg, abstract.base.params)
    state = make_adapter_state(cfg, optimizer, abstract)
    state = state.replace(base=abstract.base.replace(params=params))

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return Contestant(run, optax.tree.size(state.params), count_peak_bytes(compiled))


def make_step_compilation(case: Case, layers: int) -> Contestant:
    """Traces and compiles a step of a few tokens, all anew."""
    more = [f"model.layers={layers}", "train.batch=1", "train.accumulate=1", "model.unroll=1"]
    cfg = configs.override(make_config(case), more)

    def run():
        jax.clear_caches()
        lower_step(cfg, jax.devices()[:1]).lowered.compile()

    return Contestant(run)


def make_forward(case: Case) -> Contestant:
    cfg = make_config(case)
    params, _ = init_params(cfg.model, jax.random.key(0))
    batch = jax.device_put(make_batch(case))
    run = jax.jit(make_eval_step(cfg, build(cfg.model)))
    return Contestant(lambda: run(params, batch), optax.tree.size(params))


def make_optimizer_step(case: Case) -> Contestant:
    """Clips and moves the parameters."""
    cfg = make_config(case)
    params, letters = init_params(cfg.model, jax.random.key(0))
    optimizer, _ = build_optimizer(cfg.optimizer, cfg.train.steps, letters)
    grads, state = jax.tree.map(lambda p: p + 1e-3, params), optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def move(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run():
        nonlocal params, state
        params, state = move(params, state, grads)
        return params

    return Contestant(run, optax.tree.size(params))


# --- parts of a step ---


def make_matmul(case: Case, *sizes: int) -> Contestant:
    rows, inner, columns = sizes or (case.N, case.D, case.F)
    x, w = draw_normal(case, rows, inner), draw_normal(case, inner, columns, number=1)
    run = jax.jit(jnp.matmul)
    return Contestant(lambda: run(x, w))


def make_copy(case: Case, numbers: int) -> Contestant:
    x, add = jnp.ones(numbers), jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        nonlocal x
        x = add(x)
        return x

    return Contestant(run)


def make_dense_products(case: Case) -> Contestant:
    """The products of one block with its matrices, forward and backward, and nothing else."""
    shapes = list(enumerate(case.products))
    xs = [draw_normal(case, case.N, n, number=i) for i, (n, _) in shapes]
    ws = [draw_normal(case, n, m, number=i) for i, (n, m) in shapes]
    ds = [draw_normal(case, case.N, m, number=i) for i, (_, m) in shapes]

    @jax.jit
    def run(xs, ws, ds):
        return [(x @ w, d @ w.T, x.T @ d) for x, w, d in zip(xs, ws, ds, strict=True)]

    return Contestant(lambda: run(xs, ws, ds))


def make_attention(case: Case, is_gradient: bool, kernel: str | None = None) -> Contestant:
    shapes = [(case.B, case.T, heads, case.K) for heads in (case.H, case.G, case.G, case.H)]
    *given, d = (draw_normal(case, *shape, number=i) for i, shape in enumerate(shapes))
    at = Coords(*(jnp.asarray(x) for x in make_batch(case)[2:4]))
    cfg = make_config(case).model
    score = ScoreMod(make_layer_mask(cfg, "full", "causal"), scale=case.K**-0.5, is_self=True)
    kernel = kernel or cfg.kernel
    if kernel in ACCELERATED and (why := ACCELERATED[kernel][1](given[0], given[1], score)):
        raise ValueError(why)  # rather than measure what is run in its place

    def forward(q, k, v, at):
        return attend(kernel, q, k, v, at, at, score)

    def gradient(q, k, v, at, d):
        return jax.vjp(lambda *given: forward(*given, at), q, k, v)[1](d)

    more = (at, d) if is_gradient else (at,)
    run = jax.jit(gradient if is_gradient else forward).lower(*given, *more).compile()
    return Contestant(lambda: run(*given, *more), peak=count_peak_bytes(run))


def make_loss(case: Case, is_chunked: bool) -> Contestant:
    """The vocabulary's loss and its gradient in hidden states and table."""
    batch = jax.device_put(make_batch(case))
    hidden = draw_normal(case, case.B, case.T, case.D)
    table = jax.random.normal(jax.random.key(1), (case.V, case.D)) * 0.02

    def chunked(hidden, table):
        return objectives.vocabulary_loss(hidden, Head(table), batch.targets, batch.weights)[0]

    def plain(hidden, table):
        flat = hidden.reshape(case.N, case.D), Head(table)
        rest = batch.targets.ravel(), batch.weights.ravel()
        return objectives.chunk_loss(*flat, *rest, 0.0, 0.0)[0]

    gradient = jax.value_and_grad(chunked if is_chunked else plain, argnums=(0, 1))
    run = jax.jit(gradient).lower(hidden, table).compile()
    return Contestant(lambda: run(hidden, table), peak=count_peak_bytes(run))


# --- everything else ---


def make_decode(case: Case, rows: int) -> Contestant:
    """Reads prompts and continues them, without text."""
    from benchmarks.decode import NoText

    cfg = make_config(case).model
    params, _ = init_params(cfg, jax.random.key(0))
    sample = SampleConfig(temperature=0, tokens=case.new)
    rules = make_rules(sample, case.V, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, case.V, (rows, case.prompt), np.int32)
    size = Size(rows, case.prompt + case.new)
    engine = Engine(cfg, unstack_layers(params), size, (), np.ones(case.V, bool))

    def run():
        for ids in tokens.tolist():
            engine.submit(Request(TextRow(sample, [], ids, NoText()), rules))
        while not engine.is_idle:
            engine.step()
        return engine.state.scores

    return Contestant(run, optax.tree.size(params))


def make_tokenizer(case: Case) -> Contestant:
    """Encodes text with a vocabulary that is left in a file for others."""
    from benchmarks.tokenizer import make_corpus

    documents, _ = make_corpus(4)
    trained = tokenizers.train(iter(documents), 8192)
    trained.save(str(pathlib.Path(case.scratch) / "tokenizer.json"))
    return Contestant(lambda: trained.encode_batch(documents))


def make_batches(case: Case, is_peer: bool) -> Contestant:
    """Makes batches of packed tokens ahead of time, as benchmarks/data.py does.

    So many at a time that those which were made in a pause do not count.
    """
    from benchmarks import data

    tokens = data.write_token_files(case.scratch, 4_000_000)
    if is_peer:
        batches = data.iterate_grain_batches(tokens, case.T)
    else:
        batches = prefetch_batches(
            data.make_task("documents", tokens, case.T), size=data.PREFETCH_BATCHES
        )
    count = DATA_TOKENS // data.BATCH_TOKENS
    return Contestant(lambda: next(itertools.islice(batches, count - 1, None)))


def make_side() -> Side:
    retain_freed_memory()  # as a run does
    where = jax.devices()[0]
    is_cpu = where.platform == "cpu"
    square, numbers = (2048, 2**26) if is_cpu else (8192, 2**29)
    own = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(jax.default_backend(), [])
    kernels = ["dense", "blockwise", *own]

    def by_kernel(is_gradient: bool) -> dict[str, Callable[[Case], Contestant]]:
        every = {f"jaxgpt {kernel}": kernel for kernel in kernels}
        return {name: partial(make_attention, is_gradient=is_gradient, kernel=kernel)
                for name, kernel in ({"jaxgpt": None} | every).items()}  # fmt: skip

    # What a policy costs is decided by measuring; what does not fit, or is not known, says so.
    tries = [("model.remat=none",), ("model.remat=dots",), ("model.remat=full",),
             ("train.loss_chunk=2048",), ("train.loss_chunk=16384",),
             ("model.products=fp8",), ("optimizer.moments=int8",),
             ("model.documents=separate",)]  # fmt: skip

    return Side(
        makers={
            "matmul, square": {"jax": lambda case: make_matmul(case, square, square, square)},
            "matmul, [N D] x [D F]": {"jax": make_matmul},
            "copy": {"jax": partial(make_copy, numbers=numbers)},
            "step": {"jaxgpt": make_step},
            "lora step": {"jaxgpt": make_lora_step},
            "step, other settings": {
                "jaxgpt, layers unrolled": lambda case: make_step(
                    case, (f"model.unroll={case.L}",)
                ),
                **{f"jaxgpt {' '.join(some)}": partial(make_step, settings=some) for some in tries},
            },
            "forward": {"jaxgpt": make_forward},
            "dense of a block": {"jax": make_dense_products},
            "attention forward": by_kernel(False),
            "attention gradient": by_kernel(True),
            "loss gradient": {
                "jaxgpt": partial(make_loss, is_chunked=True),
                "jaxgpt plain": partial(make_loss, is_chunked=False),
            },
            "optimizer": {"jaxgpt": make_optimizer_step},
            "decode 1 row": {"jaxgpt": partial(make_decode, rows=1)},
            "decode 8 rows": {"jaxgpt": partial(make_decode, rows=8)},
            "tokenizer": {"jaxgpt": make_tokenizer},
            "data": {
                "jaxgpt": partial(make_batches, is_peer=False),
                "grain": partial(make_batches, is_peer=True),
            },
            "compile": {
                "jaxgpt 12 layers": partial(make_step_compilation, layers=12),
                "jaxgpt 48 layers": partial(make_step_compilation, layers=48),
            },
        },
        wait=jax.block_until_ready,
        about={
            "platform": where.platform,
            "device": where.device_kind,
            "square": str(square),
            "copied": str(8 * numbers),
            **{name: version(name) for name in ("jax", "flax", "optax")},
        },
        is_queue=not is_cpu,
    )


if __name__ == "__main__":
    serve_pipe(make_side)
