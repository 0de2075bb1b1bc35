"""Memory allocation of training steps on a CPU."""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from jaxgpt.config import Config
from jaxgpt.saved_arrays import is_out_of_memory
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.checkpoint import RunError, describe_last_step
from jaxgpt.trainer.estimate import format_advice

# Options of mallopt(3), with their values
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_MAX, NO_BLOCKS = -4, 0


def retain_freed_memory():
    """Make the process retain the memory that a training step on one CPU frees, for the next step.

    XLA allocates temporary memory anew for each step, and glibc returns large blocks to the
    system as soon as they are freed. The system then zeroes every page again: 105,000 pages per
    step of gpt_mini, 4% of its time. glibc can retain large blocks only in the heap of the main
    thread, so computations are dispatched synchronously, which runs them there.

    It changes the whole process, so it is for commands to call, not for a library; and before any
    device is used, because dispatch cannot be changed later. It does nothing with another C
    library, and has no effect on other devices, or several.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, NO_BLOCKS)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


@contextmanager
def describe_memory_errors(cfg: Config, abstract: Any) -> Iterator[None]:
    """Refuse a state that does not fit, before or when it is made, with what would fit.

    Args:
        abstract: the `TrainState` to be made, as shapes and shardings.

    Raises:
        ConfigError: it does not fit.
    """
    leaves = list(jax.tree.leaves((abstract.params, abstract.opt_state, abstract.base)))
    needed = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    device = jax.local_devices()[0]
    memory = read_memory_bytes(device)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves((abstract.params, abstract.base)))
    copies = jax.local_device_count() if device.platform == "cpu" else 1
    message = (
        f"parameters and optimizer state of {parameters:,} parameters need {needed / 1e9:,.1f} GB "
        f"on each device, and {device.device_kind} has {memory / 1e9:,.1f} GB. Without "
        f"activations, about {int(parameters * memory / max(needed * copies, 1)):,} parameters "
        f"would fit: lower model.width={cfg.model.width} or model.layers={cfg.model.layers}, set "
        "optimizer.moments=int8, or divide the state over more devices by mesh.fsdp."
    )
    if memory and needed * copies > memory:
        raise ConfigError(message)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(message) from error


@contextmanager
def describe_step_memory_errors(cfg: Config, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Turn running out of memory in a training step into an error that says what would fit.

    Raises:
        RunError: in place of the original error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = mesh.devices.flat[0]
        advice = format_advice(cfg, mesh.size, device.platform)
        checkpoint = describe_last_step(cfg.run_folder)
        raise RunError(f"out of memory on {device.device_kind} ({checkpoint}). {advice}") from error


def read_memory_bytes(device: jax.Device) -> int:
    """Return the memory of a device, of a CPU that of the machine; 0 if it is not known."""
    if device.platform == "cpu":
        if "SC_PHYS_PAGES" not in os.sysconf_names:
            return 0
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(memory, *_read_container_limits()) if memory > 0 else 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def _read_container_limits() -> list[int]:
    """Return the memory limits of the container that this process runs in, in bytes."""
    limits = [2**63]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError), open(path) as file:
            limits.append(int(file.read()))  # "max" if there is none
    return limits
