"""What every test shares. Tests run on the CPU, as eight devices, wherever they run."""

import os
import signal
from importlib.metadata import version

# Before jax is imported, for it reads these once. Tests compile much and compute little, so machine
# code is not optimised: that takes a quarter of the time. Scripts that tests start are as users'.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later ones do not know it, and would end
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# A shell that starts this in the background has Ctrl-C ignored; tests of Ctrl-C want it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def compilations():
    """compilations(f, g): how many programs have been compiled for these jitted functions."""
    return lambda *jitted: sum(f._cache_size() for f in jitted)
