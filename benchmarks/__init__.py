"""Commands that measure. They run on any machine that has jax, flax, optax and orbax."""

import importlib.util
import sys
from unittest import mock

if importlib.util.find_spec("chex") is None:
    # The library only asks it to check shapes while tracing: on a machine that is lent for an hour
    # and lacks it, nothing is checked.
    sys.modules["chex"] = mock.MagicMock(unsafe=True)  # else it has no attribute assert...
