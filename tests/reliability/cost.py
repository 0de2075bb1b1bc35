"""What checksums cost: their part of a save, and of a load."""

import pathlib
import statistics
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.checksums import read_arrays, sum_arrays
from jaxgpt.saved_arrays import read_progress
from jaxgpt.trainer.checkpoint import Checkpoints, Progress
from jaxgpt.trainer.state import TrainState

from . import Outcome


def measure(folder: pathlib.Path, megabytes: int = 300, times: int = 5) -> Outcome:
    """Save and read a state of some size, with and without its checksums."""
    rng = np.random.default_rng(0)
    count = max(megabytes * 10**6 // (3 * 4 << 20), 1)
    params = {
        f"w{i}": jnp.asarray(rng.normal(size=(1024, 1024)), jnp.float32) for i in range(count)
    }
    moments = {"m": jax.tree.map(lambda x: x * 0.1, params), "v": jax.tree.map(jnp.square, params)}
    state = TrainState(jnp.int32(0), params, moments, jax.random.key(0))
    size = 3 * sum(x.nbytes for x in params.values())
    sums, saves, processor = [], [], []
    with closing(Checkpoints(str(folder), keep=1)) as saver:
        for step in range(1, times + 1):
            begin, spent = time.perf_counter(), time.process_time()
            saver.save(state, Progress(step=step))
            saver.wait()
            saves.append(time.perf_counter() - begin)
            processor.append(time.process_time() - spent)
            spent = time.process_time()
            sum_arrays(params=params, rest=moments)
            sums.append(time.process_time() - spent)
    path = str(folder / "checkpoints" / str(times))
    records = read_progress(path)[1]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    reads = {None: [], "checked": []}
    for _ in range(times):
        for kind, found in reads.items():
            spent = time.process_time()
            jax.block_until_ready(read_arrays(path, "params", abstract, kind and records))
            found.append(time.process_time() - spent)
    middle = statistics.median
    return Outcome(
        "cost of checksums", times, [],
        {
            "MB": round(size / 1e6),
            "GB/s": round(size / middle(sums) / 1e9, 1),
            "share of the processor time of a save": f"{middle(sums) / middle(processor):.1%}",
            "share of the time of a save": f"{middle(sums) / middle(saves):.1%}",
            "share of a read": f"{max(1 - middle(reads[None]) / middle(reads['checked']), 0):.1%}",
        },
    )  # fmt: skip
