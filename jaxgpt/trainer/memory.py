"""What a CPU's memory is asked to do for the next step."""

import ctypes
import platform

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
    C library it does nothing, and with another device, or several, it changes nothing for them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, NONE)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
