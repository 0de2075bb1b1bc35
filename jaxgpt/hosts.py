"""Many processes, one run: how they find each other, share a batch, agree, and who writes.

`jax.distributed` is the engine; a run of one process passes through here and notices nothing.
Processes agree through the coordinator's table of keys and values, never through a computation on
devices: a process that has failed could not take part in that, and the others would wait for it.
"""

import collections
import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # the client has no public name
from jax.experimental.multihost_utils import process_allgather

from jaxgpt.settings import ConfigError
from jaxgpt.sharding import batch_sharding

Result = TypeVar("Result")
TIMEOUT = 300  # seconds to wait for another process before it counts as lost
PATIENCE = 7 * 24 * 3600 * 1000  # milliseconds: others may be busy for long; the dead are noticed
THREADS = 16  # of XLA's CPU client, at least

# --- joining ---------------------------------------------------------------------------------


def _number(environment: Mapping[str, str], *names: str) -> int:
    """The largest of these variables that are numbers; 1 if none is."""
    values = (environment.get(name, "") for name in names)
    return max((int(value) for value in values if value.isdecimal()), default=1)


def _is_tpu_pod(environment: Mapping[str, str]) -> bool:
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    is_one_of_many = any("," in environment.get(name, "") for name in names)
    return is_one_of_many or _number(environment, "MEGASCALE_NUM_SLICES") > 1


# Launcher -> whether it started this process as one of several, and what JAX calls it where JAX
# must be told. Variables of a step are read, not of a job: in a job of eight tasks, the shell that
# submits them is by itself.
CLUSTERS: dict[str, tuple[Callable[[Mapping[str, str]], bool], str | None]] = {
    "TPU pod": (_is_tpu_pod, None),
    "Slurm": (lambda e: "SLURM_PROCID" in e and _number(e, "SLURM_STEP_NUM_TASKS") > 1, "slurm"),
    "Open MPI": (
        lambda e: "OMPI_MCA_orte_hnp_uri" in e and _number(e, "OMPI_COMM_WORLD_SIZE") > 1,
        "ompi",
    ),
    "MPI": (lambda e: _number(e, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE") > 1, "mpi4py"),
    "Kubernetes": (
        lambda e: "KUBERNETES_SERVICE_HOST" in e and "JOB_COMPLETION_INDEX" in e,
        None,
    ),
}


def detect(environment: Mapping[str, str]) -> str | None:
    """The row of CLUSTERS that started this process as one of several, or None."""
    rows = (name for name, (is_here, _) in CLUSTERS.items() if is_here(environment))
    return next(rows, None)


def plan(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> dict[str, Any] | None:
    """How to join: arguments of `jax.distributed.initialize`, or None for a run of one process.

    Args:
        environment: such as os.environ.
        coordinator: "host:port" of process 0; "auto" leaves all to JAX, "none" joins nothing.
        processes: how many there are.
        process: which of them this is, from 0.

    Raises:
        ConfigError: some of the three are missing, or they do not fit together.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == 3:
        name = detect(environment)
        return {"cluster_detection_method": CLUSTERS[name][1]} if name else None
    if coordinator in ("auto", "none") and len(missing) == 2:
        return {} if coordinator == "auto" else None
    if missing or coordinator is None or processes is None or process is None:
        there = " and ".join(flag for flag in given if flag not in missing)
        raise ConfigError(f"{there} without {' and '.join(missing)}: give all three, or none.")
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
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = TIMEOUT,
) -> Iterator[None]:
    """Inside, all processes of the run know each other. Call it before anything touches a device.

    A ConfigError leaves as it came: all processes have it (see `together`). Any other error is this
    process's own, and ends it (see `guarded`); the others notice, and end as well.

    Args:
        coordinator, processes, process: see `plan`.
        timeout: seconds to wait for the others: to come, to be heard of again, and to leave.

    Raises:
        ConfigError: the flags do not fit together, or JAX can not tell who the others are.
    """
    how = plan(os.environ, coordinator, processes, process)
    if how is None:
        yield
        return
    _connect(how, timeout)
    try:
        with guarded():
            yield
    finally:
        jax.distributed.shutdown()


@contextmanager
def guarded(*shared: type[Exception]) -> Iterator[None]:
    """Ends this process at once if an error inside is its own: closing files and saying farewell,
    it would wait for the others, which can not get on without it.

    Args:
        shared: errors that all processes have at the same time, as all have a ConfigError.
    """
    try:
        yield
    except BaseException as error:
        if count() == 1 or isinstance(error, (ConfigError, *shared)):
            raise
        _abandon(error)


def _connect(how: dict[str, Any], timeout: int):
    # On CPU, each virtual device of a collective waits in a thread: with fewer threads than
    # devices, none gets on.
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, THREADS)))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow every SIGTERM from now on, also before the loop is there to hear.
    jax.config.update("jax_enable_preemption_service", False)
    clock = threading.Timer(timeout, _nobody_came, [how, timeout])
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=timeout + 60,  # it would end the process without a word
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"can not join the other processes: {error} Give --coordinator host:port, "
            "--processes and --process; or --coordinator none for a run of this process alone."
        ) from error
    finally:
        clock.cancel()


def _nobody_came(how: dict[str, Any], timeout: int):
    who = f"process {how['process_id']} of {how['num_processes']}" if "process_id" in how else "it"
    where = how.get("coordinator_address", "the address that the cluster tells")
    print(
        f"{os.path.basename(sys.argv[0])}: {who} waited {timeout} s for the others at {where}: is "
        "every process started, with the same --coordinator, and can they reach it? --timeout "
        "gives them more time.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread is inside JAX, and hears nothing


def _abandon(error: BaseException):
    traceback.print_exception(error)
    print(
        f"\n{os.path.basename(sys.argv[0])}: process {index()} of {count()} ends here. If another "
        "one was stopped, start them all again: the run goes on from its last checkpoint.",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


# --- who is who ------------------------------------------------------------------------------


def count() -> int:
    """How many processes the run has."""
    return global_state.num_processes if global_state.client else 1


def index() -> int:
    """Which of them this is, from 0."""
    return global_state.process_id if global_state.client else 0


def once(write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, but only in the first process: for what must be on disk, or told, once."""

    @functools.wraps(write)
    def first(*args, **kwargs):
        return write(*args, **kwargs) if index() == 0 else None

    return first


# --- agreeing --------------------------------------------------------------------------------

_rounds: collections.Counter[str] = collections.Counter()


def _round(name: str) -> str:
    """A new name for every use of a name; the same in all processes."""
    _rounds[name] += 1
    return f"jaxgpt/{name}/{_rounds[name]}"


def _client() -> Any:
    return global_state.client


def exchange(name: str, text: str) -> list[str]:
    """What each process has to say, in their order. All must come, or none gets on."""
    if count() == 1:
        return [text]
    place, client = _round(name), _client()
    client.key_value_set(f"{place}/{index():06}", text)
    client.wait_at_barrier(place, PATIENCE)
    return [said for _, said in sorted(client.key_value_dir_get(f"{place}/"))]


class Call:
    """One word that reaches all processes: the first that is said."""

    def __init__(self, name: str):
        self._key = _round(name)

    def say(self, word: str):
        """Does nothing if a word has been said."""
        with _already_said():
            _client().key_value_set(self._key, word)

    def wait(self) -> str:
        """The word, once it has been said."""
        return _client().blocking_key_value_get(self._key, PATIENCE)


@contextmanager
def _already_said():
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def together(work: Callable[[], Result]) -> Result:
    """The result of `work`, once it has succeeded in every process.

    Raises:
        ConfigError: it failed in another process; the message says which, and why.
    """
    try:
        result = work()
    except BaseException as error:
        known = isinstance(error, ConfigError)
        exchange("together", str(error) if known else f"{type(error).__name__}: {error}")
        raise
    for number, problem in enumerate(exchange("together", "")):
        if problem:
            raise ConfigError(f"process {number} of {count()}: {problem}")
    return result


def agree(facts: Mapping[str, Any]):
    """Refuses, in every process, to go on with facts that are not the same in all of them.

    Raises:
        ConfigError: some differ from the first process's; the message names them and the process.
    """
    if count() == 1:
        return
    mine = json.loads(json.dumps(facts))
    call = Call("agree")
    once(call.say)(json.dumps(mine))
    first = json.loads(call.wait())

    def compare():
        differ = [key for key in mine | first if mine.get(key) != first.get(key)]
        if differ:
            lines = "".join(
                f"\n  {k}: {first.get(k)!r} there, {mine.get(k)!r} here" for k in differ
            )
            raise ConfigError(f"process 0 and process {index()} do not agree:{lines}")

    together(compare)


# --- arrays ----------------------------------------------------------------------------------


@functools.cache
def rows(mesh: jax.sharding.Mesh, B: int) -> np.ndarray:
    """The rows of a batch of B that this process's devices need, int64 [R], ascending.

    Where one row lies on devices of several processes, each of them makes it.
    """
    wanted = batch_sharding(mesh, (B,)).addressable_devices_indices_map((B,))
    return np.unique(np.concatenate([np.arange(B)[place] for place in wanted.values()]))


def place(batch, mesh: jax.sharding.Mesh, B: int):
    """Puts a batch on the devices of all processes.

    Args:
        batch: tree of arrays [B ...], whole, or [R ...], this process's `rows` of them.

    Returns:
        The same tree, global arrays [B ...] divided as `batch_sharding` says.
    """

    def put(x: np.ndarray) -> jax.Array:
        have = np.arange(B) if len(x) == B else rows(mesh, B)
        shape = (B, *x.shape[1:])

        def part(where: Any) -> np.ndarray:
            first, last, _ = where[0].indices(B)
            at = np.searchsorted(have, first)
            return x[at : at + last - first][(slice(None), *where[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), part)

    return jax.tree.map(put, batch)


def fetch(tree):
    """The arrays of a tree, whole, in the memory of every process."""

    def get(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(get, tree)
