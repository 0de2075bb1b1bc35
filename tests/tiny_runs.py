"""Complete training runs that take seconds: a small text and a small model."""

import functools
import os
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from xla_flags import make_xla_flags

from jaxgpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    override,
)
from jaxgpt.data import Batch, EncoderInputs
from jaxgpt.model import abstract_params, build
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.sharding import make_batch_sharding, make_mesh
from jaxgpt.trainer.checkpoint import Checkpoints
from jaxgpt.trainer.state import abstract_state, make_state
from jaxgpt.trainer.step import make_train_step

MODEL = ModelConfig(vocab=260, context=16, width=32, layers=2, heads=4, kv_heads=2, ffn=48)
WORDS = ("the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "hill", "red", "big")
B, T, V = 16, MODEL.context, MODEL.vocab


def write_text(folder, documents=12, words=90):
    """Write text files of common words, the same every time."""
    dice = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(dice.choices(WORDS, k=words)) + ".\n"
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def config(*assignments: str, **sections) -> Config:
    """Return a tiny experiment without paths; see `run_config`."""
    defaults = dict(
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-2, warmup=2),
        train=TrainConfig(steps=12, batch=B),
    )
    return override(Config(**{**defaults, **sections}), assignments)


def run_config(folder, *assignments: str) -> Config:
    """Return a tiny run inside `folder`."""
    text = folder / "text"
    if not text.exists():
        write_text(text)
    data = DataConfig(source=str(text), tokenizer="bytes", cache=str(folder / "tokens"))
    sample = SampleConfig(prompt="the ", tokens=4)
    cfg = config(f"folder={folder / 'runs'}", "train.sample_every=0", data=data, sample=sample)
    return override(cfg, assignments)


def fill(state, seed=0):
    """Return a state with a random number in every place of every float and code."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def random(x, key):
        if x.dtype.itemsize == 1:
            return jax.device_put(jax.random.randint(key, x.shape, 0, 127, x.dtype), x.sharding)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jax.device_put(jax.random.normal(key, x.shape), x.sharding)

    return jax.tree.unflatten(tree, [random(x, k) for x, k in zip(leaves, keys, strict=True)])


def random_batch(seed=0, weighted_fraction=0.7) -> Batch:
    """Return [B T] random tokens in rows of two documents; a fraction of the targets counts."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, V, (2, B, T), dtype=np.int32)
    second = np.arange(T) >= T // 2
    return Batch(
        tokens=tokens,
        targets=targets,
        positions=np.broadcast_to(np.arange(T) - second * (T // 2), (B, T)).astype(np.int32),
        segment_ids=np.broadcast_to(1 + second, (B, T)).astype(np.int32),
        weights=(rng.random((B, T)) < weighted_fraction).astype(np.float32),
    )


def make_batch_fn(objective: str):
    """Return a function number -> batch for the objective, `random_batch` where that fits."""

    def pairs(number):
        batch, source = random_batch(number), random_batch(number + 100)
        # One document per row, of a random length.
        lengths = np.random.default_rng(number).integers(2, T, (2, B, 1))
        segment_ids = (np.arange(T) < lengths).astype(np.int32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        return batch._replace(
            positions=positions,
            segment_ids=segment_ids[0],
            weights=batch.weights * segment_ids[0],
            encoder_inputs=EncoderInputs(source.tokens, positions, segment_ids[1]),
        )

    def texts(number):
        batch = pairs(number)
        rng = np.random.default_rng(number)
        return batch._replace(
            targets=rng.integers(0, 2, B).astype(np.int32),
            weights=np.ones(B, np.float32),
            encoder_inputs=None,
        )

    def prefixes(number):
        return random_batch(number)._replace(prefix=np.full((B, T), 3, np.int32))

    return {"pairs": pairs, "classify": texts, "prefix": prefixes}.get(objective, random_batch)


class Training(NamedTuple):
    """What the training loop builds from a config, without the loop."""

    mesh: jax.sharding.Mesh
    abstract: object
    optimizer: object
    step: object  # jitted: (state, batch) -> (state, metrics)
    make_state: object  # () -> a new state

    def run(self, steps, state=None, batch_of=None):
        """Return (state, losses) after a number of steps, each on its own batch."""
        state = self.make_state() if state is None else state
        losses = []
        with jax.set_mesh(self.mesh):
            for number in range(steps):
                batch = (batch_of or random_batch)(number)
                shardings = jax.tree.map(lambda x: make_batch_sharding(self.mesh, x.shape), batch)
                batch = jax.device_put(batch, shardings)
                state, metrics = self.step(state, batch)
                losses.append(float(metrics["loss"]))
        return state, losses


def make_training(cfg: Config, devices: int = 1) -> Training:
    mesh = make_mesh(cfg.mesh, devices=jax.devices()[:devices])
    _, letters = abstract_params(cfg.model)
    optimizer, schedule = build_optimizer(cfg.optimizer, cfg.train.steps, letters)
    abstract = abstract_state(cfg.model, optimizer, cfg.seed, mesh, cfg.optimizer.train)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    make_first = functools.cache(lambda: make_state(cfg.model, optimizer, cfg.seed, abstract))
    step = make_train_step(cfg, build(cfg.model), optimizer, schedule)
    return Training(
        mesh,
        abstract,
        optimizer,
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        lambda: jax.tree.map(lambda x: x.copy(), make_first()),
    )


def restore_latest(cfg: Config):
    """Restore (state, progress) of the latest checkpoint of a run."""
    files = Checkpoints(cfg.run_folder, cfg.train.keep)
    state, progress = files.restore(make_training(cfg, jax.device_count()).abstract)
    files.close()
    return state, progress


def to_numpy(tree):
    """Copy all arrays to the host, random keys as their data."""
    return jax.tree.map(
        lambda x: np.array(jax.random.key_data(x) if _is_key(x) else x, copy=True), tree
    )


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def assert_same_bits(a, b):
    """Assert that two trees are equal, bit by bit."""
    jax.tree.map_with_path(
        lambda path, x, y: np.testing.assert_array_equal(
            x, y, err_msg=jax.tree_util.keystr(path), strict=True
        ),
        to_numpy(a),
        to_numpy(b),
    )


def has_drawing(path) -> bool:
    """Return whether a PNG file has colors: axes and text are gray, curves and matrices are not."""
    colors = matplotlib.image.imread(path)[..., :3]
    return bool(np.ptp(colors, axis=-1).max() > 0.1)


def single_device_env(is_fast: bool = True) -> dict[str, str]:
    """Return the environment of a script that runs on one device.

    Its programs compile fast, as in the tests, or as a user's do.
    """
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return kept | {"XLA_FLAGS": make_xla_flags(1)} if is_fast else kept
