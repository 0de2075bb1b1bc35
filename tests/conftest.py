"""What every test shares. Tests run on the CPU, as eight devices, wherever they run."""

import os
import signal
from importlib.metadata import version

# Before jax is imported, for it reads these once. Tests compile much and compute little, so machine
# code is not optimised: that takes a quarter of the time. Scripts that tests start are as users'.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
    # jaxlib 0.11 does not know this one, and would end.
    f"{' --xla_cpu_use_fusion_emitters=false' if version('jaxlib') < '0.11' else ''}"
).strip()
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
