"""Benchmark commands. They run on any machine that has jax, flax, optax and orbax."""

import importlib.util
import sys
from unittest import mock

if importlib.util.find_spec("chex") is None:
    # The library uses it only to check shapes while tracing; without it, these checks are skipped.
    sys.modules["chex"] = mock.MagicMock(unsafe=True)  # allows attributes named assert_*
