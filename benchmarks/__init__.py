"""Commands that measure. They run on any machine that has jax, flax, optax and orbax."""

import importlib.util
import sys
from unittest import mock

if importlib.util.find_spec("chex") is None:
    # The library only asks it to check shapes while tracing: where it is missing, nothing checks.
    sys.modules["chex"] = mock.MagicMock(unsafe=True)  # else it has no attribute assert...
