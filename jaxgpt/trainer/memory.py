"""What a CPU's memory is asked to do for the next step."""

import ctypes
import sys

import jax

# mallopt(3)
TRIM_THRESHOLD, NEVER = -1, -1
MMAP_MAX, NONE = -4, 0


def keep_freed():
    """What a training step on one CPU frees stays with the process, for the next step.

    XLA allocates a step's temporary memory for each step, and glibc returns large blocks to the
    system as soon as they are free. The system then clears every page once more: 105,000 of them
    for a step of gpt_mini, 4% of its time. glibc can keep large blocks only in the heap of the main
    thread, so that is where computations are made to run.

    Call it before anything touches a device: later, computations stay where they run. With another
    device, with several, or with another C library it has no effect.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu" or jax.device_count() > 1 or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(MMAP_MAX, NONE)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
