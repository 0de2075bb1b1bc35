"""Memory freed by a step, counted in pages that the system had to zero again."""

import platform
import subprocess
import sys

import pytest

from jaxgpt import config as configs
from tests.tiny_runs import run_config, single_device_env

# Prints the MiB of pages that were newly mapped per run of a computation that needs 64 MiB.
CODE = """
import resource, sys
import jax, jax.numpy as jnp
from jaxgpt import config, trainer

if len(sys.argv) > 1:
    trainer.train(config.from_json(open(sys.argv[1]).read()), is_quiet=True)
wide = jax.jit(lambda x, y: jnp.tanh(x @ y) @ x)
x = jnp.ones((4096, 8))
y = jax.block_until_ready(x.T)  # a computation that waits for its inputs runs in another thread
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    jax.block_until_ready(wide(x, y))
before = pages()
for _ in range(10):
    jax.block_until_ready(wide(x, y))
print((pages() - before) / 10 * resource.getpagesize() / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_after_training_on_one_cpu_memory_is_zeroed_once(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(configs.to_json(run_config(tmp_path, "train.steps=2")))

    def measure_zeroed_mib(*arguments: str) -> float:
        command = [sys.executable, "-c", CODE, *arguments]
        done = subprocess.run(
            command, env=single_device_env(), capture_output=True, text=True, check=True
        )
        return float(done.stdout.split()[-1])

    assert measure_zeroed_mib() > 60
    assert measure_zeroed_mib(str(config)) < 1
