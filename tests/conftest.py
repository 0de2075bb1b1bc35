"""What every test shares. Tests run on the CPU, as eight devices, wherever they run."""

import os
import signal

# Before jax is imported, for it reads these once.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
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
