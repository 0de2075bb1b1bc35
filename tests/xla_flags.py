"""XLA's flags in tests, which compile much and compute little."""

from importlib.metadata import version

# Machine code is not optimized, which takes a quarter of the time. jaxlib 0.11 exits on the second
# flag, which it does not have.
FAST_COMPILATION = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""
)


def make_xla_flags(devices: int) -> str:
    """Return the value of XLA_FLAGS for the CPU as a number of devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}"
