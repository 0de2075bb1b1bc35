"""Runs of several processes: initialization, host-side collectives, and batches on all devices.

Built on `jax.distributed`; in a run of one process every function here is trivial. The collectives
use the coordinator's key-value store, never a computation on devices: a process that has failed
could not take part in one, and its peers would hang.
"""

import collections
import contextvars
import functools
import inspect
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxgpt.roll_call import check_process_ids
from jaxgpt.settings import ConfigError
from jaxgpt.sharding import make_batch_sharding

Result = TypeVar("Result")
DEFAULT_TIMEOUT_SECONDS = 300  # after which an unreachable process counts as lost
MAX_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000  # peers may be slow; the heartbeat detects a crash
MIN_CPU_THREADS = 16  # of XLA's CPU client, at least

EndProcess = Callable[[int], object]  # of an exit status
_end_process: contextvars.ContextVar[EndProcess | None]
_end_process = contextvars.ContextVar("end_process", default=None)

# --- initialization --------------------------------------------------------------------------


def _read_size(environment: Mapping[str, str], *names: str) -> int:
    """Return the largest of these variables that are numbers, or 1 if none is."""
    values = (environment.get(name, "") for name in names)
    return max((int(value) for value in values if value.isdecimal()), default=1)


def _is_tpu_pod(environment: Mapping[str, str]) -> bool:
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    has_many_workers = any("," in environment.get(name, "") for name in names)
    return has_many_workers or _read_size(environment, "MEGASCALE_NUM_SLICES") > 1


# Launcher -> whether it started this process as one of several, and JAX's cluster detection method
# (None: JAX detects it by default). The variables are those of a job step, not of the job: in a job
# of eight tasks, the batch script itself is a single process.
CLUSTERS: dict[str, tuple[Callable[[Mapping[str, str]], bool], str | None]] = {
    "TPU pod": (_is_tpu_pod, None),
    "Slurm": (lambda e: "SLURM_PROCID" in e and _read_size(e, "SLURM_STEP_NUM_TASKS") > 1, "slurm"),
    "Open MPI": (
        lambda e: "OMPI_MCA_orte_hnp_uri" in e and _read_size(e, "OMPI_COMM_WORLD_SIZE") > 1,
        "ompi",
    ),
    "MPI": (lambda e: _read_size(e, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") > 1, "mpi4py"),
    "Kubernetes": (
        lambda e: "KUBERNETES_SERVICE_HOST" in e and "JOB_COMPLETION_INDEX" in e,
        None,
    ),
}


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Return the key in CLUSTERS that started this process as one of several, or None."""
    found = (name for name, (is_started_by, _) in CLUSTERS.items() if is_started_by(environment))
    return next(found, None)


def has_own_devices(environment: Mapping[str, str]) -> bool:
    """Return whether every GPU that this process sees is its own.

    It is if Slurm or MPI runs no other process on the node, or has bound this one to a GPU. Else
    all processes of a node see all of its GPUs, and JAX takes the one with the process's number.
    """
    nodes, tasks = (environment.get(f"SLURM_STEP_NUM_{of}") for of in ("NODES", "TASKS"))
    is_alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (tasks and tasks == nodes)
    return bool(is_alone) or "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")


def make_initialize_args(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> dict[str, Any] | None:
    """Return arguments for `jax.distributed.initialize`, or None for a run of one process.

    Args:
        environment: such as os.environ.
        coordinator: "host:port" of process 0; "auto" lets JAX detect everything, "none" forces a
            run of one process.
        processes: number of processes.
        process: index of this process, from 0.

    Raises:
        ConfigError: only some of the three are given, or they are inconsistent.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3:
        name = detect_cluster(environment)
        if name is None:
            return None
        detected: dict[str, Any] = {"cluster_detection_method": CLUSTERS[name][1]}
        if has_own_devices(environment):
            detected["local_device_ids"] = []  # all of them
        return detected
    if coordinator in ("auto", "none") and len(missing) == 2:
        return {} if coordinator == "auto" else None
    if missing or coordinator is None or processes is None or process is None:
        present = " and ".join(flag for flag in given if flag not in missing)
        raise ConfigError(f"{present} without {' and '.join(missing)}: give all three, or none.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"--coordinator {coordinator} must be host:port of process 0, such as "
            "10.0.0.1:1234; or auto, or none."
        )
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process {process} with --processes {processes}: processes are numbered from 0 to "
            f"{max(processes, 1) - 1}."
        )
    return dict(
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        cluster_detection_method="deactivate",
    )


@contextmanager
def distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = DEFAULT_TIMEOUT_SECONDS,
    end_process: EndProcess | None = None,
) -> Iterator[None]:
    """Initialize `jax.distributed` for the duration of the context, before any device is used.

    A ConfigError propagates, because all processes raise it (see `run_on_all`). Any other error is
    local: it ends this process (see `abort_on_error`), and its peers detect that and end too.

    Args:
        coordinator, processes, process: see `make_initialize_args`.
        timeout: seconds to wait for the peers to start, for their heartbeat, and for their
            shutdown.
        end_process: ends this process at once with an exit status, as `os._exit`, which a command
            passes: after a local error, or if the peers did not start. A thread that is blocked
            inside JAX cannot be ended otherwise. None (for a library call) never ends the
            process: a local error is raised, and shutting down waits `timeout` for the peers.

    Raises:
        ConfigError: the flags are inconsistent, or JAX cannot find the other processes.
    """
    init_args = make_initialize_args(os.environ, coordinator, processes, process)
    if init_args is None:
        yield
        return
    token = _end_process.set(end_process)
    try:
        _connect(init_args, timeout)
        try:
            with abort_on_error():
                yield
        finally:
            jax.distributed.shutdown()
    finally:
        _end_process.reset(token)


@contextmanager
def abort_on_error(*shared_errors: type[Exception]) -> Iterator[None]:
    """End this process on a local error; an orderly exit would deadlock with its peers.

    Closing files and shutting down synchronize with the other processes, which in turn wait for
    this one. The process is ended by `end_process` of `distributed`; without it, the error is
    raised.

    Args:
        shared_errors: errors that, like ConfigError, all processes raise at the same time.
    """
    try:
        yield
    except BaseException as error:
        end_process = _end_process.get()
        is_shared = isinstance(error, (ConfigError, *shared_errors))
        if process_count() == 1 or is_shared or end_process is None:
            raise
        _print_abort(error)
        end_process(130 if isinstance(error, KeyboardInterrupt) else 1)


def _connect(init_args: dict[str, Any], timeout: int):
    # On CPU, each virtual device of a collective blocks a thread: with fewer threads than devices,
    # the collective deadlocks.
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, MIN_CPU_THREADS)))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "coordinator_address" in init_args:
        check_process_ids(*_get_flags(init_args), timeout)
    timer = threading.Timer(timeout, _report_timeout, [init_args, timeout, _end_process.get()])
    timer.daemon = True
    timer.start()
    try:
        _initialize(init_args, timeout)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"cannot join the other processes: {error} Give --coordinator host:port, "
            "--processes and --process; or --coordinator none for a run of this process alone."
        ) from error
    finally:
        timer.cancel()


def _initialize(init_args: dict[str, Any], timeout: int):
    """Call `jax.distributed.initialize` with the limits and options that this version has."""
    limits: dict[str, Any] = dict(
        initialization_timeout=timeout + 60,  # JAX would end the process without a message
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,  # since jax 0.8
    )
    known = inspect.signature(jax.distributed.initialize).parameters
    # JAX's preemption service would swallow every SIGTERM from here on, even before the training
    # loop handles signals. Before jax 0.8, it cannot be switched off, and sets a handler.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    handler = signal.getsignal(signal.SIGTERM)
    jax.distributed.initialize(**init_args, **{k: v for k, v in limits.items() if k in known})
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _get_flags(init_args: dict[str, Any]) -> tuple[str, int, int]:
    names = ("coordinator_address", "num_processes", "process_id")
    return tuple(init_args[name] for name in names)  # type: ignore[return-value]


def _report_timeout(init_args: dict[str, Any], timeout: int, end_process: EndProcess | None):
    is_numbered = "process_id" in init_args
    name = "process {process_id} of {num_processes}".format(**init_args) if is_numbered else "it"
    where = init_args.get("coordinator_address", "the address given by the cluster")
    print(
        f"{os.path.basename(sys.argv[0])}: {name} waited {timeout} s for the others at {where}: is "
        "every process started, with the same --coordinator, and can they reach it? --timeout "
        "gives them more time.",
        file=sys.stderr,
        flush=True,
    )
    if end_process is not None:
        end_process(2)  # the main thread is blocked inside JAX, which ends the process later


def _print_abort(error: BaseException):
    traceback.print_exception(error)
    print(
        f"\n{os.path.basename(sys.argv[0])}: process {process_index()} of {process_count()} ends "
        "here. If another one was stopped, start them all again: the run resumes from its last "
        "checkpoint.",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()


# --- process indices -------------------------------------------------------------------------


def _get_global_state() -> Any:
    """Return JAX's record of the run: the client of the coordinator, and the processes' numbers.

    JAX gives its client no public name, and `jax.process_count` would initialize the devices, after
    which much can no longer be configured.
    """
    from jax._src.distributed import global_state

    return global_state


def process_count() -> int:
    """Return the number of processes of the run."""
    return _get_global_state().num_processes if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """Return the index of this process, from 0."""
    return _get_global_state().process_id if jax.distributed.is_initialized() else 0


def run_on_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function to run in process 0 only, for what must be written or printed once."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) if process_index() == 0 else None

    return wrapper


# --- host-side collectives -------------------------------------------------------------------

_use_counts: collections.Counter[str] = collections.Counter()


def make_unique_key(name: str) -> str:
    """Return a key that differs for every use of a name, and is the same in all processes."""
    _use_counts[name] += 1
    return f"jaxgpt/{name}/{_use_counts[name]}"


def get_client() -> Any:
    """Return JAX's client of the coordinator, whose key-value store all processes share."""
    return _get_global_state().client


def all_gather_text(name: str, text: str) -> list[str]:
    """All-gather a string, in the order of processes. Blocks until every process has called it."""
    if process_count() == 1:
        return [text]
    key, client = make_unique_key(name), get_client()
    client.key_value_set(f"{key}/{process_index():06}", text)
    client.wait_at_barrier(key, MAX_WAIT_MILLISECONDS)
    return [value for _, value in sorted(client.key_value_dir_get(f"{key}/"))]


class Broadcast:
    """One message to all processes: the first one that any of them sends."""

    def __init__(self, name: str):
        self._key = make_unique_key(name)

    def send(self, message: str):
        """Send a message, unless one has been sent before."""
        with _ignore_if_already_sent():
            get_client().key_value_set(self._key, message)

    def wait(self) -> str:
        """Block until a message has been sent, and return it."""
        return get_client().blocking_key_value_get(self._key, MAX_WAIT_MILLISECONDS)


@contextmanager
def _ignore_if_already_sent():
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def run_on_all(work: Callable[[], Result]) -> Result:
    """Call `work` in every process, and return its result once all of them have succeeded.

    Raises:
        ConfigError: it failed in another process; the message gives which one, and why.
    """
    try:
        result = work()
    except BaseException as error:
        is_config_error = isinstance(error, ConfigError)
        message = str(error) if is_config_error else f"{type(error).__name__}: {error}"
        all_gather_text("run_on_all", message)
        raise
    for index, message in enumerate(all_gather_text("run_on_all", "")):
        if message:
            raise ConfigError(f"process {index} of {process_count()}: {message}")
    return result


def check_equal(values: Mapping[str, Any]):
    """Check that these values are the same in all processes; raise in all of them if not.

    Raises:
        ConfigError: some differ from those of process 0; the message names them and the process.
    """
    if process_count() == 1:
        return
    local = json.loads(json.dumps(values))
    broadcast = Broadcast("check_equal")
    run_on_first(broadcast.send)(json.dumps(local))
    first = json.loads(broadcast.wait())

    def compare():
        different = [key for key in local | first if local.get(key) != first.get(key)]
        if different:
            lines = "".join(
                f"\n  {k}: {first.get(k)!r} there, {local.get(k)!r} here" for k in different
            )
            raise ConfigError(f"process 0 and process {process_index()} differ:{lines}")

    run_on_all(compare)


# --- arrays ----------------------------------------------------------------------------------


@functools.cache
def find_local_rows(mesh: jax.sharding.Mesh, B: int) -> np.ndarray:
    """Return the rows of a batch of B that this process's devices need, int64 [R], ascending.

    A row that is sharded over devices of several processes is loaded by each of them.
    """
    slices = make_batch_sharding(mesh, (B,)).addressable_devices_indices_map((B,))
    return np.unique(np.concatenate([np.arange(B)[index] for index in slices.values()]))


def place_batch(batch, mesh: jax.sharding.Mesh, B: int):
    """Put a batch on the devices of all processes.

    Args:
        batch: tree of arrays, either whole [B ...], or [R ...], the `find_local_rows` of them.

    Returns:
        The same tree of global arrays [B ...], sharded according to `make_batch_sharding`.
    """

    def put(x: np.ndarray) -> jax.Array:
        available = np.arange(B) if len(x) == B else find_local_rows(mesh, B)
        shape = (B, *x.shape[1:])

        def get_shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(B)
            first = np.searchsorted(available, start)
            return x[first : first + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape, make_batch_sharding(mesh, shape), get_shard)

    return jax.tree.map(put, batch)


def fetch(tree):
    """All-gather the arrays of a tree into the host memory of every process."""

    def get(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(get, tree)
