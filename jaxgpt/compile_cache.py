"""The compilation cache of commands: a program that was compiled once is read the next time."""

import os
from contextlib import suppress

import jax

MAX_BYTES = 1 << 30  # of the cache; what was not used for longest is deleted


def find_cache_folder() -> str:
    """Return the user's cache folder for compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(base), "jaxgpt")


def enable_compile_cache():
    """Keep compiled programs between runs, unless the user has chosen a folder, or none, for JAX.

    It is for commands to call, since it concerns the whole process. JAX_COMPILATION_CACHE_DIR is
    another folder; JAX_ENABLE_COMPILATION_CACHE=false switches the cache off. A folder that cannot
    be written is not used.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = find_cache_folder()
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
