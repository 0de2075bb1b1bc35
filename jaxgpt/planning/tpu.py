"""Plan for TPUs without a TPU: the compiler in libtpu runs on any Linux machine.

It prints its log on every run that finds it, so it is best installed in an environment of its own,
and always runs in a process of its own: `plan_in_process` starts worker.py with the interpreter
of `JAXGPT_TPU_PYTHON`, or with this one if libtpu is installed beside jaxgpt.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jaxgpt
from jaxgpt.settings import ConfigError

PYTHON_VARIABLE = "JAXGPT_TPU_PYTHON"
INSTALL = (
    "python3 -m venv ~/tpu-plan && ~/tpu-plan/bin/pip install 'jaxgpt[tpu-plan]' && "
    f"export {PYTHON_VARIABLE}=~/tpu-plan/bin/python"
)

# Set before jax is imported: there is no TPU to search for, and no cloud metadata to query.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip of this machine is used
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
RESULT = "jaxgpt-plan-result:"  # before the line of standard output that holds the result


def find_python() -> str:
    """Return the interpreter that has the TPU compiler.

    Raises:
        ConfigError: none has; the message says how to install it.
    """
    python = os.environ.get(PYTHON_VARIABLE, "")
    if python:
        path = os.path.expanduser(python)
        if not os.path.isfile(path):
            raise ConfigError(f"{PYTHON_VARIABLE}={python} is no interpreter: {INSTALL}")
        return path
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "planning for TPUs needs their compiler, the package libtpu, best in an environment of "
            f"its own since it prints its log on CPU runs:\n  {INSTALL}"
        )
    return sys.executable


def is_available() -> bool:
    """Return whether an interpreter with the TPU compiler is known."""
    try:
        find_python()
    except ConfigError:
        return False
    return True


def plan_in_process(request: dict[str, Any]) -> dict[str, Any]:
    """Run `plan.answer` on a request in a process that has the TPU compiler.

    Args:
        request: arguments of `plan.answer`, as JSON.

    Raises:
        ConfigError: the compiler is missing, or refuses the config; with its message.
    """
    python = find_python()
    environment = os.environ | ENVIRONMENT
    root = os.path.dirname(os.path.dirname(os.path.abspath(jaxgpt.__file__)))
    if os.path.basename(root) not in ("site-packages", "dist-packages"):  # a checkout
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [python, "-m", "jaxgpt.planning.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        if "No module named 'libtpu'" in done.stderr or "No module named 'jax" in done.stderr:
            raise ConfigError(f"{python} has no jaxgpt with the TPU compiler: {INSTALL}")
        end = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise ConfigError(f"the TPU compiler ended with exit status {done.returncode}:\n{end}")
    result = json.loads(found[-1].removeprefix(RESULT))
    if "error" in result:
        raise ConfigError(result["error"])
    return result


def get_devices(topology: str) -> list:
    """Return the devices of a TPU slice, which need not exist, in a process with `ENVIRONMENT`.

    Raises:
        ConfigError: the compiler is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"the TPU compiler, the package libtpu, is not installed: {INSTALL}")
    import jax
    from jax.experimental import topologies

    # Both cores of a v4 are one device, as in JAX on such a chip; otherwise they would be two.
    chip: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    # Slices smaller than a host's 2 x 2 chips are a part of it.
    for bounds in ({}, {"chips_per_host_bounds": (1, 1, 1)}):
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **chip, **bounds
            )
            return list(found.devices)
        except jax.errors.JaxRuntimeError as error:
            message = str(error).splitlines()[0]
            if "is not divisible" not in message:
                break
    raise ConfigError(f"--topology {topology}: the TPU compiler refuses it: {message}")
