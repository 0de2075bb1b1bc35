"""Common setup of the tests. They run on the CPU as eight devices, on every machine."""

import gc
import os
import signal
import tempfile

from xla_flags import make_xla_flags

# Before jax is imported, which reads these once.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {make_xla_flags(8)}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# A shell that starts this in the background ignores SIGINT; tests of Ctrl-C need the handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module")
def compiled_once(compiled_folder):
    """Compile each program once, for files that train one model again and again.

    Return the folder. It is not for all files: where programs differ, writing them takes time.
    """
    settings = {
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or compiled_folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield settings["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """Free the programs that the tests of a file have compiled.

    Each has memory maps of its own. Linux allows a process 65,530 of them; beyond that, the
    compiler dies by a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def without_plugins_of_other_files():
    """Remove the rows that the plugins of a file's tests have added to registries."""
    from helpers import forget_plugins

    yield
    forget_plugins()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def count_compilations():
    """Return a function that counts the compiled programs of jitted functions."""

    def count(f):  # some are wrapped by checks on the host
        return (f if hasattr(f, "_cache_size") else f.__wrapped__)._cache_size()

    return lambda *jitted: sum(map(count, jitted))


def pytest_addoption(parser):
    parser.addoption(
        "--plugins",
        dest="jaxgpt_plugins",
        help="modules or .py files whose rows join the tests that run over every row of a registry",
    )


def pytest_configure(config):
    if names := config.getoption("jaxgpt_plugins", None):
        from jaxgpt.config import list_tables
        from jaxgpt.plugins import import_plugins

        import_plugins(names.split(","), list_tables())
